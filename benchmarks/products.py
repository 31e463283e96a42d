"""How close the matrix products come to the machine's bounds, and to torch's.

    python benchmarks/products.py [--out 4096 --in 1024 --matrices 40] [--tokens 1,4,8,12,16,32,64]
        [--isa ISA ...] [--json FILE]

Every round measures the bounds (memory copied and read, multiply-adds out of registers) and then,
for every number of tokens, our packed products and torch.nn.functional.linear over the same
weights, one after the other. Printed are medians: GB/s of weights, GFLOP/s, and both as a share of
the bounds of the same round. Needs g++ and a processor with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from forerun.native import library, operations
from forerun.native.matrix import Packed

STREAM = 256 << 20
ROUNDS_OF_PEAK = 2_000_000


class Bounds:
    """benchmarks/bounds.cc, compiled for this machine."""

    def __init__(self, threads: int):
        self.threads = threads
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "bounds.so"
            source = Path(__file__).with_name("bounds.cc")
            command = ["g++", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(library))
        for name in ("copy_seconds", "read_seconds", "bf16_peak", "int8_peak"):
            getattr(self._library, name).restype = ctypes.c_double
        self._from = torch.ones(STREAM, dtype=torch.uint8)
        self._to = torch.zeros(STREAM, dtype=torch.uint8)

    def measure(self) -> dict[str, float]:
        """copy and read in GB/s (of what is copied, of what is read), peaks in GFLOP/s."""
        size, from_, to = ctypes.c_int64(STREAM), *(ctypes.c_void_p(t.data_ptr()) for t in (self._from, self._to))
        rounds = ctypes.c_int64(ROUNDS_OF_PEAK)
        return {
            "copy": STREAM / self._library.copy_seconds(to, from_, size, self.threads) / 1e9,
            "read": STREAM / self._library.read_seconds(from_, size, self.threads) / 1e9,
            "bf16": 2 * self._library.bf16_peak(rounds, self.threads) / 1e9,
            "int8": 2 * self._library.int8_peak(rounds, self.threads) / 1e9,
        }


def seconds(products: Callable[[], None], repeats: int = 3) -> float:
    """Median over a few runs, after one that is not counted."""
    products()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        products()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Per row of the table, the figures of every round."""
    shape = (arguments.out, arguments.in_)
    weights = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(arguments.matrices)]
    ways = {
        "native bf16": [Packed.of(weight) for weight in weights],
        "native int8": [Packed.of(weight, torch.int8) for weight in weights],
    }
    bounds, found = Bounds(torch.get_num_threads()), defaultdict(lambda: defaultdict(list))
    for _ in range(arguments.rounds):
        best = bounds.measure()
        for name, value in best.items():
            found["bounds"][name].append(value)
        for tokens in map(int, arguments.tokens.split(",")):
            x, taken = torch.randn(tokens, arguments.in_, dtype=torch.bfloat16), {}
            for isa in arguments.isa or [library.active_isa()]:
                library.use_isa(isa)
                for name, p in ways.items():
                    taken[f"{name} ({isa})"] = seconds(lambda p=p, x=x: [operations.linear(x, m) for m in p])
            taken["torch bf16"] = seconds(lambda x=x: [F.linear(x, weight) for weight in weights])
            for name, spent in taken.items():
                size = arguments.matrices * arguments.out * arguments.in_
                row = found[f"{name}, {tokens}"]
                row["ms"].append(spent * 1e3)
                row["GB/s"].append(size * (1 if "int8" in name else 2) / spent / 1e9)
                row["of copy"].append(row["GB/s"][-1] / best["copy"])
                row["GFLOP/s"].append(2 * size * tokens / spent / 1e9)
                row["of peak"].append(row["GFLOP/s"][-1] / best["int8" if "int8" in name else "bf16"])
    return {name: dict(row) for name, row in found.items()}


def show(found: dict[str, dict[str, list[float]]]) -> None:
    console = Console()
    bounds = {name: np.median(values) for name, values in found["bounds"].items()}
    console.print(
        f"bounds: copies {bounds['copy']:.1f} GB/s, reads {bounds['read']:.1f} GB/s, "
        f"bf16 {bounds['bf16']:.0f} GFLOP/s, int8 {bounds['int8']:.0f} GFLOP/s"
    )
    table = Table("kernel, tokens", "ms", "GB/s", "of copy", "GFLOP/s", "of peak", box=None)
    for name, row in found.items():
        if name != "bounds":
            middle = {key: np.median(values) for key, values in row.items()}
            shares = (f"{middle['of copy']:.0%}", f"{middle['GFLOP/s']:.0f}", f"{middle['of peak']:.0%}")
            table.add_row(name, f"{middle['ms']:.2f}", f"{middle['GB/s']:.1f}", *shares)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", type=int, default=1024, dest="in_")
    parser.add_argument("--matrices", type=int, default=40)
    parser.add_argument("--tokens", default="1,4,8,12,16,32,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--isa", action="append", choices=library.ISAS, help="may be repeated; the best of this machine"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
