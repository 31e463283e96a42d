"""From a model folder and a drafter's name to a running engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from forerun.accept.lossy import lossy_of
from forerun.drafting.drafter import Drafter
from forerun.drafting.spec import Description
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.engine.threads import use_threads, warn_if_busy
from forerun.errors import CheckpointError, DrafterError
from forerun.model import Model
from forerun.nn.dtype import device_of, dtype_of
from forerun.nn.load import load_network
from forerun.nn.machine import memory
from forerun.nn.memory import network_of
from forerun.nn.network import Network
from forerun.sources.source import Source
from forerun.sources.tokenizer import HuggingFaceTokenizer, end_tokens_of, fast, fingerprint_of, ids_without_tokens

log = logging.getLogger(__name__)

SHARE = 16
"""Of so much memory, one part is for prefixes."""


def load(
    model: str | os.PathLike[str] | transformers.PreTrainedModel,
    drafter: str | Description = "none",
    dtype: str = "auto",
    device: str = "auto",
    max_rows: int = 16,
    kernels: str = "auto",
    weights: str = "auto",
    acceptance: str = "exact",
    threads: int | None = None,
    tokenizer: Any = None,
    prefix_cache: int | None = None,
) -> Engine:
    """An engine for a model and a drafter.

    Args:
        model: a folder in Hugging Face format, a GGUF file, a hub id, which may end in @REVISION, or a transformers
            model that is in memory. Such a model stays where it is and runs in its own number format, unless another is
            asked for. Torch shares its weights; native kernels, which `auto` takes where they fit, have a layout of
            their own and copy them: what changes the model later is not seen there (`kernels="torch"` sees it).
        drafter: `none`, `lookup`, `small:PATH`, a JSON or YAML file, or a description (see `forerun.drafting.spec`),
            vLLM's speculative_config among them.
        dtype: auto (bf16 where the processor multiplies bf16 itself, else fp32), bf16, fp32 or fp16; for every network.
        device: auto (cuda if there is one), cpu, cuda, cuda:1 ...
        max_rows: requests that run side by side.
        kernels: auto (native where this machine and the model allow it), native, or torch; for every network.
        weights: auto (as dtype) or int8 (needs native kernels); the model with such weights is then the one
            whose output is kept exactly.
        acceptance: exact, or a lossy rule, so marked in every statistic: typical[:EPSILON,DELTA], Medusa's
            for requests that sample (`forerun.accept.Typical`), or lenient[:FACTOR], CS Drafting's
            (`forerun.accept.Lenient`).
        threads: processor threads, of the whole process (torch's own setting); None: as FORERUN_THREADS says,
            or as torch has it. A warning is logged where a busy machine leaves too few processors for them.
        tokenizer: a fast tokenizer of transformers; None: the one beside the weights, and none for a
            model in memory, whose prompts and outputs are token ids then.
        prefix_cache: bytes in which the engine remembers what it has read, so that prompts that begin alike are read
            once, with the same output bit for bit; 0: none. None: a sixteenth of the memory that there is, and none
            for a model in memory, whose weights may change (`engine.prefixes.clear()` forgets what others have read).

    Raises:
        CheckpointError: a checkpoint that is missing, broken or of an unsupported kind.
        DrafterError: an unknown drafter, or one that does not fit the target.
        ForerunError: a device, a dtype, kernels or threads that cannot be had.
    """
    lossy, count = lossy_of(acceptance), use_threads(threads)
    given = None if tokenizer is None else fast(tokenizer, "the tokenizer given")
    target, words, ends = _target(model, given, dtype, device, kernels, weights)
    log.debug("target: %d parameters on %s", target.footprint.parameters, target.footprint.runs_on)
    if target.device.type == "cpu":
        warn_if_busy(count)
    forbid_what_is_no_token(target, words, ends)
    made = drafter_for(target, drafter, kernels, weights, words)
    log.debug("drafter %s: at most %d tokens ahead, %s", made.name, made.max_nodes, drafter)
    if prefix_cache is None:
        prefix_cache = memory(target.device) // SHARE if isinstance(model, str | os.PathLike) else 0
    return Engine(target, made, words, ends, max_rows, lossy, prefix_cache)


def _target(
    model: object, given: HuggingFaceTokenizer | None, dtype: str, device: str, kernels: str, weights: str
) -> tuple[Network, HuggingFaceTokenizer | None, tuple[int, ...]]:
    """The network, the tokenizer (the one given, else the one beside the weights), and the tokens that end a text."""
    if not isinstance(model, str | os.PathLike):
        # Asked first, this question makes transformers import all that models are built of: seconds of every start.
        if isinstance(model, transformers.PreTrainedModel):
            return _in_memory(model, dtype, device, kernels, weights), given, tuple(end_tokens_of(model))
        raise CheckpointError(
            f"a model cannot be of type {type(model).__name__}: give a folder, a hub id, or a causal language model of "
            "transformers"
        )
    place, source = device_of(device), Source.of(model if isinstance(model, str) else Path(model))
    target = load_network(source, dtype_of(dtype, place), place, kernels, weights)
    return target, given or source.tokenizer, tuple(source.ends)


def _in_memory(model: transformers.PreTrainedModel, dtype: str, device: str, kernels: str, weights: str) -> Network:
    place = model.device if device == "auto" else device_of(device)
    return network_of(model, model.dtype if dtype == "auto" else dtype_of(dtype, place), place, kernels, weights)


def drafter_for(
    target: Network,
    drafter: str | Description,
    kernels: str = "auto",
    weights: str = "auto",
    tokenizer: HuggingFaceTokenizer | None = None,
) -> Drafter:
    """A drafter for a target, its networks in the target's dtype; "native" binds the target alone. Raises as `load`.

    tokenizer: the target's; with it, stores that were made with another one are refused.
    """
    return made_for(workshop_for(target, kernels, weights, tokenizer), drafter)


def made_for(workshop: Workshop, drafter: str | Description) -> Drafter:
    """A drafter from a workshop: several from one share the networks that they name. Raises as `load`."""
    made = build(drafter, workshop)
    check_fit(workshop.target.network, made)
    return made


def workshop_for(
    target: Network, kernels: str = "auto", weights: str = "auto", tokenizer: HuggingFaceTokenizer | None = None
) -> Workshop:
    """What drafters for a target are built with."""
    kind, place, chosen = target.dtype, target.device, "torch" if kernels == "torch" else "auto"

    @cache  # a model may have several places
    def network(path: str) -> Network:
        loaded = load_network(path, kind, place, chosen, weights)
        loaded.no_tokens = target.no_tokens
        return loaded

    fingerprint = cache(lambda: fingerprint_of(tokenizer.backend_tokenizer.get_vocab()) if tokenizer else "")
    return Workshop(Model(target, 0), network, fingerprint)


def forbid_what_is_no_token(
    network: Network, tokenizer: HuggingFaceTokenizer | None, ends: Collection[int] = ()
) -> None:
    """Ids that the tokenizer does not know are never said; without a tokenizer nothing is known of them."""
    ids = ids_without_tokens(tokenizer, network.vocab_size, ends) if tokenizer else []
    network.no_tokens = torch.tensor(ids, device=network.device) if ids else None


def check_fit(target: Network, drafter: Drafter) -> None:
    """DrafterError if the drafter wants hidden states that the target does not have."""
    layers = target.cache_shape.layers
    outside = [layer for layer in drafter.reads if not 0 <= layer <= layers]
    if outside:
        raise DrafterError(f"the drafter {drafter.name} reads layer {outside[0]}, and the target has {layers}")
