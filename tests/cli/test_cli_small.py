"""`forerun train small`: a draft model out of its target, and what its replay promises the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from forerun.engine.load import load
from forerun.nn.load import load_network
from forerun.nn.save import save_beside
from forerun.plan.acceptance import replayed
from forerun.sampling import SamplingParams
from forerun.sources.source import Source
from forerun.train import small
from forerun.train.distill import Sample, read
from forerun.train.objectives import imitation
from forerun.train.objectives.descent import Descent
from forerun.train.pruning.importance import Importance
from forerun.train.pruning.slicing import sliced
from forerun.train.replay import emitted

FEW = ("--steps", 6, "--rows", 4, "--length", 96, "--validate-every", 3, "--save-every", 2, "--calibration", 400)
ON = ("--device", "cpu", "--dtype", "fp32")


@pytest.fixture(scope="module")
def answers(family, tmp_path_factory) -> Path:
    """What the target says greedily, as plain rows; some of them end by themselves."""
    engine = load(family / "target", dtype="fp32", kernels="torch")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 600, (4 + n % 9,), generator=generator).tolist() for n in range(60)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=48))
    rows = [{"prompt": p, "answer": o.token_ids} for p, o in zip(prompts, outputs, strict=True)]
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trained(forerun, family, answers, tmp_path):
    """Train a draft model into tmp_path / name; its folder and what was said."""

    def call(name: str, shape: str, *options: object) -> tuple[Path, str]:
        where = ("--from", family / "target", "--data", answers, "--out", tmp_path / name, "--shape", shape)
        code, out, err = forerun("train", "small", *where, *FEW, *ON, *options)
        assert code == 0, err
        return tmp_path / name, out

    return call


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_draft_model_is_made_and_everyone_can_use_it(trained, family, said):
    folder, out = trained("draft", "1x16x24x2")
    config = transformers.AutoModelForCausalLM.from_pretrained(folder).config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert sizes == (1, 16, 24, 2) and (config.num_key_value_heads, config.head_dim) == (2, 8)
    about = json.loads((folder / "pruning.json").read_text())
    assert about["shape"] == "1x16x24x2/2" and about["figures"].keys() >= {"loss", "accepted", "tokens_per_step"}
    assert len(about["kept"]["hidden"]) == 16 and about["kept"]["layers"] == [0]
    assert out.startswith(f"{folder}: ") and f"{about['figures']['tokens_per_step']:.2f} tokens per step" in out
    options = ("generate", family / "target", "def main(", "--max-new-tokens", 24, *ON)
    plain, drafted = said(*options, "--drafter", "none"), said(*options, "--drafter", f"small:{folder}")
    assert drafted["token_ids"] == plain["token_ids"] and drafted["stats"]["drafted_tokens"] > 0


def test_training_teaches_and_no_step_at_all_leaves_what_pruning_left(trained, family):
    pruned, _ = trained("pruned", "2x24", "--steps", 0)
    taught, _ = trained("taught", "2x24", "--steps", 30)
    target = load_network(family / "target", torch.float32, torch.device("cpu"))
    assert same_weights(sliced(target, small.kept_of(pruned)), pruned)
    before, after = (json.loads((folder / "pruning.json").read_text())["figures"] for folder in (pruned, taught))
    assert after["divergence"] < 0.9 * before["divergence"] and after["accepted"] > before["accepted"]


def same_weights(module, folder: Path) -> bool:
    theirs = load_network(folder, torch.float32, torch.device("cpu"))
    return all(torch.equal(ours, their) for ours, their in zip(module.parameters(), theirs.parameters(), strict=True))


def test_a_draft_that_is_there_is_taught_further(forerun, refused, family, answers, tmp_path):
    """The vocabulary must be the target's."""
    where = ("--from", family / "target", "--data", answers, "--out", tmp_path / "taught")
    code, _, err = forerun("train", "small", *where, "--init-from", family / "small", *FEW, *ON)
    assert code == 0, err
    about = json.loads((tmp_path / "taught" / "pruning.json").read_text())
    assert about["kept"] is None and about["shape"] == "1x32x48x4/2"
    ours, theirs = (weights_of(folder) for folder in (tmp_path / "taught", family / "small"))
    assert ours.keys() == theirs.keys() and not torch.equal(*(w["model.norm.weight"] for w in (ours, theirs)))
    where = (*where[:-1], tmp_path / "other")
    assert "same vocabulary" in refused("train", "small", *where, "--init-from", family / "other", *ON)
    assert "--shape, or --init-from" in refused("train", "small", *where, *ON)
    assert "--shape, or --init-from" in refused("train", "small", *where, "--shape", 1, "--init-from", "x", *ON)


def test_what_is_interrupted_goes_on_and_ends_as_if_nothing_had_happened(trained, forerun, monkeypatch, tmp_path):
    """In the pruning, and in the training."""
    whole, _ = trained("whole", "1x16")
    for owner, name, calls in ((Importance, "read", 2), (Descent, "update", 4)):
        real, count = getattr(owner, name), 0

        def interrupted(self, *given, real=real, calls=calls):
            nonlocal count
            count += 1
            if count == calls:
                raise KeyboardInterrupt
            return real(self, *given)

        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(owner, name, interrupted)
            trained("parts", "1x16")
        assert not (tmp_path / "parts").exists()
    parts, _ = trained("parts", "1x16")
    assert same(whole, parts)


