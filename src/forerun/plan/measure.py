"""What the planner needs to know, measured: how often models agree on the target's own text, and
what their work costs here.

Acceptance: the target writes; every model reads the same text (teacher forcing), under the same
sampling parameters. Model i accepts a token of model j with the probability sum over x of
min(p_j(x), p_i(x)), 1 minus the total variation; greedily, where both would say the same. Averages
over positions, with standard errors.

Costs: whole operations as the engine performs them, Python and sampling included, not bare
forwards. Proposals of a given length come from `Sham`; rounds of all lengths take turns, and
medians count, because the machine's speed drifts. Rates and costs of single models say where to
look for a hierarchy (`forerun.plan.selection`); what is found is replayed as it is (`replay`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from forerun.chance import key_of
from forerun.cost import Floats, Table
from forerun.drafters.small import DraftModel
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain
from forerun.drafting.stopping import Fixed
from forerun.engine.engine import Engine
from forerun.errors import RequestError
from forerun.model import Model
from forerun.nn.network import Network
from forerun.plan.costs import Point
from forerun.row import Row
from forerun.sampling import SamplingParams, laws
from forerun.tree import TokenTree

Of = TypeVar("Of")

LENGTHS = (1, 2, 3, 5, 9, 17)
"""Tokens of the forwards that are timed: node 0 and 0, 1, 2, 4, 8, 16 drafts."""
UNCOUNTED = 2
"""Rounds of timings that come before those that count."""
CHUNK = 64
"""Tokens of a text that are scored at a time."""


@dataclass(frozen=True)
class Transcript:
    """What the target said: prompt and answer. limit: the total length at which it had to end."""

    tokens: tuple[int, ...]
    prompt_length: int
    limit: int

    @property
    def prompt(self) -> list[int]:
        return list(self.tokens[: self.prompt_length])

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


def texts_of(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Transcript]:
    """The target's own answers. engine: any exact drafter will do. Half of the answers would be of no use: Ctrl-C is a
    KeyboardInterrupt."""
    outputs = engine.generate([list(prompt) for prompt in prompts], params)
    if len(outputs) < len(prompts) or any(output.finish_reason == "interrupted" for output in outputs):
        raise KeyboardInterrupt
    found = []
    for output in outputs:
        prompt = prompts[output.prompt_index]
        found.append(Transcript((*prompt, *output.token_ids), len(prompt), engine.limit_of(prompt, params)))
    return found


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
    """So many tokens of no meaning: what it costs to verify them does not depend on what they are."""

    name = "sham"

    def __init__(self, length: int, vocab_size: int, most: int = max(LENGTHS)):
        self.length, self.max_nodes, self._vocab = length, most, vocab_size

    def propose(self, context: Context) -> TokenTree:
        sizes = [max(0, min(self.length, depth)) for depth in context.depths]
        tokens = [
            [row.tokens[-1], *((7 * place + len(row.tokens)) % self._vocab for place in range(size))]
            for row, size in zip(context.rows, sizes, strict=True)
        ]
        return TokenTree.chain(tokens, context.device)


@dataclass(frozen=True)
class Timing:
    """How much is timed. rounds: of all lengths, at most; seconds: after which no round begins, once there are a few.
    lengths: tokens of the forwards. streak: how many of a length run one after the other, of which the second half
    counts: narrow steps that follow wide ones take longer, and an engine seldom changes from one to the other."""

    rounds: int = 24
    seconds: float = math.inf
    lengths: tuple[int, ...] = LENGTHS
    streak: int = 1


OF_STEPS = Timing(6, streak=4)
"""Of a target's steps."""
FEWEST = 5
"""Rounds that are made in any case, the first ones, which do not count, among them."""


def step_costs(
    engine: Engine, groups: Sequence[Sequence[Transcript]], params: SamplingParams, timing: Timing | None = None
) -> list[Point]:
    """Seconds of a step of the engine behind the texts of each group, side by side, by the nodes of each row's tree;
    drafting is not included. All groups and trees take turns, so what slows the machine for a while slows all alike.
    The trees are chains, no luck in them. timing: None is `OF_STEPS`. RequestError where the context has no room."""
    timing = timing or OF_STEPS
    runners = [_Runner(engine, texts, params, timing) for texts in groups]
    places = [(place, nodes) for place in range(len(runners)) for nodes in timing.lengths]

    try:
        for runner in runners:
            runner.begin()
        found = _timings(lambda place: runners[place[0]].step(place[1]), places, timing)
    finally:
        for runner in runners:
            runner.engine.close()
    return [
        Point(len(groups[place]), runners[place].context, nodes, *_middle(seconds))
        for (place, nodes), seconds in found.items()
    ]


def target_cost(engine: Engine, text: Transcript, params: SamplingParams) -> Table:
    """Seconds of a step of one row by the nodes of its tree, drafting not included."""
    return Table([(point.nodes, point.seconds) for point in step_costs(engine, [[text]], params)])


