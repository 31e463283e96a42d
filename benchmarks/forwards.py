"""Milliseconds of one cached forward, and plain tokens per second, of forerun and of other engines, interleaved.

    python benchmarks/forwards.py --model MODELS/34m --engine forerun --engine transformers \\
        --engine llama.cpp:MODELS/34m.gguf --engine openvino:MODELS/openvino-34m \\
        --peer-python llama.cpp=PEERS/llama/bin/python --peer-python openvino=PEERS/openvino/bin/python --plain

Every engine runs in a process of its own, under its own Python (benchmarks/peers/), and sleeps
while another one works. A round gives every engine one turn per number of tokens, in changing
order; a turn counts as its median. All processes are started several times and their rounds pooled:
where a process happens to have its memory can change its speed by a quarter, for as long as it
lives. The tables show the median over all rounds, and the ratio to the first engine: median (range)
of the ratios of the rounds. Beneath plain decoding stands how long the engines say the same: bf16
rounds differently in each, so that random weights soon part them.

Engines: forerun[:KERNELS] (or an instruction set, as avx512-bf16), torch (forerun with its torch
kernels), transformers, llama.cpp:GGUF, openvino:FOLDER.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
from worker_protocol import token_ids  # noqa: E402

WORKERS = {
    "forerun": "forerun_worker.py",
    "torch": "forerun_worker.py",
    "transformers": "transformers_worker.py",
    "llama.cpp": "llama_worker.py",
    "openvino": "openvino_worker.py",
}
WIDTH = 150  # characters of a table
WARM_UP = 100  # forwards after loading: until then some engines run at half their speed
PAUSE = 0.01  # seconds between turns, for threads that spin on after their work


class Worker:
    """One engine in its own process, which answers commands (benchmarks/peers/worker_protocol.py)."""

    def __init__(self, label: str, command: Sequence[str], threads: int):
        self.label = label
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )

    def read(self) -> dict[str, Any]:
        """The next answer. Raises SystemExit with the worker's own words if it failed or died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"{self.label} died:\n" + "".join(self._errors.readlines()[-15:]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"{self.label}: {answer['error']}")
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Give the worker its turn."""
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Series:
    """One engine at one size: a number per round (milliseconds of a forward, or tokens per second).

    ids: what plain decoding said in the last round.
    """

    engine: str
    size: int
    values: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def ratios(self, base: Series) -> list[float]:
        """Round by round, ascending."""
        return sorted(a / b for a, b in zip(self.values, base.values, strict=True))

    def agreement(self, base: Series) -> float:
        """Mean number of new tokens before the first one that differs."""
        return statistics.mean(_common(a, b) for a, b in zip(self.ids, base.ids, strict=True))

    def numbers(self) -> dict[str, Any]:
        return {"engine": self.engine, "size": self.size, "median": self.median, "values": self.values}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def start(spec: str, model: Path, pythons: dict[str, str], threads: int) -> Worker:
    """The worker of an engine given as NAME or NAME:ARGUMENT; it is still loading when this returns."""
    name, _, argument = spec.partition(":")
    if name not in WORKERS:
        raise typer.BadParameter(f"unknown engine {name!r}: choose from {', '.join(WORKERS)}")
    if name in ("llama.cpp", "openvino") and not argument:
        raise typer.BadParameter(f"{name} needs its own form of the model: {name}:PATH")
    kernels = {"torch": "torch", "forerun": argument}.get(name, "")
    path = argument if name in ("llama.cpp", "openvino") else str(model)
    command = [pythons.get(name, sys.executable), str(PEERS / WORKERS[name]), path, "--threads", str(threads)]
    label = spec if name == "forerun" else name
    return Worker(label, command + (["--kernels", kernels] if kernels else []), threads)


@contextmanager
def started(
    specs: Sequence[str], model: Path, pythons: dict[str, str], threads: int, about: dict[str, Any]
) -> Iterator[list[Worker]]:
    """Workers that have loaded their models; what they say about themselves goes into `about`."""
    workers: list[Worker] = []
    try:
        for spec in specs:  # one after the other: loading is work, too
            workers.append(start(spec, model, pythons, threads))
            about[workers[-1].label] = workers[-1].read()["ready"]
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def time_forwards(
    workers: Sequence[Worker], sizes: Sequence[int], context: int, rounds: int, repeats: int
) -> list[Series]:
    """Milliseconds; a long turn for each, and one round that is not counted, come first."""
    for worker in workers:
        worker.ask(do="forward", tokens=sizes[0], context=context, repeats=WARM_UP)
    series = {(w.label, size): Series(w.label, size) for size in sizes for w in workers}
    for number in track(range(rounds + 1), "forwards", refresh_per_second=1):
        for size in sizes:
            for worker in _turned(workers, number):
                answer = worker.ask(do="forward", tokens=size, context=context, repeats=repeats)
                if number:
                    series[worker.label, size].values.append(statistics.median(answer["milliseconds"]))
    return list(series.values())


def time_plain(workers: Sequence[Worker], batches: Sequence[int], prompt: int, new: int, rounds: int) -> list[Series]:
    """New tokens per second of the whole call; one round that is not counted comes first."""
    series = {(w.label, size): Series(w.label, size) for size in batches for w in workers}
    for number in track(range(rounds + 1), "plain", refresh_per_second=1):
        for size in batches:
            prompts = [token_ids(prompt, start=1000 * row) for row in range(size)]
            for worker in _turned(workers, number):
                answer = worker.ask(do="plain", prompts=prompts, new=new)
                if number:
                    series[worker.label, size].values.append(sum(map(len, answer["ids"])) / answer["seconds"])
                    series[worker.label, size].ids = answer["ids"]
    return list(series.values())


def pool(series: list[Series], more: Sequence[Series]) -> None:
    """Add the rounds of another start."""
    if not series:
        series.extend(more)
        return
    for one, other in zip(series, more, strict=True):
        one.values += other.values


def _turned(workers: Sequence[Worker], number: int) -> list[Worker]:
    first = number % len(workers)
    return [*workers[first:], *workers[:first]]


def show(series: Sequence[Series], title: str, heading: str, digits: int, console: Console) -> None:
    """A row per engine and a column per size; beneath the medians, the ratios to the first engine."""
    by_key = {(one.engine, one.size): one for one in series}
    engines, sizes = list(dict.fromkeys(e for e, _ in by_key)), list(dict.fromkeys(s for _, s in by_key))
    base = engines[0]
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("engine", no_wrap=True)
    for size in sizes:
        table.add_column(heading.format(size), justify="right", no_wrap=True)
    for engine in engines:
        table.add_row(engine, *(f"{by_key[engine, size].median:.{digits}f}" for size in sizes))
    table.add_section()
    for engine in engines[1:]:
        ratios = (by_key[engine, size].ratios(by_key[base, size]) for size in sizes)
        table.add_row(f"{engine} / {base}", *map(_ratio, ratios))
    if series[0].ids:
        table.add_section()
        for engine in engines[1:]:
            agreements = (by_key[engine, size].agreement(by_key[base, size]) for size in sizes)
            table.add_row(f"{engine} = {base}", *(f"{tokens:.0f} tokens" for tokens in agreements))
    console.print(table)


def _ratio(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    model: Annotated[Path, typer.Option(help="folder in Hugging Face format, for forerun and transformers")],
    engine: Annotated[list[str], typer.Option(help="NAME or NAME:ARGUMENT; ratios are to the first")],
    peer_python: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON: the interpreter of an engine")] = None,
    starts: Annotated[int, typer.Option(help="how often all processes are started afresh")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of each start")] = 5,
    repeats: Annotated[int, typer.Option(help="forwards in a turn")] = 10,
    tokens: Annotated[str, typer.Option(help="numbers of new tokens")] = "1,4,8,12,16,32",
    context: Annotated[int, typer.Option(help="tokens already in the cache")] = 200,
    threads: int = 2,
    plain: Annotated[bool, typer.Option("--plain", help="time plain greedy decoding as well")] = False,
    batch: Annotated[str, typer.Option(help="batch sizes of plain decoding")] = "1,8",
    prompt: Annotated[int, typer.Option(help="tokens of a prompt of plain decoding")] = 32,
    new: Annotated[int, typer.Option(help="tokens to decode after it")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every engine; print tables; keep the numbers of every round."""
    pythons = dict(pair.split("=", 1) for pair in peer_python or [])
    about: dict[str, Any] = {}
    record: dict[str, Any] = {"model": model.name, "threads": threads, "context": context, "repeats": repeats}
    record |= {"starts": starts, "rounds": rounds, "load_average": os.getloadavg()[0], "engines": about}
    forwards: list[Series] = []
    speeds: list[Series] = []
    for _ in range(starts):
        with started(engine, model, pythons, threads, about) as workers:
            pool(forwards, time_forwards(workers, _numbers(tokens), context, rounds, repeats))
            if plain:
                pool(speeds, time_plain(workers, _numbers(batch), prompt, new, rounds))
    console = Console(width=WIDTH)
    show(forwards, f"{model.name}: milliseconds of a forward, context {context}", "{} new", 2, console)
    record["forward_milliseconds"] = [one.numbers() for one in forwards]
    if plain:
        show(speeds, f"{model.name}: plain tokens per second, {prompt} + {new} tokens", "batch {}", 0, console)
        record["plain"] = {"prompt": prompt, "new": new, "tokens_per_second": [one.numbers() for one in speeds]}
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