def test_masks_may_learn_what_stays(trained, tmp_path):
    """The masks stay with the run."""
    folder, _ = trained("draft", "1x16x24x2", "--shear-steps", 3)
    about = json.loads((folder / "pruning.json").read_text())
    masks = load_file(tmp_path / "draft.run" / "masks.safetensors")
    assert about["shear_steps"] == 3 and about["kept"]["hidden"] == masks["hidden"].nonzero()[:, 0].tolist()
    assert (masks["units"] > 0).sum(1).tolist() == [24 * (masks["layers"][layer] > 0).item() for layer in (0, 1)]


def test_another_draft_to_begin_with_does_not_go_on_in_a_run(forerun, refused, family, answers, tmp_path):
    """Even if it lies where the other did."""
    first = shutil.copytree(family / "small", tmp_path / "first")
    where = ("train", "small", "--from", family / "target", "--data", answers, "--out", tmp_path / "taught", *FEW, *ON)
    assert forerun(*where, "--steps", 0, "--init-from", first)[0] == 0
    save_file({name: -one for name, one in weights_of(first).items()}, first / "model.safetensors", {"format": "pt"})
    assert "another init_from" in refused(*where, "--steps", 0, "--init-from", first)


def test_kinds_of_answers_are_mixed_and_their_shares_are_gone_on_with(trained, answers, tmp_path, monkeypatch):
    """A kind that repeats one token is soon learnt."""
    easy = tmp_path / "easy.jsonl"
    easy.write_text("".join(json.dumps({"prompt": [5, n + 6], "answer": [7] * 30}) + "\n" for n in range(40)))
    monkeypatch.setattr(imitation, "REWEIGH_EVERY", 2)
    whole, _ = trained("whole", "1x16", "--data", easy)
    real, count = Descent.update, 0

    def interrupted(self, step):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(Descent, "update", interrupted)
        trained("parts", "1x16", "--data", easy)
    parts, _ = trained("parts", "1x16", "--data", easy)
    assert same(whole, parts)
    first, second = load_file(tmp_path / "whole.run" / "state.safetensors")["shares"].tolist()
    assert first + second == pytest.approx(1) and first != second


def test_another_shape_does_not_go_on_in_a_run(trained, refused, family, answers, tmp_path):
    trained("draft", "1x16")
    where = ("--from", family / "target", "--data", answers, "--out", tmp_path / "draft")
    assert "another shape" in refused("train", "small", *where, "--shape", "1x24", *FEW, *ON)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--shape", "3x16"), "layers 3"),
        (("--shape", "thin"), "no shape"),
        (("--shape", "1x15"), "its heads divide"),
        (("--shape", "1x16", "--pick", "luck"), "picked by"),
        (("--shape", "1x16", "--length", 5000), "do not fit"),
        (("--shape", "1x16", "--teacher-weight", 0, "--text-weight", 0), "nothing would be learnt"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(options, reason, refused, family, answers, tmp_path):
    where = ("--from", family / "target", "--data", answers, "--out", tmp_path / "draft")
    assert reason in refused("train", "small", *where, *ON, *options)
    assert list(tmp_path.iterdir()) == []


def test_too_few_answers_teach_nothing(refused, family, answers, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(answers.read_text().splitlines(True)[:3]))
    where = ("--from", family / "target", "--data", few, "--out", tmp_path / "draft", "--shape", "1x16")
    assert "make more or longer answers" in refused("train", "small", *where, *ON)


def test_another_model_is_not_overwritten(refused, family, answers):
    where = ("--from", family / "target", "--data", answers, "--out", family / "small", "--shape", "1x16")
    assert "would be overwritten" in refused("train", "small", *where, *ON)


def test_a_model_that_is_stored_too_wide_is_made_compact(forerun, refused, family, tmp_path):
    wide = load_network(family / "target", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for part in (wide.embedding.weight.T, *(m.weight for b in wide.blocks for m in (b.out, b.down))):
            part[:8] = 0
    save_beside(wide, Source.of(family / "target"), tmp_path / "wide")
    code, out, err = forerun("convert", tmp_path / "wide", "--to", "compact", "--out", tmp_path / "narrow")
    assert code == 0 and "width 24 instead of 32" in out, err
    tokens, device = torch.arange(3, 40)[None], torch.device("cpu")
    ours, theirs = (load_network(tmp_path / name, torch.float32, device) for name in ("narrow", "wide"))
    with torch.no_grad():
        one, two = (net.features(tokens) @ net.head.weight.T for net in (ours, theirs))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    again = ("--to", "compact", "--out", tmp_path / "again")
    assert "as compact as it can be" in refused("convert", tmp_path / "narrow", *again)
    assert "compares nothing" in refused("convert", tmp_path / "wide", *again, "--target", family / "target")


# ---- replay


def test_a_replay_counts_what_the_engine_counts_step_for_step(trained, family, answers):
    """Also where an answer is cut off by its length, or ends by itself in the middle of a draft."""
    folder, _ = trained("draft", "2x32x40", "--steps", 0)
    samples = read(answers).samples[:6]
    short = Sample(samples[0].prompt, samples[0].answer[:7])
    found = replayed(load_network(folder, torch.float32, torch.device("cpu")), [*samples, short])
    shares = [float(hits.mean()) for hits in found.answers]
    assert 0.1 < sum(shares) / len(shares) < 0.95, "right now and then"
    for length in (1, 4):
        spec = json.dumps({"drafter": "small", "checkpoint": str(folder), "length": length})
        engine = load(family / "target", drafter=spec, dtype="fp32", kernels="torch")
        for sample, hits in zip([*samples, short], found.answers, strict=True):
            params = SamplingParams(max_new_tokens=len(sample.answer))
            pieces = list(engine.stream([list(sample.prompt)], params, text=False))
            assert [token for piece in pieces for token in piece.token_ids] == list(sample.answer)
            assert [len(piece.token_ids) for piece in pieces] == emitted(hits, length)
