"""From a model folder and a drafter's name to a running engine."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from forerun.accept import Lenient, Typical
from forerun.drafter import Drafter
from forerun.drafters import Description, Workshop, build
from forerun.drafters.lookup.index import fingerprint_of
from forerun.engine import Engine, check_fit
from forerun.errors import CheckpointError, ForerunError
from forerun.judge import Lossy
from forerun.model import Model
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.text import HuggingFaceTokenizer


def load(
    path: str | Path,
    drafter: str | Description = "none",
    dtype: str = "auto",
    device: str = "auto",
    max_rows: int = 16,
    kernels: str = "auto",
    weights: str = "auto",
    acceptance: str = "exact",
) -> Engine:
    """An engine for a model and a drafter.

    Args:
        path: a folder in Hugging Face format, or a hub id.
        drafter: `none`, `lookup`, `small:PATH`, a JSON or YAML file, or a description (see `forerun.drafters`).
        dtype: auto (bf16 where the processor multiplies bf16 itself, else fp32), bf16, fp32 or fp16; for every network.
        device: auto (cuda if there is one), cpu, cuda, cuda:1 ...
        max_rows: requests that run side by side.
        kernels: auto (native where this machine and the model allow it), native, or torch; for every network.
        weights: auto (as dtype) or int8 (needs native kernels); the model with such weights is then the one whose output is
            kept exactly.
        acceptance: exact, or a lossy rule, so marked in every statistic: typical[:EPSILON,DELTA], Medusa's for requests that
            sample (`forerun.accept.Typical`), or lenient[:FACTOR], CS Drafting's (`forerun.accept.Lenient`).

    Raises:
        CheckpointError: a checkpoint that is missing, broken or of an unsupported kind.
        DrafterError: an unknown drafter, or one that does not fit the target.
    """
    place = device_of(device)
    kind = dtype_of(dtype, place)
    lossy = lossy_of(acceptance)
    target = Model(load_network(str(path), kind, place, kernels, weights), scratch=1)
    tokenizer = tokenizer_of(path)
    made = drafter_for(target, drafter, kernels, weights, tokenizer)
    return Engine(target, made, tokenizer, end_tokens(path), max_rows, lossy)


def lossy_of(acceptance: str) -> Lossy | None:
    """None for exact, else the relaxed rule that the word asks for."""
    name, _, numbers = acceptance.partition(":")
    try:
        values = [float(number) for number in numbers.split(",")] if numbers else []
        if acceptance == "exact":
            return None
        if name == "typical" and len(values) in (0, 2) and all(0 < value < 1 for value in values):
            return Typical(*values)
        if name == "lenient" and len(values) < 2 and all(1 < value < math.inf for value in values):
            return Lenient(*values)
    except ValueError:
        pass
    raise ForerunError(
        f"there is no acceptance {acceptance!r}: use exact, typical, typical:EPSILON,DELTA with numbers between 0 and 1,"
        " lenient, or lenient:FACTOR with a factor above 1"
    )


def drafter_for(
    target: Model,
    drafter: str | Description,
    kernels: str = "auto",
    weights: str = "auto",
    tokenizer: HuggingFaceTokenizer | None = None,
) -> Drafter:
    """A drafter for a target, its networks in the target's dtype; "native" binds the target alone. Raises as `load`.

    tokenizer: the target's; with it, stores that were made with another one are refused.
    """
    kind, place, chosen = target.network.dtype, target.device, "torch" if kernels == "torch" else "auto"
    network = cache(lambda path: load_network(path, kind, place, chosen, weights))  # a model may have several places
    fingerprint = cache(lambda: fingerprint_of(tokenizer.backend_tokenizer.get_vocab()) if tokenizer else "")
    made = build(drafter, Workshop(target, network, fingerprint))
    check_fit(target, made)
    return made


def device_of(name: str) -> torch.device:
    """auto, or any torch device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ForerunError(f"unknown device {name!r}: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ForerunError("there is no CUDA device here: use --device cpu")
    return device


def tokenizer_of(path: str | Path) -> HuggingFaceTokenizer | None:
    """The tokenizer beside the weights, or None where there is none (prompts are token ids then)."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")) and not (Path(path) / "vocab.json").exists():
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {' '.join(str(error).split())}") from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(f"the tokenizer in {path} has no tokenizer.json: convert it to a fast tokenizer first")
    fitting: HuggingFaceTokenizer = tokenizer
    return fitting


def end_tokens(path: str | Path) -> list[int]:
    """The end-of-sequence ids of a model: from generation_config.json, else from config.json."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except (OSError, ValueError):
        ids = getattr(AutoConfig.from_pretrained(str(path)).get_text_config(), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
