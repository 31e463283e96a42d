"""`forerun train medusa|hydra|hydra++`: from answers to heads that the engine takes, and what is said on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.trained import Adversary, Weights
from forerun.engine.load import load
from forerun.sampling import SamplingParams
from forerun.train.distill import read
from forerun.train.least_squares import LeastSquares
from forerun.train.objectives.descent import Descent

FEW = ("--steps", 12, "--rows", 4, "--length", 96, "--validate-every", 6, "--save-every", 4, "--device", "cpu")
FP32 = ("--dtype", "fp32")
KINDS = {"medusa": "medusa", "hydra": "hydra", "hydra++": "hydra"}
every_preset = pytest.mark.parametrize("preset", KINDS)


@pytest.fixture(scope="session")
def answers(family, tmp_path_factory) -> Path:
    """What the target says, as plain rows."""
    engine = load(family / "target", dtype="fp32", kernels="torch")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 600, (4 + n % 9,), generator=generator).tolist() for n in range(60)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=48, ignore_eos=True))
    rows = [{"prompt": p, "answer": o.token_ids} for p, o in zip(prompts, outputs, strict=True)]
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trained(forerun, family, answers, tmp_path):
    """Train heads into tmp_path / name; their folder, stdout and stderr."""

    def call(preset: str, name: str, *options: object) -> tuple[Path, str, str]:
        base = ("train", preset, "--target", family / "target", "--data", answers, "--out", tmp_path / name)
        code, out, err = forerun(*base, *FEW, *FP32, *options)
        assert code == 0, err
        return tmp_path / name, out, err

    return call


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- from answers to heads


@every_preset
def test_heads_are_trained_and_the_engine_takes_them(preset, trained, family, said):
    folder, out, err = trained(preset, "heads")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    figures = config_of(folder)["training"]["figures"]
    assert f"{folder}: {figures['tokens_per_step']:.2f} tokens per step projected on held-out answers" in out
    assert "forerun calibrate" in out and err.count("⟦") == err.count("⟧") == 1
    options = ("generate", family / "target", "def main(", "--max-new-tokens", 32, *FP32)
    plain, drafted = said(*options), said(*options, "--drafter", f"{KINDS[preset]}:{folder}")
    assert drafted["token_ids"] == plain["token_ids"]
    assert (drafted["stats"]["drafter"], drafted["stats"]["exact"]) == (preset, True)
    assert drafted["stats"]["drafted_tokens"] > 0


@every_preset
def test_the_figures_on_the_way(preset, trained):
    folder, out, _ = trained(preset, "heads")
    heads = config_of(folder)["architecture"]["heads"]
    rows = [json.loads(line) for line in (folder.parent / "heads.run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12]
    tops = {f"head{head}_top{k}" for head in range(1, heads + 1) for k in range(1, 6)}
    tops |= {f"head{head}_{part}" for head in range(1, heads + 1) for part in ("loss", "given")}
    assert all(row.keys() == {"step", "train_loss", "seconds", "loss", "tokens_per_step", *tops} for row in rows)
    last = rows[-1]
    for head in range(1, heads + 1):
        shares = [last[f"head{head}_top{k}"] for k in range(1, 6)]
        assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)
        assert (
            f"{head}  {last[f'head{head}_loss']:.2f}  " + "  ".join(f"{share:.1%}".rjust(5) for share in shares) in out
        )
    temperatures = config_of(folder)["architecture"]["temperatures"]
    assert [line.split()[-1] for line in out.splitlines() if line.strip()[:1].isdigit()] == [
        f"{one:.2f}" for one in temperatures
    ]
    assert 1 <= last["tokens_per_step"] <= 1 + heads
    recorded = config_of(folder)["training"]["figures"]
    fitted = {f"head{head}_temperature": one for head, one in enumerate(temperatures, 1)}
    assert recorded == pytest.approx({name: (last | fitted)[name] for name in recorded}, abs=1e-4)
    assert recorded.keys() >= fitted.keys() and len(fitted) == heads


def test_tensorboard_is_told_the_figures(trained, tmp_path):
    pytest.importorskip("tensorboardX")
    trained("medusa", "heads", "--tensorboard", tmp_path / "board")
    (file,) = (tmp_path / "board").iterdir()
    assert b"given/head5" in file.read_bytes() and b"loss/training" in file.read_bytes()


def test_the_presets_are_the_papers(trained):
    found = {preset: config_of(trained(preset, preset)[0]) for preset in KINDS}
    medusa, hydra, plus = (found[preset]["architecture"] for preset in KINDS)
    assert (medusa["heads"], medusa["layers"], hydra["heads"], hydra["layers"]) == (5, 1, 4, 1)
    assert (plus["heads"], plus["layers"], plus["tied_layers"]) == (4, 4, True) and plus["prefix"]["mlp_width"] == 48
    assert "prefix" not in hydra and {one["vocabulary"] for one in (medusa, hydra, plus)} == {"own"}
    training = found["hydra++"]["training"]
    assert Weights(**training["weights"]) == Weights(text=0.0, teacher=1.0)
    assert (training["schedule"]["adam_rate"], training["schedule"]["floor"]) == (5e-4, 0.33)
    assert found["medusa"]["training"]["weights"]["decay"] == 0.8
    assert all(one["target"] == "target" and one["training"]["answers"] == 60 for one in found.values())


def test_options_have_the_last_word(trained):
    shape = ("--heads", 2, "--layers", 3, "--own-layers", "--vocabulary", "shared")
    loss = ("--text-weight", 0.5, "--teacher-weight", 0.25, "--head-decay", 0.9, "--rate", 0.002, "--seed", 5)
    found = config_of(trained("hydra++", "heads", *shape, "--dropout", 0.0, *loss, "--parts", 2)[0])
    architecture, training = found["architecture"], found["training"]
    names = ("heads", "layers", "tied_layers", "vocabulary")
    assert [architecture[name] for name in names] == [2, 3, False, "shared"] and "prefix" in architecture
    assert Weights(**training["weights"]) == Weights(text=0.5, teacher=0.25, decay=0.9)
    assert (training["schedule"]["adam_rate"], training["schedule"]["parts"], training["seed"]) == (0.002, 2, 5)


def test_parts_of_a_method_are_switched_off_by_options(trained):
    """Those of its own; another method's are refused."""
    switches = {"--stages": 1, "--sampled-token": "first", "--auto-embedding": "one-way"}
    given = [word for pair in switches.items() for word in pair]
    architecture = config_of(trained("amphista", "heads", *given)[0])["architecture"]
    names = ("stages", "sampled_token", "auto_embedding")
    assert [architecture[name] for name in names] == [*switches.values()]


