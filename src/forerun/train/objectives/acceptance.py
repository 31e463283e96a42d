"""The acceptance head of SpecDec++ (arXiv 2405.19715), on a target and a draft model that stay as they are.

Of every answer token X_i of the target the draft model says what it would have drafted there, Y_i, and

    label_i = min(1, p(Y_i) / q(Y_i))       behind the target's own text: the probability that Y_i is accepted
    Z_i     = X_i with probability `mix`, else Y_i
    state_i = the draft model's at Z_i, behind Z

The head learns label_i from state_i wherever Z_i is Y_i. So it sees the draft model's own texts, nearly, although the
labels are those behind the target's. Y and Z are drawn once: they depend on the seed and the answer, not on the epoch,
and are remembered.

    loss = sum [w (1 - label) (-log(1 - said)) - label log(said)] / sum [w (1 - label) + label]

Labels are for one temperature without filters; who decodes at another should train at that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.drafters.small import DraftModel
from forerun.drafting.acceptance.head import ACCEPTED, REJECTED, AcceptanceHead, corrected
from forerun.drafting.growth import Chain
from forerun.drafting.stopping import Fixed
from forerun.nn.network import Network
from forerun.row import Row
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.lesson import CHUNK_NUMBERS
from forerun.train.objectives.descent import Descent
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher
from forerun.train.thresholds import MOST, THRESHOLDS, Chains, Growing, chains_of, cut

BINS = 10
"""Of the reliability table."""
CHAINS = 128
"""That thresholds are tried on."""
CHUNK = CHUNK_NUMBERS // 8
"""Probabilities of each model that exist at a time."""


class Lessons(Protocol):
    """Where a head's states and labels come from."""

    @property
    def draft_share(self) -> float:
        """What a drafted token takes, as a share of a pass of the target: that of the memory of their weights."""

    def lesson(self, batch: Batch, number: int) -> Lesson:
        """What the head learns on batch `number`."""

    def chains(self, samples: Sequence[Sample], count: int) -> Chains:
        """So many, behind answers that are cut somewhere: the same whenever these samples are given."""


