"""Layouts of the outside world, made here as their own code makes them: what is read is what they
say, and what is written is read back the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra.layouts import hydra_table
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.layouts import FASTERDECODING, medusa_table
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.trained import LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts import files
from forerun.layouts.exchange import Base, Heads, read, write
from forerun.layouts.table import skeleton

D, V, K = 16, 32, 3


# ---- the published code, in miniature


class Block(nn.Module):
    """Both codes' residual block; with a wider input, as the first of Hydra's."""

    def __init__(self, seen: int = 1):
        super().__init__()
        self.linear = nn.Linear(seen * D, D)
        self.res_connection = nn.Linear(seen * D, D) if seen > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.res_connection(x) + nn.functional.silu(self.linear(x))


def medusa_heads(layers: int = 1, heads: int = K, shared: bool = False) -> nn.ModuleList:
    """As Medusa's code: one block repeated, so that layers are tied."""
    last = [[] if shared else [nn.Linear(D, V, bias=False)] for _ in range(heads)]
    return shaken(nn.ModuleList(nn.Sequential(*[Block()] * layers, *end) for end in last))


class HydraModule(nn.Module):
    """As Hydra's code: with the copy of the embeddings, and with a prefix layer that has embeddings nobody reads."""

    def __init__(self, layers: int, base: transformers.LlamaForCausalLM, prefix: bool):
        super().__init__()
        config = transformers.LlamaConfig(
            **base.config.to_dict() | {"num_hidden_layers": 1, "tie_word_embeddings": False}
        )
        drop = [nn.Dropout(0.0)] if prefix else []
        if prefix:
            self.prefix_embeding_layer = transformers.LlamaModel(config)
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(*drop, Block(i + 2), *[*drop, Block()] * (layers - 1)) for i in range(K)
        )
        heads = [nn.Linear(D, V) for _ in range(K)]
        self.hydra_lm_head = nn.ModuleList(nn.Sequential(*drop, head) if prefix else head for head in heads)
        shaken(self)
        self.input_embed_fn = base.get_input_embeddings()


