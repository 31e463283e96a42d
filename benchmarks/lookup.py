"""What the lookup drafter costs, and what it finds: python benchmarks/lookup.py

[--json FILE] [--tokenizer FILE] [--answers FILE] [--fit]

For the native automaton (what is used where there are kernels) and the one in Python, and for texts
of 1,024 to 131,072 tokens, Python source, random tokens and random bits: microseconds per token to
read a prompt, to append one by one, and to study one by one (append, and learn how well it was
foretold); microseconds of one lookup (longest match and tree) and of the whole proposal (study,
look up, make the tree, as the engine asks for it), where something was found and where nothing was;
bytes per token; and what a target that says the following 2,000 tokens would have accepted. Times
are wall-clock; the machine should be idle.

--answers, a file of `forerun distill`, measures a model store of 2**20 tokens instead, which hears
the answers one after the other: microseconds of one draft, milliseconds to take up an answer, and
when it is full to read anew what is left; and what the answers in the second half of the file would
have gained.

--fit prints the logistic regression behind `forerun.stores.growth.prior`, fitted to source code; with --answers, that
of the model store, fitted to the second half of the answers when the first is known.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import quantiles

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from forerun.drafters.lookup import Lookup
from forerun.drafting.drafter import Context
from forerun.native import library
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores.automaton import ROOT, SEPARATOR, SuffixAutomaton
from forerun.stores.context import ContextView
from forerun.stores.follower import Automaton, automaton_of
from forerun.stores.growth import RANKS
from forerun.stores.model import ModelStore
from forerun.stores.store import Limits
from forerun.tree import TokenTree

LENGTHS = (1024, 8192, 32_768, 131_072)
FOLLOWING = 2000
"""Tokens that are decoded behind each text."""
VOCABULARY = 4096
"""Of the random text."""
DEVICE = torch.device("cpu")
LIMITS = Limits(nodes=16, depth=16, min_match=1, cost=0.05)

STORED = 2**20
"""Tokens in the model store."""

IdsOf = Callable[[str], Sequence[int]]
Make = Callable[[], Automaton]


@dataclass(frozen=True)
class Figures:
    """One text. Times in microseconds; accepted tokens without, tokens_per_step with the target's own token."""

    automaton: str
    text: str
    tokens: int
    prompt_us_per_token: float
    append_us_per_token: float
    study_us_per_token: float
    lookup_us_p50: float
    lookup_us_p99: float
    propose_us_p50: float
    propose_us_p99: float
    nothing_us_p50: float
    nothing_us_p99: float
    bytes_per_token: float
    tokens_per_step: float
    nodes_per_step: float


def words() -> IdsOf:
    """A tokenizer that needs no file: a number for every new word, sign or run of blanks."""
    known: dict[str, int] = {}
    return lambda text: [known.setdefault(word, len(known)) for word in re.findall(r"\w+|\s+|[^\w\s]", text)]


def tokenizer(file: Path | None) -> IdsOf:
    if file is None:
        return words()
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(file))
    return lambda text: encoder.encode(text, add_special_tokens=False).ids


