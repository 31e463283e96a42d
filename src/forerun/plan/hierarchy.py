"""What a token costs in a hierarchy of models, where each verifies what the next smaller one drafts.

The online algorithm is that of "Fast Inference via Hierarchical Speculative Decoding" (Globerson et
al., arXiv 2510.19705); the expressions for its expected latency are a reconstruction, as the body
of the paper was not available to us. For two models they are those of Leviathan et al. (arXiv
2211.17192), for a fixed number of rounds those of CS Drafting (arXiv 2312.11462).

Two things alternate on the way up. A `Draft` is what a level hands up: so many tokens, for so many
seconds. A `Round` is one verification of a draft: so many tokens are emitted (those accepted and
one more), for the seconds of the forward and of the draft below. A level repeats rounds until its
draft is long enough, and three rules say when that is:

    fixed_block    exactly T tokens, the surplus is dropped. Exact for models that do not look at their context.
    at_least       T tokens or more, nothing is dropped. What the paper runs.
    fixed_rounds   n rounds, whatever they emit. CS Drafting's vertical cascade.

All of them assume that drafts are accepted independently of each other with one rate per pair of
models; the last two also that what happened to a draft at one level says nothing about the level
above. Real models break both by some percent, in either direction: where the middle model lies
between the others, a token that it corrected survives the target more often than one that it
accepted, and these expressions are too optimistic; and easy text is easy for all levels together.
Gains below 3% are noise until measured.

Letters of the formulas: a acceptance rate, S drafts of one round, T tokens that a level gathers, Y
tokens that a round emits, R rounds, X tokens that a level hands up. A pmf is an array whose entry k
is the probability of k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forerun.cost import Floats, Price, cost_of
from forerun.errors import DrafterError


@dataclass(frozen=True, eq=False)
class Draft:
    """What is handed up at a time. lengths: the pmf of the number of tokens; seconds: what they cost, on average."""

    lengths: Floats
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", _pmf("lengths of a draft", self.lengths))
        _demand_seconds(self.seconds)

    @staticmethod
    def exactly(tokens: int, seconds: float) -> Draft:
        return Draft(np.eye(1, tokens + 1, tokens)[0], seconds)

    @property
    def tokens(self) -> float:
        return _mean(self.lengths)


@dataclass(frozen=True, eq=False)
class Round:
    """One verification, with the drafting before it. yields: the pmf of the number of tokens
    emitted, at least one; seconds: what they cost, on average."""

    yields: Floats
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "yields", _pmf("yields of a round", self.yields))
        _demand_seconds(self.seconds)
        if self.yields[0] > 0:
            raise DrafterError(
                "a round of verification emits one token or more: its yields begin with a probability of 0"
            )

    @property
    def tokens(self) -> float:
        return _mean(self.yields)

    @property
    def latency(self) -> float:
        """Seconds per token, by renewal and reward: the means' ratio, not the ratios' mean."""
        return self.seconds / self.tokens


@dataclass(frozen=True)
class Autoregressive:
    """A model that writes token by token."""

    cost: Price


@dataclass(frozen=True)
class Verifier:
    """A model that verifies. rate: the probability that it accepts a token of the level below; for
    a store, whose tokens come without probabilities, the probability that it says the same
    token."""

    cost: Price
    rate: float

    def __post_init__(self) -> None:
        _demand_rate(self.rate)


@dataclass(frozen=True)
class Chain:
    """A hierarchy, from below; the last verifier is the target.

    bottom: an Autoregressive model; or the Draft that a store or a statistical model proposes at a
    time, of any length (none at all makes a plain token of the level above); or a Round, where the
    lowest level that verifies was measured as a whole. Without verifiers the bottom is the target
    itself.
    """

    bottom: Autoregressive | Draft | Round
    verifiers: tuple[Verifier, ...]

    def __post_init__(self) -> None:
        if isinstance(self.bottom, Draft) and not self.verifiers:
            raise DrafterError("a chain whose bottom is a draft needs a model that verifies it")

    @property
    def gathering(self) -> int:
        """How many levels gather tokens, and so have a size: all but the target, and a store, whose
        lengths are its own."""
        return len(self.verifiers) - isinstance(self.bottom, Draft)


Gather = Callable[[Round, int], Draft]


def expected_tokens(rate: float, drafts: float) -> float:
    """n(a, S) = 1 + a + ... + a^S: what a round emits when S drafts are verified (Leviathan et al.,
    equation 1). S may be fractional."""
    if rate == 1:
        return drafts + 1
    if rate == 0:
        return 1.0
    return float(-np.expm1((drafts + 1) * np.log(rate)) / (1 - rate))


def round_yields(rate: float, lengths: Floats) -> Floats:
    """The pmf of Y when S drafts with this pmf are verified: P(k) = (1-a) a^(k-1) for k <= S, and a^S for k = S + 1."""
    longer = np.append(lengths[::-1].cumsum()[::-1][1:], 0.0)  # P(S >= k) for k = 1 ...
    return np.append(0.0, rate ** np.arange(len(lengths)) * ((1 - rate) * longer + lengths))


def renewals(yields: Floats, tokens: int) -> Floats:
    """u(m) = sum over y of P(Y = y) u(m - y), u(0) = 1: the probability that a round begins when m
    tokens are there, for m < T. T, and their sum is E[R], the rounds that it takes to gather T
    tokens."""
    begins = np.zeros(tokens)
    begins[:1] = 1.0
    for m in range(1, tokens):
        longest = min(m, len(yields) - 1)
        begins[m] = yields[1 : longest + 1] @ begins[m - longest : m][::-1]
    return begins


def rounds_up_to(rate: float, drafts: int, tokens: int) -> Floats:
    """r(a, S, T) for T = 0 .. tokens, in time linear in T. tokens + 1.

    The renewal equation, subtracted from itself one token later: d(1) = 1, d(m) = (1-a) + a^(S+1)
    d(m-S-1), and r(T) is the sum of d(1) .. d(T). Reconstruction."""
    begins = [0.0, 1.0]
    for m in range(2, tokens + 1):
        earlier = m - drafts - 1
        begins.append((1 - rate) + rate ** (drafts + 1) * (begins[earlier] if earlier > 0 else 0.0))
    return np.cumsum(begins[: tokens + 1])


def rounds(rate: float, drafts: int, tokens: int) -> float:
    """r(a, S, T): expected rounds of S drafts each until T tokens or more are there."""
    return float(rounds_up_to(rate, drafts, tokens)[tokens])


def verified(draft: Draft, verifier: Verifier) -> Round:
    """One round over this draft. A cost that depends on the length is averaged over the lengths."""
    cost = cost_of(verifier.cost)
    forward = sum(share * cost(drafts + 1) for drafts, share in enumerate(draft.lengths) if share)
    return Round(round_yields(verifier.rate, draft.lengths), float(forward) + draft.seconds)


def at_least_so_many(round: Round, tokens: int) -> Draft:
    """Rounds until so many tokens are there; all are handed up. By Wald's identity E[X] = E[R] E[Y]."""
    begins = renewals(round.yields, tokens)
    lengths = np.convolve(begins, round.yields)
    lengths[:tokens] = 0.0
    return Draft(lengths, float(begins.sum()) * round.seconds)


