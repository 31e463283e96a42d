"""`custom_generate` for transformers: its `generate`, with our loop in the middle.

transformers reads the arguments, this module reads what transformers has made of them: the logits
processors and stopping criteria say what is wanted, whatever the names of the settings were.
What cannot be honoured is refused; of what transformers hands on, nothing is left out in silence.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.generation import logits_process as processing
from transformers.generation import stopping_criteria as stopping

from forerun.drafting.spec import Description
from forerun.engine.engine import Engine
from forerun.engine.load import drafter_for, load
from forerun.engine.prompts import tokens_of
from forerun.engine.requests import Output
from forerun.errors import RequestError
from forerun.nn.foreign.network import demand_evaluation
from forerun.nn.memory import hangings
from forerun.sampling import SamplingParams

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
WARPERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    processing.TemperatureLogitsWarper: lambda one: {"temperature": float(one.temperature)},
    processing.TopKLogitsWarper: lambda one: {"top_k": int(one.top_k)},
    processing.TopPLogitsWarper: lambda one: {"top_p": float(one.top_p)},
    processing.MinPLogitsWarper: lambda one: {"min_p": float(one.min_p)},
    processing.LogitNormalization: lambda one: {},  # a law is normalised anyway
}
"""Processors that are sampling parameters of ours, in the order in which these are applied."""
PURE = (
    processing.NoRepeatNGramLogitsProcessor,
    processing.NoBadWordsLogitsProcessor,
    processing.SequenceBiasLogitsProcessor,
    processing.SuppressTokensLogitsProcessor,
    processing.InfNanRemoveLogitsProcessor,
)
"""Processors of transformers that look at a row's text and scores alone, so that they can be asked
at every node, before the warpers."""
UNHEEDED = frozenset("use_cache logits_to_keep attention_mask position_ids past_key_values".split())
"""Arguments of a forward that are looked at here, or change nothing."""
ENGINES = "_forerun_engines"
SAMPLED = 64
"""Numbers of a weight that are looked at to see whether it has changed."""
ROWS = 64
"""Of a batch, side by side; others wait."""


def generate(
    model: transformers.PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: transformers.GenerationConfig,
    drafter: str | Description = "lookup",
    kernels: str = "auto",
    **model_kwargs: Any,
) -> Tensor | transformers.generation.GenerateDecoderOnlyOutput:
    """What `model.generate` would return, made with fewer forwards of the model.

        model.generate(**inputs, max_new_tokens=64, custom_generate=forerun.hf.generate, drafter="lookup")

    drafter, kernels: as of `forerun.load`. Greedy text is the model's own, and sampled text follows
    the same law, with torch's generator as its only seed. Rows may be padded on the left; each says
    what it says alone.

    The engine is made at the first call and belongs to the model object from then on: it goes when
    the model goes, and is made anew when weights, hooks or forwards have changed. transformers
    hands on neither streamers, whose end then never comes (use `forerun.load(model).stream`), nor
    assistant models.

    Raises RequestError, a ValueError, for what cannot be honoured: beams, processors and stopping
    criteria of the caller, scores and states as outputs, a cache that was begun.
    """
    _demand_plain(generation_config, model_kwargs)
    prompts = _prompts(input_ids, model_kwargs)
    padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
    wish = _wish(_parted(logits_processor, padding), stopping_criteria, generation_config, input_ids.shape[1])
    longest = max(map(len, prompts)) + (wish.max_new_tokens or 0)
    with _engines_of(model).guard:
        engine = _engine_of(model, drafter, kernels)
        if longest > (room := engine.target.max_length):
            raise RequestError(f"{longest} tokens are asked for and the context holds {room}: set max_new_tokens lower")
        session = engine.stream(prompts, _seeded(wish, len(prompts)), text=False)
    outputs = session.outputs()
    if len(outputs) < len(prompts) or any(output.finish_reason == "interrupted" for output in outputs):
        raise KeyboardInterrupt
    padding = generation_config.pad_token_id
    sequences = _sequences(input_ids, outputs, next(iter(wish.stop_token_ids), 0) if padding is None else padding)
    if generation_config.return_dict_in_generate:
        return transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _demand_plain(config: transformers.GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    """RequestError for what has no place in our loop."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise RequestError(f"forerun does not do {mode.value.replace('_', ' ')}: use one beam, greedy or sampling")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, False):
            raise RequestError(f"{name} is not kept: leave it out, or generate without custom_generate")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise RequestError("past_key_values holds a text already, and forerun keeps its own: give the whole text")
    for name, value in model_kwargs.items():
        if value is not None and name not in UNHEEDED:
            raise RequestError(f"{name} cannot be handed to forerun: give input_ids and attention_mask alone")


