"""What other engines call drafting: vLLM's speculative_config, translated into our descriptions.

Everything it says is either translated, or means nothing here and is said to (a log line), or is refused with a
reason. Settings that shape how its engine runs cannot change what a model says, so these are the ones passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from forerun.drafting.registry import ALIASES, method, names
from forerun.errors import DrafterError

log = logging.getLogger(__name__)

CHECKPOINT, TOKENS, METHOD = "model", "num_speculative_tokens", "method"
SETTINGS = {
    "prompt_lookup_min": "min_match",
    "suffix_decoding_max_tree_depth": "depth",
    "suffix_decoding_min_token_prob": "cost",
}
"""vLLM's words for settings of ours."""
NEEDLESS = {
    "prompt_lookup_max": "the longest match is always looked for",
    "suffix_decoding_max_cached_requests": "the store of earlier outputs is bounded in tokens (capacity)",
    "suffix_decoding_max_spec_factor": "a proposal ends where it is no longer worth its cost",
    **dict.fromkeys(
        (
            *("max_model_len", "attention_backend", "kv_cache_dtype", "moe_backend", "enforce_eager", "code_revision"),
            *("disable_padded_drafter_batch", "use_local_argmax_reduction", "enable_adaptive_verification"),
        ),
        "it tunes vLLM's engine",
    ),
}
REFUSED = {
    "quantization": "drafters run in the target's number format; --weights int8 rounds both",
    "parallel_drafting": "there is no drafter of ours that reads it",
    "use_heterogeneous_vocab": "a drafter here shares the target's vocabulary",
    "num_speculative_tokens_per_batch_size": "the engine itself paces drafts by what they cost at every batch size",
    "synthetic_acceptance_rates": "acceptance here is real",
    "synthetic_acceptance_length": "acceptance here is real",
}
METHODS_REFUSED = {
    "custom_class": "a class of vLLM's cannot run here; register a drafter of your own (CONTRIBUTING.md)",
    "extract_hidden_states": "it drafts nothing",
    "mtp": "heads that come inside a model are not read yet",
    "mlp_speculator": "its heads are not read",
}


def is_foreign(description: Mapping[str, Any]) -> bool:
    """Written in vLLM's words: it names a method or a number of speculative tokens, and no drafter."""
    return "drafter" not in description and (METHOD in description or TOKENS in description)


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our description of what vLLM's configuration asks for. DrafterError for what cannot be had here."""
    rest = {key: value for key, value in config.items() if value is not None}
    named, checkpoint, tokens = rest.pop(METHOD, None), rest.pop(CHECKPOINT, None), rest.pop(TOKENS, None)
    if not isinstance(checkpoint, str | None):
        raise DrafterError(f"the model of a speculative config is a folder or a hub id, not {checkpoint!r}")
    name = _method(named, checkpoint)
    found: dict[str, Any] = {"drafter": name}
    if checkpoint is not None and checkpoint not in ALIASES:
        revision = rest.pop("revision", None)
        found["checkpoint"] = f"{checkpoint}@{revision}" if revision else checkpoint
    greedy = _draws_greedily(rest.pop("draft_sample_method", "probabilistic"))
    found |= _settings(rest)
    if tokens is not None:
        found = reaching(found, tokens)
    if greedy and "length" in found:
        found["tree"] = {"width": 1, "depth": found["length"], "nodes": found.pop("length")}
    return found


def reaching(description: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The same drafter, running so many tokens ahead. DrafterError where that is no setting of its."""
    kinds = method(description.get("drafter")).kinds
    wanted = ["length"] if "length" in kinds else ["depth", "nodes"] if "depth" in kinds and "nodes" in kinds else []
    if not wanted:
        raise DrafterError(
            f"num_speculative_tokens means nothing to the drafter {description['drafter']}: leave it out, for"
            " this drafter's own settings say how far it goes"
        )
    return {**description, **dict.fromkeys(wanted, tokens)}


def _method(named: object, checkpoint: object) -> str:
    """vLLM takes a missing method from the model: ngram where it is called so, else a draft model."""
    word = str(named or (checkpoint if checkpoint in ALIASES else "draft_model"))
    if word in METHODS_REFUSED:
        raise DrafterError(f"the method {word} of a speculative config is refused: {METHODS_REFUSED[word]}")
    if word not in ALIASES and word not in names():
        known = ", ".join(sorted({*ALIASES, *names()}))
        raise DrafterError(f"the method {word!r} of a speculative config is none of ours: use one of {known}")
    return ALIASES.get(word, word)


def _draws_greedily(method: object) -> bool:
    if method not in ("greedy", "probabilistic"):
        raise DrafterError(
            f"draft_sample_method in the speculative config is 'greedy' or 'probabilistic', not {method!r}: give one"
        )
    return method == "greedy"


def _settings(rest: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in rest.items():
        if key in SETTINGS:
            found[SETTINGS[key]] = value
        elif key in NEEDLESS:
            log.info("%s in the speculative config is not needed: %s", key, NEEDLESS[key])
        elif key in REFUSED and value not in (False, [], {}):
            raise DrafterError(f"{key} in the speculative config is refused ({REFUSED[key]}): leave it out")
        elif key not in REFUSED:
            _demand_default(key, value)
    return found


def _demand_default(key: str, value: object) -> None:
    """Settings of which vLLM's default is what happens here."""
    defaults = {"draft_tensor_parallel_size": 1, "rejection_sample_method": "standard"}
    if key not in defaults:
        raise DrafterError(f"the speculative config has a setting {key!r} that is not known here: leave it out")
    if value != defaults[key]:
        raise DrafterError(f"{key} in the speculative config can only be {defaults[key]!r} here, not {value!r}")
