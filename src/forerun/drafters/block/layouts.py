"""Block drafters in the layouts of speculators, DSpark's and DFlash's.

Both hold the same tensors; DSpark's may have a Markov term and a confidence head beside them. Names, shapes and
defaults were read in speculators 0.9, whose classes load what is written here; no server was tried. It numbers the
target's states as we do, by the layer that they enter, but the last of them have not passed the target's last norm, as
ours have. The matrices of the target are not stored, and where a file has them they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from forerun.drafters.block import LAST, BlockConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.decoders import (
    count,
    demand_as_wide,
    dtype_of,
    frame,
    layer_of,
    maps,
    published,
    sizes,
    verifier,
    without_copy,
    without_embedding,
    without_maps,
)
from forerun.layouts.table import Heads, Parcel, Place, Published, Table, origin, packed, target_of
from forerun.layouts.target import Base
from forerun.nn.translate import places
from forerun.sources.folder import CONFIG, WEIGHTS

BEFORE, BEHIND = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
PROJECTION, CONFIDENCE = "lm_head.weight", "confidence_head."
OF_TARGET = ("verifier_lm_head.weight", "verifier_norm.weight")
"""What speculators makes of the target when it loads a drafter."""


def table_of(config: BlockConfig) -> Table:
    assert config.layer is not None
    width, inner = config.width, config.layer.transformer(config.width, config.layers, qk_norm=True)
    table: Table = {
        "fc.weight": Place("fuse", (width, len(config.sources) * width)),
        "hidden_norm.weight": Place("fuse_norm", (width,)),
        "norm.weight": Place("stack.final_norm", (width,)),
    }
    for name, place in places(inner).items():
        if name.startswith("model.layers."):
            table[name.removeprefix("model.")] = Place(f"stack.{place.parameter}", place.shape, (), place.begin)
    if config.rank:
        table[BEFORE] = Place("markov.before", (config.vocab_size, config.rank))
        table[BEHIND] = Place("markov.behind", (config.candidates, config.rank))
    return table


# ---- what is read


def read(stored: Published, base: Base | None) -> Heads:
    """Either layout."""
    layout, said = stored.config["speculators_model_type"], stored.config.get("transformer_layer_config") or {}
    shape, layer = sizes(stored, said), layer_of(stored, said)
    demand_as_wide(stored, shape["width"])
    stored, kept = without_maps(stored, shape["vocab_size"])
    _demand_maps(stored, len(kept) or shape["vocab_size"])
    stored, notes = _without_the_rest(stored, base, kept)
    from_anchor = bool(stored.config.get("sample_from_anchor", layout == "dspark"))
    rows = count(stored, stored.config, "block_size", 8)
    config = BlockConfig(
        **shape,
        kept=kept,
        heads=rows if from_anchor else rows - 1,
        layers=count(stored, said, "num_hidden_layers"),
        layer=layer,
        rank=_rank(stored, layout),
        sources=_sources(stored, base),
        mask_token=count(stored, stored.config, "mask_token_id"),
        from_anchor=from_anchor,
    )
    config, tensors = stored.gather(config, table_of(config))
    target = verifier(stored) or target_of(stored, base)
    return Heads(layout, config, tensors, target, origin(stored, layout), notes)


def _demand_maps(stored: Published, mapped: int) -> None:
    said = stored.config.get("draft_vocab_size", mapped)
    if said != mapped:
        raise CheckpointError(
            f"{stored.folder / CONFIG} says draft_vocab_size {said}, and the tensors map {mapped} tokens: fetch them"
            " again"
        )


def _without_the_rest(stored: Published, base: Base | None, kept: Sequence[int]) -> tuple[Published, tuple[str, ...]]:
    """Copies of the target's matrices, and what is not needed here."""
    stored, notes = without_embedding(stored, base)
    stored, more = without_copy(stored, PROJECTION, "projection", base, lambda base: _rows(base, kept))
    left = {name: tensor for name, tensor in stored.tensors.items() if name not in OF_TARGET}
    own = {name: tensor for name, tensor in left.items() if not name.startswith(CONFIDENCE)}
    unheard = ("its confidence head is left out: here the probabilities of the tree tell",) if own != left else ()
    return replace(stored, tensors=own), (*notes, *more, *unheard)


