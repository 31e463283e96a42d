"""Checkpoints of the outside world -> ours, and back.

    path or hub id -> folder -> config.json -> our Transformer, if it is a Llama, Mistral, Qwen2 or Qwen3
                                            -> nn/foreign.py, if it is any other Hugging Face causal LM

Weights are read from safetensors only (a pickle can run code), tensor by tensor into parameters that exist already:
loading needs the memory of the model and of one tensor more. Nothing is skipped silently: a tensor too many, too few or
of another shape is an error that lists it.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from forerun.errors import CheckpointError
from forerun.nn.feed import Network
from forerun.nn.transformer import Transformer, TransformerConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DOWNLOADED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.jinja")
NOT_DOWNLOADED = ("*/*", "consolidated*.safetensors")
SHOWN = 12
"""Differences between weights and config.json that a message lists before it only counts."""


def load_network(path_or_hub_id: str | Path, dtype: torch.dtype, device: torch.device) -> Network:
    """A network from a local folder or a hub id, on `device` in `dtype`, ready to read.

    Raises CheckpointError for anything that is missing, damaged, or of a kind that cannot be run.
    """
    folder = checkpoint_folder(path_or_hub_id)
    outside = read_config(folder)
    config = translate(outside, folder)
    if config is not None:
        return load_transformer(folder, config, dtype, device)
    from forerun.nn.foreign import load_foreign

    return load_foreign(folder, outside, dtype, device)


def checkpoint_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or a local copy of the hub's model of that name: weights, config and tokenizer, no pickles."""
    name, path = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds {CONFIG} and the weights")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CheckpointError(f"there is no folder {name}: check the path")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)
            )
        )
    except Exception as error:  # the client raises a dozen kinds that have no ancestor in common
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub hands out ({brief(error)}): "
            "check the name and the connection"
        ) from error


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """The config.json of a checkpoint as transformers reads it."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a wrong config.json makes transformers raise whatever its first victim raises
        raise CheckpointError(
            f"{folder / CONFIG} cannot be used ({brief(error)}): repair it or fetch it again"
        ) from error


def brief(error: BaseException) -> str:
    """The first line of an error, to be quoted within a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


# ---- config.json -> TransformerConfig


def translate(outside: transformers.PreTrainedConfig, source: Path | str) -> TransformerConfig | None:
    """Our words for a config, or None where it asks for something that our transformer does not have."""
    fields = outside.to_dict()
    if not _is_ours(fields):
        return None
    try:
        return _translate(outside, fields)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"the {CONFIG} of {source} is incomplete ({error!r}): repair it") from error


def _is_ours(fields: Mapping[str, Any]) -> bool:
    kind = fields.get("model_type", "")
    rope = fields.get("rope_parameters") or {}
    return (
        kind in ARCHITECTURES
        and (fields.get("architectures") or [ARCHITECTURES[kind]]) == [ARCHITECTURES[kind]]
        and fields["hidden_act"] == "silu"
        and fields.get("is_causal", True)
        and fields.get("quantization_config") is None
        and rope.get("rope_type") in ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(fields.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
    )


def _translate(outside: transformers.PreTrainedConfig, fields: dict[str, Any]) -> TransformerConfig:
    kind, heads, rope = fields["model_type"], fields["num_attention_heads"], fields["rope_parameters"]
    attention_bias = kind in ("llama", "qwen3") and bool(fields["attention_bias"])
    inv_freq, rope_scale = _scaled_frequencies(outside, rope["rope_type"])
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm_eps=fields["rms_norm_eps"],
        tied=bool(fields["tie_word_embeddings"]),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(fields["mlp_bias"]),
        qk_norm=kind == "qwen3",
        windows=_windows(fields),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        rope_theta=float(rope["rope_theta"]),
        source=fields,
    )


def _scaled_frequencies(outside: transformers.PreTrainedConfig, rope_type: str) -> tuple[tuple[float, ...], float]:
    if rope_type == "default":
        return (), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](outside)
    return tuple(frequencies.tolist()), float(scale)


