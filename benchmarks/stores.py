"""What each store of tokens, or mix of stores, would have proposed and had accepted: no forward but
one reading of the answers.

    python benchmarks/stores.py models/target --answers ANSWERS.jsonl [--corpus STORE]

The answers are those of `forerun distill`: the target's own, greedy or drawn. Each is walked as the
engine would walk it: a mix proposes a tree, what agrees with the answer counts as accepted, and one
token more is the target's. Of every temperature the first half of the answers is heard only
(--cold: not even that), and the others are walked. Per mix and temperature: tokens and nodes per
step; microseconds of this thread's own time per step, for proposing, learning, and finding the
target's most probable tokens where a store wants them; and the speed over plain decoding that
follows from what a step costs by its nodes (measured, or told with --step), as it is and if the
stores took no time.

A mix is a list of names: `context`, `model`, `corpus`, and of `candidates.py` `recycling` (or
`recycling:KIND`), `counts`, `counts:said` and `weighed`. `@8` behind it limits the nodes; `!`
behind that takes away the least probability that is worth a node. --always asks every store at
every step instead of when the hierarchy's patience says so. What a store learns from rejected nodes
is only known with --exact, which reads every tree with the target.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from candidates import RANKS, Counts, Law, Recycling, RecyclingView, Weighed
from rich.console import Console
from rich.table import Table as Printed

import forerun
from forerun.accept.exact import Verdict
from forerun.cost import Cost, Table
from forerun.drafters.hierarchy import Hierarchy, Patience
from forerun.drafting.drafter import Context
from forerun.engine.engine import Engine
from forerun.model import Model, Scores
from forerun.plan.measure import Transcript, target_cost
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores.context import ContextStore
from forerun.stores.corpus import Corpus, CorpusStore
from forerun.stores.model import ModelStore
from forerun.stores.store import Draft, Limits, Store
from forerun.train.distill import Sample, read
from forerun.tree import TokenTree

STANDARD = (
    "context",
    "context,recycling",
    "context,model",
    "context,model,recycling",
    "context,corpus",
    "context,corpus,recycling",
    "recycling",
    "recycling@4!",
    "recycling@8!",
    "recycling@16!",
    "counts",
    "weighed",
    "counts:said",
)
CPU = torch.device("cpu")
CHUNK = 64


@dataclass(frozen=True)
class Answer:
    """laws: the target's most probable tokens instead of each token of the answer."""

    sample: Sample
    laws: list[Law]

    def row(self) -> Row:
        prompt = list(self.sample.prompt)
        return Row(prompt, len(prompt), SamplingParams(), key=0, limit=self.sample.size)


@dataclass
class Walked:
    """Sums over steps."""

    mix: str
    temperature: float
    steps: int = 0
    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0
    forwards: float = 0.0

    def add(self, came: int, read: int, seconds: float, cost: Cost) -> None:
        """One step: tokens that came, tokens that the target read, and the stores' own time."""
        self.steps += 1
        self.tokens += came
        self.nodes += read - 1
        self.seconds += seconds
        self.forwards += cost(read)

    def as_dict(self, plain: float) -> dict[str, Any]:
        steps = max(1, self.steps)
        figures = {"tokens_per_step": self.tokens / steps, "nodes_per_step": self.nodes / steps}
        figures |= {"us_per_step": 1e6 * self.seconds / steps}
        return asdict(self) | figures | {"speed": self.speed(plain), "bound": self.bound(plain)}

    def speed(self, plain: float) -> float:
        """Over plain decoding."""
        return self.tokens * plain / max(1e-9, self.forwards + self.seconds)

    def bound(self, plain: float) -> float:
        """Over plain decoding, if the stores took no time."""
        return self.tokens * plain / max(1e-9, self.forwards)


class Eager(Patience):
    """Asks at every step."""

    def asks(self) -> bool:
        return True


class Watched(Hierarchy):
    """A hierarchy whose stores may want the target's laws. always: its stores are asked at every step."""

    def __init__(self, stores: Sequence[Store], limits: Limits, always: bool = False):
        super().__init__(stores, limits)
        self._always = always

    def admit(self, row: Row, hidden: Mapping[int, torch.Tensor]) -> None:
        super().admit(row, hidden)
        if self._always:
            self._seats[-1].patience = [Eager() for _ in self.stores]

    def scored(self, row: Row, draft: Draft, laws: Sequence[Law | None], came: Sequence[int | None]) -> None:
        before = row.tokens[-2] if len(row.tokens) > 1 else -1
        for view in self._seats[0].views:
            if isinstance(view, RecyclingView):
                view.scored(before, draft, laws, came)

    @property
    def wants_laws(self) -> bool:
        return any(isinstance(store, Recycling) for store in self.stores)

    def hear(self, answer: Answer) -> None:
        """A whole answer at once."""
        row, said = answer.row(), answer.sample.answer
        self.admit(row, {})
        for token, law in zip(said, answer.laws, strict=True):
            if self.wants_laws:
                self.scored(row, Draft([row.tokens[-1]], [-1], [1.0]), [law], [token])
            row.tokens.append(token)
        self.release(0)


