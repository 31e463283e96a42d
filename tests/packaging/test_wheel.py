"""The wheel is tagged for what it holds, and what it holds is enough.

Kernels that are built already are packed as they are, and where compiling is the question a file of one line stands
for them, so that no test takes half a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from forerun.native import library

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT = ROOT / "src" / "forerun" / "native" / "_kernels.so"
ALWAYS = {
    "forerun/py.typed",
    "forerun/__init__.py",
    *(f"forerun/bench/{path.name}" for path in (ROOT / "src" / "forerun" / "bench").glob("*.jsonl")),
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a wheel is made of, with nothing built in it."""
    copy = tmp_path / "tree"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "_kernels.*")
    for folder in ("src", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def wheel_of(tree: Path, **settings: str) -> tuple[Path, str]:
    """The wheel that pip builds offline, and what the build printed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FORERUN_")}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-v", "-w", "out"]
    done = subprocess.run(command, cwd=tree, env=own | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "out").glob("*.whl")
    return wheel, done.stdout + done.stderr


def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as file:
        return set(file.namelist())


def metadata(wheel: Path, name: str) -> str:
    with ZipFile(wheel) as file:
        return file.read(next(path for path in file.namelist() if path.endswith(f".dist-info/{name}"))).decode()


def one_line_kernels(tree: Path) -> None:
    for path in (tree / "kernels").iterdir():
        path.unlink()
    (tree / "kernels" / "one.cc").write_text('extern "C" int fr_one() { return 1; }\n')


@pytest.mark.skipif(not BUILT.exists(), reason="the kernels are not built here")
def test_with_kernels_it_fits_one_platform_and_every_python(tree: Path, tmp_path: Path) -> None:
    packed = tree / "built" / "forerun" / "native" / BUILT.name
    packed.parent.mkdir(parents=True)
    shutil.copy(BUILT, packed)  # newer than its sources, so it is not built again
    (tree / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    wheel, _ = wheel_of(tree)
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none") and platform != "any"
    assert {*ALWAYS, "forerun/native/_kernels.so"} <= contents(wheel)
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")

    alone = tmp_path / "alone"
    with ZipFile(wheel) as file:
        file.extractall(alone)
    program = "from forerun.native import library; import forerun; print(forerun.__file__, library.is_there())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(alone)}, capture_output=True
    )
    assert done.stdout.decode().split() == [str(alone / "forerun" / "__init__.py"), str(library.is_there())]


def test_without_kernels_it_fits_any_platform(tree: Path) -> None:
    wheel, _ = wheel_of(tree, FORERUN_KERNELS="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) >= ALWAYS and "forerun/native/_kernels.so" not in contents(wheel)
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    assert "forerun = forerun.__main__:main" in metadata(wheel, "entry_points.txt")


def test_without_a_compiler_it_says_why_there_are_no_kernels(tree: Path) -> None:
    wheel, said = wheel_of(tree, CC="false", CXX="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "the native kernels were not built" in said
    assert "forerun/native/_kernels.txt" in contents(wheel)


@needs_compiler
def test_openmp_is_used_where_the_compiler_has_it(tree: Path, tmp_path: Path) -> None:
    """Apple's has none, and refuses the flag; clang warns of a warning that only GCC knows."""
    one_line_kernels(tree)
    _, said = wheel_of(tree, CC="g++", CXX="g++")
    assert "-ffp-contract=off" in said and "one thread" not in said

    apple = tmp_path / "apple"
    apple.write_text('#!/bin/sh\nfor flag; do [ "$flag" = -fopenmp ] && exit 1; done\nexec g++ "$@"\n')
    apple.chmod(0o755)
    shutil.rmtree(tree / "build")
    shutil.rmtree(tree / "out")
    wheel, said = wheel_of(tree, CC=str(apple), CXX=str(apple))
    assert "this compiler has no OpenMP, the kernels run on one thread" in said
    assert "forerun/native/_kernels.so" in contents(wheel)


def test_every_python_that_is_named_is_allowed_and_no_address_is_invented() -> None:
    """There is no public address yet. The licence is an expression, which excludes its classifiers."""
    project = PROJECT["project"]
    assert "urls" not in project and project["license"] == "Apache-2.0"
    assert not [one for one in project["classifiers"] if one.startswith("License ::")]
    least = project["requires-python"].removeprefix(">=")
    named = [one.rsplit(" ", 1)[1] for one in project["classifiers"] if "Python :: 3." in one]
    assert min(named, key=lambda version: int(version.split(".")[1])) == least


def test_one_python_builds_the_wheel_of_every_other() -> None:
    """cibuildwheel is asked for the oldest; two would build the same file twice."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert PROJECT["tool"]["cibuildwheel"]["build"] == f"cp{oldest}-*"
