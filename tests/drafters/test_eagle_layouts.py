"""EAGLE in the layouts of others: what is read computes what their layers compute, and what is written
is read back the same."""

from __future__ import annotations

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
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from drafters.heading import filled
from drafters.test_exchange import put, shaken, tiny_llama
from forerun.drafters.eagle import EagleConfig
from forerun.drafters.eagle.layouts import table_of
from forerun.drafters.eagle.network import EagleModule
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.heads import Places
from forerun.drafting.trained import LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.exchange import Base, Heads, read, write
from forerun.layouts.table import skeleton
from forerun.nn.load import load_network
from forerun.train.distill import Sample
from forerun.train.exchange_check import tokens_per_step

D, V = 16, 32
LAYER = LayerConfig(4, 2, 4, 24, 64, 1e-5, 5000.0)
SIZES = {"hidden_size": D, "vocab_size": V, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
ONE = EagleConfig(D, V, layer=LAYER)
THREE = replace(ONE, fused=True, sources=(0, 1, 2), vocabulary="own")
KEPT = (1, 2, 3, 9, 17, 30)
ALL = {
    "eagle": ONE,
    "eagle, biased": replace(ONE, fuse_bias=True, qkv_bias=True, layers=2),
    "eagle3": THREE,
    "eagle3, part": replace(THREE, sources=(1, 2), kept=KEPT, residual_normed=True),
    "eagle3, two layers": replace(THREE, layers=2, joined_normed=True),
    "eagle3.1": replace(THREE, sources=(1, 2), sources_normed=True, output_normed=True, qk_norm=True),
}
NORM, CPU = 1e-5, torch.device("cpu")


# ---- their layers, as transformers has them


class Theirs(nn.Module):
    """One decoder layer over pairs, named as the published code names it."""

    def __init__(self, fused: bool, known: int = V):
        super().__init__()
        config = transformers.LlamaConfig(**SIZES, rope_theta=5000.0, attn_implementation="eager")
        self.fused, self.rotary = fused, LlamaRotaryEmbedding(config)
        self.fc = nn.Linear(3 * D if fused else 2 * D, D, bias=not fused)
        layer = LlamaDecoderLayer(config, 0)
        if fused:
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, nn.Linear(2 * D, getattr(attention, name).out_features, bias=False))
            layer.hidden_norm = LlamaRMSNorm(D, NORM)
            self.norm, self.lm_head = LlamaRMSNorm(D, NORM), nn.Linear(D, known, bias=False)
        else:
            layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        shaken(self)

    @torch.no_grad()
    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """What is scored, [1, N, D]."""
        layer, count = self.layers[0], states.shape[1]
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        angles = self.rotary(states, torch.arange(count)[None])
        if self.fused:
            x = self.fc(states)
            seen = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(x)), -1)
        else:
            x = seen = self.fc(torch.cat((embedded, states), -1))
        x = x + layer.self_attn(seen, position_embeddings=angles, attention_mask=mask)[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x) if self.fused else x

    def tensors(self, first: str = "layers.0") -> dict[str, Tensor]:
        named = {name.replace("layers.0", first): tensor for name, tensor in self.state_dict().items()}
        return {name: tensor for name, tensor in named.items() if "rotary" not in name}


def flat(**entries: object) -> dict[str, object]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "rope_theta": 5000.0, **entries}


def speculators(**entries: object) -> dict[str, object]:
    """As speculators 0.9 saves one."""
    about: dict[str, object] = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "some/target"}},
        "transformer_layer_config": {**SIZES, "model_type": "llama", "rope_parameters": {"rope_theta": 5000.0}},
        "draft_vocab_size": V,
        "norm_before_residual": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
    }
    return about | entries


@pytest.fixture
def llama(tmp_path: Path) -> transformers.LlamaForCausalLM:
    return tiny_llama(tmp_path / "target")


@pytest.fixture
def base(llama: object, tmp_path: Path) -> Base:
    return Base.of(str(tmp_path / "target"))


