"""The papers' training settings as data.

Medusa: arXiv 2401.10774 section 7 (lambda_k = 0.8^k, K = 5, peak rate 1e-3 of the released Medusa-1 heads, cosine, a
tenth of warm-up). Hydra++: the recipe that its authors give for Vicuna-7B (four heads, four blocks, prefix layer, the
target's law as the only signal, 5e-4, cosine down to a third, weight decay 0.1, dropout 0.2). Hydra: the defaults of
its training script; its rate and length are not published, so they are Medusa's (a reconstruction). Medusa-2: the two
recipes of Medusa's appendix, in `JOINT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weights:
    """Of the terms of a heads' loss. text: cross-entropy with the next token; teacher: with the target's law. The k-th head
    counts decay^k (k from 1)."""

    text: float = 1.0
    teacher: float = 0.0
    decay: float = 1.0


@dataclass(frozen=True)
class Preset:
    """drafter: the kind. architecture: fields of its config, except for those that follow from the target ("prefix":
    True asks for a layer like the target's). warmup: a share of the steps, or steps if 1 or more. floor: the share of
    the rate at the end."""

    drafter: str
    architecture: Mapping[str, object]
    weights: Weights = field(default_factory=Weights)
    rate: float = 1e-3
    warmup: float = 0.1
    floor: float = 0.0
    weight_decay: float = 0.0


PRESETS: dict[str, Preset] = {
    "medusa": Preset("medusa", {"heads": 5, "layers": 1}, Weights(decay=0.8)),
    "hydra": Preset("hydra", {"heads": 4, "layers": 1}),
    "hydra++": Preset(
        "hydra",
        {"heads": 4, "layers": 4, "tied_layers": True, "prefix": True, "dropout": 0.2},
        Weights(text=0.0, teacher=1.0),
        rate=5e-4,
        warmup=100,
        floor=0.33,
        weight_decay=0.1,
    ),
}


@dataclass(frozen=True)
class Joint:
    """Heads trained together with their target, which adapters move (Medusa-2). The loss is keep + head_weight * ramp
    * heads'.

    heads: the heads' preset; its rate is the backbone's. head_rate: how much faster all of the heads' parameters learn (the
    published code leaves their biases at the backbone's rate). keep: what holds the target in place, "original" (the
    divergence from its own original law) or "text" (cross-entropy with the answers). ramp: see `Ramp` in
    train/joint.py. rank, alpha: of the adapters."""

    heads: Preset
    keep: str
    head_weight: float
    ramp: str
    head_rate: float = 4.0
    rank: int = 32
    alpha: float = 16.0


_FIVE_HEADS: Mapping[str, object] = {"heads": 5, "layers": 1}
JOINT: dict[str, Joint] = {
    "original": Joint(
        Preset("medusa", _FIVE_HEADS, Weights(decay=0.8), rate=1e-4, warmup=20), "original", 0.01, "sine"
    ),
    "text": Joint(Preset("medusa", _FIVE_HEADS, Weights(decay=0.8), rate=5e-4, warmup=40), "text", 0.2, "constant"),
}
"""Medusa-2 by what keeps the target: as the paper trained Vicuna-33B and Zephyr (sections 3.2 and 7.4), and Vicuna-7B
and 13B (section 7.3)."""
