"""From logits to the law that a request asked for: the one place for temperature, filters, penalties, bias, processors.

The order is that of transformers: bias, then penalties, then the user's processors, then the
constraint, then temperature, top-k, top-p, min-p. Everything is applied at every node of a tree with that node's own
prefix.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from forerun.constraint import Constraint, Matcher
from forerun.errors import RequestError
from forerun.native import sampling as native

Processor = Callable[[Tensor, Tensor], Tensor]
"""transformers' protocol: (input_ids [1, S], scores [1, V]) -> scores [1, V]."""


COLDEST = 1e-5
"""The lowest temperature above 0: logits divided by less leave the range of fp32."""
SYNONYMS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "logits_processor": "processors",
    "logits_processors": "processors",
}
"""Names that other engines have for our parameters."""


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are(values: object, fit: Callable[[Any], bool]) -> bool:
    """What can be looked at once only, such as a generator, would be empty afterwards."""
    return isinstance(values, Collection) and not isinstance(values, str) and all(map(fit, values))


_KINDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("top_k n", "a whole number", _is_whole),
    ("max_new_tokens seed logprobs", "a whole number or None", lambda value: value is None or _is_whole(value)),
    ("temperature top_p min_p", "a number", _is_number),
    ("repetition_penalty presence_penalty frequency_penalty", "a number", _is_number),
    (
        "logit_bias",
        "token ids, each with what to add to its logit",
        lambda bias: isinstance(bias, Mapping) and _are(bias, _is_whole) and _are(bias.values(), _is_number),
    ),
    ("stop", "a string or several", lambda stop: isinstance(stop, str) or _are(stop, lambda one: isinstance(one, str))),
    ("stop_token_ids", "token ids", lambda ids: _are(ids, _is_whole)),
    ("drafts", "True or False", lambda drafts: isinstance(drafts, bool)),
    ("tenant", "a name", lambda tenant: isinstance(tenant, str)),
    ("processors", "functions of (input_ids, scores)", lambda processors: _are(processors, callable)),
    ("constraint", "a Constraint or None", lambda given: given is None or isinstance(given, Constraint | Mapping)),
)
"""Parameters, what kind of value they want, and how to tell."""


