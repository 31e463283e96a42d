"""Checkpoints: what is read is what was published, and every refusal is one sentence that helps."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from forerun.errors import CheckpointError, ForerunError
from forerun.nn import dtype as dtypes
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.nn.save import save_pretrained
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sources.folder import checkpoint_folder
from nn.feeding import CPU, Reader, plain, saved, small_model, some_tokens

TEXT = some_tokens(12)
TINY = TransformerConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_length=64, tied=True
)


def load(folder: str | Path) -> Transformer:
    network = load_network(folder, torch.float32, CPU)
    assert isinstance(network, Transformer)
    return network


def assert_same(network: Any, theirs: Any) -> None:
    logits = Reader(network).read([TEXT]).logits_BNV
    torch.testing.assert_close(logits, plain(theirs, TEXT).logits, atol=2e-5, rtol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(small_model("llama"), tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


# ---- reading


def test_shards(tmp_path: Path) -> None:
    theirs = small_model("llama")
    saved(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(load(tmp_path), theirs)


def test_the_number_format_asked_for(folder: Path) -> None:
    network = load_network(folder, torch.bfloat16, CPU)
    assert isinstance(network, Transformer)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    expected = load(folder).state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16())


def test_old_config_keys(folder: Path) -> None:
    """`rope_theta` and `rope_scaling`, as every checkpoint before transformers 5 spells them."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0, "rope_scaling": scaling}))
    network = load(folder)
    assert network.config.rope_theta == 77.0
    assert_same(network, transformers.AutoModelForCausalLM.from_pretrained(folder))


def test_buffers_of_old_exports_do_not_matter(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)


def test_a_tied_head_shares_its_memory(tmp_path: Path) -> None:
    network = load(saved(small_model("llama", tie_word_embeddings=True), tmp_path))
    assert network.head.weight is network.embedding.weight


def test_a_tied_head_that_is_published_all_the_same(tmp_path: Path) -> None:
    saved(small_model("llama", tie_word_embeddings=True), tmp_path)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    network = load(tmp_path)
    assert network.config.tied
    assert network.head.weight is network.embedding.weight
    edit(tmp_path, lambda w: w["lm_head.weight"].mul_(2))
    network = load(tmp_path)
    assert not network.config.tied
    assert_same(network, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_hub_id_downloads_no_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load("someone/some-model")
    assert asked["name"] == "someone/some-model"
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "model.safetensors",
            "pytorch_model.bin",
            "config.json",
            "tokenizer.model",
            "merges.txt",
            "code.py",
            "original/consolidated.00.pth",
            "consolidated.safetensors",
            "onnx/model.safetensors",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert sorted(kept) == ["config.json", "merges.txt", "model.safetensors", "tokenizer.model"]


# ---- refusals


def refuse(path: str | Path, *words: str) -> str:
    """Loading fails with one sentence that contains the words; returns all of the message."""
    with pytest.raises(CheckpointError) as caught:
        load_network(path, torch.float32, CPU)
    message = str(caught.value)
    first = message.splitlines()[0]
    assert str(path) in first
    for word in words:
        assert word in message
    assert ": " in first, "no mend"
    return message


def test_no_such_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "there is no folder", "check the path")


def test_no_such_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing here\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refuse("someone/absent", "neither a folder here nor a model", "nothing here", "check the name")
    assert "second line" not in message


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    refuse(folder / "model.safetensors", "is a file", "give the folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, "has no config.json")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "nobody-knows"}', '{"model_type": "llama", "vocab_size": "x"}']
)
def test_a_config_that_cannot_be_used(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json cannot be used", "repair it")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "has no model.safetensors")


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "only pickled weights (pytorch_model.bin)", "convert")