class _Runner:
    """An engine that goes on behind some texts, with trees of any size."""

    def __init__(self, engine: Engine, texts: Sequence[Transcript], params: SamplingParams, timing: Timing):
        moved = moves(timing)
        for text in texts:
            _demand_room(engine.target.max_length, text, moved)
        self._texts, self._sham = texts, Sham(0, engine.target.vocab_size, max(timing.lengths))
        self._params = replace(params, max_new_tokens=moved, ignore_eos=True, stop=(), stop_token_ids=())
        self.engine = engine.beside(self._sham, max_rows=len(texts))

    @property
    def context(self) -> int:
        return round(sum(len(text.tokens) for text in self._texts) / len(self._texts))

    def begin(self) -> None:
        for text in self._texts:
            self.engine.add(list(text.tokens), self._params, text=False)
        self.engine.step()

    def step(self, nodes: int) -> None:
        self._sham.length = nodes - 1
        self.engine.step()


def _middle(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error as that of a normal law of the same median deviation."""
    middle = median(seconds)
    deviation = 1.4826 * median(abs(one - middle) for one in seconds)
    return middle, 1.2533 * deviation / len(seconds) ** 0.5


def verifier_cost(
    network: Network, text: Transcript, params: SamplingParams, target: Network | None = None, rounds: int = 24
) -> Table:
    """Seconds of one round of a model in the middle of a hierarchy, by the number of tokens that it reads.

    target: reads a token before every timing, as it does when the hierarchy runs, and leaves
    nothing of the model in the processor's caches.
    """
    sham = Sham(0, network.vocab_size)
    verified = Verified(Model(network, max(LENGTHS) + 1), sham, 1)
    _demand_room(network.max_length, text, moves(Timing(rounds)))
    propose = _proposing(verified, text, params, network.device, lambda tokens: setattr(sham, "length", tokens - 1))
    return _table(propose, Timing(rounds), reading(target, text))


def writer_cost(
    network: Network, text: Transcript, params: SamplingParams, target: Network | None = None, rounds: int = 24
) -> Table:
    """Seconds for which a draft model writes so many tokens, one after the other. target: as for `verifier_cost`."""
    chain = DraftModel.on(network, Chain(Fixed(max(LENGTHS))))
    _demand_room(network.max_length, text, moves(Timing(rounds)))

    def prepare(tokens: int) -> None:
        chain.form, chain.max_nodes = Chain(Fixed(tokens)), tokens

    propose = _proposing(chain, text, params, network.device, prepare)
    return _table(propose, Timing(rounds, lengths=tuple(n for n in LENGTHS if n <= 9)), reading(target, text))


def reading(network: Network | None, text: Transcript) -> Callable[[], object]:
    """Reads the last token of a text, again and again: what a target leaves of other models in the processor's caches,
    which is nothing if it is large. On a GPU nobody waits for it, so there it would be timed with what comes next."""
    if network is None or network.device.type != "cpu":
        return lambda: None
    model, row = Model(network, 1), Row(list(text.tokens), text.prompt_length, SamplingParams(), 0, len(text.tokens))
    model.admit(len(text.tokens))
    return lambda: model.next_scores([row])


def moves(timing: Timing) -> int:
    """Tokens by which timings move a text on, at most."""
    return 2 * timing.streak * (timing.rounds + UNCOUNTED) * len(timing.lengths) + max(timing.lengths)


def _demand_room(context: int, text: Transcript, tokens: int) -> None:
    """Every timing moves the text on by a token, or by as many as were accepted by chance."""
    if len(text.tokens) + tokens > context:
        raise RequestError(
            f"a text of {len(text.tokens)} tokens leaves no room to time steps of {tokens} more in a context of"
            f" {context}: give shorter prompts, or fewer new tokens"
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


def _table(work: Callable[[int], None], timing: Timing, before: Callable[[], object] = lambda: None) -> Table:
    found = _timings(work, timing.lengths, timing, before)
    return Table(tuple((length, median(seconds)) for length, seconds in found.items()))


def _timings(
    work: Callable[[Of], None], kinds: Sequence[Of], timing: Timing, before: Callable[[], object] = lambda: None
) -> dict[Of, list[float]]:
    """Seconds by kind of work, of interleaved rounds, `before` each of which something else is done. The
    first rounds are not counted. Every other round goes backwards, so that what is light never follows
    what is heaviest: a processor takes many milliseconds to become fast again."""
    seconds: dict[Of, list[float]] = {kind: [] for kind in kinds}
    started = time.perf_counter()
    with torch.inference_mode():
        for number in range(timing.rounds + UNCOUNTED):
            if number >= FEWEST and time.perf_counter() - started > timing.seconds:
                break
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                for place in range(timing.streak):
                    before()
                    begun = time.perf_counter()
                    work(kind)
                    if number >= UNCOUNTED and place >= timing.streak // 2:
                        seconds[kind].append(time.perf_counter() - begun)
    return seconds
