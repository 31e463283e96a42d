"""`forerun design`: what it measures, believes and proposes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from forerun.cost import Table
from forerun.engine.load import load
from forerun.nn.load import load_network
from forerun.plan import drafts as drafts_of
from forerun.plan import latency
from forerun.plan.acceptance import Given
from forerun.plan.design import Measured, configs
from forerun.plan.drafts import predicted, trained_on
from forerun.sampling import SamplingParams
from forerun.train.pruning.shape import Shape

ON = ("--device", "cpu", "--dtype", "fp32", "--kernels", "torch")


@pytest.fixture(scope="module")
def answers(family, tmp_path_factory) -> Path:
    engine = load(family / "target", dtype="fp32", kernels="torch")
    prompts = [[3 + (7 * place + n) % 500 for place in range(6)] for n in range(24)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=24, ignore_eos=True))
    rows = [{"prompt": p, "answer": o.token_ids} for p, o in zip(prompts, outputs, strict=True)]
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def target(family):
    return load_network(family / "target", torch.float32, torch.device("cpu")).config


@pytest.fixture
def costs(target, tmp_path) -> Path:
    """Of a machine where a layer takes a tenth of a step of the target."""
    kinds = {(one.width, one.mlp_width, one.heads, one.kv_heads): (1e-5, 1e-3) for one in configs(target)}
    here = Measured(kinds, {one.width: 1e-5 for one in configs(target)}, [(1, 1e-2), (17, 1.1e-2)])
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(here.as_dict()))
    return path


def test_layers_are_timed_and_a_plan_is_written_that_can_be_planned_from(
    forerun, family, target, tmp_path, monkeypatch
):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    out = tmp_path / "design.json"
    code, said, err = forerun("design", family / "target", "--survival", 0.9, "--out", out, *ON)
    assert code == 0, err
    written = json.loads(out.read_text())
    here = Measured.of(written["costs"])
    assert all(here.step(config) > 0 for config in configs(target)) and here.verify(1) > 0
    assert here.about["machine"]["kernels"] == "torch" and here.about["context"] > 32
    if written["best"]:
        assert f"--shape {written['best']}" in said and Shape.read(written["best"]).within(target)
    again = tmp_path / "again.json"
    assert forerun("design", family / "target", "--survival", 0.9, "--costs", out, "--out", again, *ON)[0] == 0
    assert json.loads(again.read_text()) == written


def test_windows_and_a_short_context_are_timed(family, tmp_path, monkeypatch):
    """Stacks are deeper than such a draft, whose context may be shorter than the text."""
    config = transformers.MistralConfig(
        **json.loads((family / "small" / "config.json").read_text())
        | {"model_type": "mistral", "architectures": None, "max_position_embeddings": 512, "sliding_window": 12}
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    shutil.copytree(
        family / "small", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*config*", "*.safet*")
    )
    engine, params = load(tmp_path, "none", dtype="fp32", kernels="torch"), SamplingParams(max_new_tokens=32)
    draft = engine.target.network.config
    assert any(draft.windows)
    text = drafts_of.text_for(engine, params)
    assert len(text.tokens) <= 128 + 32, "timing needs room behind it"
    monkeypatch.setattr(latency, "target_cost", lambda *_: Table([(1, 1.0)]))
    here = latency.measured(engine, [replace(draft, max_length=64)], text, params, rounds=1)
    assert here.step(draft) > 0


def test_a_flat_belief_takes_the_cheapest_shape_and_says_how_to_train_it(said, forerun, family, costs):
    line = ("design", family / "target", "--survival", "0.8,0.7", "--costs", costs, *ON)
    found = said(*line)
    assert [plan["shape"] for plan in found["plans"]] == [found["best"]] == ["1x32x48x4/2"]
    plain = found["plain_tokens_per_second"]
    assert plain == pytest.approx(100) and found["plans"][0]["speedup"] > 1.5
    assert f"forerun train small --from {family / 'target'} --shape 1x32x48x4/2" in forerun(*line)[1]


def test_where_nothing_pays_it_says_so(said, forerun, family, costs):
    line = ("design", family / "target", "--survival", 0.01, "--costs", costs, *ON)
    assert said(*line)["best"] is None and "do not speculate" in forerun(*line)[1]
    assert said(*line, "--max-parameters", 10)["plans"] == []


def test_few_trained_drafts_predict_nothing_and_many_predict_others(said, forerun, family, costs, answers):
    """The same model several times is as good as itself."""
    line = ("design", family / "target", "--data", answers, "--costs", costs, *ON)
    own = ("--draft", family / "target")
    code, out, err = forerun(*line, *own, "--draft", family / "small")
    assert code == 0 and "too few" in err and "target is what you have" in out
    found = said(*line, *own, *own, *("--draft", family / "small") * 2)
    one = found["drafts"][0]
    assert (one["rate"], one["tokens_per_step"]) == (1, pytest.approx(12, abs=5)) and one["trained_on"] is None
    deep = next(plan for plan in found["plans"] if plan["shape"].startswith("2x32"))
    assert deep["rate"] == 1, "what was replayed is not predicted"


def test_a_draft_of_a_shape_is_believed_about_that_shape(said, family, costs, answers, tmp_path):
    """Whatever else its config differs in from the target's."""
    draft = shutil.copytree(family / "small", tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "max_position_embeddings": 512}))
    line = ("design", family / "target", "--draft", draft, "--data", answers, "--survival", 0, "--costs", costs, *ON)
    found = said(*line)
    (plan,) = [one for one in found["plans"] if one["shape"] == "1x32x48x4/2"]
    assert plan["rate"] == found["drafts"][0]["rate"] > 0


def test_what_cannot_be_designed_is_refused(refused, family, costs, answers, tmp_path):
    line = ("design", family / "target", *ON)
    assert "--draft, or --survival" in refused(*line, "--costs", costs)
    assert "give --data" in refused(*line, "--draft", family / "small")
    assert "no list of shares" in refused(*line, "--survival", "often", "--costs", costs)
    assert "never rise" in refused(*line, "--survival", "0.5,0.6", "--costs", costs)
    assert "leave this draft out" in refused(*line, "--draft", family / "other", "--data", answers, "--costs", costs)
    (tmp_path / "costs.json").write_text("{}")
    assert "measure them anew" in refused(*line, "--survival", 0.5, "--costs", tmp_path / "costs.json")


def test_tokens_that_a_draft_was_trained_on_are_read_beside_it(tmp_path, monkeypatch):
    assert trained_on(tmp_path) is None
    about = {"schedule": {"steps": 10, "parts": 2}, "rows": 4, "length": 100}
    (tmp_path / drafts_of.PRUNING).write_text(json.dumps(about))
    assert trained_on(tmp_path) == 8000


def test_a_prediction_grows_with_what_a_draft_is_trained_on(target):
    """More tokens, more accepted, where the drafts given say so."""
    drafts = [
        drafts_of.Draft(str(n), Shape(layers).within(target), Given((0.3 + 0.1 * (n % 2),)), 1e5 * (1 + 9 * (n % 2)))
        for n, layers in enumerate((1, 1, 2, 2))
    ]
    few, many = (predicted(drafts, tokens)(Shape(2, 16).within(target)).rate for tokens in (1e5, 1e6))
    assert few == pytest.approx(0.3, abs=0.03) and many == pytest.approx(0.4, abs=0.03)