def _windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window per layer; empty when no layer has one. A Mistral slides everywhere or nowhere, a Llama never does."""
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if fields["model_type"] == "llama" or window is None:
        return ()
    kinds = ["sliding_attention"] * layers if fields["model_type"] == "mistral" else fields["layer_types"]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


# ---- published tensors -> parameters


@dataclass(frozen=True)
class Place:
    """Where a published tensor lives: rows `begin .. begin + shape[0]` of one of our parameters."""

    parameter: str
    shape: tuple[int, ...]
    begin: int = 0

    def within(self, model: Transformer) -> Tensor:
        return model.get_parameter(self.parameter).detach()[self.begin : self.begin + self.shape[0]]


def places(config: TransformerConfig) -> dict[str, Place]:
    """The published name of every tensor, and its place. All four families use the same names."""
    table = {
        "model.embed_tokens.weight": Place("embedding.weight", (config.vocab_size, config.width)),
        "model.norm.weight": Place("final_norm", (config.width,)),
    }
    if not config.tied:
        table["lm_head.weight"] = Place("head.weight", (config.vocab_size, config.width))
    for layer in range(config.layers):
        for name, place in _places_in_layer(config).items():
            table[f"model.layers.{layer}.{name}"] = replace(place, parameter=f"blocks.{layer}.{place.parameter}")
    return table


def _places_in_layer(config: TransformerConfig) -> dict[str, Place]:
    width, mlp = config.width, config.mlp_width
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {
        "input_layernorm.weight": Place("attention_norm", (width,)),
        "post_attention_layernorm.weight": Place("mlp_norm", (width,)),
    }
    if config.qk_norm:
        table["self_attn.q_norm.weight"] = Place("q_norm", (config.head_dim,))
        table["self_attn.k_norm.weight"] = Place("k_norm", (config.head_dim,))
    for name, ours, begin, rows, columns, biased in (
        ("self_attn.q_proj", "qkv", 0, queries, width, config.qkv_bias),
        ("self_attn.k_proj", "qkv", queries, keys, width, config.qkv_bias),
        ("self_attn.v_proj", "qkv", queries + keys, keys, width, config.qkv_bias),
        ("self_attn.o_proj", "out", 0, width, queries, config.out_bias),
        ("mlp.gate_proj", "gate_up", 0, mlp, width, config.mlp_bias),
        ("mlp.up_proj", "gate_up", mlp, mlp, width, config.mlp_bias),
        ("mlp.down_proj", "down", 0, width, mlp, config.mlp_bias),
    ):
        table[f"{name}.weight"] = Place(f"{ours}.weight", (rows, columns), begin)
        if biased:
            table[f"{name}.bias"] = Place(f"{ours}.bias", (rows,), begin)
    return table


# ---- reading


def load_transformer(folder: Path, config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Our transformer with the weights of a folder, which must hold exactly the tensors that `config` calls for."""
    files = weight_files(folder)
    stored = _stored(files)
    # A head that is published although the config ties it may differ; transformers believes the weights, and so do we.
    twice = config.tied and "lm_head.weight" in stored
    config = replace(config, tied=config.tied and not twice)
    table = places(config)
    _demand_same(folder, table, stored)
    model = _allocate(config, dtype, device)
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in table:
                    table[name].within(model).copy_(file.get_tensor(name))
    if twice and torch.equal(model.head.weight, model.embedding.weight):
        model.config, model.head.weight = replace(config, tied=True), model.embedding.weight
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}): fetch it again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names: fetch the missing files")
    return [folder / shard for shard in shards]


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are opened: "
            "convert them to safetensors where you trust them"
        )
    return f"{folder} has no {WEIGHTS}: give the folder of a checkpoint that is complete"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({brief(error)}): fetch it again") from error


@dataclass(frozen=True)
class Stored:
    """What a file says about a tensor: its shape, and its number format in safetensors' words."""

    shape: tuple[int, ...]
    dtype: str