def exactly_so_many(round: Round, tokens: int) -> Draft:
    """Rounds until so many tokens are there; the surplus is dropped."""
    return Draft.exactly(tokens, float(renewals(round.yields, tokens).sum()) * round.seconds)


def so_many_rounds(round: Round, count: int) -> Draft:
    lengths = np.ones(1)
    for _ in range(count):
        lengths = np.convolve(lengths, round.yields)
    return Draft(lengths, count * round.seconds)


def fixed_block(chain: Chain, sizes: Sequence[int]) -> Round:
    """The target's round where every level hands up exactly its size. Sizes are those of the levels
    that gather, from below."""
    return _target_round(chain, sizes, exactly_so_many)


def at_least(chain: Chain, sizes: Sequence[int]) -> Round:
    """The target's round where every level hands up all it has once that is its size or more.

    Where a forward costs the same at any length, this is never slower than `fixed_block`: longer drafts emit more."""
    return _target_round(chain, sizes, at_least_so_many)


def fixed_rounds(chain: Chain, sizes: Sequence[int]) -> Round:
    """The target's round where the sizes of levels that verify are numbers of rounds; an
    autoregressive bottom writes so many tokens as its size."""
    return _target_round(chain, sizes, so_many_rounds)


def _target_round(chain: Chain, sizes: Sequence[int], gather: Gather) -> Round:
    _demand_sizes(chain, sizes)
    remaining = iter(sizes)
    level = chain.bottom
    if isinstance(level, Autoregressive):
        if not chain.verifiers:
            return Round(np.array([0.0, 1.0]), cost_of(level.cost)(1))
        level = written(level, next(remaining))
    for verifier in chain.verifiers:
        draft = level if isinstance(level, Draft) else gather(level, next(remaining))
        level = verified(draft, verifier)
    assert isinstance(level, Round)  # a chain that ends in a draft is not built
    return level


def written(model: Autoregressive, tokens: int) -> Draft:
    return Draft.exactly(tokens, tokens * cost_of(model.cost)(1))


def _mean(pmf: Floats) -> float:
    return float(np.arange(len(pmf)) @ pmf)


def _pmf(what: str, given: Sequence[float] | Floats) -> Floats:
    pmf = np.asarray(given, dtype=np.float64)
    if pmf.ndim != 1 or not len(pmf) or (pmf < 0).any() or abs(pmf.sum() - 1) > 1e-6:
        raise DrafterError(f"the {what} are {pmf.tolist()}: give probabilities of 0, 1, 2, ... that sum to 1")
    return pmf


def _demand_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise DrafterError(f"an acceptance rate of {rate}: give one from 0 to 1")


def _demand_seconds(seconds: float) -> None:
    if not seconds >= 0:
        raise DrafterError(f"a cost of {seconds} seconds: give 0 or more")


def _demand_sizes(chain: Chain, sizes: Sequence[int]) -> None:
    if len(sizes) != chain.gathering or any(size < 1 for size in sizes):
        raise DrafterError(
            f"sizes {list(sizes)} for a hierarchy with {chain.gathering} levels below the target that gather tokens: "
            "give each of them 1 or more"
        )
