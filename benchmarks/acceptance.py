"""What joint verification of drawn tokens gains over settling them one by one: tokens per step, a count.

    python benchmarks/acceptance.py models/target models/small --json benchmarks/records/acceptance.json

The draft model samples a chain, or a tree without replacement. Both rules answer the same requests
with the same seeds. Their texts differ, and so their counts differ by luck too; therefore every tree
of the joint rule's run is also asked what either rule keeps of it in the mean. Shards are every
third prompt of the suite; tables show the median shard and the range over shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import forerun
from forerun.accept import judge
from forerun.accept.exact import Verdict, _Budgets, excess, traversal_verification
from forerun.bench.suites import load as load_suite
from forerun.bench.suites import spread
from forerun.chance import Dice
from forerun.engine import load as assembly
from forerun.tree import TokenTree

RULES = ("one by one", "jointly")
FORMS: dict[str, dict[str, Any]] = {
    "chain of 3": {"length": 3},
    "chain of 6": {"length": 6},
    "tree 2, 2, 1": {"widths": [2, 2, 1]},
    "tree 3, 2, 1, 1": {"widths": [3, 2, 1, 1]},
}


@dataclass(frozen=True)
class Count:
    """One shard under one rule."""

    form: str
    temperature: float
    rule: str
    shard: int
    tokens: int
    steps: int
    expected: float
    """Tokens per step on the trees of the joint rule's run, in the mean over the coins."""

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


