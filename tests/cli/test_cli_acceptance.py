"""`forerun train acceptance`, and what the other commands make of the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forerun.drafting.acceptance.head import AcceptanceHead, opened


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    luck = torch.Generator().manual_seed(0)
    rows = [{"prompt": [1, 5, 9], "answer": torch.randint(3, 600, (60,), generator=luck).tolist()} for _ in range(40)]
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(family, answers, out, *options):
    small = f"small:{family / 'small'}"
    base = ("train", "acceptance", "--target", family / "target", "--data", answers, "--out", out)
    return (
        *base,
        "--steps",
        2,
        "--rows",
        4,
        "--length",
        64,
        *(() if "--drafter" in options else ("--drafter", small)),
        *options,
    )


def test_from_answers_to_a_draft_that_ends_itself(forerun, said, family, answers, tmp_path, monkeypatch):
    monkeypatch.setattr("forerun.train.objectives.acceptance.CHAINS", 4)
    head, long = tmp_path / "head", json.dumps({"drafter": "small", "checkpoint": str(family / "small"), "length": 9})
    code, out, err = forerun(
        *trained(family, answers, head, "--depth", 1, "--tie-blocks", "--rejection-weight", 3, "--drafter", long)
    )
    assert code == 0, err
    assert "verification rate" in out and f"acceptance:{head}" in out and "The head has" in err
    assert opened(str(head)).config.weight == 3
    drafter = out.splitlines()[-1].partition("draft with ")[2]
    wishes = ("generate", family / "target", "import os", "--max-new-tokens", 24, "--dtype", "fp32")
    assert said(*wishes, "--drafter", drafter)["text"] == said(*wishes, "--drafter", "none")["text"]
    told = said("inspect", head)["heads"]
    assert json.loads(told["use"])["checkpoint"] == "small"
    assert (told["kind"], told["draft_model"], told["for_the_target"]) == ("acceptance head", "small", "target")


def test_what_cannot_be_trained(refused, family, answers, tmp_path):
    assert "draws no chains" in refused(*trained(family, answers, tmp_path / "x", "--drafter", "lookup"))
    other = f"small:{family / 'other'}"
    assert "shares the target's tokenizer" in refused(*trained(family, answers, tmp_path / "x", "--drafter", other))
    assert "holds another model" in refused(*trained(family, answers, family / "small"))


def test_held_out_answers_must_teach_something(refused, family, answers, tmp_path):
    """The last of twenty is held out, and here it is one token long."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in rows[19::20]:
        row["answer"] = row["answer"][:1]
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "a smaller --mix" in refused(*trained(family, short, tmp_path / "x", "--mix", 0.99))


# ---- heads as the paper's code writes them


def published(folder: Path, blocks: list[torch.Tensor], depth: int, skip: int = 0) -> Path:
    """skip: names of a repeated block that are left out, as safetensors does with tensors that share memory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "num_layers": depth}))
    tensors = {f"model.{depth}.weight": torch.ones(2, 4), f"model.{depth}.bias": torch.tensor([0.25, 0.5])}
    for number, block in list(enumerate(blocks))[: depth - skip]:
        tensors |= {f"model.{number}.linear.weight": block.clone(), f"model.{number}.linear.bias": block[0].clone()}
    save_file(tensors, folder / "model.safetensors")
    return folder


W, V = torch.arange(16.0).view(4, 4) / 16, torch.eye(4)


@pytest.mark.parametrize(
    ("blocks", "skip", "tied"), [([W, W, W], 0, True), ([W, W, W], 2, True), ([W, V, W], 0, False), ([W], 0, False)]
)
def test_a_published_head_is_read_as_it_is(forerun, tmp_path, blocks, skip, tied):
    source = published(tmp_path / "theirs", blocks, len(blocks), skip)
    code, out, err = forerun("convert", source, "--to", "ours", "--out", tmp_path / "ours")
    assert code == 0 and "the same bit by bit" in out and "taken to be 6" in err
    head = opened(str(tmp_path / "ours"))
    assert isinstance(head, AcceptanceHead) and head.config.tie_blocks is tied and head.config.depth == len(blocks)
    x = states = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for block in blocks:
        x = x + torch.nn.functional.silu(block @ x + block[0])
    torch.testing.assert_close(head(states), torch.ones(2, 4) @ x + torch.tensor([0.25, 0.5]))


def test_a_published_head_that_does_not_fit_is_refused(refused, tmp_path):
    source = published(tmp_path / "theirs", [W, V, W], 3)
    assert "only read" in refused("convert", source, "--to", "eagle", "--out", tmp_path / "x")
    (source / "config.json").write_text(json.dumps({"hidden_size": 4, "num_layers": 5}))
    err = refused("convert", source, "--to", "ours", "--out", tmp_path / "x")
    assert "missing model.5.weight" in err and "unexpected model.3.weight" in err
    assert not (tmp_path / "x").exists()