def said(heads: Heads, states: Tensor, embedded: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The first step's state and logits at every place of one text."""
    module = heads.module().eval()
    rows, at = torch.zeros(states.shape[1], dtype=torch.int64), torch.arange(states.shape[1])
    states = F.pad(states, (0, 0, 0, 1))  # of the last token, which nothing follows
    texts = torch.cat((torch.zeros_like(embedded[:, :1]), embedded), 1)  # each is the token behind a state
    seen = module.seen({0: states}, Places(rows, at, texts))
    return seen[:, 0], module.logits(seen, seen[..., :0], head_VD)[0]


def some(count: int, width: int) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("config", [flat(), flat(bias=True), {"model_type": "eagle", "model": flat()}])
def test_eagle_as_its_own_code_has_it(
    config: Mapping[str, object], name: str, llama: transformers.LlamaForCausalLM, base: Base, tmp_path: Path
) -> None:
    """With the copy of the embedding, and with a bias that its config need not mention."""
    theirs = Theirs(fused=False)
    copy = {"embed_tokens.weight": llama.get_input_embeddings().weight.detach()}
    heads = read(put(tmp_path / "it", config, theirs.tensors() | copy, name), base)
    assert heads.layout == "eagle" and heads.drafter == "eagle"
    assert heads.config == replace(ONE, fuse_bias=True)
    assert any("is that of" in note for note in heads.notes)
    states, embedded = some(9, D), some(9, D) + 1
    torch.testing.assert_close(said(heads, states, embedded, base.head_VD)[0], theirs(states, embedded)[0])


@pytest.mark.parametrize("form", ["speculators", "flat", "specforge"])
def test_eagle3_as_others_have_it(form: str, base: Base, tmp_path: Path) -> None:
    """With a part of the vocabulary, under both names of its layer."""
    theirs, ids = Theirs(fused=True, known=len(KEPT)), torch.tensor(KEPT)
    maps = {"d2t": ids - torch.arange(len(ids)), "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)}
    layers, left = ({"eagle_aux_hidden_state_layer_ids": ids} for ids in ([0, 1, 2], [-1, 0, 1]))
    config, first = {
        "speculators": (speculators(draft_vocab_size=len(KEPT)), "layers.0"),
        "flat": (flat(draft_vocab_size=len(KEPT), **layers), "midlayer"),
        "specforge": (flat(architectures=["LlamaForCausalLMEagle3"], eagle_config=left), "midlayer"),
    }[form]
    heads = read(put(tmp_path / "it", config, theirs.tensors(first) | maps, "model.safetensors"), base)
    assert heads.config == replace(THREE, kept=KEPT)
    assert heads.target == ("some/target" if form == "speculators" else base.name)
    states, embedded = some(9, 3 * D), some(9, D) + 1
    seen, logits = said(heads, states, embedded, base.head_VD)
    expected = theirs(states, embedded)[0]
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(logits, theirs.lm_head(expected).detach())


def test_layers_that_are_not_named_are_those_of_the_code(base: Base, tmp_path: Path) -> None:
    """Of two, and without a target nobody knows."""
    theirs = Theirs(fused=True)
    theirs.fc = nn.Linear(2 * D, D, bias=False)
    config = speculators(eagle_aux_hidden_state_layer_ids=None)
    folder = put(tmp_path / "it", config, theirs.tensors(), "model.safetensors")
    assert read(folder, base).config.sources == (0, 1)
    with pytest.raises(DrafterError, match="give --target"):
        read(folder)


# ---- both ways


def heads_of(config: EagleConfig, dtype: torch.dtype) -> Heads:
    torch.manual_seed(0)
    tensors = {name: torch.randn(p.shape).to(dtype) for name, p in skeleton(config).named_parameters()}
    return Heads("ours", config, tensors, "some/target", {})


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_target", [False, True])
def test_what_is_written_is_read_back(
    config: EagleConfig, dtype: torch.dtype, with_target: bool, base: Base, tmp_path: Path
) -> None:
    heads, target = heads_of(config, dtype), base if with_target else None
    homes = ["eagle"] if not config.fused else ["eagle3", *([] if 0 in config.sources else ["specforge"])]
    for layout in homes:
        out = tmp_path / layout
        assert write(heads, layout, out, target) == len(heads.tensors)
        again = read(out, target)
        assert (again.layout, again.config, again.target) == (layout, config, "some/target")
        write(again, "ours", tmp_path / f"{layout} ours", target)
        checkpoint = checkpoints.read(tmp_path / f"{layout} ours")
        module = checkpoint.module(EagleModule, EagleConfig)
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, heads.tensors[name].float())


def test_what_training_alone_asked_for_does_not_travel(base: Base, tmp_path: Path) -> None:
    heads = heads_of(replace(THREE, heads=7, taught=7, noise="none"), torch.float32)
    write(heads, "eagle3", tmp_path / "it", base)
    assert read(tmp_path / "it", base).config == heads.config


def test_the_maps_of_a_part_of_the_vocabulary(base: Base, tmp_path: Path) -> None:
    """Offsets, and a mask: the j-th of what is marked is j plus its offset (13.17)."""
    write(heads_of(replace(THREE, kept=KEPT), torch.bfloat16), "eagle3", tmp_path / "it", base)
    stored = load_file(tmp_path / "it" / "model.safetensors")
    marked = stored["t2d"].nonzero().flatten()
    assert stored["t2d"].dtype == torch.bool and len(stored["t2d"]) == V and len(marked) == len(KEPT)
    assert torch.equal(marked, torch.arange(len(KEPT)) + stored["d2t"]) and stored["d2t"].dtype == torch.int64
    assert torch.equal(stored["embed_tokens.weight"], base.embedding_VD.bfloat16())
    assert json.loads((tmp_path / "it" / "config.json").read_text())["draft_vocab_size"] == len(KEPT)


@pytest.mark.parametrize(
    ("change", "layout", "said"),
    [
        ({}, "eagle", "no place for EAGLE-3"),
        ({"vocabulary": "shared"}, "eagle3", "shares its target's projection"),
        ({"sources": (0, 1, -1)}, "specforge", "last state"),
        ({"qkv_bias": True}, "eagle3", "biases"),
        ({"layers": 2}, "specforge", "has one layer"),
        ({}, "specforge", "leave no layer"),
        ({}, "vllm", "heads see the tokens|EAGLE"),
    ],
)
def test_what_a_layout_has_no_place_for_is_refused(
    change: dict[str, Any], layout: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DrafterError, match=said):
        write(heads_of(replace(THREE, **change), torch.float32), layout, tmp_path / "it")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"some_new_norm": True}, "some_new_norm, which is not known"),
        ({"target_hidden_size": 2 * D, "hidden_size": D}, "not as wide"),
        ({"layer": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}}}, "llama3"),
        ({"layer": {"attention_bias": True}}, "biases in its attention"),
        ({"layer": {"hidden_act": "gelu"}}, "gelu"),
        ({"layer": {"hidden_size": None}}, "does not say hidden_size"),
    ],
)
def test_what_ours_cannot_do_is_refused(entries: dict[str, Any], said: str, base: Base, tmp_path: Path) -> None:
    config: dict[str, Any] = speculators(**{name: value for name, value in entries.items() if name != "layer"})
    config["transformer_layer_config"] |= entries.get("layer", {})
    folder = put(tmp_path / "it", config, Theirs(fused=True).tensors(), "model.safetensors")
    with pytest.raises((DrafterError, CheckpointError), match=said):
        read(folder, base)