@pytest.mark.parametrize("keep", [0, 5, 300, -7])
def test_weights_cut_short(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    refuse(folder, "model.safetensors is damaged or cut short", "fetch it again")


def test_a_missing_shard(tmp_path: Path) -> None:
    saved(small_model("llama"), tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    refuse(tmp_path, f"lacks {shard.name}", "fetch the missing files")


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', "[1]"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    saved(small_model("llama"), tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refuse(tmp_path, "index.json is damaged")


def test_weights_that_are_not_those_of_the_config(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]
        weights["model.layers.0.mlp.extra"] = torch.ones(2, 3)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.ones(3)
        weights["lm_head.weight"] = torch.ones(61, 32, dtype=torch.int8)

    edit(folder, change)
    message = refuse(folder, "do not fit its config.json")
    assert message.splitlines()[1:] == [
        "  missing     model.norm.weight [32]",
        "  unexpected  model.layers.0.mlp.extra [2, 3]",
        "  wrong shape model.layers.1.mlp.down_proj.weight [3] instead of [32, 48]",
        "  wrong type  lm_head.weight I8 instead of one of F64, F32, F16, BF16",
    ]


def test_a_long_difference_is_cut(folder: Path) -> None:
    configure(folder, hidden_size=64)
    assert refuse(folder).splitlines()[-1].endswith("more")


def test_too_few_layers_in_the_config_is_an_error(folder: Path) -> None:
    configure(folder, num_hidden_layers=2)
    refuse(folder, "unexpected  model.layers.2.input_layernorm.weight [32]")


# ---- writing


def trained(config: TransformerConfig = TINY) -> Transformer:
    return Transformer(config).initialise(seed=3)


def test_what_is_written_is_a_hugging_face_llama(tmp_path: Path) -> None:
    network = trained()
    save_pretrained(network, tmp_path / "new", {"pad_token_id": 0})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.bfloat16
    config = theirs.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (64, True)
    assert load(tmp_path / "new").config == TINY
    assert_same(network.bfloat16().float(), theirs.float())


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "eos_token_id": 7}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
)
def test_every_family_survives_a_round_trip(kind: str, choices: dict[str, Any], tmp_path: Path) -> None:
    theirs = small_model(kind, **choices)
    ours = load(saved(theirs, tmp_path / "theirs"))
    save_pretrained(ours, tmp_path / "ours", dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert again.config.eos_token_id == theirs.config.eos_token_id
    assert torch.equal(plain(again, TEXT).logits, plain(theirs, TEXT).logits)
    assert load(tmp_path / "ours").config == ours.config


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(trained(), tmp_path)
    save_pretrained(trained(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the same failure, in the same place, as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with little_room(10_000), pytest.raises(CheckpointError, match=r"cannot be written .*make room"):
        save_pretrained(trained(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_pretrained(trained(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with little_room(10_000), pytest.raises(CheckpointError):
        save_pretrained(Transformer(TINY).initialise(seed=4), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(trained(), tmp_path / "model")


def test_a_shape_that_nobody_publishes(tmp_path: Path) -> None:
    odd = TransformerConfig(**(vars(TINY) | {"qk_norm": True, "mlp_bias": True}))
    with pytest.raises(CheckpointError, match="none of llama, mistral, qwen2, qwen3"):
        save_pretrained(trained(odd), tmp_path / "model")
    with pytest.raises(CheckpointError, match="none of"):
        save_pretrained(trained(), tmp_path / "model", {"rms_norm_eps": 0.5})
    with pytest.raises(CheckpointError, match="transformers would refuse"):
        save_pretrained(trained(), tmp_path / "model", {"vocab_size": "many"})
    assert list(tmp_path.iterdir()) == []


# ---- number formats


def test_names_of_number_formats() -> None:
    assert dtype_of("fp32", CPU) == torch.float32
    assert dtype_of("bf16", CPU) == torch.bfloat16
    assert dtype_of("fp16", CPU) == torch.float16
    with pytest.raises(ForerunError, match="no dtype 'int4': choose one of auto, bf16, fp32, fp16"):
        dtype_of("int4", CPU)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True, "architecture": "aarch64"}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_follows_the_processor(
    flags: dict[str, object], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert dtype_of("auto", CPU) == expected
    assert dtypes.multiplies_bf16(torch.device("meta")) is False


def test_auto_without_torch_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert dtype_of("auto", CPU) in (torch.bfloat16, torch.float32)


def test_paths_may_be_relative_to_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint_folder("~/model") == folder
