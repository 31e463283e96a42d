"""The native kernels again, built with the address and undefined-behaviour sanitizers: nothing is
read or written out of place.

The build takes half a minute or more and is kept in pytest's cache for as long as the sources stay as they are.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forerun.native import library
from nn.kernel_oracles import REASON

ROOT = Path(__file__).parents[2]
RUNTIMES = ("libasan.so", "libubsan.so")
# Every kernel once per instruction set, every boundary of memory once. What does the same to the same places with other
# numbers (bad ones, equal ones) is left out, and what is done in threads or in used memory runs on the best set alone.
TESTS = {
    "test_kernels.py": "not alone_and_in_any_company and not like_single_tokens and not bad_ and not outweigh"
    " and not ((portable or avx2) and shared_out)",
    "test_packed.py": "(odd or everything or pairs) and (company or grown or beside or long_text or no_trace)"
    " and not (everything and no_trace) and not (long_text and float32)",
    "test_packed_heads.py": "(every_node or company or another_tree or equal or trace or beside or anywhere)"
    " and not ((portable or avx2) and (trace or equal))",
    "test_packed_block.py": "(readable or formats or bits or trace or bad or trees or equal or left or nodes or beside)"
    " and not ((portable or avx2) and (bits or trace or trees_are))",
    "test_states.py": "pieces or beside or encodes",
    "test_native_automaton.py": "not memory and not 200_000",
    "test_native_sampling.py": "not without_the_kernels and not portable",
    "../drafters/test_corpus_store.py": "test",
}


def runtime(name: str) -> str | None:
    """Where the compiler keeps a library of the sanitizers; None without it or without a compiler."""
    if shutil.which("g++") is None:
        return None
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def flags(is_tried: bool = True) -> list[str]:
    """Those of setup.py, which cannot be imported: it would build. What is not tried is only compiled, in no time."""
    lists = {}
    for line in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") in ("FLAGS", "SANITIZERS"):
            lists[line.targets[0].id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
    lines = ["-g1", "-fPIC", "-w"]  # lines are enough, and a third faster
    return [*lists["FLAGS"], *(lists["SANITIZERS"] if is_tried else ["-O0"]), *lines]


def compiled(sources: list[Path], folder: Path) -> Path:
    """The kernels as a library in `folder`. Another process may be making it too: the last one wins."""
    own = Path(tempfile.mkdtemp(dir=folder))

    def compile_(source: Path) -> str:
        target = str(own / f"{source.stem}.o")
        is_tried = source.stem.removeprefix("isa_").replace("_", "-") not in left_out()
        subprocess.run(["g++", *flags(is_tried), "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, sources))
    made = own / "_kernels.so"
    subprocess.run(["g++", "-shared", *flags(), *objects, "-o", str(made)], check=True)
    made = made.replace(folder / "_kernels.so")
    shutil.rmtree(own)
    return made


@pytest.fixture(scope="module")
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if REASON is not None:
        pytest.skip(REASON)
    if missing := [name for name in RUNTIMES if runtime(name) is None]:
        pytest.skip(f"there is no g++ with {' and '.join(missing)} here")
    files = sorted((ROOT / "kernels").iterdir())
    content = b"".join([*(path.read_bytes() for path in files), " ".join([*flags(), *left_out()]).encode()])
    name = f"kernels-{hashlib.sha256(content).hexdigest()[:16]}"
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)
    for old in folder.parent.glob("kernels-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    made = folder / "_kernels.so"
    return made if made.exists() else compiled([path for path in files if path.suffix == ".cc"], folder)


def test_kernels_that_were_built_can_be_loaded() -> None:
    """Or all other tests of theirs would be skipped: the library that lies here may be older than the sources."""
    if not Path(library.__file__).with_name("_kernels.so").exists() or os.environ.get("FORERUN_KERNELS"):
        pytest.skip("they were not built, or others were chosen")
    library.kernels()


def test_nothing_is_read_or_written_out_of_place(sanitized: Path) -> None:
    """In one process: torch is slow to import under the sanitizers, and only one worker needs the library."""
    settings = {
        "FORERUN_KERNELS": str(sanitized),
        "FORERUN_EXAMPLES": "3",
        "LD_PRELOAD": " ".join(path for runtime_ in RUNTIMES if (path := runtime(runtime_))),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    chosen = " or ".join(f"({Path(name).name} and ({words}))" for name, words in TESTS.items())
    chosen = f"({chosen}){beside_the_best()}"
    files = [str(Path(__file__).parent / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", *files, "-xs", "-rp", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, report(run)
    for name in TESTS:
        passed = len(re.findall(rf"^PASSED .*\b{Path(name).name}::", run.stdout, re.MULTILINE))
        assert passed > 15, f"{name} was skipped: {run.stdout[-300:]}"  # a library that cannot be loaded


def beside_the_best() -> str:
    """For pytest: the instruction sets that are tried."""
    best = library.active_isa()
    best_of = {name: f" and not {best}" if name in best else "" for name in left_out()}
    return "".join(f" and not ({name}{best_of[name]})" for name in left_out())


def left_out() -> list[str]:
    """Instruction sets between the second and this processor's best, which do the same in other widths."""
    return [name for name in library.ISAS[2:] if name != library.active_isa()]


def report(run: subprocess.CompletedProcess[str]) -> str:
    """What the sanitizer found and where in the kernels, without the Python below; or how the tests failed."""
    lines = run.stderr.splitlines()
    found = next((i for i, line in enumerate(lines) if "runtime error" in line or "Sanitizer" in line), None)
    return run.stdout[-4000:] if found is None else "\n".join(lines[found : found + 20])
