"""Folders of draft heads: what is written is read again, and what does not fit is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra.network import HydraHeads
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import DEFAULT_TREE, Checkpoint, load, read, tree_for, write
from forerun.drafting.trained import LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.ranktree import PUBLISHED, RankTree

MEDUSA = MedusaConfig(width=16, vocab_size=20, heads=3)
HYDRA = HydraConfig(width=16, vocab_size=20, heads=3, layers=3, tied_layers=True, dropout=0.2)
PREFIX = LayerConfig(heads=4, kv_heads=2, head_dim=4, mlp_width=24, max_length=64)
HYDRA_PP = replace(HYDRA, layers=2, tied_layers=False, prefix=PREFIX)


def shuffled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
    return module


def written(folder: Path, config: MedusaConfig | HydraConfig = MEDUSA, seed: int = 0) -> nn.Module:
    kind = "medusa" if isinstance(config, MedusaConfig) else "hydra"
    module = shuffled(MedusaHeads(config) if kind == "medusa" else HydraHeads(config), seed)
    write(module, config, Checkpoint(folder, kind, {}, "target", {"preset": kind}))
    return module


def read_back(folder: Path) -> nn.Module:
    stored = read(folder)
    kind = registry.trained()[stored.drafter]
    return stored.module(kind.network, kind.config)


@pytest.fixture
def heads(tmp_path) -> Path:
    written(tmp_path / "heads")
    return tmp_path / "heads"


def changed(folder: Path, **fields: object) -> dict:
    """Change config.json; None removes a field."""
    path = folder / "config.json"
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return found


def with_architecture(folder: Path, **fields: object) -> None:
    changed(folder, architecture=json.loads((folder / "config.json").read_text())["architecture"] | fields)


# ---- there and back


@pytest.mark.parametrize(
    "config",
    [
        MEDUSA,
        replace(MEDUSA, layers=2),
        replace(MEDUSA, layers=3, tied_layers=True),
        replace(MEDUSA, vocabulary="shared"),
        HYDRA,
        replace(HYDRA, layers=1),
        replace(HYDRA, vocabulary="shared"),
        HYDRA_PP,
    ],
    ids=lambda config: f"{type(config).__name__}{config.layers}{config.vocabulary}",
)
def test_what_is_written_is_read_again(tmp_path, config):
    module = written(tmp_path / "heads", config)
    again = read_back(tmp_path / "heads")
    ours, theirs = dict(module.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.config == (replace(config, dropout=0.0) if isinstance(config, HydraConfig) else config)


def test_the_folder_says_everything(tmp_path):
    written(tmp_path / "heads", HYDRA_PP)
    found = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert found.keys() == {"forerun", "drafter", "architecture", "target", "training"}
    assert (found["forerun"], found["drafter"], found["target"]) == (1, "hydra", "target")
    assert found["architecture"].keys() == set("width vocab_size heads layers tied_layers vocabulary prefix".split())
    assert found["architecture"]["prefix"]["mlp_width"] == 24
    weights = tmp_path / "heads" / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "heads").iterdir()), "anyone may read heads"
    assert [path.name for path in tmp_path.iterdir()] == ["heads"], "nothing is left beside"


def test_dropout_belongs_to_training(tmp_path):
    written(tmp_path / "heads", HYDRA)
    assert "dropout" not in read(tmp_path / "heads").architecture
    assert read_back(tmp_path / "heads").config.dropout == 0


def test_no_prefix_is_no_field(tmp_path):
    written(tmp_path / "heads", HYDRA)
    assert "prefix" not in read(tmp_path / "heads").architecture
    assert read_back(tmp_path / "heads").prefix is None


def test_new_heads_replace_older_ones_and_their_tree(heads):
    (heads / "tree.json").write_text('{"paths": [[0], [1]]}')
    (heads / "notes.txt").write_text("mine")
    module = written(heads, seed=1)
    assert torch.equal(read_back(heads).blocks, module.blocks)
    assert {path.name for path in heads.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    module = written(tmp_path / "heads")
    (tmp_path / "heads" / "tree.json").write_text("[[0]]")

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    for name in ("heads", "new"):
        with pytest.raises(CheckpointError, match=r"cannot be written .*No space left.*make room"):
            written(tmp_path / name, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"] and (tmp_path / "heads" / "tree.json").exists()
    assert torch.equal(read_back(tmp_path / "heads").blocks, module.blocks)


# ---- what does not fit


def test_kinds_mixed_up(heads):
    with pytest.raises(DrafterError, match=rf"{heads} holds a drafter of the kind medusa: write medusa:{heads}"):
        load(str(heads), "hydra")
    with pytest.raises(DrafterError, match="needs a checkpoint: write hydra:PATH"):
        load(None, "hydra")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=rf"there is no {tmp_path / 'no' / 'config.json'}"):
        read(tmp_path / "no")


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "[]", '{"forerun": 2}', '{"forerun": "1"}', "3"])
def test_what_others_have_written(heads, text):
    (heads / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"does not hold heads of this library.*forerun convert"):
        read(heads)


@pytest.mark.parametrize("content", [b"", b"{", b'{"forerun": 1', b"\xff\xfe\x00"])
def test_a_damaged_config(heads, content):
    (heads / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read(heads)


@pytest.mark.parametrize("field", ["drafter", "architecture", "target", "training"])
def test_a_field_that_is_missing(heads, field):
    changed(heads, **{field: None})
    with pytest.raises(CheckpointError, match=f"lacks the field '{field}'"):
        read(heads)


def test_unknown_and_missing_architecture(heads):
    with_architecture(heads, kernel=3, heads=3)
    with pytest.raises(CheckpointError, match=r"unknown architecture fields \(kernel\)"):
        read_back(heads)
    changed(heads, architecture={"vocab_size": 20})
    with pytest.raises(CheckpointError, match=r"lacks architecture fields .*'width'"):
        read_back(heads)


@pytest.mark.parametrize(
    "fields",
    [{"heads": "3"}, {"heads": 0}, {"layers": -1}, {"width": 16.0}, {"vocabulary": "foo"}, {"vocab_size": True}],
)
def test_values_that_make_no_sense(heads, fields):
    with_architecture(heads, **fields)
    with pytest.raises(DrafterError, match=rf"with (the )?{next(iter(fields))} .* no sense"):
        read_back(heads)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"heads": 4}, r"wrong shape blocks \[1, 3, 16, 16\] instead of \[1, 4, 16, 16\]"),
        ({"layers": 2}, r"wrong shape biases \[1, 3, 16\] instead of \[2, 3, 16\]"),
        ({"vocab_size": 21}, r"wrong shape vocabulary \[3, 20, 16\] instead of \[3, 21, 16\]"),
        ({"vocabulary": "shared"}, r"unexpected  vocabulary \[3, 20, 16\]"),
    ],
)
def test_weights_of_another_architecture(heads, fields, line):
    with_architecture(heads, **fields)
    with pytest.raises(CheckpointError, match=rf"(?s)the weights in {heads} do not fit its config.json.*{line}"):
        read_back(heads)


def test_a_tensor_that_is_missing(heads):
    tensors = load_file(heads / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if name != "biases"}, heads / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing     biases \[1, 3, 16\]"):
        read_back(heads)


def test_damaged_weights(heads):
    weights = heads / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * len(content)):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            read_back(heads)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_back(heads)


# ---- trees


def test_trees_in_the_order_of_preference(heads, tmp_path):
    stored = read(heads)
    assert tree_for(stored, None, 4, 4096) == DEFAULT_TREE
    assert tree_for(stored, None, 3, 4096) == DEFAULT_TREE.within(3, 10) and tree_for(stored, None, 1, 4096).depth == 1
    (heads / "tree.json").write_text('{"paths": [[0], [1]], "rows": 1}')
    assert tree_for(stored, None, 3, 4096) == RankTree([(0,), (1,)])
    (tmp_path / "other.json").write_text("[[0], [0, 0]]")
    assert tree_for(stored, str(tmp_path / "other.json"), 3, 4096) == RankTree.chain(2)
    assert tree_for(stored, [[0], [0, 0], [0, 0, 0]], 3, 4096) == RankTree.chain(3)
    assert tree_for(stored, {"paths": [[2], [0]]}, 3, 4096) == RankTree([(2,), (0,)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trees_by_name(heads, name):
    assert tree_for(read(heads), name, 5, 4096) == RankTree.named(name)


def test_a_tree_that_is_too_deep(heads):
    stored = read(heads)
    with pytest.raises(DrafterError, match=rf"the tree is 4 deep and {heads} has 3 heads"):
        tree_for(stored, "mc_sim_7b_63", 3, 4096)
    (heads / "tree.json").write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    with pytest.raises(DrafterError, match="4 deep"):
        tree_for(stored, None, 3, 4096)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", '{"nodes": 3}', '{"paths": 3}', "[[0], [0]]", "[[1, 0]]", '[["a"]]']
)
def test_a_tree_file_that_is_no_tree(heads, content):
    (heads / "tree.json").write_text(content)
    with pytest.raises(DrafterError):
        tree_for(read(heads), None, 3, 4096)


def test_a_tree_that_is_nowhere(heads, tmp_path):
    with pytest.raises(DrafterError, match=r"there is no tree .*mc_sim_7b_63"):
        tree_for(read(heads), str(tmp_path / "no.json"), 3, 4096)
    with pytest.raises(DrafterError, match="cannot be read"):
        tree_for(read(heads), str(tmp_path), 3, 4096)
    with pytest.raises(DrafterError, match="holds no tree"):
        tree_for(read(heads), 7, 3, 4096)
