"""Imports point downwards: the levels of the layout, enforced by walking the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

LEVELS = (
    ("errors", "files", "tree", "ranktree", "sampling", "chance", "row"),
    ("accept", "stopping", "cache", "nn", "text", "automaton"),
    ("model", "drafter", "judge"),
    ("drafters", "engine"),
    ("assembly", "presets", "train", "plan", "bench", "serve", "check"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
APART = {3: "an implementation and the loop do not know each other", 4: "uses of the engine do not import one another"}
SHARED = {"assembly"}  # what every use of the engine begins with
ENTRY = "__init__"  # the public names, imported lazily


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE / "forerun").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of forerun that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "forerun" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("forerun.")}
    return found


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if part_of(path) != ENTRY]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(path)
    assert own in LEVEL, f"{own} has no level: give it one in this test and in the layout"
    for other in imports(path) - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{own} (level {LEVEL[own]}) imports {other} (level {LEVEL[other]})"
        if LEVEL[own] in APART and LEVEL[other] == LEVEL[own] and other not in SHARED and own not in SHARED:
            pytest.fail(f"{own} imports {other}: {APART[LEVEL[own]]}")


def test_the_engine_does_not_know_a_drafter_by_name() -> None:
    text = (SOURCE / "forerun" / "engine.py").read_text()
    assert not any(f'"{name}"' in text for name in ("lookup", "small", "verified", "none"))
