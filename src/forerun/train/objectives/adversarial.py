"""Heads that learn to be taken for the target (after KOALA, Zhang et al. 2024, arXiv 2408.08146).

Of the paper we know the abstract, the caption of its first figure and what others say of it: draft heads of several
layers are the generator, a discriminator tells their predictions from the target's, and both learn in turns. How the
discriminator is made, what it sees, the form of the losses and every number are a reconstruction.

    y_p, y_q   what is seen of the target's law p and the head's q for the same token; as a rule the expected embedding,
               p E and q E, E the target's own
    D(c, y)    W3 silu(W2 silu(Wc rms(c) + We rms(e) + Wy rms(y) + b_k)); c is the target's state at the place, e the
               embedding of the newest token that the head k sees, if it sees tokens; nothing of both is moved
    for D      BCE(D(c, y_p), 1 - smoothing) + BCE(D(c, y_q), 0), the mean over all that is taught
    for heads  the supervised loss + weight * BCE(D(c, y_q), 1), per head and place like the other terms

The law is given to D as a whole, so D can learn any divergence between both: whether this brings more than a term that
names the divergence is a question for experiments. After training D is thrown away.

Departures from our specification: a learned bias b_k of the first layer names the head, which is what an embedding of
its number comes to there; gradients are compared over all that learns, for heads have no last tensor in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from forerun.drafting.trained import SEES, Adversary
from forerun.errors import TrainingError
from forerun.train.answers import Batch
from forerun.train.lesson import Lesson, chunk
from forerun.train.objectives.descent import Descent, Group, by_scale, moved
from forerun.train.objectives.heads import HeadsObjective, Said
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule, demand_numbers

LOOK_EVERY = 20
"""Steps between two looks at how things stand."""
LEAST, MOST = 0.05, 0.3
"""How large the adversarial gradient may be beside that of the rest."""
FARTHEST = 10.0
"""Times that the weight may be changed, all in all; a look changes it by a factor of two at most."""
TOO_GOOD, GOOD_AGAIN, PATIENCE = 0.95, 0.90, 200
"""A discriminator that is right so often for so many steps rests until it is right less often."""
JUDGED_BATCHES = 4
"""Held-out batches that figures are of."""


class Discriminator(nn.Module):
    """Whether the target said this, in logits. seen: the size of what it sees of a law; follows: it sees a token
    too."""

    def __init__(self, target_width: int, seen: int, heads: int, follows: bool, width: int = 0):
        super().__init__()
        width = width or max(1, target_width // 4)
        self.state = nn.Linear(target_width, width, bias=False)
        self.token = nn.Linear(target_width, width, bias=False) if follows else None
        self.law = nn.Linear(seen, width, bias=False)
        self.which = nn.Parameter(torch.zeros(heads, width))
        self.middle = nn.Linear(width, width)
        self.verdict = nn.Linear(width, 1)

    def forward(self, here_PD: Tensor, tokens_KPD: Tensor | None, seen_KPY: Tensor) -> Tensor:
        """[K, P], fp32."""
        x = self.law(_normed(seen_KPY)) + self.state(_normed(here_PD)) + self.which[:, None]
        if self.token is not None:
            assert tokens_KPD is not None
            x = x + self.token(_normed(tokens_KPD))
        found: Tensor = self.verdict(F.silu(self.middle(F.silu(x))))
        return found[..., 0].float()


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


@dataclass
class Opposed(HeadsObjective):
    """Heads with a critic, a discriminator that somebody else teaches. Its term counts in steps alone: what is asked
    for otherwise, figures among it, is the supervised loss. pressure: how much it counts now."""

    critic: Discriminator = field(kw_only=True)
    adversary: Adversary = field(kw_only=True)
    pressure: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.weight, self.ratio = self.adversary.weight, 0.0

    @property
    def begins(self) -> int:
        """The step at which the adversary does."""
        return round(self.adversary.warmup * self.schedule.steps)

    def update(self, step: int) -> float:
        if step < self.begins or not self.weight:
            return super().update(step)
        if step % LOOK_EVERY == 0:
            self._balance(*self.sizes(step * self.schedule.parts))
        self.pressure = self.weight
        try:
            return super().update(step)
        finally:
            self.pressure = 0.0

    def _beside(self, said: Said) -> Tensor | None:
        supervised = super()._beside(said)
        if not self.pressure:
            return supervised
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        verdict = functional_call(self.critic, frozen, self.evidence(said))
        pressed = self.pressure * F.softplus(-verdict)
        return pressed if supervised is None else supervised + pressed

    def evidence(self, said: Said, target: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the critic is shown of the heads, or of the target."""
        lesson, count, embedding = said.lesson, self.module.taught, self.teacher.embedding_VD
        tokens = None
        if self.critic.token is not None:
            tokens = F.embedding(lesson.tokens_PK[:, :count], embedding).transpose(0, 1)
        if self.adversary.sees == "state":
            states = lesson.states_PKD.transpose(0, 1) if target else self.module.foreseen(lesson.context_PD)
            return lesson.here_PD, tokens, states[:count]
        logits = said.target_logits_KPV if target else said.logits_KPV
        assert logits is not None
        known = self.module.known
        seen = _seen(logits[:count], self.adversary.sees, embedding if known is None else embedding[known])
        return lesson.here_PD, tokens, seen

    def sizes(self, number: int) -> tuple[float, float]:
        """The norms of both gradients on a batch: of the supervised loss, and of the critic's term as if its weight
        were 1."""
        learning = [p for _, p in moved(self.module)]
        plain = torch.autograd.grad(self.loss(number), learning, allow_unused=True)
        self.pressure = 1.0
        try:
            both = torch.autograd.grad(self.loss(number), learning, allow_unused=True)
        finally:
            self.pressure = 0.0
        pairs = [(a, b if a is None else b - a) for a, b in zip(plain, both, strict=True) if b is not None]
        return _norm([a for a, _ in pairs if a is not None]), _norm([b for _, b in pairs])

    def _balance(self, supervised: float, adversarial: float) -> None:
        if not (supervised and adversarial and math.isfinite(supervised) and math.isfinite(adversarial)):
            return
        self.ratio = self.weight * adversarial / supervised
        if self.adversary.balanced:
            factor = min(max(self.ratio, LEAST), MOST) / self.ratio
            first = self.adversary.weight
            wish = self.weight * min(max(factor, 0.5), 2.0)
            self.weight = min(max(wish, first / FARTHEST), first * FARTHEST)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """Those of heads, the weight of the critic's term, and how large its gradient was beside the other one when
        it was last looked at."""
        return super().validate(watch) | {"adversarial_weight": self.weight, "adversarial_ratio": self.ratio}

    def state(self) -> dict[str, Tensor]:
        return super().state() | {BALANCE: torch.tensor([self.weight, self.ratio], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.weight, self.ratio = _numbers(state, BALANCE)


BALANCE, GUARD = "balance", "guard"


def _numbers(state: Mapping[str, Tensor], name: str) -> tuple[float, float]:
    if name not in state:
        raise ValueError(f"the state does not fit {name}")
    one, other = state[name].tolist()
    return one, other


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.float().square().sum()) for g in gradients))


