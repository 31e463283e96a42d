"""kernels/forerun_kernels.h in Python: its records, its functions, and the constants that both sides know."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

FORMATS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}
"""`fr_format`."""
PANEL, GROUP, WIDEST_HEAD = 32, 128, 512
"""Outputs that are packed together, int8 inputs that share a scale, and the widest head of attention."""


class Matrix(ctypes.Structure):
    """`fr_matrix`: a packed matrix."""

    _fields_ = (
        ("format", c_int32),
        ("gated", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("padded_in", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


class FeedRecord(ctypes.Structure):
    """`fr_feed`."""

    _fields_ = (
        ("rows", c_int32),
        ("count", c_int32),
        ("start", c_int32),
        ("held", c_int32),
        ("counts", c_void_p),
        ("lengths", c_void_p),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("paths", c_void_p),
        ("states", c_void_p),
        ("states_format", c_int32),
        ("reach", c_int32),
        ("mutual", c_int32),
    )


class CacheRecord(ctypes.Structure):
    """`fr_cache`."""

    _fields_ = (
        ("store", c_void_p),
        ("format", c_int32),
        ("layers", c_int32),
        ("slots", c_int32),
        ("capacity", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
    )


class LayerRecord(ctypes.Structure):
    """`fr_layer`."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", c_int32),
    )


class TransformerRecord(ctypes.Structure):
    """`fr_transformer`."""

    _fields_ = (
        ("layers", c_int32),
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("mlp_width", c_int32),
        ("norm_eps", c_float),
        ("scale", c_float),
        ("layer", POINTER(LayerRecord)),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("embedding", c_void_p),
        ("embedding_format", c_int32),
        ("vocabulary", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("table_length", c_int64),
    )


class WantedRecord(ctypes.Structure):
    """`fr_wanted`."""

    _fields_ = (
        ("logits", c_void_p),
        ("best", c_void_p),
        ("last", c_void_p),
        ("hidden_count", c_int32),
        ("hidden_format", c_int32),
        ("hidden_layers", c_void_p),
        ("hidden", c_void_p),
    )


class HeadRecord(ctypes.Structure):
    """`fr_head`."""

    _fields_ = (("first", Matrix), ("blocks", POINTER(Matrix)), ("block_count", c_int64), ("vocabulary", Matrix))


class HeadsRecord(ctypes.Structure):
    """`fr_heads`."""

    _fields_ = (
        ("count", c_int32),
        ("width", c_int32),
        ("vocabulary", c_int32),
        ("format", c_int32),
        ("head", POINTER(HeadRecord)),
        ("embedding", c_void_p),
    )


class LevelRecord(ctypes.Structure):
    """`fr_level`."""

    _fields_ = (
        ("first", c_int32),
        ("nodes", c_int32),
        ("parents", c_int32),
        ("widest", c_int32),
        ("begin", c_void_p),
        ("ranks", c_void_p),
        ("grown", c_void_p),
    )


class TreeRecord(ctypes.Structure):
    """`fr_tree`."""

    _fields_ = (("nodes", c_int32), ("levels", c_int32), ("parents", c_void_p), ("level", POINTER(LevelRecord)))


class CursorRecord(ctypes.Structure):
    """`fr_cursor`."""

    _fields_ = (("state", c_int32), ("length", c_int32))


class ViewRecord(ctypes.Structure):
    """`fr_view`."""

    _fields_ = (
        ("automaton", c_void_p),
        ("prior", c_void_p),
        ("odds", c_double * 9),
        ("cursor", CursorRecord),
        ("own", c_int32),
        ("studied", c_int32),
        ("nodes", c_int32),
        ("depth", c_int32),
        ("min_match", c_int32),
        ("room", c_int32),
        ("ends_count", c_int32),
        ("cost", c_double),
        ("ends", c_void_p),
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("survival", c_void_p),
    )


class CorpusRecord(ctypes.Structure):
    """`fr_corpus`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("order", c_void_p),
        ("starts", c_void_p),
        ("size", c_int64),
        ("entries", c_int64),
        ("vocabulary", c_int32),
        ("wide", c_int32),
    )


class CorpusWishRecord(ctypes.Structure):
    """`fr_corpus_wish`."""

    _fields_ = (
        ("nodes", c_int32),
        ("depth", c_int32),
        ("min_match", c_int32),
        ("places", c_int32),
        ("enough", c_int32),
        ("end_count", c_int32),
        ("cost", c_double),
        ("ends", c_void_p),
        ("weights", c_void_p),
        ("odds", c_void_p),
    )


class CorpusDraftRecord(ctypes.Structure):
    """`fr_corpus_draft`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("survival", c_void_p),
        ("nodes", c_int32),
        ("length", c_int32),
        ("first", c_int32),
        ("chance", c_double),
    )


class BlockRecord(ctypes.Structure):
    """`fr_block`."""

    _fields_ = (
        ("stack", POINTER(TransformerRecord)),
        ("fuse", Matrix),
        ("fuse_norm", c_void_p),
        ("mask", c_void_p),
        ("behind", Matrix),
        ("before", c_void_p),
        ("count", c_int32),
        ("rank", c_int32),
    )