def main(
    target: Path,
    small: Path,
    shards: int = 3,
    prompts: Annotated[int, typer.Option(help="prompts of every shard")] = 8,
    samples: Annotated[int, typer.Option(help="texts of every prompt")] = 1,
    tokens: int = 256,
    temperature: Annotated[list[float] | None, typer.Option(help="may be repeated")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Count the steps of both rules on every shard at every temperature."""
    plain = forerun.load(target)
    suite, counts = load_suite(), list[Count]()
    for form, settings in FORMS.items():
        description = {"drafter": "small", "checkpoint": str(small), **settings}
        engine = plain.beside(assembly.drafter_for(plain.target.network, description, tokenizer=plain.tokenizer))
        for heat in temperature or [0.6, 0.8, 1.0]:
            wishes = forerun.SamplingParams(max_new_tokens=tokens, temperature=heat, seed=0, n=samples, ignore_eos=True)
            for shard in range(shards):
                texts = [one.prompt for one in spread(suite[shard::shards])[:prompts]]
                expectations = Expectations()
                for name, rule in (("one by one", token_wise), ("jointly", expectations.verify)):
                    with patch.object(judge, "traversal_verification", rule):
                        stats = [output.stats for output in engine.generate(texts, wishes)]
                    new, steps = sum(one.new_tokens for one in stats), sum(one.steps for one in stats)
                    counts.append(Count(form, heat, name, shard, new, steps, 0.0))
                for at, kept in enumerate(expectations.means(), -2):
                    counts[at] = replace(counts[at], expected=1 + kept)
        show([one for one in counts if one.form == form])
    if json_file:
        note = {"dtype": str(plain.target.network.dtype), "prompts": prompts, "samples": samples, "new_tokens": tokens}
        json_file.write_text(json.dumps({**note, "rows": [asdict(one) for one in counts]}, indent=1) + "\n")


def show(counts: Sequence[Count]) -> None:
    shown = Table(title="tokens per step")
    for heading in ("draft", "temperature", *RULES, "gain", "gain on the same trees"):
        shown.add_column(heading, justify="right")
    for form, heat in dict.fromkeys((one.form, one.temperature) for one in counts):
        single, joint = (
            [one for one in counts if (one.form, one.temperature, one.rule) == (form, heat, rule)] for rule in RULES
        )
        pairs = list(zip(single, joint, strict=True))
        shown.add_row(
            form,
            f"{heat:g}",
            *(_range([one.tokens_per_step for one in rows], ".2f") for rows in (single, joint)),
            _range([100 * (b.tokens_per_step / a.tokens_per_step - 1) for a, b in pairs], "+.1f"),
            _range([100 * (b.expected / a.expected - 1) for a, b in pairs], "+.1f"),
        )
    Console(width=140).print(shown)


def _range(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# ---- what is expected of a tree


class Expectations:
    """Joint verification that notes how many drafted tokens each rule keeps in the mean, per row and step."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []

    def verify(self, tree: TokenTree, laws_BNV: Tensor, chance: Dice) -> Verdict:
        budgets = _Budgets(tree, laws_BNV, range(tree.rows))
        for row, keep in enumerate(budgets.keep):
            self._found.append((_one_by_one(tree, row, laws_BNV[row]), _jointly(tree, row, keep)))
        return traversal_verification(tree, laws_BNV, chance)

    def means(self) -> list[float]:
        """One by one, and jointly."""
        return [sum(values) / len(values) for values in zip(*self._found, strict=True)]


def _jointly(tree: TokenTree, row: int, keep: Sequence[float]) -> float:
    kept, left = 0.0, 1.0
    for node in tree.topology.upwards[row]:
        kept += left * keep[node] * float(tree.topology.depths_BN[row, node])
        left *= 1 - keep[node]
    return kept


def _one_by_one(tree: TokenTree, row: int, laws_NV: Tensor, node: int = 0) -> float:
    kept, left = 0.0, 1.0
    for child, ratio, _ in _tried(tree, row, laws_NV, node):
        kept += left * ratio * (1 + _one_by_one(tree, row, laws_NV, child))
        left *= 1 - ratio
    return kept


# ---- the other rule


def token_wise(tree: TokenTree, laws_BNV: Tensor, chance: Dice) -> Verdict:
    """Speculative sampling (Leviathan et al. 2023), and for siblings recursive rejection (SpecInfer, Miao et al. 2024):
    each is tried against what those before it left of the target's law."""
    paths, laws = [], []
    for row in range(tree.rows):
        path, law = _walked(tree, row, laws_BNV[row], chance.row(row))
        paths.append(path)
        laws.append(law)
    following = chance.token(torch.stack(laws)[:, None], np.array([[len(path) - 1] for path in paths]))
    bonus = [path[-1] not in tree.topology.children[row] for row, path in enumerate(paths)]
    return Verdict(paths, following[:, 0].tolist(), bonus)


def _walked(tree: TokenTree, row: int, laws_NV: Tensor, luck: Dice) -> tuple[list[int], Tensor]:
    """The path kept, and the law of the token behind it."""
    path, law, goes_on = [0], laws_NV[0], True
    while goes_on:
        goes_on, place = False, np.array([[len(path) - 1]])
        for attempt, (node, ratio, left) in enumerate(_tried(tree, row, laws_NV, path[-1])):
            if luck.coin(torch.tensor([[ratio]]), place, np.array([[attempt]])):
                path.append(node)
                law, goes_on = laws_NV[node], True
                break
            law = left
    return path, law


def _tried(tree: TokenTree, row: int, laws_NV: Tensor, parent: int) -> Iterator[tuple[int, float, Tensor]]:
    """The siblings below a node: each, how probably it is kept, and what it leaves of the law if it is not."""
    assert tree.laws_BNV is not None
    law, proposal = laws_NV[parent], tree.laws_BNV[row, parent]
    for node in tree.topology.children[row].get(parent, []):
        token = tree.tokens[row][node]
        ratio = min(1.0, float(law[token] / proposal[token]))
        rest, total = excess(law, proposal)
        law = rest / total if total > 0 else rest
        yield node, ratio, law
        proposal = proposal.index_fill(0, torch.tensor([token]), 0.0)
        proposal = proposal / proposal.sum()


if __name__ == "__main__":
    typer.run(main)
