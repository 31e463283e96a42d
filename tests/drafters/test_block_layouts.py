"""Block drafters in the layouts of others: what is read computes what their layers compute, and what is written is read
back the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Config,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from drafters.test_exchange import put, shaken, tiny_llama
from forerun.drafters.block import BlockConfig
from forerun.drafters.block.layouts import table_of
from forerun.drafters.block.network import BlockModule
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.heads import Places
from forerun.drafting.trained import LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.exchange import Base, Heads, read, write
from forerun.layouts.table import skeleton
from forerun.nn.load import load_network
from forerun.train.distill import Sample
from forerun.train.exchange_check import tokens_per_step

D, V, ROWS, MASK, RANK = 16, 32, 4, 31, 5
LAYER = LayerConfig(4, 2, 4, 24, 64, 1e-5, 5000.0)
SIZES = {"hidden_size": D, "vocab_size": V, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
DSPARK = BlockConfig(D, V, ROWS, layers=2, rank=RANK, sources=(0, 1), mask_token=MASK, layer=LAYER)
DFLASH = replace(DSPARK, heads=ROWS - 1, rank=0, from_anchor=False)
ALL = {
    "dspark": DSPARK,
    "dspark, past the anchor": replace(DSPARK, from_anchor=False),
    "dspark, no Markov term": replace(DSPARK, rank=0, layers=1),
    "dflash": DFLASH,
    "dflash, from the anchor": replace(DFLASH, from_anchor=True, sources=(1,)),
}
KEPT = (1, 2, 3, 9, 17, 30)
CPU = torch.device("cpu")


# ---- their network, as speculators' code describes it, on transformers' own parts


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        size, heads, kv_heads = LAYER.head_dim, LAYER.heads, LAYER.kv_heads
        self.q_proj, self.o_proj = nn.Linear(D, heads * size, bias=False), nn.Linear(heads * size, D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, kv_heads * size, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (Qwen3RMSNorm(size, config.rms_norm_eps) for _ in range(2))

    def forward(self, rows: Tensor, context: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rows [W, D] that see all of the context [S, D] and one another; angles of all S + W positions."""
        both, size = torch.cat((context, rows)), LAYER.head_dim
        q = self.q_norm(self.q_proj(rows).view(1, len(rows), -1, size)).transpose(1, 2)
        k = self.k_norm(self.k_proj(both).view(1, len(both), -1, size)).transpose(1, 2)
        v = self.v_proj(both).view(1, len(both), -1, size).transpose(1, 2)
        cos, sin = angles
        q, _ = apply_rotary_pos_emb(q, q, cos[:, len(context) :], sin[:, len(context) :])
        _, k = apply_rotary_pos_emb(k, k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)[0])


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Qwen3MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (Qwen3RMSNorm(D, config.rms_norm_eps) for _ in range(2))

    def forward(self, rows: Tensor, context: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rows = rows + self.self_attn(self.input_layernorm(rows), context, angles)
        return rows + self.mlp(self.post_attention_layernorm(rows))


class Markov(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(V, RANK), nn.Linear(RANK, V, bias=False)


class Theirs(nn.Module):
    def __init__(self, markov: bool, sources: int = 2):
        super().__init__()
        config = Qwen3Config(**SIZES, rope_theta=5000.0)
        self.rotary = Qwen3RotaryEmbedding(config)
        self.fc = nn.Linear(sources * D, D, bias=False)
        self.hidden_norm, self.norm = (Qwen3RMSNorm(D, config.rms_norm_eps) for _ in range(2))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(2))
        self.markov_head = Markov() if markov else None
        shaken(self)

    @torch.no_grad()
    def forward(self, states: Tensor, anchor: int, table: Tensor, head: Tensor, before: list[int]) -> Tensor:
        """Logits of all rows of a block behind states [S, M D]; before: the token before each row's proposal."""
        rows = table[[anchor] + [MASK] * (ROWS - 1)]
        context = self.hidden_norm(self.fc(states))
        angles = self.rotary(states[None], torch.arange(len(states) + ROWS)[None])
        for layer in self.layers:
            rows = layer(rows, context, angles)
        logits = self.norm(rows) @ head.T
        if self.markov_head is not None:
            logits = logits + self.markov_head.markov_w2(self.markov_head.markov_w1(torch.tensor(before)))
        return logits

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if "rotary" not in name}


