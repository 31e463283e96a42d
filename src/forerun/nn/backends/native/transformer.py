"""The one transformer again, on native kernels: the same config and weights, packed; a whole forward is one call.

A call per operation would cost more than the arithmetic of a small model (decision 10 in
docs/decisions.md), so the layers are walked in C++ (kernels/forward.cc). `nn/transformer.py` stays
the readable version and the oracle.

Activations are rounded to bf16 only as inputs of products; the residual stream, norms, scores and logits are fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn

from forerun.native.library import demand_fine, kernels
from forerun.native.matrix import Packed, padded
from forerun.native.operations import top
from forerun.native.records import (
    FORMATS,
    WIDEST_HEAD,
    FeedRecord,
    LayerRecord,
    TransformerRecord,
    WantedRecord,
    cache_record,
)
from forerun.nn.backends.blocks import BlockNetwork, BlockWeights
from forerun.nn.backends.heads import DraftHeads, Drafting
from forerun.nn.backends.native.arena import Arena
from forerun.nn.backends.native.blocks import KnownBlocks, PackedBlocks
from forerun.nn.backends.native.heads import PackedHeads
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read
from forerun.nn.formats import Formats
from forerun.nn.network import Footprint, LayerShape, Network
from forerun.nn.transformer import NO_VOCABULARY, TransformerConfig, rope_tables

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MatrixShape:
    """One matrix of the model: `out` columns of a product, `in_` inputs."""

    out: int
    in_: int
    gated: bool = False
    biased: bool = False


def shapes(config: TransformerConfig) -> dict[str, MatrixShape]:
    """The matrices of one layer, by the names of `Layer`."""
    mixed = config.heads * config.head_dim
    return {
        "qkv": MatrixShape(
            (config.heads + 2 * config.kv_heads) * config.head_dim, config.width, biased=config.qkv_bias
        ),
        "out": MatrixShape(config.width, mixed, biased=config.out_bias),
        "gate_up": MatrixShape(config.mlp_width, config.width, gated=True, biased=config.mlp_bias),
        "down": MatrixShape(config.width, config.mlp_width, biased=config.mlp_bias),
    }


class PackedTransformer:
    """A `Network` on native kernels. Make one with `load_packed` or `pack`.

    dtype: of the cache, and of the weights unless `weights` says otherwise: int8, or a format per
    matrix. Logits are fp32.
    """

    device = CPU
    no_tokens: Tensor | None = None
    home: Path | None = None

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, weights: torch.dtype | Formats | None = None):
        if config.head_dim > WIDEST_HEAD or dtype not in FORMATS:
            raise ValueError(f"heads of {config.head_dim} in {dtype}: the kernels know {WIDEST_HEAD} in bf16 or fp32")
        self.config, self.dtype = config, dtype
        self.formats = Formats.of(weights or dtype)
        table, head = shapes(config), MatrixShape(config.vocab_size, config.width)
        kinds = [{name: (self.formats.layer(i, name), table[name]) for name in table} for i in range(config.layers)]
        every = [kind for layer in kinds for kind in layer.values()] + [(self.formats.head, head)]
        self._arena = Arena(sum(padded(_size(*kind), 64) for kind in every))
        self.layers = [{name: self._matrix(*kind) for name, kind in layer.items()} for layer in kinds]
        self.head = self._matrix(self.formats.head, head)
        # A packed head can be read backwards as the embedding; an int8 one would blur it.
        self.embedding: Tensor | None = None
        kept = self.formats.embedding(dtype)
        if not (config.tied and self.formats.head == kept):
            self.embedding = torch.empty(config.vocab_size, config.width, dtype=kept)
        self.norms = {name: torch.zeros(size) for name, size in _norm_sizes(config).items()}
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._growing = Lock()
        self.record = TransformerRecord()
        self._layer_records = (LayerRecord * config.layers)()

    def _matrix(self, dtype: torch.dtype, shape: MatrixShape) -> Packed:
        address = self._arena.take(_size(dtype, shape))
        return Packed.at(address, self._arena, dtype, shape.out, shape.in_, shape.gated, shape.biased)

    @property
    def weights(self) -> torch.dtype:
        """The format of all matrices that are no exceptions."""
        return self.formats.default

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def cache_shape(self) -> CacheShape:
        return self.config.cache_shape

    @property
    def windows(self) -> frozenset[int]:
        """Empty: the kernels know windows themselves."""
        return frozenset()

    @property
    def backend(self) -> NativeBackend:
        return NATIVE

    @property
    def layer_shape(self) -> LayerShape:
        return self.config.layer_shape

    @property
    def output_shape(self) -> tuple[int, int]:
        return self.config.vocab_size, self.config.width

    @property
    def footprint(self) -> Footprint:
        runs_on = f"forerun's own transformer, native kernels ({self.formats} weights)"
        return Footprint(runs_on, self.parameters, self.nbytes)

    @cached_property
    def input_embedding(self) -> Tensor:
        """[V, D]; where the packed head is the embedding too, a copy, made when first asked for."""
        return (self.head.unpacked() if self.embedding is None else self.embedding).to(self.dtype)

    @property
    def output_head(self) -> Packed:
        return self.head

    def head_matrix(self) -> Tensor:
        return self.head.unpacked().to(self.dtype)

    @property
    def parameters(self) -> int:
        """How many numbers the model has learnt."""
        table = shapes(self.config)
        in_layer = sum((s.in_ + s.biased) * s.out * (1 + s.gated) for s in table.values())
        vocabulary = self.config.vocab_size * self.config.width
        norms = sum(norm.numel() for norm in self.norms.values())
        return self.config.layers * in_layer + vocabulary * (2 - self.config.tied) + norms

    @property
    def nbytes(self) -> int:
        """Memory of all weights, padding included."""
        return (
            self._arena.used + sum(norm.nbytes for norm in self.norms.values()) + getattr(self.embedding, "nbytes", 0)
        )

    # ---- filling

    def put(self, parameter: str, value: Tensor, begin: int = 0) -> None:
        """Rows `begin ..` of one of `Transformer`'s parameters, by its name there."""
        if parameter.startswith("blocks."):
            _, layer, name = parameter.split(".", 2)
            matrix = self.layers[int(layer)].get(name.removesuffix(".weight").removesuffix(".bias"))
            if matrix is None:
                self.norms[parameter][: len(value)] = value.float()
                return
            fill = matrix.fill if name.endswith(".weight") else matrix.fill_bias
            if not matrix.record.gated:
                fill(value, begin)
                return
            gates = max(0, min(len(value), matrix.out - begin))
            for part, rows in enumerate((value[:gates], value[gates:])):
                if len(rows):
                    fill(rows, begin if part == 0 else max(0, begin - matrix.out), part)
        elif parameter == "final_norm":
            self.norms[parameter][: len(value)] = value.float()
        else:
            self._put_vocabulary(parameter, value, begin)

    def _put_vocabulary(self, parameter: str, value: Tensor, begin: int) -> None:
        if self.embedding is not None and parameter == "embedding.weight":
            self.embedding[begin : begin + len(value)] = value
        if parameter == "head.weight" or self.config.tied:
            self.head.fill(value, begin)

    def ready(self) -> PackedTransformer:
        """Call once after all values are in."""
        config, record = self.config, self.record
        for index, (matrices, layer) in enumerate(zip(self.layers, self._layer_records, strict=True)):
            prefix = f"blocks.{index}."
            for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
                if prefix + name in self.norms:
                    setattr(layer, name, self.norms[prefix + name].data_ptr())
            for name, matrix in matrices.items():
                setattr(layer, name, matrix.record)
            layer.window = (config.windows[index] or 0) if config.windows else 0
        record.layers, record.width, record.mlp_width = config.layers, config.width, config.mlp_width
        record.heads, record.kv_heads, record.head_dim = config.heads, config.kv_heads, config.head_dim
        record.norm_eps, record.scale = config.norm_eps, config.head_dim**-0.5
        record.layer, record.final_norm = self._layer_records, self.norms["final_norm"].data_ptr()
        record.head, record.vocabulary = self.head.record, config.vocab_size
        if self.embedding is not None:
            record.embedding = self.embedding.data_ptr()
            record.embedding_format = FORMATS[self.embedding.dtype]
        return self

    # ---- reading

    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """See `Network.forward`. Hidden states come in `dtype`."""
        rows, count = feed.tokens_BN.shape
        if any(not 0 <= layer <= self.config.layers for layer in hidden_layers):
            raise ValueError(f"there are no states of layers {sorted(hidden_layers)}: there are {self.config.layers}")
        scored = count if feed.last_B is None else 1
        logits = torch.empty((rows, scored, self.vocab_size), dtype=torch.float32)
        best = torch.empty((rows, scored), dtype=torch.int64) if self.vocab_size else None
        hidden = {layer: torch.empty((rows, count, self.config.width), dtype=self.dtype) for layer in hidden_layers}
        wanted = WantedRecord(logits.data_ptr(), None if best is None else best.data_ptr())
        if hidden:
            layers = (ctypes.c_int32 * len(hidden))(*hidden)
            places = (ctypes.c_void_p * len(hidden))(*(tensor.data_ptr() for tensor in hidden.values()))
            wanted.hidden_count, wanted.hidden_format = len(hidden), FORMATS[self.dtype]
            wanted.hidden_layers = ctypes.cast(layers, ctypes.c_void_p)
            wanted.hidden = ctypes.cast(places, ctypes.c_void_p)
        self.turn_up_to(cache.capacity)
        tokens, paths = feed.tokens_BN.contiguous(), feed.paths_BNJ
        if tokens.dtype != torch.int64 or tokens.shape != feed.where_BN.shape:
            raise ValueError(f"tokens are int64 and have positions: {tokens.dtype} {list(tokens.shape)}")
        ints = _integers(feed)
        begin = ints.ctypes.data
        record = FeedRecord(rows, count, feed.start, feed.held, begin, begin + 4 * rows, tokens.data_ptr())
        record.positions = begin + 12 * rows
        states = self._states(feed)
        if states is not None:
            record.states, record.states_format = states.data_ptr(), FORMATS[states.dtype]
        if feed.last_B is not None:
            wanted.last = begin + 8 * rows
        if paths is not None:
            if paths.shape[:2] != (rows, count):
                raise ValueError(f"paths {list(paths.shape)} for the entries of {rows} x {count} tokens")
            paths = np.ascontiguousarray(paths, np.int32)
            record.paths, record.reach = paths.ctypes.data, paths.shape[2]
        error = kernels().fr_forward(
            ctypes.byref(self.record),
            ctypes.byref(record),
            ctypes.byref(cache_record(cache.store)),
            ctypes.byref(wanted),
            torch.get_num_threads(),
        )
        demand_fine(error)
        return Read(logits, hidden, best)

    def borrow(self, embedding: Tensor, head: Packed) -> None:
        """A stack of layers scores with another network's vocabulary from now on, in calls of its `record`."""
        shape = (head.out, int(head.record.in_))
        if embedding.shape != shape or shape[1] != self.config.width or head.record.gated:
            raise ValueError(
                f"an embedding {list(embedding.shape)} and a head {list(shape)} for layers of width {self.config.width}"
            )
        embedding = embedding.detach().to(self.dtype).contiguous()
        self.record.head, self.record.vocabulary = head.record, head.out
        self.record.embedding, self.record.embedding_format = embedding.data_ptr(), FORMATS[embedding.dtype]
        self._borrowed = (embedding, head)  # kept alive

    def _states(self, feed: Feed) -> Tensor | None:
        """Inputs that are no tokens, as the kernels read them."""
        if feed.states_BND is None:
            if not self.vocab_size:
                raise ValueError(NO_VOCABULARY)
            return None
        states = feed.states_BND.detach().contiguous()
        if states.shape != (*feed.tokens_BN.shape, self.config.width):
            raise ValueError(
                f"states {list(states.shape)} for tokens {list(feed.tokens_BN.shape)} of width {self.config.width}"
            )
        return states if states.dtype in (torch.bfloat16, torch.float32) else states.to(self.dtype)

    def turn_up_to(self, length: int) -> None:
        """Rotary tables [length, head_dim / 2] for every position the cache may hold. Old ones are
        kept: another thread may be reading them."""
        length = min(length, self.max_length)
        if self.record.table_length >= length:
            return
        with self._growing:
            length = min(max(length, 2 * self.record.table_length), self.max_length)
            cos, sin = (table.contiguous() for table in rope_tables(self.config, length))
            self._tables.append((cos, sin))
            self.record.cos, self.record.sin = cos.data_ptr(), sin.data_ptr()
            self.record.table_length = length


