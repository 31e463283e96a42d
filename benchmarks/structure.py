"""The house in figures: what a reader, a drafted token and a training batch have to go through.

    python benchmarks/structure.py [SOURCE]

Read off the source (SOURCE: another checkout's `src`): files, lines, functions of over 60 lines,
lines of over 120 characters, circles of modules. Seen while running: the files of forerun whose
functions one step of the engine calls, by drafter, and those of one training batch, by kind of
heads.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

ROOT = Path(__file__).parents[1]
LONG_FUNCTION, LONG_LINE = 60, 120
MODELS = ROOT / "models"
DRAFTERS = {
    "none": "none",
    "lookup": "lookup",
    "hierarchy": "hierarchy",
    "small": f"small:{MODELS / 'small'}",
    "hsd": str(MODELS / "hsd.yaml"),
    "medusa": f"medusa:{MODELS / 'medusa'}",
    "hydra++": f"hydra:{MODELS / 'hydra++'}",
}


# ---- what can be read off the source


def read_off(source: Path) -> dict[str, object]:
    paths = sorted((source / "forerun").rglob("*.py"))
    texts = {path: path.read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    long_functions = {
        f"{path.relative_to(source)}:{node.lineno} {node.name}": _length(node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > LONG_FUNCTION
    }
    return {
        "files": len(paths),
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "functions over 60 lines": long_functions,
        "lines over 120 characters": sum(
            len(line) > LONG_LINE for text in texts.values() for line in text.splitlines()
        ),
        "modules in circles": sorted(_in_circles(imports := _imports(source, trees))),
        "rooms in circles": sorted(_in_circles(_rooms(imports))),
    }


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _imports(source: Path, trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Which modules each module imports, inside functions too; the library's face, which imports
    lazily, is left out."""
    names = {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in trees}
    names.pop("forerun", None)
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        asked: set[str] = set()
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom) and node.module:
                wholes = {f"{node.module}.{alias.name}" for alias in node.names}
                asked |= (wholes & names.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
        found[name] = (asked & names.keys()) - {name}
    return found


def _rooms(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the parts at the top of the library."""
    found: dict[str, set[str]] = {}
    for name, others in imports.items():
        own = name.split(".")[1]
        found.setdefault(own, set()).update({other.split(".")[1] for other in others} - {own})
    return found


def _in_circles(imports: dict[str, set[str]]) -> set[str]:
    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for other in imports[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    return {name for name in imports if name in reached(name)}


# ---- what is seen while it runs


class Visited:
    """The files of forerun whose functions are called while this holds."""

    def __init__(self, source: Path):
        self._source, self.files = source, set[str]()

    def __enter__(self) -> Visited:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(self._source) and frame.f_code.co_name != "<module>":
            self.files.add(str(path.relative_to(self._source)))


def files_of(work: Callable[[], object], source: Path) -> list[str]:
    with Visited(source / "forerun") as visited:
        work()
    return sorted(visited.files)


def of_a_step(spec: str, source: Path) -> list[str]:
    """Of one step that drafts, verifies and emits."""
    import forerun

    engine = forerun.load(MODELS / "target", drafter=spec)
    engine.add("def main():\n    return", forerun.SamplingParams(max_new_tokens=64))
    for _ in range(6):
        engine.step()
    return files_of(engine.step, source)


def of_a_batch(preset: str, source: Path) -> list[str]:
    """Of one step of training: reading the batch, the teacher, the loss, the optimiser."""
    from forerun.drafting import registry
    from forerun.train.drafters import HeadsRecipe, prepare, schedule_for

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "answers.jsonl"
        row = json.dumps({"prompt": [1, *range(300, 340)], "answer": list(range(500, 700))})
        data.write_text(f"{row}\n" * 40)
        schedule = schedule_for(registry.preset(preset)[2], 10)
        recipe = HeadsRecipe(preset, str(MODELS / "target"), data, {}, None, schedule, rows=2, length=256)
        objective = prepare(recipe, torch.device("cpu")).objective
        objective.update(0)
        return files_of(lambda: objective.update(1), source)


def main() -> None:
    source = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "src"
    print(json.dumps(read_off(source), indent=1))
    if source != ROOT / "src":
        return
    torch.set_num_threads(1)
    for name, spec in DRAFTERS.items():
        found = of_a_step(spec, source)
        print(f"a step with {name}: {len(found)} files: {', '.join(found)}")
    for preset in ("medusa", "hydra++"):
        found = of_a_batch(preset, source)
        print(f"a batch of {preset}: {len(found)} files: {', '.join(found)}")


if __name__ == "__main__":
    main()