def speculators(kind: str, **entries: object) -> dict[str, Any]:
    """As speculators 0.9 saves one."""
    about: dict[str, Any] = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "some/target", "architectures": []}},
        "transformer_layer_config": {**SIZES, "model_type": "qwen3", "rope_parameters": {"rope_theta": 5000.0}},
        "draft_vocab_size": V,
        "block_size": ROWS,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [0, 1],
        "mask_token_id": MASK,
        "sliding_window_non_causal": False,
        "sample_from_anchor": kind == "dspark",
    }
    if kind == "dspark":
        about |= {"markov_rank": RANK, "markov_head_type": "vanilla", "enable_confidence_head": True}
        about |= {"confidence_head_with_markov": True}
    return about | entries


@pytest.fixture
def llama(tmp_path: Path) -> transformers.LlamaForCausalLM:
    return tiny_llama(tmp_path / "target")


@pytest.fixture
def base(llama: object, tmp_path: Path) -> Base:
    return Base.of(str(tmp_path / "target"))


@pytest.mark.parametrize(
    ("kind", "entries", "expected"),
    [
        ("dspark", {}, DSPARK),
        ("dspark", {"sample_from_anchor": False}, replace(DSPARK, heads=ROWS - 1, from_anchor=False)),
        ("dflash", {}, DFLASH),
        ("dflash", {"sample_from_anchor": True}, replace(DFLASH, heads=ROWS, from_anchor=True)),
    ],
)
def test_what_is_read_says_what_theirs_says(
    kind: str, entries: Mapping[str, object], expected: BlockConfig, base: Base, tmp_path: Path
) -> None:
    theirs = Theirs(markov=kind == "dspark")
    heads = read(put(tmp_path / "it", speculators(kind, **entries), theirs.tensors(), "model.safetensors"), base)
    assert (heads.layout, heads.drafter, heads.config, heads.target) == (kind, "block", expected, "some/target")
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    states, place = torch.randn(1, text.shape[1], 2 * D, generator=torch.Generator().manual_seed(3)), 6
    behind = text[0, place + 1 :].tolist()
    module, table = heads.module().eval(), base.embedding_VD
    there = Places(torch.tensor([0]), torch.tensor([place]), F.embedding(text, table), table)
    seen = module.seen({0: states}, there)
    before = F.embedding(text[:, place + 1 : place + 1 + module.count], module.table(table))
    found = module.logits(seen, before, base.head_VD)[:, 0]
    first = 0 if expected.from_anchor else 1
    said = theirs(states[0, : place + 1], behind[0], table, base.head_VD, [0] * first + behind[: ROWS - first])
    torch.testing.assert_close(found, said[first:])


def test_copies_of_the_target_and_the_confidence_head_are_left_out(
    llama: transformers.LlamaForCausalLM, base: Base, tmp_path: Path
) -> None:
    copies = {"embed_tokens.weight": base.embedding_VD, "lm_head.weight": base.head_VD}
    copies |= {"verifier_lm_head.weight": base.head_VD, "verifier_norm.weight": torch.ones(D)}
    copies |= {"confidence_head.proj.weight": torch.ones(1, D + RANK), "confidence_head.proj.bias": torch.ones(1)}
    tensors = Theirs(markov=True).tensors()
    plain, copied = (
        read(put(tmp_path / name, speculators("dspark"), given, "model.safetensors"), base)
        for name, given in (("plain", tensors), ("copied", tensors | copies))
    )
    assert plain.config == copied.config and plain.notes == ()
    assert all(torch.equal(plain.tensors[name], copied.tensors[name]) for name in plain.tensors)
    assert [note.split(",")[0].split(" is ")[0] for note in copied.notes] == [
        "its embedding",
        "its projection",
        "its confidence head",
    ]
    wrong = tensors | {"lm_head.weight": base.head_VD.flip(0).clone()}
    with pytest.raises(DrafterError, match=r"projection .* is not that of"):
        read(put(tmp_path / "wrong", speculators("dspark"), wrong, "model.safetensors"), base)