def test_a_block_drafter_that_other_engines_read(trained, forerun, family, tmp_path):
    """Of inner layers and with a mask that is a token; the text stays the target's own on its way there and back."""
    folder, _, _ = trained("block", "drafter", "--sources", "0,1", "--mask-token", 2)
    architecture = config_of(folder)["architecture"]
    assert (architecture["sources"], architecture["mask_token"]) == ([0, 1], 2) and "mask" not in weights_of(folder)
    code, said, err = forerun(
        "convert", folder, "--to", "dspark", "--out", tmp_path / "out", "--target", family / "target"
    )
    assert code == 0, err
    before, after = (part.split()[-2] for part in said.rsplit(":", 1)[1].split(","))
    assert before == after and config_of(tmp_path / "out")["mask_token_id"] == 2


def test_the_sample_that_is_shown_is_one_that_is_trained_on(trained, answers, family):
    _, _, err = trained("medusa", "heads")
    samples = read(answers).samples
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "target")
    prompt, answer = (tokenizer.decode(list(ids)) for ids in (samples[0].prompt, samples[0].answer))
    assert f"{prompt}⟦{answer}⟧" in err
    training = [sample for number, sample in enumerate(samples, 1) if number % 20]
    tokens = sum(len(sample.answer) for sample in training)
    share = tokens / sum(len(sample.prompt) + len(sample.answer) for sample in training)
    assert f"{share:.0%} of what is read, {tokens:,} tokens in 57 answers; 3 answers are held out" in err


