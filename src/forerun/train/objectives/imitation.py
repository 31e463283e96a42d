"""A language model learns to go on with a text as its target would: on the target's own answers, from its law at every
token of them.

    teacher * KL(target || draft) + text * -log draft(token)

The divergence counts as a cross-entropy, which has the same gradient. Logits exist for a chunk of places at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.drafting.trained import Weights
from forerun.nn.transformer import Transformer
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.domains import Domains
from forerun.train.lesson import CHUNK_NUMBERS
from forerun.train.objectives.descent import Descent, Group, by_kind
from forerun.train.objectives.losses import losses
from forerun.train.objectives.next_token import OUTSIDE
from forerun.train.replay import Hits, tokens_per_step
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

LOOKAHEAD = 4
"""Tokens of the drafts that the figures are of."""
REWEIGH_EVERY = 100
SHARES = "shares"
"""In a state: of the kinds of answers."""


@dataclass(frozen=True)
class Places:
    """Of P answer tokens: what the draft model's head and the target's see in front of them, and the tokens."""

    ours_PD: Tensor
    theirs_PD: Tensor
    labels_P: Tensor

    def chunks(self, size: int) -> Iterator[Places]:
        parts = (torch.split(part, size) for part in (self.ours_PD, self.theirs_PD, self.labels_P))
        return (Places(*each) for each in zip(*parts, strict=True))


@dataclass
class Imitation(Descent):
    """The distillation of a draft model. weights: `text` and `teacher` of the loss, `distance` and `lk` if wanted.
    domains: the answers by kind, if there are several: every `REWEIGH_EVERY` steps those on which the draft model is
    furthest from its target get a larger share."""

    module: Transformer
    teacher: Teacher
    answers: Answers
    weights: Weights
    schedule: Schedule
    most_validated: int = 64
    domains: Domains | None = None

    def groups(self) -> list[Group]:
        """Muon for the matrices inside the blocks, AdamW for embeddings, heads and vectors; or AdamW for all."""
        return by_kind(self.module, self.schedule, OUTSIDE, betas=(0.9, 0.95))

    def loss(self, number: int) -> Tensor:
        """In nats, the mean over the answer tokens of a batch."""
        self.module.train()
        batch = (self.domains or self.answers).batch(number)
        with self.teacher.precision():
            places = self._places(batch)
            parts = list(places.chunks(self._at_a_time))
            if len(parts) == 1:  # nothing to save
                sums = [self._sum(places)]
            else:
                sums = [checkpoint(self._sum, part, use_reentrant=False) for part in parts]
        total: Tensor = torch.stack(sums).sum() / max(1, len(places.labels_P))
        return total

    def update(self, step: int) -> float:
        if self.domains is not None and step and step % REWEIGH_EVERY == 0:
            self.domains.learn([self._divergence(kind) for kind in self.domains.kinds])
        return super().update(step)

    @torch.no_grad()
    def _divergence(self, kind: Answers) -> float:
        """From the target, on some held-out answers of a kind."""
        self.module.eval()
        samples = (kind.heldout or kind.training)[: kind.rows]
        with self.teacher.precision():
            parts = self._places(Batch.of(list(samples), kind.length)).chunks(self._at_a_time)
            return float(torch.cat([self._figures(part)[1] for part in parts]).mean())

    def state(self) -> dict[str, Tensor]:
        shares = {} if self.domains is None else {SHARES: torch.from_numpy(self.domains.shares)}
        return super().state() | shares

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.domains is not None:
            if SHARES not in state or len(state[SHARES]) != len(self.domains.kinds):
                raise ValueError("the state is that of other kinds of answers")
            self.domains.shares = state[SHARES].numpy()
        super().load_state(state)

    @property
    def _at_a_time(self) -> int:
        """Places whose logits exist at a time."""
        return max(1, CHUNK_NUMBERS // self.module.vocab_size)

    def _places(self, batch: Batch) -> Places:
        tokens = batch.tokens_BN.to(self.teacher.device)
        theirs = self.teacher.states(tokens, {self.teacher.top})[self.teacher.top]
        rows, before = in_front(batch, tokens.device)
        ours = self.module.features(tokens)[rows, before]
        return Places(ours, theirs[rows, before], tokens[rows, before + 1])

    def _logits(self, places: Places) -> tuple[Tensor, Tensor]:
        """The draft model's and the target's, [P, V]."""
        with torch.no_grad():
            theirs = F.linear(places.theirs_PD, self.teacher.head_VD)
        return F.linear(places.ours_PD, self.module.head.weight), theirs

    def _sum(self, places: Places) -> Tensor:
        found, _ = losses(*self._logits(places), places.labels_P, self.weights)
        return found.sum()

    @property
    def judged(self) -> Sequence[Sample]:
        """The answers that figures are of: as many of every kind."""
        kinds = self.domains.kinds if self.domains else [self.answers]
        most = -(-self.most_validated // len(kinds))
        return [sample for kind in kinds for sample in (kind.heldout or kind.training)[:most]]

    @torch.no_grad()
    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """On held-out answers: `loss`, nats per token; `divergence` from the target's law, and `accepted`, the chance
        that a token drawn from the draft's is (1 - the total variation), means over tokens; and of greedy answers
        `tokens_per_step` with drafts of `LOOKAHEAD` tokens, by replay."""
        self.module.eval()
        samples, sums_4, hits = self.judged, torch.zeros(4, dtype=torch.float64), list[Hits]()
        batches = list(self.answers.batches_of(samples))
        for number, batch in enumerate(batches):
            watch(number, len(batches))
            with self.teacher.precision():
                parts = self._places(batch).chunks(self._at_a_time)
                found_4P = torch.cat([self._figures(part) for part in parts], 1).cpu()
            sums_4 += found_4P.sum(1).double()
            own = samples[number * self.answers.rows : (number + 1) * self.answers.rows]
            for sample, right_P in zip(own, torch.split(found_4P[3], _counts(batch)), strict=True):
                if sample.temperature == 0:
                    hits.append(right_P.bool().numpy())
        tokens = sum(sum(_counts(batch)) for batch in batches)
        names = ("loss", "divergence", "accepted", "right")
        figures = dict(zip(names, (sums_4 / max(1, tokens)).tolist(), strict=True))
        return figures | {"tokens_per_step": tokens_per_step(hits, LOOKAHEAD)}

    def _figures(self, places: Places) -> Tensor:
        """Per token, [4, P]: its nats, the divergence and the overlap of both laws there, and whether it is the draft
        model's best."""
        ours, theirs = self._logits(places)
        log_ours, log_theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        nats = -log_ours.gather(1, places.labels_P[:, None])[:, 0]
        divergence = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1)
        overlap = torch.minimum(log_ours, log_theirs).exp().sum(-1)
        right = (ours.argmax(-1) == places.labels_P).to(nats.dtype)
        return torch.stack((nats, divergence, overlap, right))


def in_front(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and index of the token in front of every answer token."""
    counts = _counts(batch)
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    spans = [torch.arange(end - count, end) for end, count in zip(batch.ends.tolist(), counts, strict=True)]
    return rows.to(device), (torch.cat(spans) - 1).to(device)


def _counts(batch: Batch) -> list[int]:
    """Answer tokens of every row that have something in front of them."""
    return [int(end) - max(1, int(begin)) for begin, end in zip(batch.begins, batch.ends, strict=True)]
