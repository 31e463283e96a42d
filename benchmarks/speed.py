"""Seconds per token of forerun and of transformers on the same weights, in one run, interleaved.

    python benchmarks/speed.py models/target --small models/small --json benchmarks/records/speed.json

Every arm answers the same held-out prompts with the same number of greedy tokens (end-of-sequence
ignored); one round gives every arm one turn, in changing order. Both sides are counted alike: new
tokens divided by the wall time of the whole call, prompt included. Ratios are taken round by round;
the table shows their median and range.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import forerun
from forerun.bench.suites import load as load_suite
from forerun.nn.dtype import dtype_of

LONGEST_DRAFT = 64  # tokens; a forward over more is reading a prompt
Tokens = list[int]
Arm = Callable[[Sequence[Tokens], int], list[Tokens]]


@dataclass
class Row:
    """One arm at one batch size: tokens per second of every round, and how many answers equal plain decoding's."""

    arm: str
    batch: int
    tokens_per_second: list[float] = field(default_factory=list)
    identical: int = 0
    answers: int = 0
    tokens_per_step: float = 1.0
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    def ratios(self, other: Row) -> list[float]:
        return sorted(a / b for a, b in zip(self.tokens_per_second, other.tokens_per_second, strict=True))


class Clocked:
    """A network that adds up the seconds of its forwards (without those that read prompts)."""

    def __init__(self, network: Any):
        self._network = network
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, feed: Any, *rest: Any) -> Any:
        begun = time.perf_counter()
        read = self._network.forward(feed, *rest)
        self.seconds += (time.perf_counter() - begun) * (feed.tokens_BN.shape[1] <= LONGEST_DRAFT)
        return read


def _models(drafter: Any) -> list[Any]:
    """The models of a drafter and of those inside it."""
    inner = [drafter.inner] if hasattr(drafter, "inner") else []
    inner += [getattr(part, "drafter", part) for part in getattr(drafter, "parts", [])]
    own = [drafter.model] if hasattr(drafter, "model") else []
    return own + [model for one in inner for model in _models(one)]


class Ours:
    """A forerun engine as an arm; it keeps the statistics of its calls and clocks every network in it."""

    def __init__(self, path: Path, drafter: str, dtype: str, temperature: float = 0.0):
        self._params = forerun.SamplingParams(temperature=temperature, seed=0, ignore_eos=True)
        self.engine = forerun.load(path, drafter=drafter, dtype=dtype, prefix_cache=0)
        self.stats: list[forerun.Stats] = []
        self.clocks: list[Clocked] = []
        models = [self.engine.target, *_models(self.engine.drafter)]
        for model in models:
            model.network = Clocked(model.network)  # type: ignore[assignment]
            self.clocks.append(model.network)  # type: ignore[arg-type]

    def __call__(self, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
        outputs = self.engine.generate(prompts, replace(self._params, max_new_tokens=count))
        self.stats += [output.stats for output in outputs]
        return [output.token_ids for output in outputs]

    def shares(self, batch: int) -> dict[str, float]:
        """Where decoding time goes, as shares of it (prompt reading left out; rows of a batch share their steps).

        draft, verify, other add up to 1; outside, for single rows, is what no network's forward accounts for.
        """
        total = sum(s.seconds - s.prefill_seconds for s in self.stats)
        parts = {
            name: sum(getattr(s, f"{name}_seconds") for s in self.stats) / total
            for name in ("draft", "verify", "other")
        }
        if batch > 1:  # rows that end early share fewer steps, so that the clocks cannot be shared out
            return parts
        return {**parts, "outside": 1 - sum(clock.seconds for clock in self.clocks) / total}

    def forget(self) -> None:
        self.stats.clear()
        for clock in self.clocks:
            clock.seconds = 0.0


class Theirs:
    """transformers' generate as an arm."""

    def __init__(self, path: Path, dtype: str, assistant: Path | None = None, **options: Any):
        from transformers import AutoModelForCausalLM

        def model(folder: Path) -> Any:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(dtype, torch.device("cpu"))).eval()
            loaded.generation_config.eos_token_id = None
            return loaded

        self._model = model(path)
        self._options = {**options, **({"assistant_model": model(assistant)} if assistant else {})}

    def __call__(self, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **self._options
        )
        return [row[longest : longest + count].tolist() for row in output]


