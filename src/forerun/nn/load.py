"""Checkpoints of the outside world -> ours.

    path or hub id -> source -> its config -> our transformer, if it is a Llama, Mistral, Qwen2 or Qwen3:
                                              nn/backends/native where there are native kernels, else nn/transformer.py
                                           -> nn/foreign.py, if it is any other Hugging Face causal LM

Tensors are read one by one, or a few rows at a time, into memory that exists already: loading needs the memory of the
model and of one tensor more. Nothing is skipped silently: a tensor too many, too few or of another shape is an error
that lists it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from forerun.errors import CheckpointError, ForerunError
from forerun.native.library import why_not
from forerun.native.records import WIDEST_HEAD
from forerun.nn.backends.native.transformer import PackedTransformer
from forerun.nn.foreign.load import load_foreign
from forerun.nn.formats import Formats
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.nn.translate import Slice, places, translate
from forerun.sources.folder import Stored, difference
from forerun.sources.source import Source
from forerun.sources.weights import Piece, whole

KERNELS = ("auto", "native", "torch")
WEIGHTS = ("auto", "int8")
FLOATS = ("F64", "F32", "F16", "BF16")


def load_network(
    source: str | Path | Source,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str = "torch",
    weights: str = "auto",
) -> Network:
    """A network from a local folder, a GGUF file or a hub id, on `device` in `dtype`, ready to read.

    kernels: "torch" (the result can be trained and saved), "native", or "auto" (native where they
    are and where they know the model). weights: "auto" (as `dtype`), or "int8" (native kernels
    only): each group of 128 weights as bytes with a scale.

    Raises CheckpointError for anything that is missing, damaged, or of a kind that cannot be run;
    ForerunError for kernels that cannot be had.
    """
    source = Source.of(source)
    network = _loaded(source, dtype, device, kernels, weights)
    network.home = source.path
    return network


def _loaded(source: Source, dtype: torch.dtype, device: torch.device, kernels: str, weights: str) -> Network:
    config = translate(source.config, source.path)
    reason = why_torch(config, dtype, device, kernels, weights)
    if config is None:
        return load_foreign(source.path, source.config, dtype, device)
    if reason is None:
        return load_packed(source, config, dtype, torch.int8 if weights == "int8" else dtype)
    return load_transformer(source, config, dtype, device)


def demand_words(kernels: str, weights: str) -> None:
    """ForerunError unless both are words that `load_network` knows."""
    if kernels not in KERNELS or weights not in WEIGHTS:
        raise ForerunError(
            f"there are no kernels {kernels!r} with weights {weights!r}: "
            f"choose kernels out of {', '.join(KERNELS)} and weights out of {', '.join(WEIGHTS)}"
        )


def why_torch(
    config: TransformerConfig | None, dtype: torch.dtype, device: torch.device, kernels: str, weights: str
) -> str | None:
    """Why a network runs on torch (a foreign one: with config None), or None where native kernels carry it.

    Raises ForerunError where that is not what was asked for.
    """
    demand_words(kernels, weights)
    if kernels == "torch":
        reason: str | None = "torch was asked for"
    elif config is None:
        reason = "they know the Llama family, and this model is another"
    elif config.head_dim > WIDEST_HEAD:
        reason = f"they know heads of up to {WIDEST_HEAD}, and this model has {config.head_dim}"
    else:
        reason = why_not(device, dtype, at_any_speed=kernels == "native")
    if reason and kernels == "native":
        raise ForerunError(f"native kernels cannot run this: {reason}; use --kernels auto")
    if reason and weights == "int8":
        raise ForerunError(f"int8 weights need the native kernels: {reason}; use --weights auto")
    return reason


def load_transformer(
    source: Source, config: TransformerConfig, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """Our transformer with the weights of a source, which must hold exactly the tensors that `config` calls for."""
    config, table = _checked(source, config)
    model = _allocate(config, dtype, device)
    for piece in source.weights.pieces(table):
        table[piece.name].within(model)[piece.begin : piece.begin + len(piece.rows)] = piece.rows
    return model


def load_packed(
    source: Source, config: TransformerConfig, dtype: torch.dtype, weights: torch.dtype | Formats
) -> PackedTransformer:
    """The same on native kernels."""
    config, table = _checked(source, config)
    return pack(config, table, source.weights.pieces(table), dtype, weights, f"the model in {source.path}")


def pack(
    config: TransformerConfig,
    table: Mapping[str, Slice],
    pieces: Iterable[Piece],
    dtype: torch.dtype,
    weights: torch.dtype | Formats,
    called: str,
) -> PackedTransformer:
    """These tensors, by their published names, on native kernels. called: what errors call the model."""
    try:
        model = PackedTransformer(config, dtype, weights)
    except (OSError, MemoryError, RuntimeError) as error:
        raise CheckpointError(f"{called} does not fit into memory: choose a smaller model or number format") from error
    for piece in pieces:
        model.put(table[piece.name].parameter, piece.rows, table[piece.name].begin + piece.begin)
    return model.ready()


def _checked(source: Source, config: TransformerConfig) -> tuple[TransformerConfig, dict[str, Slice]]:
    """The config as the weights have it, and the places of its tensors, all of which are there."""
    held = source.weights.stored()
    # Heads that were trained with the model (Medusa-2) travel in its folder, as X_head.* beside
    # X_num_heads: for forerun convert.
    theirs = tuple(f"{key.removesuffix('_num_heads')}_head." for key in config.source if key.endswith("_num_heads"))
    held = {name: tensor for name, tensor in held.items() if not name.startswith(theirs)}
    # A head that is published although the config ties it may differ; transformers believes the weights, and so do we.
    twice = config.tied and "lm_head.weight" in held
    table = places(replace(config, tied=config.tied and not twice))
    _demand_same(source.path, table, held)
    if not twice:
        return config, table
    head, embedding = (whole(source.weights, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    config = replace(config, tied=torch.equal(head, embedding))
    return config, places(config)


def _demand_same(path: Path, table: Mapping[str, Slice], held: Mapping[str, Stored]) -> None:
    lines = [f"missing     {name} {_shape(table[name].shape)}" for name in table if name not in held]
    lines += [f"unexpected  {name} {_shape(held[name].shape)}" for name in held if name not in table]
    for name in table.keys() & held.keys():
        if held[name].shape != table[name].shape:
            lines.append(f"wrong shape {name} {_shape(held[name].shape)} instead of {_shape(table[name].shape)}")
        elif held[name].dtype not in FLOATS:
            lines.append(f"wrong type  {name} {held[name].dtype} instead of one of {', '.join(FLOATS)}")
    if lines:
        raise CheckpointError(difference(path, lines))


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
