"""`forerun calibrate`: the tree lands where drafters find it, and what cannot be calibrated is said in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from forerun.bench import suites
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.engine.engine import Engine
from forerun.engine.load import load
from forerun.nn.load import load_network
from forerun.plan import calibrate as module
from forerun.sampling import SamplingParams

FP32 = ("--dtype", "fp32")
FEW = ("--answers", 6, "--rounds", 2, "--max-new-tokens", 24, *FP32)


@pytest.fixture(scope="session")
def trained(family, tmp_path_factory) -> Path:
    """Heads that say what the target says one token earlier: not good, and right at times, for
    texts repeat themselves."""
    target = load_network(family / "target", torch.float32, torch.device("cpu"))
    heads = MedusaHeads(config := MedusaConfig(width=32, vocab_size=600, heads=3)).initialise(target.output_head)
    folder = tmp_path_factory.mktemp("trained") / "medusa"
    checkpoints.write(heads, config, Checkpoint(folder, "medusa", {}, "target", {}), torch.float32)
    return folder


@pytest.fixture
def heads(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "heads"))


@pytest.fixture(scope="session")
def answers(family, tmp_path_factory) -> Path:
    engine = load(family / "target", dtype="fp32", kernels="torch")
    prompts = [[1, 5 + n, 9 * n % 600 or 3, 17] for n in range(30)]
    rows = []
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=1, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        rows += [
            {"prompt": p, "answer": o.token_ids, "temperature": temperature}
            for p, o in zip(prompts, outputs, strict=True)
        ]
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sizes(monkeypatch) -> None:
    """Few sizes and few steps: there is no need for good timings here."""
    monkeypatch.setattr(module, "SIZES", (1, 2, 5))
    monkeypatch.setattr(module, "STEPS", 4)


@pytest.fixture
def free(monkeypatch) -> None:
    """Trees cost nothing, so that the largest pays."""
    monkeypatch.setattr(module._Bench, "pair", lambda bench, tree, number: module.Pair(1.0, 1.0))


@pytest.fixture
def calibrated(forerun, family, sizes, free):
    def call(spec: object, *options: object) -> str:
        code, out, err = forerun("calibrate", family / "target", "--drafter", spec, *FEW, *options)
        assert code == 0, err
        return out

    return call


def drafted(said, family, spec: object) -> int:
    """The nodes of the first tree that this drafter grows."""
    found = said("generate", family / "target", "def main(", "--max-new-tokens", 12, "--drafter", spec, *FP32)
    return int(found["stats"]["drafted_tokens"])


def test_the_tree_is_kept_and_used(calibrated, heads, family):
    out = calibrated(f"medusa:{heads}")
    held = json.loads((heads / "tree.json").read_text())
    assert {path.name for path in heads.iterdir()} == {"config.json", "model.safetensors", "tree.json"}
    assert [one["nodes"] for one in held["candidates"]] == [1, 2, 5] and held["answers"] == 6 and held["rows"] == 1
    assert (held["machine"]["dtype"], held["machine"]["device"], held["temperature"]) == ("float32", "cpu", 0.0)
    assert f"{heads / 'tree.json'}: {len(held['paths'])} nodes" in out and "6 answers" in out
    assert f"{held['speedup']:.2f}x plain decoding" in out and held["speedup"] > 1
    engine = load(family / "target", f"medusa:{heads}", dtype="fp32")
    assert [list(path) for path in engine.drafter.head.tree.paths] == held["paths"]


def timed(monkeypatch, *costs: dict[int, float]) -> None:
    """What a step costs by nodes, in the rounds in turn; 0 nodes are plain."""
    monkeypatch.setattr(
        module._Bench, "pair", lambda bench, tree, number: module.Pair(*(costs[number % 2][n] for n in (0, tree.size)))
    )


def test_the_fastest_size_is_kept(calibrated, heads, monkeypatch):
    timed(monkeypatch, costs := {0: 1.0, 1: 1.0, 2: 1.0, 5: 100.0}, costs)
    out = calibrated(f"medusa:{heads}")
    held = json.loads((heads / "tree.json").read_text())
    speeds = [one["speedup"] for one in held["candidates"]]
    assert len(held["paths"]) == held["candidates"][speeds.index(max(speeds))]["nodes"] < 5
    assert held["plain_seconds"] == 1.0 and f"{held['speedup']:.2f}x" in out


def test_the_table(calibrated, heads, monkeypatch):
    timed(monkeypatch, {0: 0.25, 1: 0.25, 2: 0.25, 5: 0.25}, {0: 0.125, 1: 0.125, 2: 0.125, 5: 0.25})
    out = calibrated(f"medusa:{heads}")
    held = json.loads((heads / "tree.json").read_text())
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    for row, one in zip(rows, held["candidates"], strict=True):
        tokens, most = one["tokens_per_step"], f"{one['tokens_per_step']:.2f}x"
        speedup, least = (f"{tokens * share:.2f}x" for share in ((0.75, 0.5) if one["nodes"] == 5 else (1, 1)))
        milliseconds = one["step_seconds"] * 1e3
        figures = [f"{tokens:.2f}", f"{milliseconds:.2f}", f"{1e3 * tokens / milliseconds:.0f}"]
        assert row == [str(one["nodes"]), *figures, speedup, least, "to", most]


SLOW, HELD_UP = {0: 0.1, 1: 1.0, 2: 1.0, 5: 1.0}, {0: 13.0, 1: 1.0, 2: 1.0, 5: 1.0}


@pytest.mark.parametrize(
    ("costs", "sentence"), [((SLOW, SLOW), "does not beat plain"), ((HELD_UP, HELD_UP), "which they cannot be")]
)
def test_what_does_not_beat_plain_decoding_is_not_kept(forerun, family, heads, sizes, monkeypatch, costs, sentence):
    timed(monkeypatch, *costs)
    command = ("calibrate", family / "target", "--drafter", f"medusa:{heads}", *FEW)
    code, out, err = forerun(*command)
    assert code == 1 and "No tree is kept" in out and sentence in out and err == ""
    assert ("not believed" in out) == (costs[0] is HELD_UP) and not (heads / "tree.json").exists()
    (heads / "tree.json").write_text("[[0], [1]]")
    code, out, _ = forerun(*command)
    assert code == 1 and f"{heads / 'tree.json'} stays as it was" in out
    assert (heads / "tree.json").read_text() == "[[0], [1]]"


def test_another_place_and_how_to_name_it(calibrated, heads, tmp_path, family, said):
    out = calibrated(f"medusa:{heads}", "--out", tmp_path / "mine.json")
    assert f'"tree": "{tmp_path / "mine.json"}"' in out and not (heads / "tree.json").exists()
    description = {"drafter": "medusa", "checkpoint": "heads", "tree": "mine.json"}  # as they lie beside this file
    (tmp_path / "drafter.json").write_text(json.dumps(description))
    engine = load(family / "target", str(tmp_path / "drafter.json"), dtype="fp32")
    held = json.loads((tmp_path / "mine.json").read_text())
    assert [list(path) for path in engine.drafter.head.tree.paths] == held["paths"]
    calibrated(tmp_path / "drafter.json")  # a description is calibrated as well, into the folder of its heads
    assert (heads / "tree.json").exists()


def test_a_published_tree_by_name(heads, family, said, refused):
    spec = {"drafter": "medusa", "checkpoint": str(heads), "tree": "vicuna_33b_stage1"}  # three deep
    assert drafted(said, family, json.dumps(spec)) > drafted(said, family, f"medusa:{heads}")
    deep = json.dumps(spec | {"tree": "mc_sim_7b_63"})
    assert "4 deep" in refused("generate", family / "target", "x", "--drafter", deep)
    unknown = json.dumps(spec | {"tree": "mc_sim"})
    assert "mc_sim_7b_63" in refused("generate", family / "target", "x", "--drafter", unknown)


@pytest.mark.parametrize("content", ["{", "[[0, 0, 0, 0, 0, 0]]", '{"paths": []}'])
def test_a_tree_that_is_damaged_is_made_anew(calibrated, heads, content, family, refused):
    (heads / "tree.json").write_text(content)
    refused("generate", family / "target", "x", "--drafter", f"medusa:{heads}")
    calibrated(f"medusa:{heads}")
    assert len(json.loads((heads / "tree.json").read_text())["candidates"]) == 3


def test_answers_of_a_file(calibrated, heads, answers):
    calibrated(f"medusa:{heads}", "--data", answers, "--answers", 20)
    assert json.loads((heads / "tree.json").read_text())["answers"] == 20
    calibrated(f"medusa:{heads}", "--data", answers, "--temperature", 0.5, "--answers", 100)
    held = json.loads((heads / "tree.json").read_text())
    assert (held["answers"], held["temperature"]) == (30, 0.5)


def test_what_training_holds_out_comes_first(calibrated, heads, answers, monkeypatch):
    seen = []
    calibrate = module.calibrate
    monkeypatch.setattr(module, "calibrate", lambda *given: seen.append(given[2]) or calibrate(*given))
    calibrated(f"medusa:{heads}", "--data", answers, "--answers", 4)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    greedy = [row for row in rows if row["temperature"] == 0]
    expected = [greedy[19], greedy[29], greedy[28], greedy[27]]  # the 20th is held out, the 40th and 60th were drawn
    assert [list(sample.answer) for sample in seen[0]] == [row["answer"] for row in expected]


def test_without_a_file_the_suite_is_asked(calibrated, heads, monkeypatch):
    seen = []
    answers_of = module.answers_of
    monkeypatch.setattr(
        module,
        "answers_of",
        lambda engine, prompts, params: seen.append((prompts, params)) or answers_of(engine, prompts, params),
    )
    calibrated(f"medusa:{heads}", "--temperature", 0.7, "--seed", 4)
    ((prompts, params),) = seen
    assert len(prompts) == 6 < len(suites.load()) and len({tuple(prompt) for prompt in prompts}) == 6
    assert (params.temperature, params.seed, params.max_new_tokens) == (0.7, 4, 24)


def test_several_rows(calibrated, heads):
    assert "2 request(s)" in calibrated(f"medusa:{heads}", "--rows", 2)
    assert json.loads((heads / "tree.json").read_text())["rows"] == 2


def test_on_the_kernels_and_numbers_of_this_machine(forerun, family, heads, sizes):
    spec = ("--drafter", f"medusa:{heads}")
    code, out, err = forerun("calibrate", family / "target", *spec, *FEW, "--dtype", "bf16")
    assert code in (0, 1) and out.count("x to ") >= 3, err
    assert (heads / "tree.json").exists() == (code == 0)
    if code == 0:
        assert json.loads((heads / "tree.json").read_text())["machine"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("where", ["answers", "timings"])
def test_interrupted_it_leaves_nothing(forerun, family, heads, sizes, monkeypatch, where):
    (heads / "tree.json").write_text("[[0], [1]]")
    step, timing = Engine._step, module._measured
    begun = where == "answers"

    def interrupted(self):
        if begun:
            raise KeyboardInterrupt
        return step(self)

    def timings(*given):
        nonlocal begun
        begun = True
        return timing(*given)

    monkeypatch.setattr(Engine, "_step", interrupted)
    monkeypatch.setattr(module, "_measured", timings)
    code, out, err = forerun("calibrate", family / "target", "--drafter", f"medusa:{heads}", *FEW)
    assert (code, out) == (130, "") and err.splitlines()[-1] == "forerun: interrupted"
    assert (heads / "tree.json").read_text() == "[[0], [1]]"
    assert {path.name for path in heads.iterdir()} == {"config.json", "model.safetensors", "tree.json"}


# ---- what is refused


@pytest.fixture
def calibrate_refused(refused, family):
    def call(spec: object, *options: object, target: str = "target") -> str:
        return refused("calibrate", family / target, "--drafter", spec, *FEW, *options)

    return call


def test_drafters_without_a_tree(calibrate_refused, family, tmp_path):
    for spec in ("lookup", "none", "medusa", "hydra", f"small:{family / 'small'}"):
        assert "write medusa:DIR or hydra:DIR" in calibrate_refused(spec)
    assert "lookup" in calibrate_refused("lokup")
    assert "no.yaml" in calibrate_refused(tmp_path / "no.yaml")


def test_heads_that_are_not_there(calibrate_refused, heads, family, tmp_path):
    assert f"there is no {tmp_path / 'no' / 'config.json'}" in calibrate_refused(f"medusa:{tmp_path / 'no'}")
    assert f"write medusa:{heads}" in calibrate_refused(f"hydra:{heads}")
    assert "forerun convert" in calibrate_refused(f"medusa:{family / 'small'}")
    (heads / "model.safetensors").write_bytes(b"x")
    assert "damaged" in calibrate_refused(f"medusa:{heads}")


def test_heads_of_another_target(calibrate_refused, heads):
    sentence = calibrate_refused(f"medusa:{heads}", target="other")
    assert "heads for target" in sentence and "608" in sentence
    assert not (heads / "tree.json").exists()


def test_data_that_does_not_fit(calibrate_refused, heads, answers, tmp_path):
    spec = f"medusa:{heads}"
    assert "no.jsonl cannot be read" in calibrate_refused(spec, "--data", tmp_path / "no.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]

    def data(name: str, rows: list[dict]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    warm = data("warm.jsonl", [row for row in rows if row["temperature"]])
    assert "0 greedy answers" in calibrate_refused(spec, "--data", warm)
    cold = data("cold.jsonl", [row for row in rows if not row["temperature"]])
    assert "temperature above 0" in calibrate_refused(spec, "--data", cold, "--temperature", 1)
    other = data("other.jsonl", [*rows, {"prompt": [1, 605], "answer": [3, 4]}])
    assert "token 605" in calibrate_refused(spec, "--data", other, "--answers", 500)
    assert not (heads / "tree.json").exists()


def test_places_that_cannot_be_written(calibrate_refused, heads, tmp_path):
    assert "no folder" in calibrate_refused(f"medusa:{heads}", "--out", tmp_path / "no" / "tree.json")
    assert "is a folder" in calibrate_refused(f"medusa:{heads}", "--out", tmp_path)


def test_a_model_without_a_tokenizer_needs_data(refused, family, heads, answers, forerun, sizes, free, tmp_path):
    mute = shutil.copytree(family / "target", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "give its answers with --data" in refused("calibrate", mute, "--drafter", f"medusa:{heads}", *FEW)
    code, _, err = forerun("calibrate", mute, "--drafter", f"medusa:{heads}", *FEW, "--data", answers)
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--answers", 1), "--answers"),
        (("--rows", 0), "--rows"),
        (("--rounds", 1), "--rounds"),
        (("--temperature", -1), "temperature"),
        (("--max-new-tokens", 0), "max_new_tokens"),
        (("--kernels", "fast"), "fast"),
        (("--acceptance", "typical"), "--acceptance"),
    ],
)
def test_options_that_make_no_sense(calibrate_refused, heads, options, named):
    assert named in calibrate_refused(f"medusa:{heads}", *options)