def mix_of(name: str, corpus: Corpus | None, limits: Limits, always: bool) -> Watched:
    stores, _, most = name.partition("@")
    cost = 1e-9 if most.endswith("!") else limits.cost
    nodes = int(most.rstrip("!")) if most else limits.nodes
    made = [_store(one, corpus) for one in stores.split(",")]
    return Watched(made, Limits(nodes, limits.depth, limits.min_match, cost, limits.ends), always)


def _store(name: str, corpus: Corpus | None) -> Store:
    name, _, option = name.partition(":")
    if name == "corpus":
        if corpus is None:
            raise typer.BadParameter("a corpus needs --corpus")
        return CorpusStore(corpus)
    if name == "recycling":
        return Recycling(option or "token")  # type: ignore[arg-type]
    makes = {"context": ContextStore, "model": lambda: ModelStore(2**20), "weighed": Weighed}
    if name == "counts":
        return Counts(said=option == "said")
    if name not in makes:
        raise typer.BadParameter(f"there is no store {name!r}")
    return makes[name]()  # type: ignore[no-any-return, operator]


# ---- the target


@torch.inference_mode()
def answer_of(model: Model, sample: Sample) -> Answer:
    """Reads an answer."""
    full, laws = [*sample.prompt, *sample.answer], list[Law]()
    row = Row(full[: len(sample.prompt)], len(sample.prompt), SamplingParams(), 0, len(full))
    slot = model.admit(len(full))
    while len(row.tokens) < len(full):
        begin = len(row.tokens) - 1
        tree = TokenTree.chain([full[begin : begin + CHUNK]], model.device)
        size = min(tree.nodes, len(full) - 1 - begin)
        laws += laws_of(model.score(tree, [row]).logits_BNV[0, :size])
        model.keep([range(size)])
        row.tokens += full[begin + 1 : begin + 1 + size]
    model.release(slot)
    return Answer(sample, laws)


def laws_of(logits_NV: torch.Tensor) -> list[Law]:
    logits_NV = logits_NV.float()
    top = logits_NV.topk(RANKS)
    chances = (top.values - logits_NV.logsumexp(-1, keepdim=True)).exp()
    return [list(zip(*law, strict=True)) for law in zip(top.indices.tolist(), chances.tolist(), strict=True)]


def price_of_laws(vocabulary: int, nodes: int) -> Cost:
    """Seconds to find the most probable tokens after so many nodes."""
    points = []
    for count in sorted({1, 2, 5, 9, 17, nodes + 1}):
        logits_NV, seconds = torch.randn(count, vocabulary), list[float]()
        for _ in range(200):
            begun = time.perf_counter()
            logits_NV.topk(RANKS).indices.tolist()
            seconds.append(time.perf_counter() - begun)
        points.append((count, median(seconds)))
    return Table(tuple(points))


def told_cost(told: str) -> Cost:
    """PLAIN,NODE,FURTHER in milliseconds: a step, each of the first eight nodes, and each of the others."""
    plain, node, further = (float(part) / 1e3 for part in told.split(","))
    return lambda tokens: plain + node * min(tokens - 1, 8) + further * max(0, tokens - 9)


# ---- walking


def walk(mix: Watched, answer: Answer, into: Walked, cost: Cost, laws: Cost, model: Model | None) -> None:
    """Step by step through an answer. model: reads every tree, so that rejected nodes teach as well."""
    row, said = answer.row(), answer.sample.answer
    mix.admit(row, {})
    slot = model.admit(row.limit) if model else 0
    while row.remaining:
        at = len(row.tokens) - row.prompt_length
        context, begun = Context([row], [mix.max_nodes], [row.remaining - 1], CPU), time.thread_time()
        tree = mix.propose(context)
        proposed = time.thread_time() - begun
        draft = Draft(list(tree.tokens[0]), list(tree.topology.parents[0]), [])
        path = accepted(draft, said[at:])
        came = said[at : at + len(path)]
        known = _laws(model, tree, row, path, answer.laws[at:]) if mix.wants_laws else []
        begun = time.thread_time()
        mix.observe(context, tree, Verdict([path], [came[-1]], [False]), Scores(torch.empty(0)))
        if mix.wants_laws:
            after = dict(zip(path, came, strict=True))
            mix.scored(row, draft, known, [after.get(node) for node in range(len(draft.tokens))])
        learned = time.thread_time() - begun + (laws(len(draft.tokens)) if mix.wants_laws else 0.0)
        into.add(len(came), len(draft.tokens), proposed + learned, cost)
        row.tokens += came
    mix.release(0)
    if model:
        model.release(slot)


