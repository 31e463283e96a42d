"""What the planner needs to know, measured: how often models agree on the target's own text, and
what their work costs here.

Acceptance: the target writes; every model reads the same text (teacher forcing), under the same
sampling parameters. Model i accepts a token of model j with the probability sum over x of
min(p_j(x), p_i(x)), 1 minus the total variation; greedily, where both would say the same. Averages
over positions, with standard errors.

Costs: whole operations as the engine performs them, Python and sampling included, not bare
forwards. Proposals of a given length come from `Sham`; rounds of all lengths take turns, and
medians count, because the machine's speed drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.chance import key_of
from forerun.cost import Floats, Table
from forerun.drafters.small import DraftModel
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain
from forerun.drafting.stopping import Fixed
from forerun.engine.engine import Engine
from forerun.errors import RequestError
from forerun.model import Model, Scores
from forerun.nn.network import Network
from forerun.plan.hierarchy import Round
from forerun.row import Row
from forerun.sampling import SamplingParams, laws
from forerun.tree import TokenTree

LENGTHS = (1, 2, 3, 5, 9, 17)
"""Tokens of the forwards that are timed: node 0 and 0, 1, 2, 4, 8, 16 drafts."""
CHUNK = 64
"""Tokens of a text that are scored at a time."""


@dataclass(frozen=True)
class Transcript:
    """What the target said: prompt and answer."""

    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


def texts_of(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Transcript]:
    """The target's own answers. engine: any exact drafter will do."""
    outputs = engine.generate([list(prompt) for prompt in prompts], params)
    return [Transcript((*prompts[o.prompt_index], *o.token_ids), len(prompts[o.prompt_index])) for o in outputs]


# ---- acceptance


@dataclass(frozen=True)
class Agreement:
    """rates[j, i]: how often model i accepts what model j drafts, in the order of the models;
    symmetric, ones on the diagonal. errors: standard errors over `positions` tokens, as if these
    were independent."""

    rates: Floats
    errors: Floats
    positions: int


def agreement(networks: Sequence[Network], texts: Sequence[Transcript], params: SamplingParams) -> Agreement:
    """Of every pair of models, on the same texts."""
    count = len(networks)
    found: dict[tuple[int, int], list[Tensor]] = {(low, high): [] for high in range(count) for low in range(high)}
    for text in texts:
        each = [answer_laws(network, text, params) for network in networks]
        for (low, high), values in found.items():
            values.append(torch.minimum(each[low], each[high]).sum(-1))
    rates, errors = np.eye(count), np.zeros((count, count))
    for (low, high), values in found.items():
        shares = torch.cat(values).double()
        rates[low, high] = rates[high, low] = float(shares.mean())
        errors[low, high] = errors[high, low] = float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else 0.0
    return Agreement(rates, errors, sum(text.answer_length for text in texts))


@torch.inference_mode()
def answer_laws(network: Network, text: Transcript, params: SamplingParams) -> Tensor:
    """The laws [answer, V] by which a model would have drawn each token of an answer, penalties left out."""
    model = Model(network, CHUNK)
    row = Row(list(text.tokens[: text.prompt_length]), text.prompt_length, params, 0, len(text.tokens))
    model.admit(len(text.tokens))
    parts = []
    while len(row.tokens) < len(text.tokens):
        begin = len(row.tokens) - 1
        tree = TokenTree.chain([text.tokens[begin : begin + CHUNK]], network.device)
        size = min(tree.nodes, len(text.tokens) - 1 - begin)
        parts.append(laws(model.score(tree, [row]).logits_BNV[:, :size].float(), [params])[0])
        model.keep([range(size)])
        row.tokens += text.tokens[begin + 1 : begin + 1 + size]
    return torch.cat(parts)


# ---- costs


