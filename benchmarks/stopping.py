"""When to stop a draft: a learnt head (SpecDec++) beside fixed lengths, the draft model's confidence, and a heuristic.

    python benchmarks/stopping.py models/target models/small head --json benchmarks/records/stopping.json

The head is what `forerun train acceptance` wrote; the target may be a deeper one (`benchmarks/deeper.py`), for the head
reads the draft model alone. One request at a time; ways take turns prompt by prompt. Each is compared with the fixed
length that was best in hindsight, of the same category at the same temperature: ratios are taken round by round, and
tables show their median and range. d and v are the paper's: tokens discarded, and verifications, per new token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import forerun
from forerun.accept.exact import Verdict
from forerun.bench.run import Timing, measure
from forerun.bench.suites import CATEGORIES, spread
from forerun.bench.suites import load as load_suite
from forerun.drafters.small import DraftModel
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain
from forerun.drafting.stopping import Fixed
from forerun.engine.engine import Engine
from forerun.engine.load import drafter_for
from forerun.model import Model, Scores
from forerun.nn.machine import processor
from forerun.row import Row
from forerun.slots import Slots
from forerun.tree import TokenTree

PLAIN, FIXED, HEURISTIC = "plain", "fixed", "heuristic"
START, MOST = 5, 20


class Heuristic(DraftModel):
    """Two tokens more after a draft that was accepted whole, one less after any other."""

    def __init__(self, model: Any, form: Any):
        super().__init__(model, form)
        self._lengths: Slots[int] = Slots()

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        super().admit(row, hidden)
        self._lengths.admit(START)

    def release(self, slot: int) -> None:
        super().release(slot)
        self._lengths.release(slot)

    def propose(self, context: Context) -> TokenTree:
        depths = [min(pair) for pair in zip(context.depths, self._lengths, strict=True)]
        return super().propose(replace(context, depths=depths))

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        super().observe(context, tree, verdict, scores)
        for slot, (size, path) in enumerate(zip(tree.sizes, verdict.kept, strict=True)):
            if size > 1:
                length = self._lengths[slot]
                self._lengths[slot] = min(MOST, length + 2) if len(path) == size else max(1, length - 1)


@dataclass(frozen=True)
class Figures:
    """One way's rounds over some prompts."""

    runs: Sequence[Timing]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every round."""
        found = []
        for number in sorted({run.round for run in self.runs}):
            stats = [run.stats for run in self.runs if run.round == number]
            seconds = sum(one.seconds - one.prefill_seconds for one in stats)
            found.append(sum(one.new_tokens for one in stats) / seconds)
        return found

    def per(self, over: str, under: str) -> float:
        """The sum of one statistic over that of another."""
        total = [sum(getattr(run.stats, name) for run in self.runs) for name in (over, under)]
        return total[0] / max(1, total[1])

    def cells(self, best: Figures) -> list[str]:
        ratios = sorted(a / b for a, b in zip(self.speeds, best.speeds, strict=True))
        drafted, kept = (self.per(f"{name}_tokens", "new_tokens") for name in ("drafted", "accepted"))
        return [
            f"{median(self.speeds):.1f}",
            f"{median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})",
            f"{self.per('new_tokens', 'steps'):.2f}",
            f"{self.per('drafted_tokens', 'steps'):.2f}",
            f"{drafted - kept:.3f}",
            f"{self.per('steps', 'new_tokens'):.3f}",
        ]


def ways(head: Path, lengths: Sequence[int], thresholds: Sequence[float]) -> dict[str, dict[str, Any] | None]:
    """By name, stopping rules; None: the heuristic."""
    learnt = {"rule": "acceptance", "checkpoint": str(head), "most": MOST}
    return {
        **{f"{FIXED} {length}": {"rule": "fixed", "most": length} for length in lengths},
        **{f"confidence {one}": {"rule": "confidence", "threshold": one, "most": MOST} for one in (0.2, 0.4, 0.6)},
        **{f"cumulative {one}": {"rule": "cumulative", "threshold": one, "most": MOST} for one in (0.1, 0.3, 0.5)},
        HEURISTIC: None,
        **{f"acceptance {one:g}": {**learnt, "threshold": one} for one in thresholds},
        "acceptance auto": {**learnt, "threshold": "auto"},
    }


def engines_for(plain: Engine, small: Path, rules: Mapping[str, dict[str, Any] | None]) -> dict[str, Engine]:
    engines = {PLAIN: plain}
    for name, rule in rules.items():
        spec = {"drafter": "small", "checkpoint": str(small), "stopping": rule or {"rule": "fixed"}}
        drafter = drafter_for(plain.target.network, spec, tokenizer=plain.tokenizer)
        if rule is None:
            drafter = Heuristic(Model(drafter.model.network, MOST), Chain(Fixed(MOST)))  # type: ignore[attr-defined]
        engines[name] = plain.beside(drafter)
    return engines


def show(runs: Sequence[Timing], categories: Sequence[str], title: str, console: Console) -> None:
    """A table per category, and one of all."""
    names = list(dict.fromkeys(run.drafter for run in runs))
    for category in ("all", *dict.fromkeys(categories)):
        own = [run for run in runs if category in ("all", categories[run.prompt])]
        figures = {name: Figures([run for run in own if run.drafter == name]) for name in names}
        best = max((name for name in names if name.startswith(FIXED)), key=lambda name: median(figures[name].speeds))
        table = Table(title=f"{title}: {category}, best length: {best}")
        for heading in ("way", "tokens/s", "x best length", "tokens/step", "drafted/step", "d", "v"):
            table.add_column(heading, justify="right")
        for name in names:
            table.add_row(name, *figures[name].cells(figures[best]))
        console.print(table)


def main(
    target: Path,
    small: Path,
    head: Path,
    length: Annotated[list[int] | None, typer.Option(help="fixed lengths")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="of the head")] = None,
    temperature: Annotated[list[float] | None, typer.Option()] = None,
    prompts: int = 16,
    tokens: int = 192,
    rounds: int = 3,
    dtype: str = "bf16",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every way at every temperature; keep the raw rows."""
    plain = forerun.load(target, dtype=dtype, prefix_cache=0)
    rules = ways(head, length or [1, 2, 3, 4, 5, 6, 8], threshold or [0.3, 0.5, 0.7, 0.8, 0.9])
    engines, chosen = engines_for(plain, small, rules), spread(load_suite())[:prompts]
    texts, categories = [plain.encode(one.prompt) for one in chosen], [one.category for one in chosen]
    assert set(categories) <= set(CATEGORIES)
    rows: list[dict[str, Any]] = []
    for heat in temperature or [0.0, 0.8]:
        params = forerun.SamplingParams(max_new_tokens=tokens, temperature=heat, ignore_eos=True)
        runs: list[Timing] = []
        count = (rounds + 1) * len(texts) * len(engines)
        watched = iter(track(range(count), f"T={heat:g}"))
        measure(engines, texts, params, rounds + 1, lambda run, kept=runs, bar=watched: (kept.append(run), next(bar)))
        timed = [run for run in runs if run.round]  # the first round warms up
        show(timed, categories, f"temperature {heat:g}", Console(width=120))
        rows += [{"temperature": heat, "category": categories[run.prompt], **run.as_dict()} for run in timed]
    if json_file:
        network = plain.target.network
        note = {
            "processor": processor(network.device),
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "target_parameters": network.footprint.parameters,
            "tokens": tokens,
        }
        json_file.write_text(json.dumps({**note, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
