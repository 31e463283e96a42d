"""A model's folder as one record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from forerun.errors import CheckpointError
from forerun.sources.source import Source

TARGET = Path(__file__).parents[2] / "models" / "target"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything of a model but its weights."""
    copy = tmp_path / "model"
    shutil.copytree(TARGET, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def test_everything_about_a_model() -> None:
    source = Source.of(TARGET)
    assert (source.asked, source.path, source.name) == (str(TARGET), TARGET, "target")
    assert source.config.model_type == "llama"
    assert source.ends == (2, 1) and source.template is None
    assert source.tokenizer is not None and source.tokenizer is source.tokenizer
    assert source.weights.bytes == (TARGET / "model.safetensors").stat().st_size
    assert len(source.fingerprint) == len(source.vocabulary_fingerprint) == 64


def test_parts_are_read_once_and_only_when_asked_for(folder: Path) -> None:
    source = Source.of(folder)
    assert source.ends == (2, 1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert source.ends == (2, 1) and Source.of(folder).ends == (7,)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        _ = source.weights


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    source = Source.of(folder)
    assert source.tokenizer is None and source.template is None and source.vocabulary_fingerprint == ""


def test_a_chat_template_travels_with_the_tokenizer(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert Source.of(folder).template == "{{ messages }}"


def test_another_config_is_another_model(folder: Path) -> None:
    shutil.copy(TARGET / "model.safetensors", folder)
    before = Source.of(folder).fingerprint
    assert before == Source.of(TARGET).fingerprint
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 5.0}))
    assert Source.of(folder).fingerprint != before


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        Source.of(Path("nowhere"))
