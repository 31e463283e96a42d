"""How sure heads may be: the temperature of every depth at which their laws are likeliest on held-out answers.

A head that was trained by another loss than likelihood, or for long on few answers, says its tokens with too large or
too small a probability. What a path of a tree is worth is a product of such probabilities, so it is set right here;
the order of a head's own tokens stays, and what is accepted is exact whatever they say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forerun.drafting.heads import HeadsModule
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.lesson import Lesson, among, chunk, logits_of
from forerun.train.teacher import Teacher

STEP = 0.25
LOGARITHMS = [STEP * place for place in range(-6, 7)]
"""To the base 2, of the temperatures that are tried; the best lies between, where a parabola has its lowest point."""


@torch.no_grad()
def temperatures_of(
    module: HeadsModule, teacher: Teacher, samples: Sequence[Sample], answers: Answers
) -> tuple[float, ...]:
    """One for every head, by likelihood of the tokens that it knows; 1 for a head that has none to say."""
    module.eval()
    sums_KT = torch.zeros(module.count, len(LOGARITHMS), dtype=torch.float64)
    for batch in answers.batches_of(samples):
        with teacher.precision():
            lesson = Lesson.of(module, teacher, batch)
            for part in lesson.chunks(chunk(module, teacher)):
                sums_KT += _costs(logits_of(module, teacher, part).float(), part, module.known).cpu()
    return tuple(round(2 ** _lowest(row), 4) for row in sums_KT.tolist())


def _costs(logits_KPV: Tensor, lesson: Lesson, known: Tensor | None) -> Tensor:
    """-log q(token) summed over the places of every head, at every temperature, [K, T]."""
    places, is_known = among(known, lesson.labels_KP)
    there = lesson.valid_KP & is_known
    own_KP = logits_KPV.gather(-1, places[..., None])[..., 0]
    costs = []
    for logarithm in LOGARITHMS:
        scale = 2**-logarithm
        cost_KP = (logits_KPV * scale).logsumexp(-1) - own_KP * scale
        costs.append((cost_KP * there).sum(1, dtype=torch.float64))
    return torch.stack(costs, 1)


def _lowest(costs: Sequence[float]) -> float:
    """Where these costs, one for each of `LOGARITHMS`, would be lowest."""
    if not any(costs):
        return 0.0
    best = min(range(len(costs)), key=costs.__getitem__)
    if not 0 < best < len(costs) - 1:
        return LOGARITHMS[best]
    below, here, above = costs[best - 1 : best + 2]
    return LOGARITHMS[best] + STEP * (below - above) / (2 * (below - 2 * here + above))
