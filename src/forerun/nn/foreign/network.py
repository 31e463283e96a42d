"""A transformers model as a `Network`: its own forward, our cache, our masks, our positions."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from forerun.errors import CheckpointError
from forerun.nn.backends.torch import TORCH, footprint_of
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Footprint, LayerShape
from forerun.sources.folder import brief

NOT_CAUSAL = "looks at later tokens and cannot be a target: choose a causal language model"
RECURRENT = "has recurrent layers, whose state cannot be rolled back: choose a model with attention in every layer"
CACHELESS = "keeps no keys and values that could be rolled back: choose a model that transformers runs with a cache"


class Foreign:
    """A transformers model as a `Network`. See the module's text. `name` is what errors call it."""

    backend = TORCH
    no_tokens: Tensor | None = None
    home: Path | None = None

    def __init__(self, model: transformers.PreTrainedModel, name: str):
        self.model, self._name = model, name
        config = model.config.get_text_config(decoder=True)
        self.max_length = _max_length(name, config)
        layers, self.vocab_size = _first_forward(name, model)
        self.cache_shape = _cache_shape(name, layers)
        self._masks = _mask_kinds(name, config, [getattr(layer, "sliding_window", None) for layer in layers])
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def weights(self) -> torch.dtype:
        return self.dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def windows(self) -> frozenset[int]:
        return frozenset(window for window in self._masks.values() if window is not None)

    @property
    def input_embedding(self) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def output_head(self) -> Tensor:
        """Without the bias, scaling or capping that some models have behind it."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def head_matrix(self) -> Tensor:
        return self.output_head

    @property
    def output_shape(self) -> tuple[int, int]:
        vocab_size, width = self.output_head.shape
        return vocab_size, width

    @property
    def layer_shape(self) -> LayerShape:
        """As far as its config tells."""
        config = self.model.config.get_text_config(decoder=True)
        mlp_width = getattr(config, "intermediate_size", None) or 4 * self.input_embedding.shape[1]
        return LayerShape(config.num_attention_heads, mlp_width, norm_eps=1e-6, rope_theta=10000.0)

    @property
    def footprint(self) -> Footprint:
        return footprint_of(self.model, "transformers' model")

    @torch.inference_mode()
    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """See `Network.forward`. Logits come in the dtype in which the model gives them."""
        if feed.states_BND is not None:
            raise ValueError("a foreign model reads tokens, not states")
        demand_evaluation(self.model, self._name)
        last = None if feed.last_B is None else torch.from_numpy(feed.last_B).to(feed.device)
        steps = torch.unique(last) if last is not None and self._trims else None
        out = self.model(
            input_ids=feed.tokens_BN,
            position_ids=feed.positions_BN,
            attention_mask=self._mask(feed),
            past_key_values=Bridge(feed, cache),
            use_cache=True,
            output_hidden_states=bool(hidden_layers),
            return_dict=True,
            **({} if steps is None else {"logits_to_keep": steps}),
        )
        return Read(_wanted(out.logits, last, steps), {index: out.hidden_states[index] for index in hidden_layers})

    def _mask(self, feed: Feed) -> Tensor | dict[str, Tensor]:
        masks = {kind: _additive(feed, window) for kind, window in self._masks.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _wanted(logits: Tensor, last_B: Tensor | None, steps: Tensor | None) -> Tensor:
    """The logits asked for, out of all of them or out of those for the positions `steps` (ascending)."""
    if last_B is None:
        return logits
    places = last_B if steps is None else torch.searchsorted(steps, last_B)
    return logits[torch.arange(logits.shape[0], device=logits.device), places].unsqueeze(1)


def _additive(feed: Feed, window: int | None) -> Tensor:
    """[B, 1, N, S], always a tensor: without one, transformers would build its own causal mask."""
    bias = feed.bias(window)
    if bias is None:
        rows, count = feed.tokens_BN.shape
        return torch.zeros((rows, 1, count, feed.span), dtype=feed.dtype, device=feed.tokens_BN.device)
    return bias.unsqueeze(1)


class Bridge(transformers.Cache):  # type: ignore[misc]
    """Our cache in the shape in which transformers wants one: for one forward over one feed."""

    def __init__(self, feed: Feed, cache: Cache):
        super().__init__(layers=[BridgeLayer(index, feed, cache) for index in range(cache.shape.layers)])


class BridgeLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `Bridge`: writes where the feed says and hands back views of what may be read, [B, H, S, E]."""

    is_sliding = False

    def __init__(self, index: int, feed: Feed, cache: Cache):
        super().__init__()
        self._index, self._feed, self._cache = index, feed, cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.append(
            self._index, self._feed, key_states.transpose(1, 2), value_states.transpose(1, 2)
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `Cache.reserve` allocates."""

    def get_seq_length(self) -> int:
        return self._feed.span - self._feed.tokens_BN.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._feed.span, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as older versions of transformers call it


# ---- what a model is like, found out by asking it


def _max_length(name: str, config: transformers.PreTrainedConfig) -> int:
    """Tokens up to which a position means the same whatever else is in the batch.

    Beyond its original length, LongRoPE changes the frequencies of all rows as soon as one row gets there.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise CheckpointError(f"{name} does not say how long a text may be: add max_position_embeddings to its config")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(longest, int(rope["original_max_position_embeddings"]))
    return longest


@torch.inference_mode()
def _first_forward(name: str, model: transformers.PreTrainedModel) -> tuple[list[Any], int]:
    """One token through the model with the cache that transformers would use: its layers, and the vocabulary's size."""
    token = torch.ones((1, 1), dtype=torch.int64, device=model.device)
    with refusing(name, "cannot run with a cache"):
        cache = transformers.DynamicCache(config=model.config)
        for layer in cache.layers:
            _demand_plain(name, layer)
        out = model(input_ids=token, past_key_values=cache, use_cache=True, return_dict=True)
    logits = getattr(out, "logits", None)
    if logits is None or logits.ndim < 3:
        raise CheckpointError(f"{name} says nothing about the next token: load it with AutoModelForCausalLM")
    return list(cache.layers), int(logits.shape[-1])


def _demand_plain(name: str, layer: object) -> None:
    if hasattr(layer, "recurrent_states"):
        raise CheckpointError(f"{name} {RECURRENT}")
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        kind = type(layer).__name__
        raise CheckpointError(f"{name} has a layer without keys and values of its own ({kind}): choose another model")


def demand_evaluation(model: transformers.PreTrainedModel, name: str) -> None:
    """CheckpointError for a model that is being trained: it may drop out, and says another thing every time."""
    if model.training:
        raise CheckpointError(f"the model {name} is in training mode, in which it may drop out: call model.eval()")


@contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Whatever a model's own code raises is a CheckpointError with its name and `what` it failed to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # any line of any model's own code
        raise CheckpointError(f"{name} {what} ({brief(error)}): choose another model") from error


def _cache_shape(name: str, layers: Sequence[Any]) -> CacheShape:
    """The one shape that all keys and values share."""
    if not layers or any(layer.keys is None for layer in layers):
        raise CheckpointError(f"{name} {CACHELESS}")
    shapes = {(tensor.shape[1], tensor.shape[3]) for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        listed = ", ".join(f"{heads} x {width}" for heads, width in sorted(shapes))
        raise CheckpointError(f"{name} keeps keys and values of different shapes ({listed}): choose another model")
    heads, width = shapes.pop()
    return CacheShape(len(layers), heads, width)


def _mask_kinds(
    name: str, config: transformers.PreTrainedConfig, windows: Sequence[int | None]
) -> dict[str, int | None]:
    """The window of each kind of layer; a model whose layers differ takes one mask per kind, by these names."""
    kinds = getattr(config, "layer_types", None) or ["every"] * len(windows)
    pairs = set(zip(kinds, windows, strict=True))
    if "chunked_attention" in kinds:
        raise CheckpointError(f"{name} attends in chunks, for which there is no tree mask: choose another model")
    if len(pairs) != len(set(kinds)):
        raise CheckpointError(f"{name} has several window sizes for one kind of layer: choose another model")
    return dict(pairs) if len(set(windows)) > 1 else {"every": windows[0]}