@dataclass(frozen=True)
class Pair:
    """A target and its draft model. temperature: that labels are for; 0 is greedy. mix: of the answer tokens, how many
    the draft model reads instead of its own. seed: of what is drawn."""

    target: Teacher
    draft: Teacher
    temperature: float = 1.0
    mix: float = 0.15
    seed: int = 0
    _known: dict[tuple[int, bytes], Drafted] = field(default_factory=dict, repr=False, compare=False)

    @property
    def draft_share(self) -> float:
        return self._drafts.draft_share

    def chains(self, samples: Sequence[Sample], count: int) -> Chains:
        return self._drafts.chains(samples, count)

    @property
    def _drafts(self) -> Drafts:
        drafter = DraftModel.on(self.draft.network, Chain(Fixed(MOST)))
        longest = min(self.target.network.max_length, self.draft.network.max_length)
        return Drafts(self.target.network, drafter, self.temperature, self.seed, longest=longest)

    @torch.no_grad()
    def lesson(self, batch: Batch, number: int = 0) -> Lesson:
        device = self.draft.device
        texts = [tokens[:end] for tokens, end in zip(batch.tokens_BN, batch.ends, strict=True)]
        drafted = [self._drafted(text, max(1, begin)) for text, begin in zip(texts, batch.begins.tolist(), strict=True)]
        own = [one.is_own_N.nonzero()[:, 0] for one in drafted]
        rows_P = torch.cat([torch.full_like(places, row) for row, places in enumerate(own)]).to(device)
        places_P = torch.cat(own).to(device)
        read_BN = batch.tokens_BN.clone()
        for row, (one, places) in enumerate(zip(drafted, own, strict=True)):
            read_BN[row, places] = one.tokens_N[places]
        states_BND = self.draft.states(read_BN.to(device), (self.draft.top,))[self.draft.top]
        label_P = torch.cat([one.label_N[places] for one, places in zip(drafted, own, strict=True)])
        return Lesson(states_BND[rows_P, places_P].float(), label_P.to(device))

    def _drafted(self, text_N: Tensor, begin: int) -> Drafted:
        """Of one answer, from `begin` on. Texts are read alone, so nothing depends on those beside them."""
        key = begin, text_N.to(torch.int32).numpy().tobytes()
        if key not in self._known:
            luck_2N = np.random.default_rng((self.seed, begin, crc32(key[1]))).random((2, len(text_N)))
            self._known[key] = self._draw(text_N.to(self.draft.device), begin, torch.from_numpy(luck_2N))
        return self._known[key]

    def _draw(self, text_N: Tensor, begin: int, luck_2N: Tensor) -> Drafted:
        is_own_N = luck_2N[1] >= self.mix
        is_own_N[:begin] = False
        states = [one.states(text_N[None], (one.top,))[one.top][0, begin - 1 : -1] for one in (self.target, self.draft)]
        size, luck_P = max(1, CHUNK // len(self._heads[1])), luck_2N[0, begin:].to(text_N.device)
        tokens_N, label_N = text_N.clone(), torch.zeros(len(text_N), device=text_N.device)
        for at in range(0, len(luck_P), size):
            part = slice(at, at + size)
            target_law, draft_law = (self._law(one[part], head) for one, head in zip(states, self._heads, strict=True))
            here = slice(begin + at, begin + at + size)
            tokens_N[here] = drawn_of(draft_law, luck_P[part])
            label_N[here] = label_of(target_law, draft_law, tokens_N[here])
        return Drafted(tokens_N.cpu(), label_N.cpu(), is_own_N)

    @cached_property
    def _heads(self) -> tuple[Tensor, Tensor]:
        """In single precision: a label of two rounded laws would be off by percents."""
        return self.target.head_VD.float(), self.draft.head_VD.float()

    def _law(self, states_PD: Tensor, head_VD: Tensor) -> Tensor:
        logits = F.linear(states_PD.float(), head_VD)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return (logits / self.temperature).softmax(-1)


def drawn_of(law_PV: Tensor, luck_P: Tensor) -> Tensor:
    """A token per place, by numbers from 0 to 1."""
    sums = law_PV.double().cumsum(-1)
    picked = torch.searchsorted(sums, (luck_P * sums[:, -1])[:, None], right=True)[:, 0]
    return picked.clamp(max=law_PV.shape[-1] - 1)


def label_of(target_PV: Tensor, draft_PV: Tensor, tokens_P: Tensor) -> Tensor:
    """How probably these tokens of the draft's law are accepted under the target's, [P]."""
    theirs, ours = (law.gather(-1, tokens_P[:, None])[:, 0] for law in (target_PV, draft_PV))
    return (theirs / ours).clamp(max=1)


@dataclass(frozen=True)
class Drafts:
    """Of a drafter that reads the target's states (EAGLE, Hydra): its own drafts behind answers that are cut somewhere,
    anew for every batch. Every label is that of a token behind those that it was drafted behind. longest: tokens of a
    text; 0: what the target has room for."""

    target: Network
    drafter: Growing
    temperature: float = 1.0
    seed: int = 0
    length: int = 8
    longest: int = 0

    @property
    def draft_share(self) -> float:
        return self.drafter.bytes_per_token / self.target.footprint.weight_bytes

    def chains(self, samples: Sequence[Sample], count: int) -> Chains:
        several = [samples[number % len(samples)] for number in range(count)]
        return chains_of(self.target, self.drafter, self._cut(several, np.random.default_rng(0)))

    def _cut(self, samples: Sequence[Sample], luck: np.random.Generator) -> list[Row]:
        return cut(samples, self.longest or self.target.max_length, self.temperature, luck)

    def lesson(self, batch: Batch, number: int = 0) -> Lesson:
        texts, luck = batch.tokens_BN.tolist(), np.random.default_rng((self.seed, number % (1 << 32)))
        spans = zip(texts, batch.begins.tolist(), batch.ends.tolist(), strict=True)
        samples = [Sample(tuple(text[:begin]), tuple(text[begin:end])) for text, begin, end in spans]
        rows = self._cut([one for one in samples if one.answer], luck)
        chains = chains_of(self.target, self.drafter, rows, self.length)
        labels_RJ = chains.accepted_RJ[:, : chains.states_RJD.shape[1]]
        return Lesson(chains.states_RJD.flatten(0, 1), labels_RJ.flatten())


@dataclass(frozen=True)
class Drafted:
    """Of a text, what the draft model would have drafted at every place of the answer, how probably it is accepted, and
    whether the draft model reads it, [N] each."""

    tokens_N: Tensor
    label_N: Tensor
    is_own_N: Tensor


@dataclass(frozen=True)
class Lesson:
    """The draft model's states where it reads a token of its own, [P, D], and how probably that is accepted, [P]."""

    states_PD: Tensor
    label_P: Tensor


def loss_of(logits_P2: Tensor, label_P: Tensor, weight: float) -> Tensor:
    """In nats, over the weight of all that is taught; 0 where nothing is."""
    log_P2 = logits_P2.float().log_softmax(-1)
    rejected_P = weight * (1 - label_P)
    total = -(rejected_P * log_P2[:, REJECTED] + label_P * log_P2[:, ACCEPTED]).sum()
    return total / (rejected_P + label_P).sum().clamp(min=torch.finfo(torch.float32).tiny)


def divergence(label_P: Tensor, said_P: Tensor) -> float:
    """The mean divergence of two choices between acceptance and rejection, in nats; 0 log 0 is 0."""
    tiny = torch.finfo(torch.float32).tiny
    pairs = torch.stack((label_P, 1 - label_P)), torch.stack((said_P, 1 - said_P))
    return (torch.xlogy(pairs[0], pairs[0]) - torch.xlogy(pairs[0], pairs[1].clamp(min=tiny))).sum(0).mean().item()


@dataclass
class AcceptanceObjective(Descent):
    """The loss of an acceptance head, and its figures on held-out answers."""

    module: AcceptanceHead
    lessons: Lessons
    answers: Answers
    schedule: Schedule
    most_validated: int = 64

    def loss(self, number: int) -> Tensor:
        lesson = self.lessons.lesson(self.answers.batch(number), number)
        return loss_of(self.module(lesson.states_PD), lesson.label_P, self.module.config.weight)

    @property
    def judged(self) -> Sequence[Sample]:
        """The answers that figures are of."""
        return self.answers.heldout[: self.most_validated] or self.answers.training[: self.most_validated]

    @property
    def is_judged(self) -> bool:
        """Figures are of something: a short answer may have no token that the draft model reads as its own."""
        batches = self.answers.batches_of(self.judged)
        return any(len(self.lessons.lesson(batch, -1 - number).label_P) for number, batch in enumerate(batches))

    @torch.no_grad()
    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """`loss`; `kl`, the divergence of labels and of what the head says, `kl_corrected` of what it means, and
        `kl_constant` of the best number that is the same everywhere; the reliability table of what it means,
        `bin1_share`, `bin1_said`, `bin1_true` .., and `ece`, the mean distance of the latter; and of texts drafted
        behind held-out ones (`chains`), per threshold, `h30_drafted` and `h30_accepted` per round."""
        batches = list(self.answers.batches_of(self.judged))
        said, labels = list[Tensor](), list[Tensor]()
        for number, batch in enumerate(batches):
            watch(number, len(batches))
            lesson = self.lessons.lesson(batch, -1 - number)
            said.append(self.module(lesson.states_PD))
            labels.append(lesson.label_P)
        logits_P2, label_P = torch.cat(said), torch.cat(labels)
        said_P, weight = logits_P2.softmax(-1)[:, ACCEPTED], self.module.config.weight
        meant_P = corrected(said_P, weight)
        return {
            "loss": loss_of(logits_P2, label_P, weight).item(),
            "kl": divergence(label_P, said_P),
            "kl_corrected": divergence(label_P, meant_P),
            "kl_constant": divergence(label_P, label_P.mean().expand_as(label_P)),
            "acceptance": label_P.mean().item(),
            **reliability(label_P, meant_P),
            **self.chains.heard(self.module).figures(THRESHOLDS),
        }

    @cached_property
    def chains(self) -> Chains:
        """What is drafted behind held-out answers that are cut somewhere."""
        return self.lessons.chains(self.judged, CHAINS)


def reliability(label_P: Tensor, said_P: Tensor) -> dict[str, float]:
    """Of what was said in each tenth: how often, in the mean, and how often it came true; and `ece`."""
    place_P = (said_P * BINS).long().clamp(max=BINS - 1)
    figures, apart = dict[str, float](), 0.0
    for number in range(BINS):
        inside = place_P == number
        share = float(inside.float().mean())
        said, true = (float(part[inside].mean()) if share else 0.0 for part in (said_P, label_P))
        figures |= {f"bin{number + 1}_{name}": one for name, one in (("share", share), ("said", said), ("true", true))}
        apart += share * abs(said - true)
    return figures | {"ece": apart}
