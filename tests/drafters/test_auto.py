"""What lies beside a target is found and used; what does not belong to it is left alone."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path

import pytest

import forerun
from forerun.drafters.auto import beside
from forerun.drafters.fallback import Fallback
from forerun.drafters.switch import Switch, is_certain
from forerun.drafting import registry
from forerun.sampling import SamplingParams

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """The reference target, and heads and models beside it: some of its own, some for others."""
    for name in ("target", "small", "wide", "medusa", "hydra++"):
        (tmp_path / name).symlink_to(MODELS / name)
    foreign = tmp_path / "a foreign one"
    shutil.copytree(MODELS / "medusa", foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["training"]["data"]["target"]["fingerprint"] = "another"
    config["training"]["figures"]["tokens_per_step"] = 99.0
    (foreign / "config.json").write_text(json.dumps(config))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("no JSON")
    return tmp_path


def names(found: list[list[dict[str, object]]]) -> list[list[tuple[object, str]]]:
    return [[(one["drafter"], Path(str(one["checkpoint"])).name) for one in candidates] for candidates in found]


def test_the_best_heads_of_this_target_and_a_model_that_is_small_enough_are_found(shelf: Path) -> None:
    heads = [("hydra", "hydra++"), ("medusa", "medusa")]
    assert names(beside(shelf / "target")) == [heads, [("small", "small")]]
    assert names(beside(shelf / "small")) == [[], []], "heads of another, and models that are not smaller"


@pytest.mark.parametrize("promise", [None, "much", float("nan"), 99])
def test_heads_that_promise_nonsense_come_last(shelf: Path, promise: object) -> None:
    (shelf / "medusa").unlink()
    shutil.copytree(MODELS / "medusa", shelf / "medusa")
    config = json.loads((shelf / "medusa" / "config.json").read_text())
    config["training"]["figures"]["tokens_per_step"] = promise
    (shelf / "medusa" / "config.json").write_text(json.dumps(config))
    assert names(beside(shelf / "target"))[0] == [("hydra", "hydra++"), ("medusa", "medusa")]


def test_the_code_of_a_neighbour_is_not_run(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anybody asked whether it may."""
    strange = shelf / "strange"
    shutil.copytree(MODELS / "small", strange)
    (strange / "code.py").write_text(f"open({str(shelf / 'ran')!r}, 'w')\nclass Config: pass\nclass Words: pass\n")
    words = strange / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["code.Words", "code.Words"]}, "tokenizer_class": "Words"}
    words.write_text(json.dumps(json.loads(words.read_text()) | own))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert names(beside(shelf / "target"))[1] == [("small", "small")]
    assert not (shelf / "ran").exists() and "custom code" not in capsys.readouterr().out


def test_a_model_in_memory_or_alone_has_its_stores(shelf: Path, tmp_path: Path) -> None:
    assert beside(None) == []
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "target").symlink_to(MODELS / "small")
    drafter = forerun.load(alone / "target", drafter="auto").drafter
    assert isinstance(drafter, Switch) and [part.name for part in drafter.parts] == ["hierarchy"]


def test_what_is_broken_is_left_out_with_a_warning(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("hydra++", "wide"):
        (shelf / name).unlink()
        shutil.copytree(MODELS / name, shelf / name)
        (shelf / name / "model.safetensors").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        drafter = forerun.load(shelf / "target", drafter="auto").drafter
    assert isinstance(drafter, Switch) and drafter.name == "auto"
    parts = [[part.name for part in one.parts] for one in drafter.parts[1:] if isinstance(one, Fallback)]
    assert parts == [["hierarchy", "medusa"], ["hierarchy", "small"]], "the next best stand in"
    assert "hydra++ is not used" in caplog.text and "wide is not used" in caplog.text


@pytest.mark.parametrize("wishes", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "seeded"])
def test_its_text_is_that_of_plain_decoding(shelf: Path, wishes: dict[str, float]) -> None:
    """A seed's too, whatever the clock says: it is served without luck."""
    prompts, params = ["def main():\n", "import "], SamplingParams(max_new_tokens=96, **wishes)  # type: ignore[arg-type]
    texts = [
        [
            one.token_ids
            for one in forerun.load(shelf / "target", drafter=drafter, dtype="fp32").generate(prompts, params)
        ]
        for drafter in ("none", "auto")
    ]
    assert texts[0] == texts[1]


def test_what_is_certain() -> None:
    assert all(is_certain(one) for one in ("lookup", "hierarchy", "lookup | hierarchy", "hierarchy | medusa:X"))
    assert not any(is_certain(one) for one in ("small:X", "lookup | small:X", "verified:X(lookup)", "auto"))
    assert is_certain({"drafter": "switch", "parts": ["lookup", "hierarchy"]})
    assert registry.method("auto").grows == "drawn"