def test_a_training_leaves_its_picture(trained, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, _, err = trained("medusa", "heads")
    run = folder.parent / "heads.run"
    assert f"{run / 'training.png'}: a picture of the training; training-dark.png beside it" in err
    assert {path.name for path in run.glob("*.png")} == {"training.png", "training-dark.png"}
    assert "heads: step 6/12  loss " in err and "  heads " in err


def test_without_matplotlib_a_training_ends_well_and_a_sentence_says_how_to_have_the_picture(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder, out, err = trained("medusa", "heads")
    assert "tokens per step" in out and "pip install 'forerun[plots]'" in err.splitlines()[-1]
    assert not list(folder.parent.rglob("*.png"))


def test_without_a_tokenizer_ids_are_shown(forerun, family, answers, tmp_path):
    shutil.copytree(family / "target", tmp_path / "target", ignore=shutil.ignore_patterns("tokenizer*"))
    base = ("train", "medusa", "--target", tmp_path / "target", "--data", answers, "--out", tmp_path / "heads")
    code, _, err = forerun(*base, *FEW, *FP32)
    sample = read(answers).samples[0]
    assert code == 0 and f"{' '.join(map(str, sample.prompt))} ⟦{sample.answer[0]} " in err


def test_in_the_number_format_of_the_machine(trained):
    assert "tokens per step" in trained("hydra++", "heads", "--dtype", "bf16")[1]


@pytest.mark.parametrize(
    "preset",
    [
        "medusa",
        "hydra",
        "hydra++",
    ],
)
def test_a_target_that_is_not_ours(preset, forerun, answers, tmp_path):
    """GPT-NeoX, through transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    outside = transformers.GPTNeoXConfig(vocab_size=600, max_position_embeddings=256, **sizes)
    transformers.GPTNeoXForCausalLM(outside).save_pretrained(tmp_path / "target")
    base = ("train", preset, "--target", tmp_path / "target", "--data", answers, "--out", tmp_path / "heads")
    code, _, err = forerun(*base, *FEW, *FP32)
    assert code == 0, err
    engine = load(tmp_path / "target", f"{KINDS[preset]}:{tmp_path / 'heads'}", dtype="fp32")
    plain = load(tmp_path / "target", dtype="fp32").generate([[5, 6, 7]], SamplingParams(max_new_tokens=20))
    assert engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=20))[0].token_ids == plain[0].token_ids


def test_a_law_that_is_more_than_states_and_a_matrix_is_not_taught(refused, forerun, answers, tmp_path):
    """Gemma 2 caps its logits: heads may learn its text, not a law that is not its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    outside = transformers.Gemma2Config(vocab_size=600, head_dim=8, num_key_value_heads=4, **sizes)
    transformers.Gemma2ForCausalLM(outside).save_pretrained(tmp_path / "target")
    base = ("--target", tmp_path / "target", "--data", answers, "--out", tmp_path / "heads", *FEW, *FP32)
    assert "--teacher-weight 0" in refused("train", "hydra++", *base)
    code, _, err = forerun("train", "hydra++", *base, "--text-weight", 1, "--teacher-weight", 0)
    assert code == 0, err


# ---- runs that stop and go on


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(
    trained, forerun, family, answers, tmp_path, monkeypatch
):
    whole, *_ = trained("hydra", "whole")
    update, count = Descent.update, 0

    def interrupted(self, step):
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(Descent, "update", interrupted)
    base = ("train", "hydra", "--target", family / "target", "--data", answers, "--out", tmp_path / "parts")
    code, _, err = forerun(*base, *FEW, *FP32)
    assert code == 130 and "goes on from the last checkpoint" in err and not (tmp_path / "parts").exists()
    monkeypatch.undo()
    parts, out, _ = trained("hydra", "parts")
    ours, theirs = weights_of(parts), weights_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, again, _ = trained("hydra", "parts")  # a finished run only writes its heads again
    assert again == out and config_of(parts)["training"]["figures"] == config_of(whole)["training"]["figures"]


def test_ctrl_c_in_the_least_squares_start_keeps_it(trained, forerun, family, answers, tmp_path, monkeypatch):
    whole, *_ = trained("hydra", "whole")
    update, taken = LeastSquares.update, []

    def interrupted(self, step):
        taken.append(step)
        if taken == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step)

    monkeypatch.setattr(LeastSquares, "update", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    base = ("train", "hydra", "--target", family / "target", "--data", answers, "--out", tmp_path / "parts")
    code, _, err = forerun(*base, *FEW, *FP32)
    signal.signal(signal.SIGINT, before)
    assert code == 130 and taken == [0, 1] and "goes on from the last checkpoint" in err
    parts, *_ = trained("hydra", "parts")
    assert taken[:3] == [0, 1, 2] and taken == sorted(set(taken)), "what was read is not read again"
    ours, theirs = weights_of(parts), weights_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_another_kind_is_not_gone_on_with(trained, forerun, family, answers, tmp_path):
    trained("medusa", "heads")
    base = ("train", "medusa", "--target", family / "target", "--data", answers, "--out", tmp_path / "new", *FEW, *FP32)
    for options in (("--rate", 0.5), ("--heads", 3)):
        code, out, err = forerun(*base, "--run", tmp_path / "heads.run", *options)
        assert (code, out) == (2, "") and "remove it" in err.splitlines()[-1] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--data", "--seed", "--text-weight", "--length"])
def test_a_run_on_other_data_is_not_gone_on_with(option, trained, forerun, family, answers, tmp_path):
    trained("medusa", "heads")
    lines = answers.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    value = {"--data": tmp_path / "other.jsonl", "--seed": 7, "--text-weight": 0.5, "--length": 64}[option]
    given = {"--target": family / "target", "--data": answers, "--out": tmp_path / "heads", option: value}
    code, _, err = forerun("train", "medusa", *FEW, *FP32, *(part for pair in given.items() for part in pair))
    assert code == 2 and "heads.run" in err.splitlines()[-1]


def test_going_on_from_heads(trained):
    first, *_ = trained("medusa", "first")
    second, *_ = trained("medusa", "second", "--init-from", first, "--rate", 0)
    ours, theirs = weights_of(first), weights_of(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    third, *_ = trained("medusa", "third", "--init-from", first)
    assert not torch.equal(weights_of(third)["blocks"], ours["blocks"])


def test_trained_anew_heads_forget_their_tree(trained):
    folder, *_ = trained("medusa", "heads")
    (folder / "tree.json").write_text("[[0]]")
    shutil.rmtree(folder.parent / "heads.run")
    trained("medusa", "heads", "--seed", 1)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_heads_that_find_no_room(trained, forerun, family, answers, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    base = ("train", "medusa", "--target", family / "target", "--data", answers, "--out", tmp_path / "heads")
    code, out, err = forerun(*base, *FEW, *FP32)
    assert (code, out) == (2, "") and "make room" in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["heads.run"]
    monkeypatch.undo()
    assert "tokens per step" in trained("medusa", "heads")[1]


# ---- what is refused, before anything is written


@pytest.fixture
def refused_run(refused, family, answers, tmp_path):
    """Training that must be refused; what was given last counts."""

    def call(preset: str, *options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        given = {"--target": family / "target", "--data": answers, "--out": tmp_path / "out"}
        names = [option for option in options if str(option) in given]
        base = [part for name, value in given.items() if name not in names for part in (name, value)]
        sentence = refused("train", preset, *base, *FEW, *FP32, *options)
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    return call


def test_data_that_cannot_teach(refused_run, answers, family, tmp_path):
    assert "no.jsonl cannot be read" in refused_run("medusa", "--data", tmp_path / "no.jsonl")
    lines = answers.read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:20]))
    assert "make more or longer answers" in refused_run("medusa", "--data", tmp_path / "few.jsonl")
    (tmp_path / "broken.jsonl").write_text("".join([*lines, "{]\n"]))
    assert "line 61" in refused_run("medusa", "--data", tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no answers" in refused_run("medusa", "--data", tmp_path / "empty.jsonl")
    (tmp_path / "other.jsonl").write_text("".join([*lines, '{"prompt": [1, 2], "answer": [607]}\n']))
    assert "token 607" in refused_run("medusa", "--data", tmp_path / "other.jsonl")
    mute = [json.loads(line) | {"prompt": [7] * 5000} for line in lines]
    (tmp_path / "mute.jsonl").write_text(
        "".join(json.dumps(row | {"answer": row["answer"][:1]}) + "\n" for row in mute)
    )
    assert "of what would be read" in refused_run("medusa", "--data", tmp_path / "mute.jsonl")


def test_targets_that_cannot_be_had(refused_run, family, tmp_path):
    assert "no folder" in refused_run("medusa", "--target", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused_run("hydra", "--target", tmp_path / "empty")


@pytest.mark.parametrize(
    ("preset", "options", "named"),
    [
        ("medusa", ("--vocabulary", "foo"), "own"),
        ("hydra", ("--vocabulary", "600"), "shared"),
        ("medusa", ("--length", 2000), "context of 1024"),
        ("medusa", ("--length", 4), "4 tokens"),
        ("medusa", ("--length", 0), "--length from 8 to 1024"),
        ("block", ("--sources", "0;1"), "'0;1' is no list of whole numbers"),
        ("medusa", ("--head-decay", "inf"), "inf is not a finite number"),
        ("medusa", ("--head-decay", 0), "--head-decay"),
        ("hydra++", ("--dropout", "nan"), "--dropout"),
        ("medusa", ("--text-weight", "nan"), "--text-weight"),
        ("medusa", ("--rate", "inf"), "rate = inf: give a finite number"),
        ("medusa", ("--floor", "nan"), "--floor"),
        ("medusa", ("--heads", 0), "--heads"),
        ("hydra", ("--layers", 0), "--layers"),
        ("hydra++", ("--dropout", 1.5), "--dropout"),
        ("medusa", ("--dropout", 0.1), "No such option: --dropout"),
        ("medusa", ("--stages", 1), "No such option: --stages"),
        ("eagle", ("--heads", 3), "No such option: --heads"),
        ("hydra", ("--state-weight", 1), "foresee no states"),
        ("eagle3", ("--state-weight", 1), "foresee no states"),
        ("medusa", ("--text-weight", 0), "nothing would be learnt"),
        ("hydra++", ("--teacher-weight", 0), "nothing would be learnt"),
        ("medusa", ("--teacher-weight", -1), "--teacher-weight"),
        ("medusa", ("--steps", 0), "--steps"),
        ("medusa", ("--rows", 0), "--rows"),
        ("medusa", ("--rate", -1), "--rate"),
        ("medusa", ("--dtype", "fp8"), "fp8"),
        ("medusa", ("--device", "tpu"), "tpu"),
        ("medusa", ("--prefix",), "--prefix"),
    ],
)
def test_options_that_make_no_sense(refused_run, preset, options, named):
    assert named in refused_run(preset, *options)


@pytest.mark.parametrize(
    ("preset", "options", "fields"),
    [
        ("medusa", ("--heads", 3), {"heads": 3}),
        ("block", ("--block", 3), {"heads": 3}),
        ("eagle3", ("--unrolled", 2, "--ahead", 4), {"taught": 2, "heads": 4}),
    ],
)
def test_options_go_to_the_fields_that_they_are_for(forerun, monkeypatch, preset, options, fields, tmp_path):
    """Whatever they are called on the command line."""
    recipes = []
    monkeypatch.setattr("forerun.cli.heads._fit", lambda recipe, *_: recipes.append(recipe))
    forerun("train", preset, "--target", "t", "--data", "d", "--out", tmp_path / "heads", *options)
    assert recipes[0].architecture == fields


def test_a_discriminator_is_asked_for_by_its_weight(forerun, refused_run, monkeypatch, tmp_path):
    recipes = []
    monkeypatch.setattr("forerun.cli.heads._fit", lambda recipe, *_: recipes.append(recipe))
    words = ("train", "hydra", "--target", "t", "--data", "d", "--out", tmp_path / "heads")
    forerun(*words)
    forerun(*words, "--adversarial", 0)
    forerun(*words, "--adversarial", 0.2, "--discriminator-sees", "law", "--discriminator-warmup", 0.5)
    assert [recipe.adversary for recipe in recipes] == [None, Adversary(0.0), Adversary(0.2, "law", 0.5)]
    assert "--adversarial" in refused_run("medusa", "--discriminator-sees", "law")
    assert "equal to 0" in refused_run("medusa", "--adversarial", -1)


def test_heads_that_foresee_no_state_have_none_to_be_seen(refused_run):
    assert "foresee no states" in refused_run("medusa", "--adversarial", 0.1, "--discriminator-sees", "state")


def test_heads_are_trained_against_a_discriminator(trained, said, family):
    """Its figures and its panel are in the run's folder, and nothing of it is in the heads'."""
    plain, *_ = trained("medusa", "plain")
    folder, out, _ = trained("medusa", "opposed", "--adversarial", 0.1)
    rows = [json.loads(line) for line in (folder.parent / "opposed.run" / "log.jsonl").read_text().splitlines()]
    figures = {"discriminator_loss", "discriminator_accuracy", "adversarial_weight", "adversarial_ratio"}
    assert all(figures <= row.keys() for row in rows)
    assert f"was right {rows[-1]['discriminator_accuracy']:.0%} of the time" in out
    assert config_of(folder)["training"]["adversary"]["weight"] == 0.1
    shapes = [config_of(each)["architecture"] for each in (folder, plain)]
    assert all(shape.pop("temperatures") for shape in shapes) and shapes[0] == shapes[1]
    held, others = weights_of(folder), weights_of(plain)
    assert held.keys() == others.keys()
    options = ("generate", family / "target", "def main(", "--max-new-tokens", 32, *FP32)
    assert said(*options)["token_ids"] == said(*options, "--drafter", f"medusa:{folder}")["token_ids"]


def test_places_that_cannot_hold_heads(refused_run, family, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused_run("medusa", "--out", tmp_path / "file")
    assert "is a file" in refused_run("medusa", "--out", tmp_path / "file" / "heads")
    shutil.copytree(family / "small", tmp_path / "model")
    assert "holds another model" in refused_run("medusa", "--out", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert "no name of its own" in refused_run("medusa", "--out", ".")
    assert "no name of its own" in refused_run("medusa", "--out", "..")


def test_starts_that_do_not_fit(refused_run, trained, family, tmp_path):
    first, *_ = trained("medusa", "first")
    assert "3, 600, 32" in refused_run("medusa", "--init-from", first, "--heads", 3)
    assert "of the kind medusa" in refused_run("hydra", "--init-from", first)
    assert "no-such" in refused_run("medusa", "--init-from", tmp_path / "no-such")
    assert "forerun convert" in refused_run("medusa", "--init-from", family / "small")


# ---- heads in other commands


def test_heads_of_another_target(trained, refused, family):
    folder, *_ = trained("medusa", "heads")
    sentence = refused("generate", family / "other", "x", "--drafter", f"medusa:{folder}")
    assert "heads for target" in sentence and "600" in sentence and "608" in sentence
    assert f"write medusa:{folder}" in refused("generate", family / "target", "x", "--drafter", f"hydra:{folder}")
    assert "hydra:PATH" in refused("generate", family / "target", "x", "--drafter", "hydra")
    assert "checked" not in refused("generate", family / "target", "x", "--drafter", f"medusa:{folder}/none")


def test_typical_acceptance_is_said_to_be_lossy(trained, family, forerun, said):
    folder, *_ = trained("medusa", "heads")
    base = ("generate", family / "target", "def main(", "--max-new-tokens", 24, "--drafter", f"medusa:{folder}", *FP32)
    warm = (*base, "--temperature", 0.8, "--seed", 1)
    code, _, err = forerun(*warm, "--acceptance", "typical")
    assert code == 0 and "typical acceptance (lossy), lossy" in err
    stats = said(*warm, "--acceptance", "typical")["stats"]
    assert (stats["exact"], stats["rule"]) == (False, "typical acceptance (lossy)")
    assert said(*warm, "--acceptance", "typical:0.5,0.5")["stats"]["exact"] is False
    assert said(*warm)["stats"]["exact"] is True and said(*warm, "--acceptance", "exact")["stats"]["exact"] is True
    greedy = said(*base, "--acceptance", "typical")
    assert greedy["stats"]["exact"] is True and greedy["token_ids"] == said(*base)["token_ids"]
    other = said(*base, "--temperature", 0.8, "--seed", 2, "--acceptance", "typical")
    assert other["token_ids"] == said(*warm, "--acceptance", "typical")["token_ids"], "nothing is drawn"


def test_the_demo_says_it_too(trained, family, forerun, tmp_path):
    folder, *_ = trained("medusa", "heads")
    base = ("demo", family / "target", "--limit", 1, "--rounds", 1, "--max-new-tokens", 8, *FP32)
    drafters = ("--drafters", f"lookup,medusa:{folder}", "--temperature", 0.9)
    code, out, err = forerun(*base, *drafters, "--acceptance", "typical", "--json", tmp_path / "rows.json")
    assert code == 0 and "lossy acceptance" in out, err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["exact"] for row in rows] == [False] * 3


@pytest.mark.parametrize("word", ["sloppy", "lenient:1", "typical:1", "typical:2,0.3", "typical:x,y", ""])
def test_acceptances_that_there_are_not(refused, family, word):
    for command in (("generate", family / "target", "x"), ("demo", family / "target")):
        assert "use exact, typical, typical:EPSILON,DELTA" in refused(*command, "--acceptance", word)