def _seen(logits_KPV: Tensor, sees: str, embedding_VD: Tensor) -> Tensor:
    """What a discriminator sees of laws over these tokens."""
    logits = logits_KPV.float()
    if sees == "token":  # straight through: a token as it was drawn, with the gradient of the law it was drawn from
        logits = logits - torch.empty_like(logits).exponential_().clamp(min=1e-9).log()
        soft = logits.softmax(-1)
        law = F.one_hot(logits.argmax(-1), logits.shape[-1]) + (soft - soft.detach())
    else:
        law = logits.softmax(-1)
    return law if sees == "law" else F.linear(law.to(embedding_VD.dtype), embedding_VD.T)


@dataclass
class Judging(Descent):
    """The discriminator's loss. It learns from what the heads that are `opposed` say now, and moves nothing of them."""

    module: Discriminator
    opposed: Opposed
    schedule: Schedule

    def __post_init__(self) -> None:
        self._fair, self._rests = self.opposed.begins, False
        """The last step at which it was not too good; whether it learns at all."""

    def groups(self) -> list[Group]:
        return by_scale(moved(self.module), self.schedule, rate=self.schedule.adam_rate, betas=(0.5, 0.9))

    def update(self, step: int) -> float:
        if step < self.opposed.begins:
            return 0.0
        if step % LOOK_EVERY == 0:
            self.guard(step, self._accuracy_on(step // LOOK_EVERY))
        if self._rests:
            return 0.0
        rounds = self.opposed.adversary.rounds
        return [super(Judging, self).update(step * rounds + turn) for turn in range(rounds)][-1]

    def guard(self, step: int, accuracy: float) -> None:
        """Rest when it has been too good for too long, until it no longer is."""
        if accuracy <= TOO_GOOD:
            self._fair = step
        if self._rests and accuracy < GOOD_AGAIN:
            self._rests = False
        elif step - self._fair >= PATIENCE:
            self._rests = True

    def loss(self, number: int) -> Tensor:
        loss, _ = self.judged(*self.opposed.drawn(number))
        return loss

    def judged(self, batch: Batch, chosen: Tensor | None = None) -> tuple[Tensor, float]:
        """The loss on a batch, and how often it is right: a half where it cannot know."""
        heads = self.opposed
        with heads.teacher.precision():
            with torch.no_grad():
                lesson = Lesson.of(heads.module, heads.teacher, batch, chosen)
            sums = [self._sums(part) for part in lesson.chunks(chunk(heads.module, heads.teacher))]
        loss, right, count = torch.stack(sums).sum(0)
        return loss / count.clamp(min=1), right.item() / max(1.0, 2 * count.item())

    def _sums(self, lesson: Lesson) -> Tensor:
        """Over what is taught in a chunk: the loss, how often it is right about either side, and how much it is."""
        heads = self.opposed
        with torch.no_grad():
            said = heads.said(lesson, law=True)
            sides = heads.evidence(said, target=True), heads.evidence(said)
        real, fake = (self.module(*side) for side in sides)
        learn = said.learn_KP[: heads.module.taught]
        smoothing = heads.adversary.smoothing
        loss = (1 - smoothing) * F.softplus(-real) + smoothing * F.softplus(real) + F.softplus(fake)
        right = (real > 0).float() + (fake <= 0)
        return torch.stack(((loss * learn).sum(), (right * learn).sum(), learn.sum()))

    @torch.no_grad()
    def _accuracy_on(self, number: int) -> float:
        """On one of the held-out batches, in turn."""
        return self._heldout(number)[1]

    def _heldout(self, number: int) -> tuple[Tensor, float]:
        heads = self.opposed
        heads.module.eval()
        torch.manual_seed(heads.answers.seed + number)
        begins = range(0, len(heads.judged), heads.answers.rows)
        begin = begins[number % len(begins)]
        (batch,) = heads.answers.batches_of(heads.judged[begin : begin + heads.answers.rows])
        return self.judged(batch)

    @torch.no_grad()
    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """`loss` and `accuracy` on a few held-out batches."""
        batches = -(-len(self.opposed.judged) // self.opposed.answers.rows)
        judged = [self._heldout(number) for number in range(min(JUDGED_BATCHES, batches))]
        losses, shares = zip(*judged, strict=True)
        return {"loss": float(torch.stack(losses).mean()), "accuracy": sum(shares) / len(shares)}

    def state(self) -> dict[str, Tensor]:
        return super().state() | {GUARD: torch.tensor([self._fair, self._rests], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        fair, rests = _numbers(state, GUARD)
        self._fair, self._rests = int(fair), bool(rests)


def opposed(objective: HeadsObjective, adversary: Adversary, seed: int = 0) -> Judging:
    """What judges heads; it has their objective as `opposed`. Raises TrainingError for settings that make no sense."""
    module, teacher, schedule = objective.module, objective.teacher, objective.schedule
    demand_numbers({name: getattr(adversary, name) for name in ("weight", "warmup", "width", "rate", "smoothing")}, 0)
    demand_numbers({"rounds": adversary.rounds}, 1)
    if adversary.smoothing > 1:
        raise TrainingError(f"a smoothing of {adversary.smoothing} leaves no label: give a number from 0 to 1")
    if adversary.sees not in SEES:
        raise TrainingError(f"a discriminator cannot see {adversary.sees!r}: choose {', '.join(SEES)}")
    if adversary.sees == "state" and not module.foresees:
        raise TrainingError("these heads foresee no states for a discriminator to see: choose another input for it")
    tokens, width = teacher.embedding_VD.shape
    known = module.known
    seen = width if adversary.sees != "law" else tokens if known is None else len(known)
    torch.manual_seed(seed)
    critic = Discriminator(width, seen, module.taught, module.sees_tokens, adversary.width).to(teacher.device)
    own = {name: getattr(objective, name) for name in HeadsObjective.__dataclass_fields__}
    rounds = adversary.rounds
    judging = replace(
        schedule,
        steps=schedule.steps * rounds,
        warmup=schedule.warmup * rounds,
        muon_rate=0.0,
        adam_rate=schedule.adam_rate * adversary.rate,
        weight_decay=0.0,
        clip=1.0,
    )
    return Judging(critic, Opposed(**own, critic=critic, adversary=adversary), judging)