@pytest.mark.parametrize(
    ("kind", "entries", "said"),
    [
        ("dspark", {"markov_head_type": "gated"}, "markov_head_type gated"),
        ("dspark", {"target_hidden_size": 2 * D}, "not as wide"),
        ("dflash", {"mask_token_id": None}, "does not say mask_token_id"),
        ("dflash", {"aux_hidden_state_layer_ids": None}, "does not say aux_hidden_state_layer_ids"),
        ("dflash", {"aux_hidden_state_layer_ids": [1, 2]}, "before the target's last norm"),
        ("dflash", {"layer": {"layer_types": ["sliding_attention"] * 2}}, "sliding window"),
        ("dflash", {"layer": {"rope_parameters": {"full_attention": {}}}}, "of several kinds"),
        ("dflash", {"layer": {"attention_bias": True}}, "biases in its attention"),
    ],
)
def test_what_ours_cannot_do_is_refused(
    kind: str, entries: dict[str, Any], said: str, base: Base, tmp_path: Path
) -> None:
    config = speculators(kind, **{name: value for name, value in entries.items() if name != "layer"})
    config["transformer_layer_config"] |= entries.get("layer", {})
    folder = put(tmp_path / "it", config, Theirs(markov=kind == "dspark").tensors(), "model.safetensors")
    with pytest.raises((DrafterError, CheckpointError), match=said):
        read(folder, base)


def test_a_missing_tensor_and_one_too_many_are_named(base: Base, tmp_path: Path) -> None:
    tensors = Theirs(markov=True).tensors()
    del tensors["layers.1.self_attn.k_norm.weight"]
    sinks = {"layers.0.self_attn.sinks": torch.zeros(4)}
    folder = put(tmp_path / "it", speculators("dspark"), tensors | sinks, "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        read(folder, base)
    assert "missing     layers.1.self_attn.k_norm.weight" in str(raised.value)
    assert "unexpected  layers.0.self_attn.sinks" in str(raised.value)


# ---- both ways


def heads_of(config: BlockConfig, dtype: torch.dtype) -> Heads:
    torch.manual_seed(0)
    tensors = {name: torch.randn(p.shape).to(dtype) for name, p in skeleton(config).named_parameters()}
    return Heads("ours", config, tensors, "some/target", {})


def homes(config: BlockConfig) -> list[str]:
    return ["dspark"] if config.rank else ["dspark", "dflash"]


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_target", [False, True])
def test_what_is_written_is_read_back(
    config: BlockConfig, dtype: torch.dtype, with_target: bool, base: Base, tmp_path: Path
) -> None:
    heads, target = heads_of(config, dtype), base if with_target else None
    for layout in homes(config):
        out = tmp_path / layout
        assert write(heads, layout, out, target) == len(heads.tensors)
        again = read(out, target)
        assert (again.layout, again.config, again.target) == (layout, config, "some/target")
        write(again, "ours", tmp_path / f"{layout} ours", target)
        module = checkpoints.read(tmp_path / f"{layout} ours").module(BlockModule, BlockConfig)
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, heads.tensors[name].float())


@pytest.mark.parametrize("config", [replace(DSPARK, kept=KEPT), replace(DFLASH, kept=KEPT)])
def test_a_part_of_the_vocabulary_goes_there_and_back(config: BlockConfig, base: Base, tmp_path: Path) -> None:
    """With the rows of the target's projection, which are those of the target when it is read."""
    heads, layout = heads_of(config, torch.float32), homes(config)[-1]
    with pytest.raises(DrafterError, match="give --target"):
        write(heads, layout, tmp_path / "it")
    write(heads, layout, tmp_path / "it", base)
    held, again = load_file(tmp_path / "it" / "model.safetensors"), read(tmp_path / "it", base)
    assert again.config == config and all(
        torch.equal(again.tensors[name], heads.tensors[name]) for name in again.tensors
    )
    assert torch.equal(held["lm_head.weight"], base.head_VD[list(KEPT)])
    assert torch.equal(held["t2d"].nonzero().flatten(), torch.arange(len(KEPT)) + held["d2t"])
    about = json.loads((tmp_path / "it" / "config.json").read_text())
    assert about["draft_vocab_size"] == len(KEPT)
    put(tmp_path / "it", about | {"draft_vocab_size": 7}, held, "model.safetensors")
    with pytest.raises(CheckpointError, match="says draft_vocab_size 7"):
        read(tmp_path / "it", base)