def test_layers_are_numbered_as_each_has_them(tmp_path: Path) -> None:
    """speculators by what enters a layer, SGLang by what leaves one."""
    heads, key = heads_of(replace(THREE, sources=(2, 4, 5)), torch.float32), "eagle_aux_hidden_state_layer_ids"
    write(heads, "eagle3", tmp_path / "speculators")
    write(heads, "specforge", tmp_path / "specforge")
    about = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("speculators", "specforge")]
    assert about[0][key] == [2, 4, 5] and about[1]["eagle_config"][key] == [1, 3, 4]


def test_drafters_are_measured_on_answers_before_and_after(llama: object, base: Base, tmp_path: Path) -> None:
    """As `forerun convert` does, with a part of the vocabulary."""
    heads, network = heads_of(replace(THREE, kept=KEPT), torch.float32), load_network(base.name, torch.float32, CPU)
    samples = [Sample((1, 2, 3), (3, 1, 9, 17, 2, 30, 1)), Sample((5,), (9, 9, 1, 2, 2))]
    write(heads, "eagle3", tmp_path / "it", base)
    before, after = (tokens_per_step(one, network, samples) for one in (heads, read(tmp_path / "it", base)))
    assert before == after >= 1


def test_a_missing_tensor_and_one_too_many_are_named(base: Base, tmp_path: Path) -> None:
    tensors = Theirs(fused=True).tensors()
    del tensors["layers.0.hidden_norm.weight"]
    folder = put(tmp_path / "it", speculators(), tensors | {"extra.weight": torch.zeros(1)}, "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        read(folder, base)
    assert "missing     layers.0.hidden_norm.weight" in str(raised.value)
    assert "unexpected  extra.weight" in str(raised.value)


@pytest.mark.parametrize("broken", ["d2t", "t2d", "order"])
def test_maps_that_contradict_one_another_are_refused(broken: str, base: Base, tmp_path: Path) -> None:
    ids = torch.tensor(KEPT)
    maps = {"d2t": ids - torch.arange(len(ids)), "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)}
    if broken == "order":
        maps["d2t"] = maps["d2t"].flip(0)
    else:
        maps[broken][0 if broken == "d2t" else 1] = 0
    tensors = Theirs(fused=True, known=len(KEPT)).tensors() | maps
    with pytest.raises(CheckpointError, match="do not map"):
        read(put(tmp_path / "it", speculators(draft_vocab_size=len(KEPT)), tensors, "model.safetensors"), base)


def test_an_embedding_of_another_target_is_refused(base: Base, tmp_path: Path) -> None:
    tensors = Theirs(fused=False).tensors() | {"embed_tokens.weight": base.embedding_VD.flip(0).clone()}
    with pytest.raises(DrafterError, match="not that of"):
        read(put(tmp_path / "it", flat(), tensors, "model.safetensors"), base)


def test_every_parameter_has_a_published_name() -> None:
    for config in ALL.values():
        reached = {place.parameter for place in table_of(config).values()}
        assert reached == {name for name, _ in skeleton(config).named_parameters()}


def test_ours_is_read_as_ours(tmp_path: Path) -> None:
    module = filled(EagleModule(THREE))
    checkpoints.write(module, THREE, Checkpoint(tmp_path / "it", "eagle", {}, "t", {}), torch.float32)
    assert read(tmp_path / "it").config == THREE