def files(ids: IdsOf) -> Iterator[Sequence[int]]:
    """The modules of the standard library and its packages, in a fixed random order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for pattern in ("*.py", "[a-z]*/*.py") for path in root.glob(pattern))
    random.Random(0).shuffle(paths)
    for path in paths:
        if path.parent.name != "site-packages":
            yield ids(path.read_text(encoding="utf-8", errors="replace"))


def source(ids: IdsOf, count: int) -> list[int]:
    return list(islice((token for file in files(ids) for token in file), count))


def noise(count: int, kinds: int = VOCABULARY) -> list[int]:
    luck = random.Random(0)
    return [luck.randrange(kinds) for _ in range(count)]


def microseconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - begun)


def append_each(automaton: Automaton, tokens: Sequence[int]) -> None:
    for token in tokens:
        automaton.append(token)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 100:
        return float("nan"), float("nan")
    cuts = quantiles(values, n=100)
    return cuts[49], cuts[98]


def accepted(tree: TokenTree, ahead: Sequence[int]) -> int:
    """How many of the tokens ahead the tree foretells."""
    children, tokens, node = tree.topology.children[0], tree.tokens_BN[0].tolist(), 0
    for place, token in enumerate(ahead):
        node = next((child for child in children.get(node, []) if tokens[child] == token), 0)
        if node == 0:
            return place
    return len(ahead)


def read(make: Make, tokens: Sequence[int]) -> Automaton:
    automaton = make()
    automaton.extend(tokens)
    return automaton


def measure(kind: str, make: Make, name: str, text: list[int], count: int) -> Figures:
    prompt, following = text[:count], text[count : count + FOLLOWING]
    reading = min(microseconds(lambda: read(make, prompt)) for _ in range(3)) / count
    row = Row(list(prompt), count, SamplingParams(), key=0, limit=len(text))
    automaton = read(make, prompt)
    appending = microseconds(lambda: append_each(automaton, following)) / len(following)
    drafter, memory = Lookup(LIMITS, make), ContextView(make)
    drafter.admit(row, {})
    memory.read(row.tokens, count)
    context = Context([row], [LIMITS.nodes], [LIMITS.depth], DEVICE)
    studies, lookups, proposals, idle, nodes, said = [], [], [], [], 0, 0
    while said < len(following):
        studies.append(microseconds(lambda: memory.read(row.tokens, len(row.tokens))))
        lookups.append(microseconds(lambda: memory.draft(row.tokens, len(row.tokens), LIMITS)))
        begun = time.perf_counter()
        tree = drafter.propose(context)
        (proposals if tree.nodes > 1 else idle).append(1e6 * (time.perf_counter() - begun))
        step = following[said : said + 1 + accepted(tree, following[said:])]
        row.tokens += step
        said, nodes = said + len(step), nodes + tree.nodes - 1
    return Figures(
        kind,
        name,
        count,
        reading,
        appending,
        sum(studies) / said,
        *percentiles(lookups),
        *percentiles(proposals),
        *percentiles(idle),
        memory.automaton.nbytes / len(memory.automaton),
        said / len(lookups),
        nodes / len(lookups),
    )


def table(figures: Sequence[Figures]) -> Table:
    shown = Table(title="lookup: microseconds, bytes, tokens")
    for heading in ("automaton", "text", "tokens", "prompt us/token", "append", "study", "lookup us p50", "p99"):
        shown.add_column(heading, justify="right")
    for heading in ("propose us p50", "p99", "nothing us p50", "p99", "bytes/token", "tokens/step", "nodes/step"):
        shown.add_column(heading, justify="right")
    for one in figures:
        kind, name, count, *values = asdict(one).values()
        shown.add_row(kind, name, f"{count:,}", *(f"{value:.{0 if value >= 100 else 2}f}" for value in values))
    return shown


# ---- the prior


def evidence(text: Sequence[int], known: int) -> Iterator[tuple[int, int, bool, int, int]]:
    """Match length, run, branches, number of continuations, and the rank of the token that came
    (RANKS: none of them)."""
    automaton = SuffixAutomaton(text[:known])
    for token in text[known:]:
        match = automaton.match
        if match.length:
            found = automaton.continuations(match, RANKS)
            rank = found.index(token) if token in found else RANKS
            _, run, branches = automaton.outlook(match)
            yield min(match.length, 64), min(run, 8), branches, len(found), rank
        automaton.append(token)


def fitted(ids: IdsOf) -> list[list[float]]:
    """Weights of (1, log2 length, log2 run, branches) per rank, in log-odds; from 1,000 tokens of each of 200 files."""
    texts = islice((text for text in files(ids) if len(text) >= 1400), 200)
    return _fitted(row for text in texts for row in evidence(text[:1400], 400))


@dataclass(frozen=True)
class StoreFigures:
    """A model store. Closing a row takes `close_ms` for the answer alone, `full_ms` when the store is full."""

    automaton: str
    answers: int
    tokens: int
    draft_us_p50: float
    draft_us_p99: float
    close_ms_p50: float
    full_ms_p50: float
    full_ms_most: float
    times_full: int
    bytes_per_token: float
    tokens_per_step: float
    nodes_per_step: float


def measure_store(kind: str, make: Make, texts: Sequence[tuple[list[int], list[int]]]) -> StoreFigures:
    store, drafts, closes, full = ModelStore(STORED, make=make), list[float](), list[float](), list[float]()
    nodes = said = 0
    for number, (prompt, answer) in enumerate(texts):
        row = Row(list(prompt), len(prompt), SamplingParams(), key=0, limit=len(prompt) + len(answer))
        view = store.open(row)
        if 2 * number < len(texts):
            row.tokens += answer
        while row.remaining:
            begun = time.perf_counter()
            found = view.draft(row.tokens, len(row.tokens), LIMITS)
            drafts.append(1e6 * (time.perf_counter() - begun))
            ahead = answer[len(row.tokens) - len(prompt) :]
            right = accepted(TokenTree.of([found.tokens], [found.parents], DEVICE), ahead)
            if right:
                view.accepted(right)
            row.tokens += ahead[: right + 1]
            nodes, said = nodes + len(found.tokens) - 1, said + len(ahead[: right + 1])
        size, begun = len(store), time.perf_counter()
        store.close(row, view)
        (closes if len(store) >= size else full).append(1e3 * (time.perf_counter() - begun))
    return StoreFigures(
        kind,
        len(texts),
        sum(len(answer) for _, answer in texts),
        *percentiles(drafts),
        percentiles(closes)[0],
        sorted(full)[len(full) // 2] if full else float("nan"),
        max(full, default=float("nan")),
        len(full),
        store.nbytes / len(store),
        said / len(drafts),
        nodes / len(drafts),
    )


def store_table(figures: Sequence[StoreFigures]) -> Table:
    shown = Table(title=f"a model store of {STORED:,} tokens")
    for heading in [name.replace("_", " ") for name in StoreFigures.__dataclass_fields__]:
        shown.add_column(heading, justify="right")
    for one in figures:
        kind, *values = asdict(one).values()
        shown.add_row(kind, *(f"{value:,.{0 if isinstance(value, int) else 2}f}" for value in values))
    return shown


def _fitted(found: Iterable[tuple[int, int, bool, int, int]]) -> list[list[float]]:
    rows = torch.tensor(list(found))
    length, run, branches, known, came = rows.double().unbind(1)
    features = torch.stack((torch.ones_like(length), length.log2(), run.log2(), branches), 1)
    return [_regression(features[known > rank], (came == rank)[known > rank].double()) for rank in range(RANKS)]


def answers(file: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of a file that `forerun distill` wrote."""
    records = map(json.loads, file.read_text().splitlines()[1:])
    return [(record["prompt"], record["answer"]) for record in records]