class Sham(Drafter):
    """So many tokens of no meaning, as a draft model would hand them over: what it costs to verify
    them does not depend on what they are. A row that samples gets a law with them."""

    name = "sham"

    def __init__(self, length: int, vocab_size: int):
        self.length, self.max_nodes, self._vocab = length, max(LENGTHS), vocab_size

    def propose(self, context: Context) -> TokenTree:
        sizes = [max(0, min(self.length, depth)) for depth in context.depths]
        tokens = [
            [row.tokens[-1], *((7 * place + len(row.tokens)) % self._vocab for place in range(size))]
            for row, size in zip(context.rows, sizes, strict=True)
        ]
        if not any(sizes) or all(row.params.is_greedy for row in context.rows):
            return TokenTree.chain(tokens, context.device)
        law = torch.full((len(tokens), max(sizes), self._vocab), 1 / self._vocab)
        return TokenTree.drawn_chain(tokens, law.to(context.device))


def target_cost(engine: Engine, text: Transcript, params: SamplingParams, rounds: int = 24) -> Table:
    """Seconds of a step of the engine by the number of tokens in its tree, drafting not included."""
    sham = Sham(0, engine.target.vocab_size)
    runner = engine.beside(sham, max_rows=1)
    _demand_room(engine.target.max_length, text, rounds)
    room = replace(params, max_new_tokens=rounds * len(LENGTHS) * 2, ignore_eos=True, stop=(), stop_token_ids=())
    runner.add(list(text.tokens), room, text=False)
    runner.step()

    def step(tokens: int) -> None:
        sham.length = tokens - 1
        runner.step()

    try:
        return _table(step, rounds)
    finally:
        runner.close()


def verifier_cost(
    network: Network, text: Transcript, params: SamplingParams, target: Network | None = None, rounds: int = 24
) -> Table:
    """Seconds of one round of a model in the middle of a hierarchy, by the number of tokens that it reads.

    target: reads a token before every timing, as it does when the hierarchy runs, and leaves
    nothing of the model in the processor's caches.
    """
    sham = Sham(0, network.vocab_size)
    verified = Verified(Model(network, max(LENGTHS) + 1), sham, 1)
    _demand_room(network.max_length, text, rounds)
    propose = _proposing(verified, text, params, network.device, lambda tokens: setattr(sham, "length", tokens - 1))
    return _table(propose, rounds, before=_reading(target, text))


def writer_cost(
    network: Network, text: Transcript, params: SamplingParams, target: Network | None = None, rounds: int = 24
) -> Table:
    """Seconds for which a draft model writes so many tokens, one after the other. target: as for `verifier_cost`."""
    chain = DraftModel.on(network, Chain(Fixed(max(LENGTHS))))
    _demand_room(network.max_length, text, rounds)

    def prepare(tokens: int) -> None:
        chain.form, chain.max_nodes = Chain(Fixed(tokens)), tokens

    propose = _proposing(chain, text, params, network.device, prepare)
    return _table(propose, rounds, tuple(n for n in LENGTHS if n <= 9), _reading(target, text))


def _reading(network: Network | None, text: Transcript) -> Callable[[], object]:
    """Reads the last token of a text, again and again."""
    if network is None:
        return lambda: None
    model, row = Model(network, 1), Row(list(text.tokens), text.prompt_length, SamplingParams(), 0, len(text.tokens))
    model.admit(len(text.tokens))
    return lambda: model.next_scores([row])


def reading_seconds(network: Network, text: Transcript) -> float:
    """Seconds for which a draft model reads a prompt, which happens in the first step."""
    seconds = []
    for _ in range(3):
        model = Model(network, 1)
        model.admit(len(text.tokens))
        row = Row(list(text.tokens[: text.prompt_length]), text.prompt_length, SamplingParams(), 0, len(text.tokens))
        begun = time.perf_counter()
        with torch.inference_mode():
            model.next_scores([row])
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def _demand_room(context: int, text: Transcript, rounds: int) -> None:
    """Every timing moves the text on by a token, or by as many as were accepted by chance."""
    wanted = len(text.tokens) + 2 * (rounds + 2) * len(LENGTHS) + max(LENGTHS)
    if wanted > context:
        raise RequestError(
            f"a text of {len(text.tokens)} tokens leaves no room to time {rounds} rounds in a context of {context}:"
            " give a"
            " shorter prompt, or fewer new tokens"
        )