def _prompts(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Each row without its padding, which stands on the left."""
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise RequestError("a row ends with padding: set padding_side to left in the tokenizer")
    places, usual = model_kwargs.get("position_ids"), (mask.long().cumsum(-1) - 1).clamp(min=0)
    if places is not None and not torch.equal(places.expand_as(usual)[mask.bool()], usual[mask.bool()]):
        raise RequestError("position_ids are not those of a text from its beginning: leave them out")
    rows = zip(input_ids.tolist(), mask.long().tolist(), strict=True)
    return [tokens_of({"input_ids": ids, "attention_mask": seen}, None) for ids, seen in rows]


def _wish(
    parts: tuple[list[Any], list[Any]], criteria: Sequence[Any], config: transformers.GenerationConfig, width: int
) -> SamplingParams:
    """What transformers has made of its settings, in our words. parts: see `_parted`; width: of the padded prompts."""
    found: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0, "ignore_eos": True}
    found["processors"], warpers = parts
    for one in warpers if config.do_sample else ():  # they change no best token
        found |= WARPERS[type(one)](one)
    for one in criteria:
        if type(one) is stopping.MaxLengthCriteria:
            found["max_new_tokens"] = min(one.max_length - width, found.get("max_new_tokens", one.max_length))
        elif type(one) is stopping.EosTokenCriteria:
            found["stop_token_ids"] = [*found.get("stop_token_ids", ()), *one.eos_token_id.tolist()]
        else:
            raise RequestError(
                f"the stopping criterion {type(one).__name__} cannot be asked within an accepted block: "
                "use max_new_tokens and eos_token_id, or forerun.load(model).generate with stop"
            )
    return SamplingParams(**found)


def _parted(processors: Sequence[Any], padding: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """Those that are asked at every node, and the warpers behind them. RequestError for any other,
    and for an order that is not ours: the law would be another. padding: before each row."""
    pure: list[Any] = []
    warpers: list[Any] = []
    order = list(WARPERS)
    for one in processors:
        kind = type(one)
        if kind in WARPERS and _is_usual(one) and all(order.index(kind) > order.index(type(w)) for w in warpers):
            warpers.append(one)
        elif kind is processing.RepetitionPenaltyLogitsProcessor and not warpers and _ignores_only(padding, one):
            pure.append(processing.RepetitionPenaltyLogitsProcessor(one.penalty))  # our prefixes have no padding
        elif kind in PURE and not warpers:
            pure.append(one)
        elif kind in (*WARPERS, *PURE, processing.RepetitionPenaltyLogitsProcessor):
            raise RequestError(
                f"the logits processor {kind.__name__} stands where, or as, transformers would not put it by itself: "
                "give its setting to generate instead, or to forerun.load(model).generate"
            )
        else:
            raise RequestError(
                f"the logits processor {kind.__name__} may depend on more than a row's own text: "
                "leave it out, or give it to forerun.load(model).generate as processors"
            )
    return pure, warpers


def _is_usual(warper: Any) -> bool:
    """It removes all that its setting says, for good."""
    return getattr(warper, "min_tokens_to_keep", 1) == 1 and getattr(warper, "filter_value", -torch.inf) == -torch.inf


def _ignores_only(padding: Sequence[int], penalty: Any) -> bool:
    """As a repetition penalty that transformers makes by itself."""
    ignored = getattr(penalty, "prompt_ignore_length", None)
    return ignored is None or (isinstance(ignored, Tensor) and ignored.tolist() == list(padding))


def _seeded(wish: SamplingParams, rows: int) -> list[SamplingParams]:
    """A seed per row, from torch's generator: `transformers.set_seed` repeats a text."""
    if wish.is_greedy:
        return [wish] * rows
    return [replace(wish, seed=seed) for seed in torch.randint(2**62, (rows,)).tolist()]


def _sequences(input_ids: Tensor, outputs: Sequence[Output], padding: int) -> Tensor:
    """Prompts and what follows them [B, S], as transformers returns it: ended rows are padded."""
    longest = max(len(output.token_ids) for output in outputs)
    new = [output.token_ids + [padding] * (longest - len(output.token_ids)) for output in outputs]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], 1)


# ---- the engine of a model


@dataclass
class _Engines:
    """Those that were made for a model object as it was in this state: one for each choice of
    kernels, with the drafter that was asked for last. Its copies and pickles begin with none."""

    state: _State | None = None
    by_kernels: dict[str, tuple[str, Engine]] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)
    """Held until the requests of a call are the engine's: who asks for another drafter sees that it is busy."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Engines, ()


def _engines_of(model: transformers.PreTrainedModel) -> _Engines:
    """Kept on the model itself: engines and model hold each other, and go together."""
    found: _Engines = model.__dict__.setdefault(ENGINES, _Engines())
    return found


def _engine_of(model: transformers.PreTrainedModel, drafter: str | Description, kernels: str) -> Engine:
    """An engine with another drafter takes the network over, which may be a copy of all weights,
    unless it is at work: one engine at a time may drive a network."""
    demand_evaluation(model, type(model).__name__)
    kept = _engines_of(model)
    if (now := _State.of(model)) != kept.state:
        kept.state, kept.by_kernels = now, {}
    described = json.dumps(drafter, sort_keys=True, default=str)
    before, engine = kept.by_kernels.get(kernels, ("", None))
    if engine is None or (described != before and engine.is_busy):
        engine = load(model, drafter, max_rows=ROWS, kernels=kernels)
    elif described != before:
        engine = engine.beside(drafter_for(engine.target.network, drafter, kernels))
    kept.by_kernels[kernels] = described, engine
    return engine


@dataclass(frozen=True)
class _State:
    """What tells that a model has changed, for kernels that copied it: where its weights are, how
    often they were written to, a sample of them (writing to `.data` is not counted), and what was
    hung on its modules."""

    weights: tuple[tuple[int, int, bytes], ...]
    hangings: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(model: torch.nn.Module) -> _State:
        weights = (
            (one.data_ptr(), 0 if one.is_inference() else one._version, _sample(one)) for one in model.parameters()
        )
        return _State(tuple(weights), tuple(map(hangings, model.modules())))


def _sample(weight: Tensor) -> bytes:
    """Some of its numbers, from end to end. Elsewhere than on a CPU nobody copies weights."""
    if weight.device.type != "cpu":
        return b""
    some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
    return some.contiguous().view(torch.uint8).numpy().tobytes()
