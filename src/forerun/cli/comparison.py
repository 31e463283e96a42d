"""Two runs over the same prompts, plain and drafted: how fast each was, and whether they say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.sampling import SamplingParams

WARM_TOKENS = 8
"""Steps before the clock runs, so that neither side pays for what happens only once."""


@dataclass(frozen=True)
class Side:
    """What one run said, and the seconds that its user waited."""

    outputs: Sequence[Output]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(one.stats.new_tokens for one in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(1, sum(one.stats.steps for one in self.outputs))


def warm(plain: Engine, drafted: Engine, ids: list[int]) -> None:
    """A few steps of both, of which nothing is remembered."""
    params = SamplingParams(max_new_tokens=WARM_TOKENS, ignore_eos=True)
    for engine in (plain, drafted):
        engine.generate([ids], params)
        engine.drafter.reset()
        engine.prefixes.clear()


def verdict(plain: Side, drafted: Side, engine: Engine) -> str:
    """Three lines: plain, drafted, and what they have in common."""
    name = drafted.outputs[0].stats.drafter
    speedup = drafted.tokens_per_second / max(plain.tokens_per_second, 1e-9)
    width = max(len(name), len("plain"))
    lines = [
        f"{title:<{width}}  {side.tokens_per_second:7.1f} tokens/s  {side.tokens_per_step:5.2f} tokens per step"
        for title, side in (("plain", plain), (name, drafted))
    ]
    return "\n".join([lines[0], f"{lines[1]}  {speedup:.2f}x", _difference(plain.outputs, drafted.outputs, engine)])


def _difference(plain: Sequence[Output], drafted: Sequence[Output], engine: Engine) -> str:
    tokens = sum(len(one.token_ids) for one in plain)
    for one, other in zip(plain, drafted, strict=True):
        if one.token_ids == other.token_ids:
            continue
        place = next(
            (at for at, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b),
            min(len(one.token_ids), len(other.token_ids)),
        )
        where = f"prompt {one.prompt_index + 1}, new token {place + 1}"
        said = f"plain {_shown(one, place, engine)}, drafted {_shown(other, place, engine)}"
        return f"first difference: {where}: {said}; {_reason(other, engine)}"
    return f"identical: {tokens} tokens of {len(plain)} text{'s' if len(plain) > 1 else ''}"


def _shown(output: Output, place: int, engine: Engine) -> str:
    if place >= len(output.token_ids):
        return "ends"
    token = output.token_ids[place]
    return repr(engine.tokenizer.backend_tokenizer.decode([token])) if engine.tokenizer else str(token)


def _reason(drafted: Output, engine: Engine) -> str:
    network = engine.target.network
    if not drafted.stats.exact:
        return "the acceptance rule is lossy"
    if drafted.stats.rule and "match" not in drafted.stats.rule:
        return "drafts that are drawn follow the same law with other luck (forerun check tests the law)"
    if network.dtype.itemsize == 2 and not network.backend.keeps_bits:
        return "in half precision a near-tie can flip (forerun check tells a tie from a mistake)"
    return "this should not happen: see what forerun check says"