def _stored(files: Sequence[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = Stored(tuple(part.get_shape()), part.get_dtype())
    # Old exports carry the rotary frequencies, which follow from the config.
    return {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _demand_same(folder: Path, table: Mapping[str, Place], stored: Mapping[str, Stored]) -> None:
    lines = [f"missing     {name} {_shape(table[name].shape)}" for name in table if name not in stored]
    lines += [f"unexpected  {name} {_shape(stored[name].shape)}" for name in stored if name not in table]
    for name in table.keys() & stored.keys():
        if stored[name].shape != table[name].shape:
            lines.append(f"wrong shape {name} {_shape(stored[name].shape)} instead of {_shape(table[name].shape)}")
        elif stored[name].dtype not in FLOATS:
            lines.append(f"wrong type  {name} {stored[name].dtype} instead of one of {', '.join(FLOATS)}")
    if lines:
        raise CheckpointError(difference(folder, lines))


def difference(folder: Path, lines: Sequence[str]) -> str:
    """The message for weights that are not those of their config.json, one line per tensor."""
    listed = [f"  {line}" for line in sorted(lines)[:SHOWN]]
    if len(lines) > SHOWN:
        listed.append(f"  and {len(lines) - SHOWN} more")
    head = f"the weights in {folder} do not fit its {CONFIG}: repair that file or fetch the weights that belong to it"
    return "\n".join([head, *listed])


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _allocate(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A transformer whose parameters have memory but no values yet."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        weights = {
            name: nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device))
            for name, weight in model.named_parameters()
        }
    except RuntimeError as error:
        numbers = sum(weight.numel() for weight in model.parameters())
        raise CheckpointError(
            f"a model of {numbers / 1e9:.1f} billion {dtype} weights does not fit into the memory of {device}: "
            "choose a smaller model or number format"
        ) from error
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    return model


# ---- writing


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    extra_config: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json and model.safetensors as transformers, llama.cpp and vLLM read them.

    extra_config: entries of config.json to add or to override (token ids, for instance). The folder is made if need be;
    other files in it stay. Raises CheckpointError where it cannot be written; then nothing half-written is left.
    """
    folder = Path(folder)
    fields = published_config(model.config, dtype) | dict(extra_config or {})
    _demand_faithful(fields, model.config, folder)
    tensors = {
        name: place.within(model).to(device="cpu", dtype=dtype).contiguous()
        for name, place in places(model.config).items()
    }
    beside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir(parents=True)
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        _move_in(beside, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({brief(error)}): make room there or choose another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move_in(beside: Path, folder: Path) -> None:
    if not folder.exists():
        beside.rename(folder)
        return
    for name in (WEIGHTS, CONFIG):
        (beside / name).replace(folder / name)


def published_config(config: TransformerConfig, dtype: torch.dtype) -> dict[str, object]:
    """config.json in the words of the family that has what `config` asks for, the plainest first."""
    kind, rope = _family(config), _published_rope(config)
    fields: dict[str, object] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.source.get("bos_token_id", 1),
        "eos_token_id": config.source.get("eos_token_id", 2),
        "rope_parameters": rope,
        # Older readers look for the next three under these names.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return fields | _published_windows(config, kind)


def _family(config: TransformerConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "mistral" if any(config.windows) else "llama"


def _published_rope(config: TransformerConfig) -> dict[str, object]:
    """As it was read; scaled frequencies alone do not say how they were scaled."""
    rope = config.source.get("rope_parameters") if config.inv_freq else None
    return dict(rope) if isinstance(rope, Mapping) else {"rope_type": "default", "rope_theta": config.rope_theta}


def _published_windows(config: TransformerConfig, kind: str) -> dict[str, object]:
    if kind == "llama":
        return {}
    window = next((window for window in config.windows if window), None)
    if kind == "mistral":
        return {"sliding_window": window}
    windows = config.windows or (None,) * config.layers
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}


def _demand_faithful(fields: Mapping[str, Any], config: TransformerConfig, folder: Path) -> None:
    """What is about to be written must be read back as the same architecture."""
    try:
        again = translate(transformers.AutoConfig.for_model(**fields), folder)
    except Exception as error:  # as in `read_config`
        raise CheckpointError(
            f"{folder} was not written, for transformers would refuse its {CONFIG} ({brief(error)}): change that"
        ) from error
    if again != (config if any(config.windows) else replace(config, windows=())):
        raise CheckpointError(
            f"{folder} was not written, for none of {', '.join(ARCHITECTURES)} has the shape of this model: {config}"
        )