@torch.inference_mode()
def _laws(
    model: Model | None, tree: TokenTree, row: Row, path: Sequence[int], ahead: Sequence[Law]
) -> Sequence[Law | None]:
    """After every node of a tree."""
    if model is None:
        known = dict(zip(path, ahead, strict=False))
        return [known.get(node) for node in range(len(tree.tokens[0]))]
    found = laws_of(model.score(tree, [row]).logits_BNV[0])
    model.keep([path])
    return found


def accepted(draft: Draft, ahead: Sequence[int]) -> list[int]:
    """The nodes that agree with what was said, node 0 first, as long as another token is left to be
    the target's own."""
    children = {pair: node for node, pair in enumerate(zip(draft.parents, draft.tokens, strict=True))}
    path = [0]
    for token in ahead[:-1]:
        node = children.get((path[-1], token))
        if node is None:
            break
        path.append(node)
    return path


def walked(
    name: str, mix: Watched, answers: Iterable[Answer], heard: int, cost: Cost, laws: Cost, model: Model | None
) -> Walked:
    """All answers of one temperature, the first of them heard only."""
    listed = list(answers)
    into = Walked(name, listed[0].sample.temperature)
    for answer in listed[:heard]:
        mix.hear(answer)
    for answer in listed[heard:]:
        walk(mix, answer, into, cost, laws, model)
    return into


def show(found: Sequence[Walked], plain: float) -> Printed:
    table = Printed(title=f"a plain step: {1e3 * plain:.2f} ms")
    for heading in (
        "mix",
        "temperature",
        "steps",
        "tokens/step",
        "nodes/step",
        "us/step",
        "speed over plain",
        "stores free",
    ):
        table.add_column(heading, justify="right")
    for one in found:
        values = one.as_dict(plain)
        digits = {
            "temperature": "g",
            "steps": ",",
            "tokens_per_step": ".3f",
            "nodes_per_step": ".2f",
            "us_per_step": ".0f",
        }
        digits |= {"speed": ".3f", "bound": ".3f"}
        table.add_row(one.mix, *(f"{values[key]:{form}}" for key, form in digits.items()))
    return table


def by_temperature(answers: Iterable[Answer]) -> Mapping[float, list[Answer]]:
    groups: dict[float, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.sample.temperature, []).append(answer)
    return dict(sorted(groups.items()))


def measured_cost(engine: Engine, sample: Sample) -> Cost:
    tokens = (*sample.prompt, *sample.answer)
    text = Transcript(tokens, len(sample.prompt), len(tokens))
    return target_cost(engine, text, SamplingParams(temperature=sample.temperature))


def main(
    target: Path,
    answers: Annotated[Path, typer.Option(help="of forerun distill")],
    corpus: Annotated[Path | None, typer.Option(help="of forerun index")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="stores, as said above; may be repeated")] = None,
    nodes: int = 16,
    depth: int = 16,
    cost: Annotated[float, typer.Option(help="the least probability that is worth a node")] = 0.08,
    step: Annotated[str | None, typer.Option(help="PLAIN,NODE,FURTHER: milliseconds of a step and its nodes")] = None,
    most: Annotated[int | None, typer.Option(help="answers of each temperature")] = None,
    cold: Annotated[bool, typer.Option(help="hear nothing before, and walk the same answers")] = False,
    always: Annotated[bool, typer.Option(help="ask every store at every step")] = False,
    exact: Annotated[bool, typer.Option(help="let the target read every tree")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Walk the answers with every mix."""
    engine = forerun.load(target)
    samples = read(answers).samples
    price = told_cost(step) if step else measured_cost(engine, samples[0])
    model = Model(engine.target.network, max(CHUNK, nodes + 1))
    groups = by_temperature(answer_of(model, sample) for sample in samples)
    library = Corpus.open(corpus) if corpus else None
    if library:
        library.demand_fit(engine.target.vocab_size)
    names = mix or [name for name in STANDARD if library or "corpus" not in name]
    limits = Limits(nodes, depth, 1, cost)
    laws, found = price_of_laws(engine.target.vocab_size, nodes), list[Walked]()
    for temperature, group in groups.items():
        half = len(group) // 2
        chosen = group[: half + (most or len(group))]
        for name in names:
            made = mix_of(name, library, limits, always)
            reader = model if exact and made.wants_laws else None
            one = walked(name, made, chosen[half:] if cold else chosen, 0 if cold else half, price, laws, reader)
            found.append(one)
            print(f"{temperature:g} {name}: {one.speed(price(1)):.3f}", flush=True)
    Console().print(show(found, price(1)))
    if json_file:
        setting = {
            "nodes": nodes,
            "depth": depth,
            "cost": cost,
            "cold": cold,
            "always": always,
            "exact": exact,
            "plain": price(1),
        }
        rows = [one.as_dict(price(1)) for one in found]
        json_file.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