def _rows(base: Base, kept: Sequence[int]) -> Tensor:
    """Of the target's projection those of the tokens that are known."""
    return base.head_VD[list(kept)] if kept else base.head_VD


def _rank(stored: Published, layout: str) -> int:
    kind = stored.config.get("markov_head_type", "vanilla")
    rank = count(stored, stored.config, "markov_rank", 256) if layout == "dspark" else 0
    if rank and kind != "vanilla":
        raise DrafterError(f"the drafter in {stored.folder} has markov_head_type {kind}, and ours is vanilla alone")
    return rank


def _sources(stored: Published, base: Base | None) -> tuple[int, ...]:
    """DrafterError where the target's last state is among them, which is not ours."""
    key = "aux_hidden_state_layer_ids"
    found = stored.config.get(key)
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"{stored.folder / CONFIG} does not say {key}: fetch it again")
    top = base.config.layers if base and base.config else None
    if top is not None and top in found:
        raise DrafterError(
            f"the drafter in {stored.folder} reads layer {top} of {key} before the target's last norm, and ours"
            " reads it behind that: get a drafter that reads inner layers"
        )
    return tuple(found)


# ---- what is written


def as_dspark(heads: Heads, base: Base | None) -> Parcel:
    config = _inner_only(heads)
    markov = {
        "markov_rank": config.rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
    }
    return _parcel(heads, config, base, "dspark", "DSparkSpeculator", markov)


def as_dflash(heads: Heads, base: Base | None) -> Parcel:
    config = _inner_only(heads)
    if config.rank:
        raise DrafterError("this drafter has a Markov term, for which DFlash's layout has no place: convert to dspark")
    return _parcel(heads, config, base, "dflash", "DFlashSpeculator", {})


def _parcel(
    heads: Heads, config: BlockConfig, base: Base | None, layout: str, architecture: str, more: Mapping[str, Any]
) -> Parcel:
    assert config.layer is not None
    about = {
        "architectures": [architecture],
        **frame(heads, base, layout, config.heads),
        "transformer_layer_config": published(config, config.layer, qk_norm=True),
        "draft_vocab_size": config.candidates,
        "block_size": config.rows,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": list(config.sources),
        "mask_token_id": config.mask_token,
        "sliding_window_non_causal": False,
        "sample_from_anchor": config.from_anchor,
        **more,
        "tie_word_embeddings": False,
        "dtype": dtype_of(heads),
    }
    return Parcel(about, packed(heads, table_of(config)) | _part(heads, config, base), (WEIGHTS,))


def _part(heads: Heads, config: BlockConfig, base: Base | None) -> dict[str, Tensor]:
    """What a file holds beside the drafter's own where it knows some tokens alone."""
    if not config.kept:
        return {}
    if base is None:
        raise DrafterError(
            "this drafter knows a part of its target's tokens, and these layouts hold the rows of the target's"
            " projection for them: give --target MODEL"
        )
    rows = _rows(base, config.kept).to(heads.dtype).clone()
    return maps(config.kept, config.vocab_size) | {PROJECTION: rows}


def _inner_only(heads: Heads) -> BlockConfig:
    config = heads.config
    if not isinstance(config, BlockConfig):
        raise DrafterError(
            f"{heads.method.title}'s heads are no block drafter, which these layouts hold: convert to {heads.homes}"
        )
    if config.mask_token is None:
        raise DrafterError(
            "this drafter has learnt what stands in its empty rows, and these layouts want a token there: train it"
            " with --mask-token"
        )
    if LAST in config.sources:
        raise DrafterError(
            "this drafter reads the target's last state behind its norm, which these layouts cannot say: train it"
            " with --sources of inner layers"
        )
    return config
