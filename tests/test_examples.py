"""Every example runs on the reference model as it stands, within a minute on an idle machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TARGET = str(ROOT / "models" / "target")


def run(name: str, folder: Path, *words: str, model: str = TARGET) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), model, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_every_example_is_tested_and_listed() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here
        assert path.name in (EXAMPLES / "README.md").read_text()


def test_speed_up_your_model(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n\n    return x\n")
    done = run("speed_up.py", tmp_path, "--prompts", str(prompts), "--tokens", "16", "--drafter", "lookup")
    assert done.returncode == 0, done.stderr
    plain, drafted, _, best = done.stdout.splitlines()
    assert plain.startswith("none") and drafted.startswith("lookup")
    assert "DIFFERENT" not in done.stdout and "fastest here: forerun.load(" in best


def test_a_model_of_a_short_context_and_what_is_wrong_in_a_sentence(tmp_path: Path) -> None:
    """The prompts of the suite are cut to what there is room for."""
    short = tmp_path / "short"
    shutil.copytree(TARGET, short, copy_function=os.symlink)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").unlink()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    done = run("speed_up.py", tmp_path, "--tokens", "8", "--drafter", "lookup", model=str(short))
    assert done.returncode == 0 and "identical" in done.stdout, done.stderr
    done = run("speed_up.py", tmp_path, "--drafter", "lokup")
    assert done.returncode == 1 and "did you mean" in done.stderr and "Traceback" not in done.stderr


def test_train_heads_for_it(tmp_path: Path) -> None:
    done = run("train_heads.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "heads").iterdir()}
    assert "tokens per step" in done.stdout.splitlines()[-1]


def test_prove_that_it_is_exact(tmp_path: Path) -> None:
    done = run("prove_exact.py", tmp_path, "--tokens", "40", "--samples", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("EXACT: drafter lookup")


def test_a_lossy_rule_is_not_proven_exact(tmp_path: Path) -> None:
    done = run("prove_exact.py", tmp_path, "--tokens", "8", "--samples", "20", "--acceptance", "typical")
    assert done.returncode == 1, done.stderr
    assert "LOSSY" in done.stdout
