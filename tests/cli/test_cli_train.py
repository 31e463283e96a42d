"""`forerun train lm`: corpus, training, growth, teaching, resuming, and what a finished model looks like."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from test_cli_options import OPTIONS

from forerun.errors import TrainingError
from forerun.train import corpus, recipe
from forerun.train import run as loop
from forerun.train.corpus import Distribution
from forerun.train.objectives.descent import Descent
from forerun.train.schedule import Schedule

VOCABULARY = 400
ROOT = Path(__file__).parents[2]
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "theta", "kappa", "table", "index", "value", "token")
TINY = ("--width", 32, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--mlp-width", 48, "--max-length", 64)
FEW = (
    "--steps",
    4,
    "--rows",
    2,
    "--length",
    32,
    "--warmup",
    1,
    "--validate-every",
    2,
    "--save-every",
    2,
    "--device",
    "cpu",
)


def module(seed: int) -> str:
    draw = random.Random(seed)

    def name() -> str:
        return "_".join(draw.choice(WORDS) for _ in range(3))

    return "\n\n".join(f"def {name()}({name()}):\n    {name()} = {name()}\n    return {name()}\n" for _ in range(8))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Distribution:
    root = tmp_path_factory.mktemp("sources")
    for seed in range(120):
        (root / f"m{seed}.py").write_text(module(seed))
    return Distribution("made-up", "MIT", root, tuple(PurePosixPath(path.name) for path in sorted(root.iterdir())))


@pytest.fixture(scope="module")
def data(sources, tmp_path_factory) -> Path:
    """A corpus as `--build-corpus` leaves it."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "installed", lambda: [sources])
        told: list[tuple[int, int]] = []
        recipe.build_corpus(folder, VOCABULARY, lambda done, total: told.append((done, total)))
    files = json.loads((folder / "sources.json").read_text())
    assert [done for done, _ in told] == list(range(1, len(told) + 1)), "a bar goes forward"
    assert {total for _, total in told} == {files["train_files"] + files["heldout_files"]} == {len(told)}
    return folder


@pytest.fixture
def trained(forerun, data, tmp_path):
    """Train into tmp_path / name; the model's folder and what was said."""

    def call(name: str, *options: object) -> tuple[Path, str]:
        code, out, err = forerun(
            "train", "lm", "--corpus", data, "--run", tmp_path / f"{name}.run", "--out", tmp_path / name, *FEW, *options
        )
        assert code == 0, err
        return tmp_path / name, out

    return call


def test_build_corpus(forerun, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "installed", lambda: [sources])
    code, out, err = forerun("train", "lm", "--corpus", tmp_path, "--build-corpus", "--vocabulary", VOCABULARY)
    assert code == 0, err
    assert "tokens to train on" in out and recipe.vocabulary_of(tmp_path) == VOCABULARY
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train.bin", "heldout.bin", "heldout.jsonl", "sources.json", "tokenizer"}


def test_a_model_is_trained_and_everyone_can_read_it(trained, said):
    folder, out = trained("target", *TINY)
    assert out.startswith(f"{folder}: validation loss") and out.endswith("nats per token after 4 steps\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (theirs.config.hidden_size, theirs.config.num_hidden_layers, theirs.config.vocab_size) == (32, 2, VOCABULARY)
    assert theirs.generation_config.eos_token_id == [2, 1]
    assert transformers.AutoTokenizer.from_pretrained(folder)("x")["input_ids"][0] == 1
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir()), "anyone may read a model"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert said("generate", folder, "def ", "--max-new-tokens", 3)["stats"]["new_tokens"] > 0


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(trained, data, forerun, tmp_path, monkeypatch):
    whole, said_whole = trained("whole", *TINY)
    update, count = Descent.update, 0

    def interrupted(self, step):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(Descent, "update", interrupted)
    parts = ("--run", tmp_path / "parts.run", "--out", tmp_path / "parts", *FEW, *TINY)
    code, _, err = forerun("train", "lm", "--corpus", data, *parts)
    assert code == 130 and "goes on from the last checkpoint" in err and not (tmp_path / "parts").exists()
    monkeypatch.undo()
    parts_folder, said_parts = trained("parts", *TINY)
    assert said_parts.split(": ")[1] == said_whole.split(": ")[1]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts_folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again, said_again = trained("parts", *TINY)  # finished runs only write their model again
    assert again == parts_folder and said_again == said_parts


def test_growth_stacks_the_layers_of_a_run(trained, tmp_path):
    trained("half", *TINY)
    folder, _ = trained("grown", "--grow-from", tmp_path / "half.run", "--layers", 4, "--first", 4)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_shallow_model_begins_with_layers_of_its_target_and_learns_its_law(trained, data, tmp_path):
    target, _ = trained("target", *TINY)
    options = ("--init-from", target, "--init-layers", "1", "--teacher", target)
    folder, _ = trained("small", *options, "--muon-rate", 0, "--adam-rate", 0)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, target))
    assert torch.equal(ours["model.layers.0.mlp.down_proj.weight"], theirs["model.layers.1.mlp.down_proj.weight"])
    assert not any(name.startswith("model.layers.1.") for name in ours)


def test_the_start_of_a_grown_model(data, tmp_path, trained):
    target, _ = trained("target", *TINY)
    made = recipe.start(
        recipe.ModelRecipe(data, recipe.Sizes(layers=4), recipe.Start(str(target)), None, Schedule(steps=1))
    )
    assert made.config.layers == 4 and made.config.width == 32
    assert torch.equal(made.blocks[2].qkv.weight, made.blocks[0].qkv.weight)


