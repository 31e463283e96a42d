"""What lies beside a target is found and used; what does not belong to it is left alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

import forerun
from forerun.drafters.auto import beside
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


def names(found: list[dict[str, object]]) -> list[tuple[object, str]]:
    return [(one["drafter"], Path(str(one["checkpoint"])).name) for one in found]


def test_the_best_heads_of_this_target_and_a_model_that_is_small_enough_are_found(shelf: Path) -> None:
    assert names(beside(shelf / "target")) == [("hydra", "hydra++"), ("small", "small")]
    (shelf / "hydra++").unlink()
    assert names(beside(shelf / "target")) == [("medusa", "medusa"), ("small", "small")]
    assert names(beside(shelf / "small")) == [], "heads of another, and models that are not smaller"


def test_a_model_in_memory_or_alone_has_its_stores(shelf: Path, tmp_path: Path) -> None:
    assert beside(None) == []
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "target").symlink_to(MODELS / "small")
    drafter = forerun.load(alone / "target", drafter="auto").drafter
    assert isinstance(drafter, Switch) and [part.name for part in drafter.parts] == ["hierarchy"]


def test_what_is_broken_is_left_out_with_a_warning(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shelf / "hydra++").unlink()
    broken = shelf / "medusa"
    broken.unlink()
    shutil.copytree(MODELS / "medusa", broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        drafter = forerun.load(shelf / "target", drafter="auto").drafter
    assert isinstance(drafter, Switch) and len(drafter.parts) == 2
    assert "medusa is not used" in caplog.text


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
