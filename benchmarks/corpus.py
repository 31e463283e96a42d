"""What a store of `forerun index` foretells of a model's answers, how long a draft takes, and
(--fit) the weights of its prior.

    python benchmarks/corpus.py text.store answers.jsonl [--fit] [--answers 200] [--context 32768]

Answers are a file of `forerun distill` whose prompts were encoded with the store's tokenizer.
Prints microseconds per draft at the end of a row of --context tokens, tokens per step and nodes per
step at cost 0.08, per temperature; with --fit the `WEIGHTS` of forerun/stores/places.py.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores import places
from forerun.stores.corpus import Corpus, CorpusStore
from forerun.stores.store import Draft, Limits
from forerun.train.distill import Sample, read

LIMITS = Limits(nodes=16, depth=16, min_match=1, cost=0.08)
SITES_PER_ANSWER, DEPTH = 12, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--context", type=int, default=32768)
    wish = parser.parse_args()
    corpus, samples = Corpus.open(wish.store), read(wish.data).samples[: wish.answers]
    print(f"{corpus.size:,} tokens, {wish.store.stat().st_size / corpus.size:.2f} bytes per token")
    latency(corpus, samples, wish.context)
    progress(corpus, samples)
    if wish.fit:
        fit(corpus, samples)


def row_of(tokens: Sequence[int]) -> Row:
    return Row(list(tokens), 1, SamplingParams(temperature=0), key=0, limit=10**9)


def latency(corpus: Corpus, samples: Sequence[Sample], context: int) -> None:
    text = list(chain.from_iterable(chain(sample.prompt, sample.answer) for sample in samples))
    text = (text * (1 + (context + 3000) // len(text)))[: context + 3000]
    row, spent = text[:context], []
    view = CorpusStore(corpus).open(row_of(row))
    for token in text[context:]:
        began = time.perf_counter()
        view.draft(row, len(row), LIMITS)
        spent.append(1e6 * (time.perf_counter() - began))
        row.append(token)
    print(f"{np.mean(spent):.1f} us per draft at {context} tokens, half under {np.median(spent):.1f}", end=", ")
    print(f"99 % under {np.percentile(spent, 99):.1f}")


def accepted(draft: Draft, ahead: Sequence[int]) -> int:
    children = {pair: node for node, pair in enumerate(zip(draft.parents, draft.tokens, strict=True))}
    node = count = 0
    while count < len(ahead) and (node := children.get((node, ahead[count]), 0)):
        count += 1
    return count


def progress(corpus: Corpus, samples: Sequence[Sample]) -> None:
    store, sums = CorpusStore(corpus), defaultdict(lambda: np.zeros(4))
    for sample in samples:
        row, whole = list(sample.prompt), [*sample.prompt, *sample.answer]
        view = store.open(row_of(row))
        while len(row) < len(whole):
            draft, ahead = view.draft(row, len(row), LIMITS), whole[len(row) :]
            count = accepted(draft, ahead)
            sums[sample.temperature] += (1, count, len(draft.tokens) - 1, sum(draft.survival[1:]))
            row += ahead[: count + 1]
    for temperature, (steps, right, nodes, expected) in sorted(sums.items()):
        rates = (
            f"{1 + right / steps:.2f} tokens per step ({1 + expected / steps:.2f} expected), {nodes / steps:.2f} nodes"
        )
        print(f"temperature {temperature}: {rates}")


def children_met(corpus: Corpus, sample: Sample, luck: random.Random) -> Iterator[tuple[int, list[float], bool]]:
    """(0 for the heaviest child and 1 for others, its features, whether it came), along the text that came."""
    numbers, whole = corpus.numbers, [*sample.prompt, *sample.answer]
    growth = places._Growth(numbers, places.Trust(), LIMITS)
    for _ in range(SITES_PER_ANSWER):
        at = luck.randrange(len(sample.prompt), len(whole))
        there = places.places(numbers, whole[at - 1 :: -1][: corpus.depth], 1)
        for depth, token in enumerate(whole[at : at + DEPTH]):
            children = growth._children(depth, there)
            total = sum(own for own, _, _ in children.values())
            for rank, (said, (own, length, _)) in enumerate(sorted(children.items(), key=lambda item: -item[1][0])[:6]):
                features = [1, np.log2(length + depth), np.log2(own), np.log2(1 + total - own)]
                yield min(rank, 1), features, said == token
            there = children[token][2] if token in children else []


def fit(corpus: Corpus, samples: Sequence[Sample]) -> None:
    luck = random.Random(0)
    met = [found for sample in samples for found in children_met(corpus, sample, luck)]
    for rank in (0, 1):
        x = np.array([features for kind, features, _ in met if kind == rank])
        came = np.array([came for kind, _, came in met if kind == rank], float)

        def loss(weights: np.ndarray, x: np.ndarray = x, came: np.ndarray = came) -> float:
            return float(np.mean(np.logaddexp(0, x @ weights) - came * (x @ weights)))

        print("weights", np.round(minimize(loss, np.zeros(4)).x, 2).tolist(), f"of {len(x)} children")


if __name__ == "__main__":
    main()