def test_what_cannot_be_trained(refused, trained, data, tmp_path, family):
    target, _ = trained("target", *TINY)
    base = ("train", "lm", "--corpus", data, "--run", tmp_path / "x", *FEW)
    assert "nothing to do" in refused("train", "lm", "--corpus", data)
    assert "--out needs --run" in refused("train", "lm", "--corpus", data, "--build-corpus", "--out", tmp_path / "y")
    assert "--build-corpus" in refused("train", "lm", "--corpus", tmp_path / "no", "--run", tmp_path / "x", *TINY)
    assert "--init-from" in refused(*base, "--init-layers", "0")
    for option in ("--validate-every", "--save-every"):
        assert "of at least 1" in refused(*base, *TINY, option, 0)
    for option in ("--muon-rate", "--adam-rate", "--decay"):
        assert "finite number of at least 0" in refused(*base, *TINY, option, "inf")
        assert "finite number of at least 0" in refused(*base, *TINY, option, "nan")
    assert "--length from 1 to 64" in refused(*base, *TINY, "--length", 65)
    assert "exclude" in refused(*base, "--init-from", target, "--grow-from", target)
    assert "0,7" in refused(*base, "--init-from", target, "--init-layers", "a")
    assert "no layer 7" in refused(*base, "--init-from", target, "--init-layers", "0,7")
    assert "multiple" in refused(*base, "--grow-from", target, "--layers", 3)
    assert "sizes" in refused(*base, "--grow-from", target, "--mlp-width", 50)
    assert "multiple of the key heads" in refused(*base, *TINY, "--kv-heads", 3)
    assert "context" in refused(*base, *TINY, "--length", 100)
    assert "vocabulary" in refused(*base, "--init-from", family / "target")
    assert "tokenizer" in refused(*base, *TINY, "--teacher", family / "target")
    assert not (tmp_path / "x").exists()
    other = ("train", "lm", "--corpus", data, "--run", tmp_path / "target.run")
    assert "another shape" in refused(*other, *FEW, *TINY, "--width", 64)
    assert "another schedule" in refused(*other, *FEW, *TINY, "--steps", 5)


def test_a_corpus_that_is_too_small(refused, data, tmp_path):
    shutil.copytree(data, tmp_path / "corpus")
    (tmp_path / "corpus" / "heldout.bin").write_bytes(b"\0\0")
    assert "heldout.bin" in refused(
        "train", "lm", "--corpus", tmp_path / "corpus", "--run", tmp_path / "x", *FEW, *TINY
    )


def test_a_checkpoint_that_finds_no_room(forerun, data, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(loop, "save_file", full)
    code, out, err = forerun("train", "lm", "--corpus", data, "--run", tmp_path / "run", *FEW, *TINY)
    sentence = err.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in err
    assert sentence.startswith("forerun: ") and "No space left" in sentence and "make room" in sentence
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "shape.json"]


def test_a_model_that_finds_no_room_leaves_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "copyfile", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    made = recipe.start(
        recipe.ModelRecipe(data, recipe.Sizes(32, 1, 4, 2, 8, 48, 64), recipe.Start(), None, Schedule(steps=1))
    )
    with pytest.raises(TrainingError, match="No space left"):
        recipe.write_model(made, data / "tokenizer", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---- the script that reproduces the reference family


def commands_of(name: str, tmp_path: Path) -> list[list[str]]:
    stub, log = tmp_path / "stub", tmp_path / "log"
    stub.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >>{log}\necho "---" >>{log}\n')
    stub.chmod(0o755)
    script = [str(ROOT / "scripts" / name), str(tmp_path / "work"), str(tmp_path / "models")]
    subprocess.run(script, env={**os.environ, "FORERUN": str(stub)}, check=True)
    return [part.splitlines() for part in log.read_text().split("---\n") if part]


def test_the_family_script_says_what_this_command_understands(forerun, tmp_path, monkeypatch):
    made: list[tuple[recipe.ModelRecipe, str]] = []

    def noted(wish, run, out, device, events):
        made.append((wish, out.name if out else ""))
        return ""

    monkeypatch.setattr(recipe, "train", noted)
    monkeypatch.setattr(recipe, "build_corpus", lambda folder, vocabulary, watch: str(vocabulary))
    lines = commands_of("family", tmp_path)
    assert [forerun(*line)[0] for line in lines] == [0] * 4
    assert [out for _, out in made] == ["target", "small", "wide"]
    target, small, wide = (wish for wish, _ in made)
    assert (target.schedule.steps, target.rows, target.length, target.sizes.layers) == (9370, 64, 1024, 8)
    assert (small.sizes.width, small.sizes.layers, small.sizes.mlp_width) == (256, 2, 768)
    assert (wide.sizes.width, wide.sizes.layers, wide.sizes.mlp_width) == (512, 1, 2048)
    assert target.teacher is None and small.teacher == wide.teacher == str(tmp_path / "models" / "target")


def test_the_script_of_the_heads_says_what_these_commands_understand(tmp_path):
    lines = commands_of("heads", tmp_path)
    assert [line[0] for line in lines] == ["distill", *["train", "calibrate"] * 3]
    assert [line[1] for line in lines if line[0] == "train"] == ["medusa", "hydra", "hydra++"]
    for line in lines:
        command = " ".join(line[: 1 + (line[0] == "train")])
        assert {word for word in line if word.startswith("--")} <= set(OPTIONS[command].split()), command
    models = tmp_path / "models"
    drafters = [line[line.index("--drafter") + 1] for line in lines if line[0] == "calibrate"]
    assert drafters == [f"medusa:{models}/medusa", f"hydra:{models}/hydra", f"hydra:{models}/hydra++"]
