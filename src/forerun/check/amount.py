"""How much to check."""

from __future__ import annotations

from dataclasses import dataclass, field

from forerun.errors import RequestError
from forerun.sampling import SamplingParams


@dataclass(frozen=True)
class Amount:
    """How much to check.

    tokens: greedy tokens to compare, for every batch size in `rows`; 0: none. length: new tokens
    per prompt, at most. samples: per prompt and arm for the law; 0: none. prompts: how many
    different ones the law is sampled on. positions: new tokens per sample. params: sampling
    parameters of the law. level: the probability of failing an exact drafter by bad luck, over all
    comparisons of the law together.
    """

    tokens: int = 1000
    rows: tuple[int, ...] = (1, 8)
    length: int = 128
    samples: int = 400
    prompts: int = 4
    positions: int = 4
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))
    seed: int = 0
    level: float = 0.001

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise RequestError(f"rows={self.rows} makes no sense: give batch sizes of at least 1, such as 1,8")
        if self.tokens < 0 or self.samples < 0 or not self.tokens + self.samples:
            raise RequestError("there is nothing to check: give some tokens or some samples")
        if min(self.length, self.prompts, self.positions) < 1:
            raise RequestError("length, prompts and positions must be at least 1")
        if self.samples and self.params.is_greedy:
            raise RequestError("greedy decoding has no law to sample: set a temperature above 0, or samples to 0")
        if not 0 < self.level < 1:
            raise RequestError(f"level={self.level} makes no sense: give a probability such as 0.001")

    @property
    def greedy_length(self) -> int:
        """New tokens per prompt: short enough that the largest batch is full of different prompts."""
        return max(1, min(self.length, -(-self.tokens // max(self.rows))))