def shaken(module: Any) -> Any:
    """With nothing left at its neutral value."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
    return module.eval()


def vllm_tensors(heads: nn.ModuleList, biased: bool = True) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in heads.state_dict().items():
        head, slot, *rest = name.split(".")
        if rest[0] == "weight":
            renamed[f"lm_heads.{head}.weight"] = tensor
        elif biased or rest[1] == "weight":
            renamed[f"blocks.{head}.layers.{slot}.{rest[1]}"] = tensor
    return renamed


def put(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith((".pt", ".bin")):
        torch.save(dict(tensors), folder / name)
    else:
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder


def medusa_config(**entries: object) -> dict[str, object]:
    """As it is on the hub, with the number of heads that is wrong there."""
    base = {"base_model_name_or_path": "lmsys/tiny", "medusa_num_heads": 2, "medusa_num_layers": 1}
    return base | {"transformers_version": "4.31.0"} | entries


VLLM = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": D, "vocab_size": V, "num_heads": K}
VLLM |= {"num_hidden_layers": 1, "max_paths": 64, "topk": 10, "truncated_vocab_size": None}


def hydra_config(**entries: object) -> dict[str, object]:
    base = {"base_model_name_or_path": "lmsys/tiny", "grounded_heads": True, "hidden_state_offset": 0}
    return base | {"hydra_head_arch": "mlp", "hydra_num_heads": K, "hydra_num_layers": 1} | entries


def tiny_llama(folder: Path, **entries: object) -> transformers.LlamaForCausalLM:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | {"rope_theta": 5000.0} | entries))
    shaken(model).save_pretrained(folder)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> transformers.LlamaForCausalLM:
    return tiny_llama(tmp_path / "target")


@pytest.fixture
def base(llama: object, tmp_path: Path) -> Base:
    return Base.of(str(tmp_path / "target"))


def hydra_folder(folder: Path, llama: Any, layers: int = 4, prefix: bool = True) -> tuple[Path, HydraModule]:
    theirs = HydraModule(layers, llama, prefix)
    config = hydra_config(hydra_head_arch="prefix-mlp" if prefix else "mlp", hydra_num_layers=layers)
    return put(folder, config, theirs.state_dict(), "hydra_lm_head.pt"), theirs


def ours(folder: Path, config: MedusaConfig | HydraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Random heads in our layout."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in skeleton(config).named_parameters()}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    heads = Heads("", config, tensors, "tiny", {"steps": 7})
    checkpoints.write(heads.module(), config, Checkpoint(folder, heads.drafter, {}, "tiny", {"steps": 7}), dtype)
    return folder


def assert_same(a: Heads, b: Heads) -> None:
    assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].dtype == b.tensors[name].dtype
        assert torch.equal(a.tensors[name], b.tensors[name]), name


@torch.no_grad()
def medusa_logits(heads: Heads, states_PD: Tensor, head_VD: Tensor) -> Tensor:
    return heads.module().logits(states_PD, states_PD[:, None], head_VD)


# ---- reading Medusa


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@torch.no_grad()
def test_five_heads_in_a_file_whose_config_says_two(tmp_path, name):
    theirs = medusa_heads(heads=5)
    heads = read(put(tmp_path / "a", medusa_config(), theirs.state_dict(), name))
    assert heads.config == MedusaConfig(D, V, heads=5)
    assert "says 2 heads" in heads.notes[0] and "5 it is" in heads.notes[0]
    assert (heads.drafter, heads.target, heads.layout) == ("medusa", "lmsys/tiny", "fasterdecoding")
    states = torch.randn(7, D)
    said = torch.stack([head(states) for head in theirs])
    torch.testing.assert_close(medusa_logits(heads, states, torch.zeros(V, D)), said)


@torch.no_grad()
def test_repeated_layers_are_tied(tmp_path):
    theirs = medusa_heads(layers=3)
    assert "0.2.linear.weight" in theirs.state_dict()
    heads = read(put(tmp_path / "a", medusa_config(medusa_num_layers=3), theirs.state_dict(), "medusa_lm_head.pt"))
    assert heads.config.layers == 3 and heads.config.tied_layers and heads.tensors["blocks"].shape == (1, K, D, D)
    states = torch.randn(7, D)
    said = torch.stack([head(states) for head in theirs])
    torch.testing.assert_close(medusa_logits(heads, states, torch.zeros(V, D)), said)


def test_layers_that_differ_are_not_tied(tmp_path):
    tensors = medusa_heads(layers=2).state_dict()
    tensors["1.1.linear.bias"] = tensors["1.1.linear.bias"] + 1
    heads = read(put(tmp_path / "a", medusa_config(medusa_num_layers=2), tensors, "medusa_lm_head.pt"))
    assert not heads.config.tied_layers and heads.tensors["biases"].shape == (2, K, D)
    assert torch.equal(heads.tensors["biases"][1, 1], tensors["1.1.linear.bias"])
    with pytest.raises(DrafterError, match="repeats one layer"):
        write(heads, "fasterdecoding", tmp_path / "b")
    write(heads, "vllm", tmp_path / "c")
    assert_same(read(tmp_path / "c"), heads)


def test_version_2_shares_the_targets_vocabulary(tmp_path, base):
    tensors = medusa_heads(shared=True).state_dict()
    folder = put(tmp_path / "c", medusa_config(version="2"), tensors, "medusa_lm_head.safetensors")
    with pytest.raises(DrafterError, match="--target"):
        read(folder)
    heads = read(folder, base)
    assert heads.config == MedusaConfig(D, V, heads=K, vocabulary="shared") and "vocabulary" not in heads.tensors


def test_merged_heads_belong_to_their_model(tmp_path, llama, base):
    theirs = medusa_heads(heads=4)
    tensors = {f"medusa_head.{name}": tensor for name, tensor in theirs.state_dict().items()} | llama.state_dict()
    config = llama.config.to_dict() | {"medusa_num_heads": 4, "medusa_num_layers": 1}
    folder = tmp_path / "merged"
    put(
        folder, config, {n: t for n, t in tensors.items() if n.startswith("medusa")}, "pytorch_model-00001-of-00002.bin"
    )
    put(folder, config, {n: t for n, t in tensors.items() if not n.startswith("m")}, "pytorch_model-00002-of-00002.bin")
    heads = read(folder)
    assert heads.config == MedusaConfig(D, V, heads=4) and heads.target == "merged"
    assert "belong to those, not to the original model" in heads.notes[0]
    assert torch.equal(heads.tensors["vocabulary"][3], theirs[3][1].weight)
    assert any("check that" in note for note in read(folder, base).notes)
    again = put(tmp_path / "safe", config, tensors, "model.safetensors")
    assert_same(read(again), heads)


@torch.no_grad()
def test_vllm(tmp_path):
    theirs = medusa_heads()
    folder = put(tmp_path / "v", VLLM | {"medusa_fc_bias": True}, vllm_tensors(theirs), "model.safetensors")
    heads = read(folder)
    assert heads.config == MedusaConfig(D, V, heads=K) and heads.notes == ()
    prefixed = {f"medusa_heads.{name}": tensor for name, tensor in vllm_tensors(theirs).items()}
    assert_same(read(put(tmp_path / "p", VLLM | {"medusa_fc_bias": True}, prefixed, "model.safetensors")), heads)
    old = put(tmp_path / "o", VLLM | {"medusa_fc_bias": True}, theirs.state_dict(), "model.safetensors")
    assert_same(read(old), heads)
    states = torch.randn(7, D)
    said = torch.stack([head(states) for head in theirs])
    torch.testing.assert_close(medusa_logits(heads, states, torch.zeros(V, D)), said)


def test_vllm_without_biases(tmp_path):
    tensors = vllm_tensors(medusa_heads(), biased=False)
    heads = read(put(tmp_path / "v", VLLM, tensors, "model.safetensors"))
    assert not heads.tensors["biases"].any() and "no biases" in heads.notes[0]
    with pytest.raises(CheckpointError, match=r"unexpected  blocks.0.layers.0.bias"):
        read(put(tmp_path / "w", VLLM, vllm_tensors(medusa_heads()), "model.safetensors"))


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_one_vocabulary_matrix(tmp_path, llama, base, name):
    tensors = vllm_tensors(medusa_heads(shared=True)) | {name: llama.lm_head.weight.detach()}
    config = VLLM | {"medusa_fc_bias": True, "original_lm_head": True}
    folder = put(tmp_path / "v", config, tensors, "model.safetensors")
    with pytest.raises(DrafterError, match="--target"):
        read(folder)
    assert read(folder, base).config.vocabulary == "shared"
    other = put(tmp_path / "o", config, tensors | {name: torch.randn(V, D)}, "model.safetensors")
    heads = read(other, base)
    assert heads.config.vocabulary == "own" and "not that of" in heads.notes[0]
    assert all(torch.equal(one, load_file(other / "model.safetensors")[name]) for one in heads.tensors["vocabulary"])
    wrong = put(tmp_path / "w", config, tensors | {name: torch.randn(V, D + 1)}, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong shape lm_head.weight \[32, 17\] instead of \[32, 16\]"):
        read(wrong, base)


def test_a_truncated_vocabulary_is_refused(tmp_path):
    tensors = vllm_tensors(medusa_heads(), biased=False)
    folder = put(tmp_path / "v", VLLM | {"truncated_vocab_size": 20}, tensors, "model.safetensors")
    with pytest.raises(DrafterError, match="20 of 32 tokens"):
        read(folder)
    folder = put(tmp_path / "w", VLLM, tensors | {"token_map": torch.arange(20)}, "model.safetensors")
    with pytest.raises(DrafterError, match="token_map"):
        read(folder)


# ---- reading Hydra


@pytest.mark.parametrize(("layers", "prefix"), [(1, False), (3, False), (1, True), (4, True)])
@torch.no_grad()
def test_hydra(tmp_path, llama, base, layers, prefix):
    folder, theirs = hydra_folder(tmp_path / "h", llama, layers, prefix)
    heads = read(folder, base)
    config = heads.config
    assert (config.width, config.vocab_size, config.heads, config.layers) == (D, V, K, layers)
    assert config.tied_layers and (config.prefix is not None) == prefix
    assert any("copy of the embeddings" in note for note in heads.notes)
    module, z = heads.module().eval(), torch.randn(2, 7, (K + 1) * D)
    for head in range(K):
        seen = z[..., : (head + 2) * D]
        said = theirs.hydra_lm_head[head](theirs.hydra_mlp[head](seen))
        torch.testing.assert_close(module.head_logits(head, seen, torch.zeros(V, D)), said)
    if prefix:
        states = torch.randn(2, 7, D)
        said = theirs.prefix_embeding_layer(inputs_embeds=states).last_hidden_state
        torch.testing.assert_close(module.contexts(states), said, atol=2e-5, rtol=1e-4)


def test_slots_of_hydra_are_one_block(tmp_path, llama, base):
    folder, theirs = hydra_folder(tmp_path / "h", llama)
    slots = [theirs.state_dict()[f"hydra_mlp.0.{slot}.linear.weight"] for slot in (3, 5, 7)]
    assert torch.equal(slots[0], slots[1]) and torch.equal(slots[0], slots[2])
    assert read(folder, base).tensors["blocks"].shape == (1, K, D, D)
    tensors = dict(theirs.state_dict()) | {"hydra_mlp.1.5.linear.weight": torch.randn(D, D)}
    config = hydra_config(hydra_head_arch="prefix-mlp", hydra_num_layers=4)
    with pytest.raises(CheckpointError, match=r"differs +hydra_mlp.1.5.linear.weight from hydra_mlp.1.3.linear.weight"):
        read(put(tmp_path / "d", config, tensors, "hydra_lm_head.pt"), base)


def test_old_exports_carry_rotary_frequencies(tmp_path, llama, base):
    folder, theirs = hydra_folder(tmp_path / "h", llama)
    more = {"prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    config = hydra_config(hydra_head_arch="prefix-mlp", hydra_num_layers=4)
    again = put(tmp_path / "i", config, dict(theirs.state_dict()) | more, "hydra_lm_head.pt")
    assert_same(read(again, base), read(folder, base))


def test_what_is_not_hydra(tmp_path, llama, base):
    tensors = HydraModule(1, llama, False).state_dict()

    def refused(match: str, kind: type[Exception] = DrafterError, drop: str = "", **entries: object) -> None:
        config = {key: value for key, value in hydra_config(**entries).items() if key != drop}
        with pytest.raises(kind, match=match):
            read(put(tmp_path / "h", config, tensors, "hydra_lm_head.pt"), base)

    refused("does not say grounded_heads", drop="grounded_heads")
    refused("grounded_heads false", grounded_heads=False)
    refused("offset 0", hidden_state_offset=1)
    refused("'eagle-attn'", hydra_head_arch="eagle-attn")
    refused("'cross-attn'", hydra_head_arch="cross-attn")
    refused("hydra_num_heads 4", CheckpointError, hydra_num_heads=4)
    refused("hydra_num_layers 2", CheckpointError, hydra_num_layers=2)
    other = put(
        tmp_path / "o", hydra_config(), dict(tensors) | {"input_embed_fn.weight": torch.randn(V, D)}, "hydra_lm_head.pt"
    )
    assert any("--target would" in note for note in read(other).notes)
    with pytest.raises(DrafterError, match="not that of"):
        read(other, base)


def test_a_prefix_layer_needs_its_target(tmp_path, llama, base):
    folder, _ = hydra_folder(tmp_path / "h", llama)
    with pytest.raises(DrafterError, match="--target"):
        read(folder)
    tiny_llama(tmp_path / "wide", intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"wrong shape prefix_embeding_layer.layers.0.mlp.down_proj.weight"):
        tensors = {k: v for k, v in torch.load(folder / "hydra_lm_head.pt").items() if k != "input_embed_fn.weight"}
        config = hydra_config(hydra_head_arch="prefix-mlp", hydra_num_layers=4)
        read(put(tmp_path / "i", config, tensors, "hydra_lm_head.pt"), Base.of(str(tmp_path / "wide")))


# ---- strictness


def published(tmp_path: Path, llama: Any, kind: str) -> tuple[dict[str, object], dict[str, Tensor], str]:
    if kind == "medusa":
        return medusa_config(medusa_num_heads=K), dict(medusa_heads().state_dict()), "medusa_lm_head.safetensors"
    if kind == "version 2":
        tensors = dict(medusa_heads(layers=2, shared=True).state_dict())
        return medusa_config(version="2", medusa_num_layers=2), tensors, "medusa_lm_head.pt"
    if kind == "vllm":
        return VLLM | {"medusa_fc_bias": True}, vllm_tensors(medusa_heads()), "model.safetensors"
    if kind == "merged":
        tensors = {f"medusa_head.{name}": tensor for name, tensor in medusa_heads().state_dict().items()}
        return llama.config.to_dict() | {"medusa_num_heads": K}, tensors, "model.safetensors"
    arch = {"hydra": "mlp", "hydra++": "prefix-mlp"}[kind]
    tensors = dict(HydraModule(3, llama, arch != "mlp").state_dict())
    tensors = {name: tensor for name, tensor in tensors.items() if "embed" not in name.split(".")[-2]}
    return hydra_config(hydra_head_arch=arch, hydra_num_layers=3), tensors, "hydra_lm_head.pt"


KINDS = ["medusa", "version 2", "vllm", "merged", "hydra", "hydra++"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_counts(tmp_path, llama, base, kind):
    """Each one in turn: missing, of another shape, beside one too many."""
    config, tensors, file = published(tmp_path, llama, kind)
    assert read(put(tmp_path / "x", config, tensors, file), base).config.heads == K
    for name, tensor in tensors.items():
        wrong = {
            f"missing     {name} ": {key: value for key, value in tensors.items() if key != name},
            f"wrong shape {name} ": tensors | {name: torch.cat((tensor, tensor))},
            f"wrong type  {name} ": tensors | {name: tensor.double()},
            f"unexpected  {name}.more ": tensors | {f"{name}.more": tensor},
        }
        for line, changed in wrong.items():
            with pytest.raises(CheckpointError) as caught:
                read(put(tmp_path / "x", config, changed, file), base)
            assert line in str(caught.value), str(caught.value)


def test_a_missing_head_or_layer_that_the_config_promises(tmp_path):
    tensors = dict(medusa_heads().state_dict())
    few = {name: tensor for name, tensor in tensors.items() if not name.startswith("2.")}
    with pytest.raises(CheckpointError, match="medusa_num_heads 3, and the weights have 2"):
        read(put(tmp_path / "a", medusa_config(medusa_num_heads=3), few, "medusa_lm_head.pt"))
    with pytest.raises(CheckpointError, match="medusa_num_layers 2, and the weights have 1"):
        read(put(tmp_path / "b", medusa_config(medusa_num_layers=2), tensors, "medusa_lm_head.pt"))
    with pytest.raises(CheckpointError, match="num_heads 4, and the weights have 3"):
        read(put(tmp_path / "c", VLLM | {"num_heads": 4}, vllm_tensors(medusa_heads(), False), "model.safetensors"))


def test_heads_for_another_target(tmp_path, base):
    tiny_llama(tmp_path / "other", vocab_size=40)
    folder = put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt")
    with pytest.raises(DrafterError, match=r"32 tokens.*40 tokens"):
        read(folder, Base.of(str(tmp_path / "other")))
    assert read(folder, base).config.heads == K


# ---- damaged and dangerous files


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_not_run(tmp_path, zipped):
    folder, witness = put(tmp_path / "a", medusa_config(), {}, "medusa_lm_head.pt"), tmp_path / "witness"
    tensors = dict(medusa_heads().state_dict()) | {"x": Evil(witness)}
    torch.save(tensors, folder / "medusa_lm_head.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run code"):
        read(folder)
    assert not witness.exists()
    torch.load(folder / "medusa_lm_head.pt", weights_only=False)
    assert witness.exists(), "the pickle was harmless, and so the test"


def test_files_that_hold_no_heads(tmp_path):
    folder = put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt")
    whole = (folder / "medusa_lm_head.pt").read_bytes()
    for content in (whole[:-100], whole[:50], b""):
        (folder / "medusa_lm_head.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read(folder)
    torch.save([1, 2], folder / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        read(folder)
    with pytest.raises(CheckpointError, match="holds no heads"):
        read(put(tmp_path / "b", medusa_config(), {"x": torch.zeros(1)}, "medusa_lm_head.pt"))
    with pytest.raises(CheckpointError, match="holds no heads"):
        read(put(tmp_path / "c", {"model_type": "llama"}, {"x": torch.zeros(1)}, "model.safetensors"))
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "c")
    (tmp_path / "c" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="there is no"):
        read(tmp_path / "c")


def test_pickled_heads_from_the_hub(tmp_path, monkeypatch):
    folder, asked = put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt"), []

    def download(
        name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None, revision: str | None = None
    ) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(files.huggingface_hub, "snapshot_download", download)
    assert read("somebody/medusa-tiny").config.heads == K
    assert "medusa_lm_head.pt" in asked[-1] and not any(pattern.endswith(".pt") for pattern in asked[0])


# ---- there and back


MEDUSAS = [
    MedusaConfig(D, V, heads=5),
    MedusaConfig(D, V, heads=2, layers=3, tied_layers=True),
    MedusaConfig(D, V, heads=3, layers=2, vocabulary="shared", tied_layers=True),
    MedusaConfig(D, V, heads=3, vocabulary="shared"),
]


@pytest.mark.parametrize("config", MEDUSAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["fasterdecoding", "vllm"])
def test_medusa_there_and_back(tmp_path, base, config, dtype, layout):
    before = read(ours(tmp_path / "ours", config, dtype))
    write(before, layout, tmp_path / "there", base)
    there = read(tmp_path / "there", base)
    assert there.layout == layout and there.notes == ()
    write(there, "ours", tmp_path / "back", base)
    back = read(tmp_path / "back")
    assert_same(back, before)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["training"]["converted_from"] == layout


def test_from_one_engine_to_the_other(tmp_path):
    """A, ours, vLLM, A: nothing changes, and no names are lost."""
    tensors = medusa_heads(layers=2).state_dict()
    start = put(tmp_path / "a", medusa_config(medusa_num_layers=2), tensors, "medusa_lm_head.pt")
    heads = read(start)
    for number, layout in enumerate(("ours", "vllm", "fasterdecoding")):
        write(heads, layout, tmp_path / str(number))
        heads = read(tmp_path / str(number))
    for file in (
        torch.load(tmp_path / "2" / "medusa_lm_head.pt"),
        load_file(tmp_path / "2" / "medusa_lm_head.safetensors"),
    ):
        assert file.keys() == tensors.keys() and all(torch.equal(file[name], tensors[name]) for name in tensors)
    found = json.loads((tmp_path / "2" / "config.json").read_text())
    assert found == {"base_model_name_or_path": "lmsys/tiny", "medusa_num_heads": K, "medusa_num_layers": 2}


def test_what_vllm_is_told(tmp_path, base):
    write(read(ours(tmp_path / "o", MEDUSAS[3], torch.bfloat16)), "vllm", tmp_path / "v", base)
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    expected = VLLM | {"medusa_fc_bias": True, "original_lm_head": True, "torch_dtype": "bfloat16"}
    assert config == expected | {"base_model_name_or_path": base.name}
    tensors = load_file(tmp_path / "v" / "model.safetensors")
    assert set(tensors) == {f"blocks.{h}.layers.0.{p}" for h in range(K) for p in ("weight", "bias")} | {
        "lm_head.weight"
    }
    assert torch.equal(tensors["lm_head.weight"], base.head_VD.bfloat16())
    counting = [key for key in config if "num" in key and ("heads" in key or "layers" in key)]
    assert counting == ["num_heads", "num_hidden_layers"], "vLLM folds every such key into these two"


def prefix_like(base: Base) -> LayerConfig:
    c = base.config
    return LayerConfig(c.heads, c.kv_heads, c.head_dim, c.mlp_width, c.max_length, c.norm_eps, c.rope_theta)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_hydra_there_and_back(tmp_path, llama, base, layers, with_prefix):
    config = HydraConfig(D, V, heads=K, layers=layers, prefix=prefix_like(base) if with_prefix else None)
    before = read(ours(tmp_path / "ours", config, torch.float16))
    for given, place in ((base, "with"), (None, "without")):
        write(before, "hydra", tmp_path / place, given)
        assert_same(read(tmp_path / place, base), before)
    write(read(tmp_path / "with", base), "ours", tmp_path / "back")
    assert_same(read(tmp_path / "back"), before)
    theirs = HydraModule(layers, llama, with_prefix)
    left = theirs.load_state_dict(torch.load(tmp_path / "with" / "hydra_lm_head.pt"), strict=False)
    assert left.unexpected_keys == [] and all("embed" in name.split(".")[-2] for name in left.missing_keys)


def test_published_hydra_there_and_back(tmp_path, llama, base):
    folder, theirs = hydra_folder(tmp_path / "h", llama)
    write(read(folder, base), "ours", tmp_path / "ours", base)
    write(read(tmp_path / "ours"), "hydra", tmp_path / "again", base)
    tensors, found = theirs.state_dict(), torch.load(tmp_path / "again" / "hydra_lm_head.pt")
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert all("embed" in name.split(".")[-2] for name in tensors.keys() - found.keys())
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = hydra_config(hydra_head_arch="prefix-mlp", hydra_num_layers=4)
    assert told == expected, "a name on the hub is worth more than a path here"


def test_what_has_no_place_in_a_layout(tmp_path, base):
    medusa, hydra = (
        read(ours(tmp_path / "m", MEDUSAS[0])),
        read(ours(tmp_path / "h", HydraConfig(D, V, heads=K, layers=2))),
    )
    shared = read(ours(tmp_path / "s", MEDUSAS[3]))
    other = {**asdict(prefix_like(base)), "norm_eps": 1e-3}
    shaped = read(ours(tmp_path / "p", HydraConfig(D, V, heads=2, prefix=LayerConfig(**other))))
    untied = read(ours(tmp_path / "u", HydraConfig(D, V, heads=2, layers=3, tied_layers=False)))
    borrowed = read(ours(tmp_path / "b", HydraConfig(D, V, heads=2, vocabulary="shared")))
    for heads, layout, given, match in (
        (hydra, "vllm", base, "see the tokens drafted before theirs"),
        (hydra, "fasterdecoding", base, "see the tokens drafted before theirs"),
        (medusa, "hydra", base, "do not see drafted tokens"),
        (shared, "vllm", None, "--target"),
        (shaped, "hydra", base, "not shaped like"),
        (untied, "hydra", None, "repeats one"),
        (borrowed, "hydra", base, "one per head"),
        (medusa, "onnx", None, "no layout 'onnx'"),
    ):
        with pytest.raises(DrafterError, match=match):
            write(heads, layout, tmp_path / "out", given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "h", "m", "p", "s", "target", "u"]


@pytest.mark.parametrize("layout", ["ours", "fasterdecoding", "vllm"])
def test_nothing_half_written_stays(tmp_path, monkeypatch, layout):
    heads = read(put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt"))

    def full(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(heads, layout, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_full_for_a_pickle(tmp_path, monkeypatch):
    heads = read(put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt"))

    def full(tensors: object, path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3")

    monkeypatch.setattr(files.torch, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(heads, "fasterdecoding", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("layout", ["ours", "fasterdecoding", "vllm"])
def test_what_reads_back_differently_is_not_written(tmp_path, monkeypatch, layout):
    heads = read(put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt"))

    def wrong(tensors: dict[str, Tensor], path: Path, metadata: object = None) -> None:
        name = next(iter(tensors))
        flipped = tensors[name].view(torch.int32).bitwise_xor(1).view(torch.float32)  # the last bit of every number
        save_file(tensors | {name: flipped}, path)

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "save_file", wrong)
    with pytest.raises(CheckpointError, match="reading it back"):
        write(heads, layout, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    heads = read(put(tmp_path / "a", medusa_config(), medusa_heads().state_dict(), "medusa_lm_head.pt"))
    with pytest.raises(CheckpointError, match="not empty"):
        write(heads, "ours", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    write(heads, "ours", tmp_path / "empty")
    assert_same(read(tmp_path / "empty"), heads)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "empty").iterdir()), "anyone may read it"


def test_a_calibrated_tree_stays_behind(tmp_path):
    folder = ours(tmp_path / "o", MEDUSAS[0])
    (folder / "tree.json").write_text('{"paths": [[0]]}')
    assert "stays behind" in read(folder).notes[0]


# ---- real sizes


VICUNA = {"7B": (4096, 32, 11008), "13B": (5120, 40, 13824), "33B": (6656, 52, 17920)}


def millions(*counts: int) -> float:
    return round(sum(counts) / 1e6, 1)


@pytest.mark.parametrize(
    ("size", "blocks", "vocabulary", "layer", "tables", "gigabytes"),
    [
        ("7B", 536.9, 524.4, 202.4, 262.1, 3.052),
        ("13B", 838.9, 655.5, 317.2, 327.7, 4.279),
        ("33B", 1417.8, 852.1, 535.0, 426.0, 6.462),
    ],
)
def test_sizes_of_published_hydra_heads(size, blocks, vocabulary, layer, tables, gigabytes):
    """The table of specs/hydra.md 2.4. The file of 33B is 6.46 GB on the hub: the count with tied
    layers, and not without."""
    width, heads, mlp = VICUNA[size]
    prefix = LayerConfig(heads, heads, width // heads, mlp, 2048)
    config = HydraConfig(width, 32000, heads=4, layers=4, tied_layers=True, prefix=prefix)
    counts = {name: p.numel() for name, p in skeleton(config).named_parameters()}
    norms = [width] * 3  # which the table does not count
    in_layer = [count for name, count in counts.items() if name.startswith("prefix")]
    in_vocabulary = [counts["vocabulary"], counts["vocabulary_biases"]]
    assert millions(*in_vocabulary) == vocabulary and millions(*in_layer, -sum(norms)) == layer
    assert millions(*counts.values(), -sum(in_vocabulary), -sum(in_layer)) == blocks
    unread = 2 * 32000 * width
    assert millions(unread) == tables
    assert round(2 * (sum(counts.values()) + unread) / 1e9, 3) == gigabytes
    stored = set(hydra_table(config).values())
    assert sum(torch.Size(place.shape).numel() for place in stored) == sum(counts.values()), (
        "every parameter has a place"
    )


def test_sizes_of_published_medusa_heads():
    config = MedusaConfig(4096, 32000, heads=5)
    count = sum(p.numel() for p in skeleton(config).parameters())
    assert millions(count // 5) == 147.9 and round(count / 5e6, 2) == 147.85
    assert round(2 * count / 1e9, 3) == 1.479 and 2 * count == 1_478_533_120
    table = medusa_table(config, FASTERDECODING)
    assert sum(torch.Size(place.shape).numel() for place in table.values()) == count
    unbiased = medusa_table(config, FASTERDECODING, biased=False)
    assert sum(2 * torch.Size(place.shape).numel() for place in unbiased.values()) <= 1_478_493_144  # as on the hub
    large = sum(p.numel() for p in skeleton(MedusaConfig(6656, 32000, heads=5)).parameters())
    assert round(large / 5e6, 1) == 257.3 and round(2 * large / 1e9, 3) == 2.573


@pytest.mark.parametrize(
    ("config", "layouts"),
    [(MedusaConfig(D, V, K, kept=(1, 4)), ("vllm", "fasterdecoding")), (HydraConfig(D, V, K, kept=(1, 4)), ("hydra",))],
)
def test_a_part_of_the_vocabulary_is_refused_where_it_has_no_place(
    config: MedusaConfig | HydraConfig, layouts: tuple[str, ...], tmp_path: Path
) -> None:
    heads = read(ours(tmp_path / "it", config))
    assert heads.config == config
    for layout in layouts:
        with pytest.raises(DrafterError, match="knows 2 of 32 tokens"):
            write(heads, layout, tmp_path / layout)