class BlockStatesRecord(ctypes.Structure):
    """`fr_block_states`."""

    _fields_ = (
        ("rows", c_int32),
        ("start", c_int32),
        ("format", c_int32),
        ("lengths", POINTER(c_int32)),
        ("counts", POINTER(c_int32)),
        ("states", POINTER(c_void_p)),
    )


class BlockWishRecord(ctypes.Structure):
    """`fr_block_wish`."""

    _fields_ = (
        ("rows", c_int32),
        ("lengths", POINTER(c_int32)),
        ("roots", POINTER(c_int64)),
        ("nodes", POINTER(c_int32)),
        ("depths", POINTER(c_int32)),
        ("least", POINTER(c_double)),
    )


class BlockTreesRecord(ctypes.Structure):
    """`fr_block_trees`."""

    _fields_ = (
        ("room", c_int32),
        ("sizes", POINTER(c_int32)),
        ("tokens", POINTER(c_int64)),
        ("parents", POINTER(c_int32)),
        ("log_probs", POINTER(c_double)),
    )


class FilterRecord(ctypes.Structure):
    """`fr_filter`."""

    _fields_ = (("temperature", c_float), ("top_k", c_int32), ("top_p", c_double), ("min_p", c_double))


class ProposalRecord(ctypes.Structure):
    """`fr_proposal`."""

    _fields_ = (
        ("rows", c_int32),
        ("nodes", c_int32),
        ("sizes", c_void_p),
        ("parents", c_void_p),
        ("tokens", c_void_p),
        ("token_luck", c_void_p),
        ("coin_luck", c_void_p),
        ("kept", c_void_p),
        ("next", c_void_p),
    )


RECORDS = (
    Matrix,
    FeedRecord,
    CacheRecord,
    LayerRecord,
    TransformerRecord,
    WantedRecord,
    HeadRecord,
    HeadsRecord,
    LevelRecord,
    TreeRecord,
    CursorRecord,
    ViewRecord,
    CorpusRecord,
    CorpusWishRecord,
    CorpusDraftRecord,
    BlockRecord,
    BlockStatesRecord,
    BlockWishRecord,
    BlockTreesRecord,
    FilterRecord,
    ProposalRecord,
)
SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "fr_sizes": (None, (c_void_p,)),
    "fr_isa_best": (c_int32, ()),
    "fr_isa_active": (c_int32, ()),
    "fr_isa_use": (c_int32, (c_int32,)),
    "fr_packed_bytes": (c_int64, (c_int32, c_int32, c_int64, c_int64)),
    "fr_pack": (None, (c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int32, c_int32)),
    "fr_unpack": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32)),
    "fr_linear": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_int32)),
    "fr_norm": (None, (*(c_void_p,) * 4, c_int32, c_int64, c_int64, c_float, c_int32, c_int32)),
    "fr_silu_gate": (None, (c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int32)),
    "fr_attention": (c_int32, (*(c_void_p,) * 3, c_int32, c_int32, c_int32, c_float, c_void_p, c_int32)),
    "fr_top": (None, (c_void_p, c_int64, c_int64, c_int32, *(c_void_p,) * 3, c_int32)),
    "fr_forward": (c_int32, (*(c_void_p,) * 4, c_int32)),
    "fr_draft": (c_int32, (*(c_void_p,) * 5, c_int64, c_int32)),
    "fr_block_read": (c_int32, (*(c_void_p,) * 3, c_int32)),
    "fr_block_score": (c_int32, (*(c_void_p,) * 4, c_int32)),
    "fr_block_grow": (c_int32, (*(c_void_p,) * 4, c_int32)),
    "fr_laws": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32)),
    "fr_pick": (None, (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int32)),
    "fr_uniform": (None, (c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    "fr_match": (None, (*(c_void_p,) * 3, c_int64, c_void_p, c_int32)),
    "fr_verify": (c_int32, (*(c_void_p,) * 4, c_int32, c_int64, c_int32)),
    "fr_automaton_new": (c_void_p, (c_int32,)),
    "fr_automaton_free": (None, (c_void_p,)),
    "fr_automaton_extend": (c_int32, (c_void_p, c_void_p, c_int64)),
    "fr_automaton_size": (None, (c_void_p, c_void_p)),
    "fr_automaton_match": (None, (c_void_p, c_void_p)),
    "fr_automaton_advance": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64)),
    "fr_automaton_outlook": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "fr_automaton_continuations": (c_int32, (c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
    "fr_view_read": (c_int32, (c_void_p, c_void_p, c_int64)),
    "fr_view_draft": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_int32)),
    "fr_view_next": (c_int32, (c_void_p, c_int32)),
    "fr_corpus_grow": (c_int32, (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
}


def cache_record(store: Tensor) -> CacheRecord:
    """The record of a cache's memory [layers, 2, slots, capacity, kv_heads, head_dim]."""
    layers, _, slots, capacity, kv_heads, head_dim = store.shape
    return CacheRecord(store.data_ptr(), FORMATS[store.dtype], layers, slots, capacity, kv_heads, head_dim)
