"""Imports point downwards, from package to package and from module to module: read off the syntax trees."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

LEVELS = (
    ("errors",),
    ("native",),  # the kernels as a library, which words may be computed with
    ("files", "tree", "ranktree", "chance", "constraint", "sampling", "row", "slots", "cost"),  # words
    ("accept", "grammar", "sources"),  # mechanisms
    ("nn", "stores"),
    ("model",),  # the two actors
    ("drafting",),
    ("layouts", "engine"),  # the loop, and what it does not know
    ("drafters",),
    ("train",),  # uses of the engine
    ("plots",),
    ("plan", "bench", "check", "serve", "hf"),
    ("integrations", "cli"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
STRANGERS = [("engine", "drafters"), ("drafters", "engine"), ("drafting", "engine"), ("layouts", "engine")]
"""The loop and what proposes do not know each other."""
FACE = "__init__"  # the public names of the library, imported lazily

TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def dotted(path: Path) -> str:
    """forerun.nn.cache; a package is called after its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(f".{FACE}")


MODULES = {dotted(path): tree for path, tree in TREES.items() if dotted(path) != "forerun"}


def imports(tree: ast.AST) -> set[str]:
    """The modules of forerun that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (wholes & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    own = part_of(module)
    assert own in LEVEL, f"{own} has no level: give it one in this test and in the layout"
    for other in {part_of(name) for name in imports(MODULES[module])} - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"
        assert (own, other) not in STRANGERS, f"{own} imports {other}: they must not know each other"


def test_no_circle_of_modules() -> None:
    """Inside packages too."""
    try:
        TopologicalSorter({module: imports(tree) - {module} for module, tree in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"these import one another: {' -> '.join(error.args[1])}")
