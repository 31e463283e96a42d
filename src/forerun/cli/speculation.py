"""The three options that say what drafts: --drafter, --speculative-config and --num-speculative-tokens."""

from __future__ import annotations

import json

from forerun.drafting import elsewhere
from forerun.drafting.spec import Description, describe
from forerun.errors import DrafterError


def chosen(drafter: str, config: str | None = None, tokens: int | None = None, default: str = "none") -> Description:
    """The drafter's description. DrafterError if it is not known, or if options contradict one another.

    default: the drafter of who names none.
    """
    if config is not None and drafter != default:
        raise DrafterError("--drafter and --speculative-config name a drafter each: give one of them")
    description = describe(drafter) if config is None else _foreign(config)
    return description if tokens is None else elsewhere.reaching(description, tokens)


def _foreign(config: str) -> Description:
    wrong = f'--speculative-config {config!r} is not vLLM\'s: write {{"method": "ngram", "num_speculative_tokens": 4}}'
    try:
        value = json.loads(config)
    except ValueError:
        raise DrafterError(wrong) from None
    if not isinstance(value, dict) or not (elsewhere.is_foreign(value) or elsewhere.CHECKPOINT in value):
        raise DrafterError(wrong)
    return elsewhere.translated(value)