def _proposing(
    drafter: Drafter, text: Transcript, params: SamplingParams, device: torch.device, prepare: Callable[[int], object]
) -> Callable[[int], None]:
    """One proposal after the other, behind a text that grows by one token each time, as if all of
    it had been rejected."""
    row = Row(list(text.tokens), text.prompt_length, params, key_of(0), len(text.tokens) + 4096)
    drafter.admit(row, {})

    def propose(tokens: int) -> None:
        prepare(tokens)
        context = Context([row], [max(LENGTHS) + 1], [max(LENGTHS) + 1], device)
        drafter.propose(context)
        drafter.retract([len(row.tokens)])
        row.tokens.append(text.tokens[len(row.tokens) % len(text.tokens)])
        row.step += 1

    return propose


def _table(
    work: Callable[[int], None],
    rounds: int,
    lengths: Sequence[int] = LENGTHS,
    before: Callable[[], object] = lambda: None,
) -> Table:
    """Medians of interleaved timings, `before` each of which something else is done. The first
    rounds are not counted."""
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    with torch.inference_mode():
        for number in range(rounds + 2):
            for length in lengths:
                before()
                begun = time.perf_counter()
                work(length)
                if number >= 2:
                    seconds[length].append(time.perf_counter() - begun)
    return Table(tuple((length, median(found)) for length, found in seconds.items()))


# ---- rounds that are measured as a whole


class Recorded(Drafter):
    """Another drafter, and how many tokens every verification of its proposals gave."""

    def __init__(self, inner: Drafter):
        self.inner, self.name, self.reads, self.max_nodes = inner, inner.name, inner.reads, inner.max_nodes
        self.yields: list[int] = []

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.inner.admit(row, hidden)

    def release(self, slot: int) -> None:
        self.inner.release(slot)

    def propose(self, context: Context) -> TokenTree:
        return self.inner.propose(context)

    def retract(self, lengths: Sequence[int]) -> None:
        self.inner.retract(lengths)

    def reset(self) -> None:
        self.inner.reset()

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        self.yields += [
            min(len(path), depth + 1) for path, depth in zip(verdict.kept, context.depths, strict=True) if depth > 0
        ]
        self.inner.observe(context, tree, verdict, scores)


def pmf(yields: Sequence[int]) -> Floats:
    """Of the numbers of tokens that rounds gave."""
    return np.asarray(np.bincount(yields) / len(yields), dtype=np.float64)


def measured_round(
    engine: Engine, network: Network | None, store: Drafter, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Round:
    """A round of a model over what a store proposes: its yields and its seconds, from a run with the target above it.

    network: the model in the middle; None: the target itself. A store's proposals vary too much in
    length and luck to be put into one rate.
    """
    recorded = Recorded(store)
    if network is None:
        drafter: Drafter = recorded
    else:
        drafter = verified = Verified(Model(network, store.max_nodes + 1), recorded, 4)
    runner = engine.beside(drafter, max_rows=1)
    whole = replace(params, ignore_eos=True)
    outputs = [runner.stream([list(prompt)], whole, text=False).outputs()[0] for prompt in prompts]
    if network is None:
        seconds = sum(o.stats.seconds - o.stats.prefill_seconds for o in outputs) / sum(o.stats.steps for o in outputs)
    else:
        tally = verified.tallies()[0]
        reading = sum(reading_seconds(network, Transcript(tuple(prompt), len(prompt))) for prompt in prompts)
        seconds = max(0.0, tally.seconds - reading) / max(1, tally.asked)
    return Round(pmf(recorded.yields), seconds)