def test_names_and_shapes_are_those_of_the_published_format(base: Base, tmp_path: Path) -> None:
    write(heads_of(DSPARK, torch.bfloat16), "dspark", tmp_path / "it", base)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "it" / "model.safetensors").items()}
    layer = {
        "input_layernorm.weight": (16,),
        "post_attention_layernorm.weight": (16,),
        "self_attn.q_norm.weight": (4,),
        "self_attn.k_norm.weight": (4,),
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
    }
    expected = {f"layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    expected |= {"fc.weight": (16, 32), "hidden_norm.weight": (16,), "norm.weight": (16,)}
    expected |= {"markov_head.markov_w1.weight": (32, 5), "markov_head.markov_w2.weight": (32, 5)}
    assert shapes == expected
    about = json.loads((tmp_path / "it" / "config.json").read_text())
    assert (about["block_size"], about["sample_from_anchor"], about["mask_token_id"]) == (ROWS, True, MASK)
    assert about["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == ROWS
    assert about["aux_hidden_state_layer_ids"] == [0, 1] and about["markov_rank"] == RANK


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="speculators is not installed")
@pytest.mark.parametrize("config", [*ALL.values(), replace(DSPARK, kept=KEPT)], ids=[*ALL, "dspark, part"])
def test_speculators_loads_what_is_written_and_writes_what_is_read(
    config: BlockConfig, base: Base, tmp_path: Path
) -> None:
    from speculators import SpeculatorModel

    for layout in homes(config):
        write(heads_of(config, torch.float32), layout, tmp_path / layout, base)
        about = tmp_path / layout / "config.json"
        about.write_text(about.read_text().replace("some/target", str(base.folder)))
        theirs = SpeculatorModel.from_pretrained(str(tmp_path / layout))
        state = theirs.state_dict()
        for name, tensor in load_file(tmp_path / layout / "model.safetensors").items():
            assert torch.equal(state[name], tensor), name
        theirs.save_pretrained(str(tmp_path / f"{layout} theirs"))
        again = read(tmp_path / f"{layout} theirs", base)
        assert again.config == config and again.layout == layout


@pytest.mark.parametrize(
    ("change", "layout", "said"),
    [
        ({"mask_token": None}, "dspark", "--mask-token"),
        ({"sources": (0, -1)}, "dspark", "--sources"),
        ({}, "dflash", "has a Markov term"),
        ({}, "eagle3", "no EAGLE"),
    ],
)
def test_what_a_layout_has_no_place_for_is_refused(
    change: dict[str, Any], layout: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DrafterError, match=said):
        write(heads_of(replace(DSPARK, **change), torch.float32), layout, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_drafters_are_measured_on_answers_before_and_after(base: Base, tmp_path: Path) -> None:
    heads, network = heads_of(DSPARK, torch.float32), load_network(base.name, torch.float32, CPU)
    samples = [Sample((1, 2, 3), (3, 1, 9, 17, 2, 30, 1)), Sample((5,), (9, 9, 1, 2, 2))]
    write(heads, "dspark", tmp_path / "it", base)
    before, after = (tokens_per_step(one, network, samples) for one in (heads, read(tmp_path / "it", base)))
    assert before == after >= 1


def test_every_parameter_has_a_published_name() -> None:
    for config in ALL.values():
        reached = {place.parameter for place in table_of(config).values()}
        assert reached == {name for name, _ in skeleton(config).named_parameters()}
