"""Heads to the hub and back, with a hub that is a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import forerun
from forerun.errors import CheckpointError
from forerun.integrations.hub import Heads

MODELS = Path(__file__).parents[2] / "models"
HEADS = MODELS / "hydra++"


class FakeHub:
    """Repositories are folders, and every call is noted."""

    def __init__(self, home: Path):
        self.home = home
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **wish: Any) -> Any:
        self.calls.append(("create_repo", wish))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id: str, folder_path: Path, **wish: Any) -> Any:
        self.calls.append(("upload_folder", wish))
        shutil.copytree(folder_path, self.home / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def snapshot_download(self, name: str, **wish: Any) -> str:
        self.calls.append(("snapshot_download", wish))
        if not (self.home / name).is_dir():
            raise OSError("no such repository")
        return str(self.home / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_what_is_pushed_comes_back_and_drafts(hub: FakeHub) -> None:
    address = Heads.from_pretrained(HEADS).push_to_hub("me/heads", license="apache-2.0", private=True)
    assert address == "hub/me/heads/commit/1"
    assert hub.calls[0] == ("create_repo", {"private": True, "exist_ok": True})
    assert hub.calls[1][1]["delete_patterns"] == ["tree.json"]  # of older heads; one that is pushed stays

    heads = Heads.from_pretrained("me/heads", revision="main")
    assert hub.calls[-1][1]["revision"] == "main"
    for name in ("config.json", "model.safetensors", "tree.json"):
        assert (heads.checkpoint.folder / name).read_bytes() == (HEADS / name).read_bytes()
    params = forerun.SamplingParams(max_new_tokens=24)
    target = str(MODELS / "target")
    (drafted,) = forerun.load(target, drafter=heads.spec).generate("import ", params)
    (plain,) = forerun.load(target).generate("import ", params)
    assert drafted.token_ids == plain.token_ids and drafted.stats.accepted_tokens > 0


def test_the_card_says_what_was_measured() -> None:
    card = Heads.from_pretrained(HEADS).card("me/heads", "apache-2.0")
    config, tree = (json.loads((HEADS / name).read_text()) for name in ("config.json", "tree.json"))
    training = config["training"]
    nodes = len(tree["paths"])
    measured = next(one for one in tree["candidates"] if one["nodes"] == nodes)["tokens_per_step"]
    for expected in (
        training["data"]["target"]["fingerprint"],
        f"| tokens per step, projected on held-out answers | {training['figures']['tokens_per_step']:.2f} |",
        f"| tokens per step, measured with it | {measured:.2f} |",
        "| licence | apache-2.0 |",
        "| preset | `hydra++` |",
        "--drafter hydra:heads",
        'Heads.from_pretrained("me/heads")',
        f'"steps": {training["schedule"]["steps"]}',
    ):
        assert expected in card.content, expected
    assert card.data.license == "apache-2.0" and card.data.library_name == "forerun"
    assert "{{" not in card.content and "{%" not in card.content


def test_what_was_not_recorded_is_not_told(tmp_path: Path) -> None:
    """Converted heads know nothing of their training, and no licence is guessed."""
    config = json.loads((HEADS / "config.json").read_text()) | {"training": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = Heads.from_pretrained(tmp_path).card("me/heads").content
    assert "fingerprint" not in content and "per step" not in content and "None" not in content
    assert "| licence | not stated |" in content


def test_saving_leaves_no_tree_of_other_heads(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(HEADS, bare)
    (bare / "tree.json").unlink()
    Heads.from_pretrained(HEADS).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tree.json").exists()
    Heads.from_pretrained(bare).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tree.json").exists()


def test_heads_are_not_saved_over_themselves(tmp_path: Path) -> None:
    shutil.copytree(HEADS, tmp_path / "heads")
    with pytest.raises(CheckpointError, match="give another folder"):
        Heads.from_pretrained(tmp_path / "heads").save_pretrained(tmp_path / "heads")


def test_what_the_hub_does_not_have_is_one_sentence(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a folder here nor heads"):
        Heads.from_pretrained("nobody/nothing")


def test_a_refused_push_is_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("401 Unauthorized")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(CheckpointError, match=r"me/heads cannot be put on the hub \(401 Unauthorized\)"):
        Heads.from_pretrained(HEADS).push_to_hub("me/heads")