def arms_for(path: Path, small: Path | None, drafters: Sequence[str], dtype: str) -> dict[str, Arm]:
    arms: dict[str, Arm] = {f"forerun {name}": Ours(path, name, dtype) for name in ("none", *drafters)}
    arms["transformers plain"] = Theirs(path, dtype)
    arms["transformers prompt lookup"] = Theirs(path, dtype, prompt_lookup_num_tokens=10)
    if small:
        arms["transformers assisted"] = Theirs(path, dtype, assistant=small)
    return arms


def noise_arms(path: Path, drafters: Sequence[str], dtype: str) -> dict[str, Arm]:
    """At this temperature the model says almost anything: text in which a drafter has nothing to find."""
    return {f"forerun {name}": Ours(path, name, dtype, temperature=5.0) for name in ("none", *drafters)}


def measure(arms: dict[str, Arm], batches: Sequence[Sequence[Tokens]], count: int, rounds: int) -> list[Row]:
    """Rounds of all arms in turn (and one before them that is not counted)."""
    rows = {name: Row(name, len(batches[0])) for name in arms}
    expected: list[list[Tokens]] = []
    names = list(arms)
    for number in track(range(rounds + 1), f"batch {len(batches[0])}"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            row, arm = rows[name], arms[name]
            if isinstance(arm, Ours):
                arm.engine.drafter.reset()  # the last round asked for the very same answers
            begun = time.perf_counter()
            answers = [arm(batch, count) for batch in batches]
            seconds = time.perf_counter() - begun
            if number == 0:
                expected = expected or [arms["forerun none"](batch, count) for batch in batches]
                same = [
                    a == b
                    for have, want in zip(answers, expected, strict=True)
                    for a, b in zip(have, want, strict=True)
                ]
                row.identical, row.answers = sum(same), len(same)
                if isinstance(arm, Ours):
                    arm.forget()
                continue
            row.tokens_per_second.append(sum(len(answer) for batch in answers for answer in batch) / seconds)
    for name, arm in arms.items():
        if isinstance(arm, Ours):
            rows[name].shares = arm.shares(rows[name].batch)
            rows[name].tokens_per_step = sum(s.new_tokens for s in arm.stats) / sum(s.steps for s in arm.stats)
    return list(rows.values())


def show(rows: Sequence[Row], console: Console) -> None:
    by_name = {row.arm: row for row in rows}
    table = Table(title=f"batch {rows[0].batch}")
    for heading in (
        "arm tokens/s x_transformers_plain x_forerun_none tokens/step draft verify other outside_forwards identical"
    ).split():
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        bases = [by_name.get(base) for base in ("transformers plain", "forerun none")]
        table.add_row(
            row.arm,
            f"{row.median:.1f}",
            *(_ratio(row.ratios(base)) if base else "" for base in bases),
            f"{row.tokens_per_step:.2f}",
            *(
                f"{row.shares[name]:.0%}" if name in row.shares else ""
                for name in ("draft", "verify", "other", "outside")
            ),
            f"{row.identical}/{row.answers}",
        )
    console.print(table)


def _ratio(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def main(
    target: Path,
    small: Annotated[Path | None, typer.Option(help="draft model for both sides")] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="forerun drafters to time beside none")] = None,
    prompts: int = 8,
    tokens: int = 256,
    rounds: int = 5,
    dtype: str = "bf16",
    threads: int = 0,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes")] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="random prompts at temperature 5, forerun's arms alone")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every arm; print a table per batch size; keep the raw rows."""
    if threads:
        torch.set_num_threads(threads)
    names = list(drafter or ["lookup", *([f"small:{small}"] if small else [])])
    arms = noise_arms(target, names, dtype) if noise else arms_for(target, small, names, dtype)
    encode = arms["forerun none"].engine.encode  # type: ignore[attr-defined]
    suite = load_suite()
    step = max(1, len(suite) // prompts)
    texts = [encode(item.prompt) for item in suite[::step][:prompts]]
    if noise:
        random = torch.Generator().manual_seed(0)
        texts = [torch.randint(3, 4096, (len(text),), generator=random).tolist() for text in texts]
    records = []
    for size in batch or [1]:
        chosen = arms if size == 1 else {name: arm for name, arm in arms.items() if _batched(name)}
        rows = measure(chosen, [texts[at : at + size] for at in range(0, len(texts) - size + 1, size)], tokens, rounds)
        show(rows, Console(width=160))
        records += [asdict(row) for row in rows]
    if json_file:
        note = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": dtype, "tokens": tokens}
        json_file.write_text(json.dumps({**note, "rows": records}, indent=1) + "\n")


def _batched(arm: str) -> bool:
    """transformers refuses to speculate with more than one row."""
    return not arm.startswith("transformers") or arm == "transformers plain"


if __name__ == "__main__":
    typer.run(main)