def said(texts: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, int, bool, int, int]]:
    """`evidence` of answers that are foretold from earlier ones; the first half of them is only heard."""
    automaton = automaton_of()
    for number, (prompt, answer) in enumerate(texts):
        cursor = automaton.walk(ROOT, prompt[-32:])
        for token in answer if 2 * number >= len(texts) else ():
            if cursor.length and automaton.outlook(cursor).newest != SEPARATOR:
                found = automaton.continuations(cursor, RANKS)
                rank = found.index(token) if token in found else RANKS
                _, run, branches = automaton.outlook(cursor)
                yield min(cursor.length, 64), min(run, 8), branches, len(found), rank
            cursor = automaton.advance(cursor, token)
        automaton.extend([*answer, SEPARATOR])


def fitted_to_answers(file: Path) -> list[list[float]]:
    return _fitted(said(answers(file)))


def _regression(features: torch.Tensor, hits: torch.Tensor) -> list[float]:
    weights = torch.zeros(features.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ weights, hits)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [round(value, 2) for value in weights.tolist()]


def _finite(record: dict[str, object]) -> dict[str, object]:
    """JSON has no word for what did not occur."""
    return {name: None if value != value else value for name, value in record.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json for the source code; else words"
    )
    parser.add_argument("--answers", type=Path, metavar="FILE", help="measure a model store that hears these")
    parser.add_argument("--fit", action="store_true", help="print the weights of the prior instead")
    options = parser.parse_args()
    console = Console()
    if options.fit:
        weights = fitted_to_answers(options.answers) if options.answers else fitted(tokenizer(options.tokenizer))
        for rank, values in enumerate(weights):
            console.print(f"rank {rank}: {values}")
        return
    makes: dict[str, Make] = ({"native": automaton_of} if library.is_there() else {}) | {"python": SuffixAutomaton}
    console.print(f"in use: {next(iter(makes))}")
    figures: Sequence[Figures | StoreFigures]
    if options.answers:
        figures = stores = [measure_store(kind, make, answers(options.answers)) for kind, make in makes.items()]
        console.print(store_table(stores))
    else:
        figures = contexts = every_context(makes, tokenizer(options.tokenizer))
        console.print(table(contexts))
    if options.json:
        machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        limits = asdict(LIMITS) | {"ends": sorted(LIMITS.ends)}
        record = {"machine": machine, "limits": limits, "figures": [_finite(asdict(one)) for one in figures]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def every_context(makes: Mapping[str, Make], ids: IdsOf) -> list[Figures]:
    longest = LENGTHS[-1] + FOLLOWING
    texts = {"source": source(ids, longest), "random": noise(longest), "bits": noise(longest, 2)}
    return [
        measure(kind, make, name, text, count)
        for kind, make in makes.items()
        for name, text in texts.items()
        for count in LENGTHS
    ]


if __name__ == "__main__":
    main()