@dataclass(frozen=True)
class SamplingParams:
    """What a request wants. Values that mean nothing are refused with a sentence (RequestError).

    max_new_tokens: at most so many; None: until the context is full. temperature: 0 is greedy.
    top_k: 0 is off. top_p, min_p: shares of probability; 1 and 0 are off. repetition_penalty: over
    prompt and output (1 is off). presence_penalty, frequency_penalty: over the output (0 is off).
    logit_bias: token id -> what is added to its logit; -inf forbids it. processors: transformers
    `LogitsProcessor`s or any callable like them, called with each node's own prefix. seed: None
    draws one. n: samples per prompt. stop: strings that end the text (not part of it).
    stop_token_ids: tokens that end it. ignore_eos: go on after end-of-sequence. logprobs: how many
    alternatives to report beside each token (0: the token alone; None: none); natural logarithms of
    the model's own law, before any of the above. constraint: what the answer must be, a
    `Constraint` or a mapping such as {"regex": "[0-9]+"}: tokens with which it cannot become so are
    impossible, its end is possible where the constraint accepts it, and it ends where nothing else
    may follow. tenant: whose memory a drafter may use: what the model said to one tenant is never
    proposed to another. drafts: whether anything is proposed at all; False decodes plainly, beside
    rows for which it is.
    """

    max_new_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    processors: Sequence[Processor] = ()
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | Mapping[str, Any] | None = None
    tenant: str = ""
    drafts: bool = True

    def __post_init__(self) -> None:
        for wrong in self._misfits() or self._complaints():
            raise RequestError(wrong)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.constraint is not None:
            object.__setattr__(self, "constraint", Constraint.of(self.constraint))
        if not all(self.stop):
            raise RequestError("a stop string is empty: it would end every text at once; leave it out")

    def _misfits(self) -> list[str]:
        """Values of the wrong kind, as they come in from outside."""
        return [
            f"{name}={getattr(self, name)!r} makes no sense: give {wants}"
            for names, wants, fits in _KINDS
            for name in names.split()
            if not fits(getattr(self, name))
        ]

    def _complaints(self) -> list[str]:
        def check(good: bool, name: str, wants: str) -> list[str]:
            return [] if good else [f"{name}={getattr(self, name)!r} makes no sense: {wants}"]

        found = check(
            self.max_new_tokens is None or self.max_new_tokens > 0, "max_new_tokens", "give 1 or more, or None"
        )
        found += check(
            math.isfinite(self.temperature) and (self.temperature == 0 or self.temperature >= COLDEST),
            "temperature",
            f"give 0 (greedy), or {COLDEST} or more",
        )
        found += check(self.top_k >= 0, "top_k", "give 0 (off) or more")
        found += check(0 < self.top_p <= 1, "top_p", "give a share above 0 and up to 1 (off)")
        found += check(0 <= self.min_p <= 1, "min_p", "give a share from 0 (off) to 1")
        found += check(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", "give a finite factor above 0; 1 is off"
        )
        found += check(math.isfinite(self.presence_penalty), "presence_penalty", "give a finite number; 0 is off")
        found += check(math.isfinite(self.frequency_penalty), "frequency_penalty", "give a finite number; 0 is off")
        found += check(self.n >= 1, "n", "give 1 or more samples")
        found += check(self.logprobs is None or self.logprobs >= 0, "logprobs", "give 0 or more alternatives, or None")
        found += check(
            all(bias < math.inf for bias in self.logit_bias.values()), "logit_bias", "give finite numbers, or -inf"
        )
        filters = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        wanted = [name for name, on in filters.items() if on]
        if self.temperature == 0 and wanted:
            found.append(
                f"{wanted[0]} has no effect at temperature 0 (greedy): set a temperature, or leave {wanted[0]} out"
            )
        if self.temperature == 0 and self.n > 1:
            found.append(f"n={self.n} greedy samples would all be the same: set a temperature, or n=1")
        return found

    @staticmethod
    def of(given: SamplingParams | Mapping[str, Any] | None = None, **more: Any) -> SamplingParams:
        """From a record, a mapping (e.g. a JSON object) or nothing; `more` goes before what is given.

        The names of other engines are understood (`SYNONYMS`). RequestError for an unknown name,
        with the nearest one that exists.
        """
        if given is None:
            given = {}
        if isinstance(given, SamplingParams):
            return replace(given, **_named(more)) if more else given
        if not isinstance(given, Mapping):
            raise RequestError(
                f"sampling parameters cannot be {given!r}: give SamplingParams, a mapping, or keyword arguments"
            )
        return SamplingParams(**_named(given) | _named(more))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def edits_scores(self) -> bool:
        """The scores depend on the prefix or on a bias, not on the logits alone."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.processors
            or self.constraint
        )

    @property
    def forbids(self) -> bool:
        """Some tokens may be made impossible by a bias, a processor or a constraint."""
        return bool(self.processors or self.logit_bias or self.constraint)

    @property
    def filter(self) -> native.Filter:
        return (self.temperature, self.top_k, self.top_p, self.min_p)


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """By our own names."""
    names = [item.name for item in fields(SamplingParams)]
    found: dict[str, Any] = {}
    for name, value in values.items():
        ours = SYNONYMS.get(name, name)
        if ours not in names:
            near = difflib.get_close_matches(name, [*names, *SYNONYMS], 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}"
            raise RequestError(f"unknown sampling parameter {name!r}{hint}")
        if ours in found:
            raise RequestError(f"{name} and another name of {ours} are given: give one of them")
        found[ours] = value
    return found


@dataclass(frozen=True)
class Prefix:
    """The tokens before a prediction: prompt and output so far, and how many of them are the prompt."""

    tokens: Sequence[int]
    prompt_length: int


@dataclass(frozen=True)
class Edits:
    """scores_NV: of every node, edited. ends: nodes behind which processors and constraint forbid
    every token; what stands there, and below, is not edited, so that it is a law whoever looks at it."""

    scores_NV: Tensor
    ends: frozenset[int]


def edited(
    scores_NV: Tensor,
    params: SamplingParams,
    prefixes: Sequence[Prefix],
    parents: Sequence[int] = (),
    matcher: Matcher | None = None,
) -> Tensor:
    """The scores of `edits_of`."""
    return edits_of(scores_NV, params, prefixes, parents, matcher).scores_NV


def edits_of(
    scores_NV: Tensor,
    params: SamplingParams,
    prefixes: Sequence[Prefix],
    parents: Sequence[int] = (),
    matcher: Matcher | None = None,
) -> Edits:
    """Bias, penalties, processors and constraint for the nodes of one row; `prefixes[n]` is node n's own prefix
    (itself included).

    parents: of the nodes, if they form a tree. matcher: of the constraint, if there is one. What is
    forbidden at a node leads nowhere: everything below it stays as it is, for a grammar may not
    know what to say there. RequestError for a processor that gives back what is no law.
    """
    assert (matcher is None) == (params.constraint is None), "whoever makes a row of a constraint gives it a matcher"
    given_NV, scores_NV = scores_NV, scores_NV.clone()
    nowhere, ends = set[int](), set[int]()
    for node, prefix in enumerate(prefixes):
        if parents and parents[node] >= 0 and params.forbids:
            parent = parents[node]
            if parent in nowhere or bool(scores_NV[parent, prefix.tokens[-1]] == -math.inf):
                nowhere.add(node)
                continue
        scores = scores_NV[node]
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        _penalise(scores, params, prefix)
        if params.processors:
            scores_NV[node] = _processed(scores, params.processors, prefix)
        if matcher:
            _constrain(scores, matcher, prefix)
        if (params.processors or matcher) and float(scores.max()) == -math.inf:
            scores_NV[node] = given_NV[node]
            nowhere.add(node)
            ends.add(node)
    return Edits(scores_NV, frozenset(ends))


def _constrain(scores_V: Tensor, matcher: Matcher, prefix: Prefix) -> None:
    allowed = matcher.allowed(prefix.tokens[prefix.prompt_length :])
    if allowed is None:
        scores_V.fill_(-math.inf)
    else:
        scores_V.masked_fill_(torch.from_numpy(~allowed).to(scores_V.device), -math.inf)


def _processed(scores_V: Tensor, processors: Sequence[Processor], prefix: Prefix) -> Tensor:
    ids, batch = torch.tensor([prefix.tokens], dtype=torch.int64, device=scores_V.device), scores_V[None]
    for processor in processors:
        batch = _demand_scores(processor(ids, batch), batch, processor)
    return batch[0]


def _demand_scores(found: object, given: Tensor, processor: Processor) -> Tensor:
    """RequestError unless a processor has given back what can be sampled from, or nothing but what it forbids."""
    name = getattr(processor, "__name__", type(processor).__name__)
    if not isinstance(found, Tensor) or found.shape != given.shape:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise RequestError(
            f"the logits processor {name} returned {what}: return scores of the shape it was given, {list(given.shape)}"
        )
    best = float(found.max())
    if math.isnan(best) or best == math.inf:
        raise RequestError(
            f"the logits processor {name} returned {best} among its scores: return finite numbers, or -inf for what is"
            " forbidden"
        )
    return found


def _penalise(scores_V: Tensor, params: SamplingParams, prefix: Prefix) -> None:
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(prefix.tokens)), device=scores_V.device)
        values = scores_V[seen]
        factor = params.repetition_penalty
        scores_V[seen] = torch.where(values < 0, values * factor, values / factor)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(prefix.tokens[prefix.prompt_length :], dtype=torch.int64, device=scores_V.device)
        counts = torch.bincount(output, minlength=scores_V.shape[0]).to(scores_V.dtype)
        scores_V -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def laws(scores_BNV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The law of every node, [B, N, V]: fp32, or fp64 if the scores are; `scores` are already edited.

    Greedy rows get the one-hot law of their best token, so that one rule can serve a mixed batch.
    """
    scores_BNV = scores_BNV if scores_BNV.dtype == torch.float64 else scores_BNV.float()
    filters = [p.filter for p in params]
    return native.laws(scores_BNV, filters) if native.fits(scores_BNV) else laws_in_torch(scores_BNV, filters)


def laws_in_torch(scores_BNV: Tensor, filters: Sequence[native.Filter]) -> Tensor:
    """The same for any device and dtype, and what is meant."""
    if len(set(filters)) == 1:
        return _law(scores_BNV, *filters[0])
    result = torch.empty_like(scores_BNV)
    for wanted in set(filters):
        rows = [row for row, one in enumerate(filters) if one == wanted]
        result[rows] = _law(scores_BNV[rows], *wanted)
    return result


def _law(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    return _filtered(scores / temperature, top_k, top_p, min_p).softmax(-1) if temperature else one_hot(scores)


def one_hot(scores: Tensor) -> Tensor:
    """All probability on the best token (the first of equals)."""
    return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def _filtered(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p < 1:
        ascending, order = scores.sort(stable=True)  # of equals the first are dropped
        surplus = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        surplus[..., -1] = False
        scores = scores.masked_fill(surplus.scatter(-1, order, surplus), float("-inf"))
    if min_p > 0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return scores
