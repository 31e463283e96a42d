"""Which parts stay is learnt: masks that are drawn from hard concrete laws, under a constraint that grows to the shape
wanted (Sheared LLaMA, arXiv 2310.06694; the laws are Louizos et al., arXiv 1712.01312).

    mask        clip(1.2 sigmoid((ln u - ln(1 - u) + a) / beta) - 0.1, 0, 1),  u uniform, beta = 2/3
    absent      the chance that it is 0: sigmoid(beta ln(1/11) - a)
    constraint  m1 (s - t) + m2 (s - t)^2 for the mean chance s and the share t that is to go, the mean over layers
                where every layer has masks of its own, the sum over kinds of parts

Weights and masks go down the gradient of the loss and the constraint, the multipliers m go up. Only kinds of parts
whose size changes have masks. In the end the parts with the largest masks stay, and the masks' values are folded into
the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.train.objectives.descent import Descent, Group, moved
from forerun.train.objectives.imitation import Imitation
from forerun.train.pruning.masks import Masked, Masks, folded, named
from forerun.train.pruning.slicing import Kept, kept, sliced
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule

BETA = 2 / 3
EDGE = math.log(100)
"""The logarithms of odds stay within this."""
BEGIN, SPREAD = 5.0, 0.01
"""Where they begin, and how much they differ then."""
WEIGHT_RATE, MASK_RATE = 1e-4, 1.0
RAMP, WARMUP, FLOOR = 0.2, 0.1, 0.1
"""Shares of the steps in which the constraint grows and the rates rise; and of the rates that is left in the end."""


def drawn(log_odds: Tensor, uniform: Tensor) -> Tensor:
    """Masks from numbers within (0, 1)."""
    spread = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_odds) / BETA)
    return (1.2 * spread - 0.1).clamp(0, 1)


def absent(log_odds: Tensor) -> Tensor:
    """The chance that a mask is 0."""
    return torch.sigmoid(BETA * math.log(1 / 11) - log_odds).clamp(1e-6, 1 - 1e-6)


def settled(log_odds: Tensor) -> Tensor:
    """The value of a mask that stays."""
    return torch.sigmoid(0.8 * log_odds / BETA)


def constraint(sparsity: Tensor, wanted: float, first: Tensor, second: Tensor) -> Tensor:
    """Of one kind of parts; sparsity: a number, or one for every layer."""
    apart = sparsity - wanted
    found: Tensor = (first * apart + second * apart.square()).mean()
    return found


class Gates(nn.Module):
    """The logarithms of odds of all masks, and the multipliers, by kind of part."""

    def __init__(self, source: TransformerConfig, shape: TransformerConfig, seed: int):
        super().__init__()
        sizes = {"layers": "layers", "hidden": "width", "heads": "heads", "units": "mlp_width"}
        shares = {kind: 1 - getattr(shape, size) / getattr(source, size) for kind, size in sizes.items()}
        self.wanted = {kind: share for kind, share in shares.items() if share}
        self.config = source
        random = torch.Generator().manual_seed(seed)
        ones = named(Masks.ones(source))
        odds = {kind: BEGIN + SPREAD * torch.randn(ones[kind].shape, generator=random) for kind in self.wanted}
        self.log_odds = nn.ParameterDict({kind: nn.Parameter(value) for kind, value in odds.items()})
        self.multipliers = nn.ParameterDict({kind: nn.Parameter(torch.zeros(2)) for kind in self.wanted})
        self.clamp_()

    @torch.no_grad()
    def clamp_(self) -> None:
        for value in self.log_odds.values():
            value.clamp_(-EDGE, EDGE)

    def masks(self, random: torch.Generator) -> Masks:
        """Drawn; of kinds without masks ones."""
        return self._with(
            {
                kind: drawn(value, torch.rand(value.shape, generator=random).clamp(1e-6, 1 - 1e-6).to(value.device))
                for kind, value in self.log_odds.items()
            }
        )

    def _with(self, values: Mapping[str, Tensor]) -> Masks:
        device = next((value.device for value in self.log_odds.values()), None)
        ones = named(Masks.ones(self.config, device))
        return Masks(*(values.get(kind, one) for kind, one in ones.items()))

    def scores(self) -> Masks:
        """What parts are ranked by."""
        return self._with({kind: value.detach() for kind, value in self.log_odds.items()})

    def final(self, parts: Kept) -> Masks:
        """Settled values of the parts that stay, zeros of the others."""
        values = self._with({kind: settled(value.detach()) for kind, value in self.log_odds.items()})
        stays = Masks(*(torch.zeros_like(value) for value in named(values).values()))
        stays.layers_L[list(parts.layers)] = 1
        stays.hidden_D[list(parts.hidden)] = 1
        for place, layer in enumerate(parts.layers):
            stays.heads_LH[layer, list(parts.heads[place])] = 1
            stays.units_LF[layer, list(parts.units[place])] = 1
        return Masks(*(a * b for a, b in zip(named(values).values(), named(stays).values(), strict=True)))

    def penalty(self, share: float) -> Tensor:
        """The constraint at this share of what is to go. It is worth its value, moves the masks down, and the
        multipliers up."""
        total = torch.zeros(())
        for kind, value in self.log_odds.items():
            sparsity, (first, second) = absent(value).mean(-1), self.multipliers[kind]
            wanted = share * self.wanted[kind]
            down = constraint(sparsity, wanted, first.detach(), second.detach())
            up = constraint(sparsity.detach(), wanted, first, second)
            total = total.to(down.device) + down - up + up.detach()
        return total


class Shear(Descent):
    """The steps: a model that becomes sparse, and its masks."""

    def __init__(self, inner: Imitation, gates: Gates, schedule: Schedule):
        """inner: the imitation whose module the masks are on."""
        self.inner, self.gates, self.schedule = inner, gates, schedule
        self.module = nn.ModuleDict({"model": inner.module, "gates": gates})

    def groups(self) -> list[Group]:
        named_parameters = moved(self.module)
        weights = [parameter for name, parameter in named_parameters if name.startswith("model.")]
        others = [parameter for name, parameter in named_parameters if not name.startswith("model.")]
        found = [Group(weights, WEIGHT_RATE, betas=(0.9, 0.95))]
        return [*found, Group(others, MASK_RATE, betas=(0.9, 0.95))] if others else found

    def loss(self, number: int) -> Tensor:
        assert isinstance(self.inner.module, Masked)
        random = torch.Generator().manual_seed(self.inner.answers.seed + number)
        self.inner.module.masks = self.gates.masks(random)
        share = min(1.0, number / max(1.0, RAMP * self.schedule.steps))
        return self.inner.loss(number) + self.gates.penalty(share)

    def update(self, step: int) -> float:
        loss = super().update(step)
        self.gates.clamp_()
        return loss

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        return self.inner.validate(watch)


@dataclass(frozen=True)
class Sheared:
    """What has become of it: the parts that stay, the masks, and the model with them folded in."""

    parts: Kept
    masks: Masks
    module: Transformer


def shear(source: Transformer, objective: Imitation, steps: int) -> Shear:
    """Ready to learn which parts of `source` make up the objective's module. The source's weights move, too."""
    gates = Gates(source.config, objective.module.config, objective.answers.seed).to(source.device)
    inner = Imitation(
        Masked(source, Masks.ones(source.config, source.device)),
        objective.teacher,
        objective.answers,
        objective.weights,
        objective.schedule,
    )
    schedule = Schedule(steps, warmup=round(WARMUP * steps), shape="cosine", floor=FLOOR)
    return Shear(inner, gates, schedule)


def sheared(source: Transformer, gates: Gates, shape: TransformerConfig) -> Sheared:
    """The parts with the largest masks, those folded into the weights."""
    parts = kept(gates.scores(), source.config, shape, pick=None)
    masks = gates.final(parts)
    return Sheared(parts, masks, sliced(folded(source, masks), parts))
