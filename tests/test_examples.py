"""Every example runs on the reference model as it stands, within a minute on an idle machine."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from forerun.bench import suites

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TARGET = str(ROOT / "models" / "target")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run an example as a program, in an empty folder and in this process: to import torch takes longer than most."""

    def call(name: str, *words: str, model: str = TARGET) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, model, *words])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        return Done(code, *capfd.readouterr())

    return call


def test_every_example_is_tested_and_listed() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here
        assert path.name in (EXAMPLES / "README.md").read_text()


def test_speed_up_your_model(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n\n    return x\n")
    done = run("speed_up.py", "--prompts", str(prompts), "--tokens", "16", "--drafter", "lookup")
    assert done.code == 0, done.err
    plain, drafted, _, best = done.out.splitlines()
    assert plain.startswith("none") and drafted.startswith("lookup")
    assert "DIFFERENT" not in done.out and "fastest here: forerun.load(" in best


def test_a_model_of_a_short_context_and_what_is_wrong_in_a_sentence(run: Run, tmp_path: Path) -> None:
    """The prompts of the suite are cut to what there is room for."""
    short = tmp_path / "short"
    shutil.copytree(TARGET, short, copy_function=os.symlink)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").unlink()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    done = run("speed_up.py", "--tokens", "8", "--drafter", "lookup", model=str(short))
    assert done.code == 0 and "identical" in done.out, done.err
    done = run("speed_up.py", "--drafter", "lokup")
    assert done.code == 1 and "did you mean" in done.err and "Traceback" not in done.err


def test_train_heads_for_it(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": one.prompt[:300]}) + "\n" for one in suites.load()))
    amounts = ("--tokens", "64", "--steps", "4", "--rows", "2", "--length", "128", "--calibrate", "2")
    done = run("train_heads.py", "--prompts", str(prompts), *amounts)
    assert done.code == 0, done.err
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "heads").iterdir()}
    assert "tokens per step" in done.out.splitlines()[-1]


def test_prove_that_it_is_exact(run: Run) -> None:
    done = run("prove_exact.py", "--tokens", "40", "--samples", "20")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("EXACT: drafter lookup")


def test_a_lossy_rule_is_not_proven_exact(run: Run) -> None:
    done = run("prove_exact.py", "--tokens", "8", "--samples", "20", "--acceptance", "typical")
    assert done.code == 1, done.err
    assert "LOSSY" in done.out