def _integers(feed: Feed) -> np.ndarray:
    """counts, lengths, last [B] and positions [B * N], one behind the other."""
    rows, count = feed.where_BN.shape
    ints = np.empty(3 * rows + rows * count, np.int32)
    ints[:rows] = count if feed.counts_B is None else feed.counts_B
    ints[rows : 2 * rows] = feed.lengths_B
    ints[2 * rows : 3 * rows] = 0 if feed.last_B is None else feed.last_B
    ints[3 * rows :] = feed.where_BN.ravel()
    return ints


def pack(model: nn.Module, weights: torch.dtype | Formats | None = None) -> PackedTransformer:
    """A packed copy of a `Transformer`, in its dtype (or with other `weights`)."""
    config: TransformerConfig = model.config  # type: ignore[assignment]
    made = PackedTransformer(config, next(model.parameters()).dtype, weights)
    for name, value in model.named_parameters():
        made.put(name, value.detach().cpu())
    return made.ready()


def _size(dtype: torch.dtype, shape: MatrixShape) -> int:
    return Packed.bytes_for(dtype, shape.out, shape.in_, shape.gated)


def _norm_sizes(config: TransformerConfig) -> dict[str, int]:
    sizes = {"final_norm": config.width}
    for layer in range(config.layers):
        sizes |= dict.fromkeys((f"blocks.{layer}.attention_norm", f"blocks.{layer}.mlp_norm"), config.width)
        if config.qk_norm:
            sizes |= dict.fromkeys((f"blocks.{layer}.q_norm", f"blocks.{layer}.k_norm"), config.head_dim)
    return sizes


class NativeBackend:
    """Networks on the native kernels (see `Backend`)."""

    name = "native"
    keeps_bits = True
    formats = frozenset(FORMATS)

    def pack(self, module: nn.Module, weights: torch.dtype | Formats) -> Network:
        return pack(module, weights)

    def heads(self, module: DraftHeads, network: Network, weights: torch.dtype) -> Drafting | None:
        if module.markov is not None:  # not known to the kernels yet
            return None
        embedding = network.input_embedding if module.sees_tokens else None
        known = module.known
        head = network.output_head if known is None else network.head_matrix()[known]
        return PackedHeads(module.weights(head), embedding, network.dtype, weights, known)

    def blocks(self, block: BlockWeights, network: Network, weights: torch.dtype) -> BlockNetwork:
        stack, head = pack(block.stack, weights), network.output_head
        if block.known is not None:
            return KnownBlocks(block, stack, network.input_embedding, network.head_matrix(), weights)
        stack.borrow(network.input_embedding, head if isinstance(head, Packed) else Packed.of(head, weights))
        return PackedBlocks(block, stack, weights)

    def top_log_probs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, tokens, total = top(logits, k)
        return values - total[..., None], tokens


NATIVE = NativeBackend()
