"""Hydra and Hydra++ (Ankner et al. 2024, arXiv 2402.05109): heads that see the tokens drafted
before theirs. This is their entry, which imports nothing heavy; the heads are in `network.py`.

Presets: Hydra++ is the recipe that its authors give for Vicuna-7B (four heads, four blocks, prefix
layer, the target's law as the only signal, 5e-4, cosine down to a third, weight decay 0.1, dropout
0.2). Hydra: the defaults of its training script; its rate and length are not published, so they are
Medusa's (a reconstruction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forerun.drafting.method import Method, later
from forerun.drafting.settings import option, setting
from forerun.drafting.trained import HeadsConfig, HeadSettings, LayerConfig, Layout, Preset, Trained, Weights
from forerun.errors import DrafterError


@dataclass(frozen=True)
class HydraConfig(HeadsConfig):
    """Layers after the first are one set of weights if tied_layers. prefix: the prefix layer
    (Hydra++), or None. dropout: in training alone."""

    tied_layers: bool = option(True, "One block, repeated, or each its own weights.", flag="--tied-layers/--own-layers")
    prefix: LayerConfig | None = None
    dropout: float = option(0.0, "In training, before blocks and projections.", least=0.0, most=0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise DrafterError(f"a dropout of {self.dropout!r} makes no sense: give a share from 0 to less than 1")
        if isinstance(self.prefix, Mapping):
            object.__setattr__(self, "prefix", LayerConfig(**self.prefix))
        if not isinstance(self.prefix, LayerConfig | None):
            raise DrafterError(f"a prefix layer of {self.prefix!r} makes no sense: give its sizes, or none")


@dataclass(frozen=True)
class HydraSettings(HeadSettings):
    """{"drafter": "hydra", "checkpoint": PATH, "tree": TREE, "weights": "auto" | "int8" | "target"}, or a "stopping"
    rule instead of a tree."""

    stopping: str | Mapping[str, Any] | None = setting(
        None, "A chain instead, drawn from the heads' laws, that ends itself by this rule; in plain torch.", "rule"
    )

    def __post_init__(self) -> None:
        if self.stopping is not None and (self.tree is not None or not isinstance(self.stopping, str | Mapping)):
            raise DrafterError("hydra: stopping is a rule that ends a chain: give it without a tree")


METHOD = Method(
    "hydra",
    "Heads on the target's last hidden state that see the tokens drafted before theirs.",
    HydraSettings,
    later("forerun.drafters.hydra.network:build"),
    grows="ranks",
    trained=Trained(
        title="Hydra",
        paper="arXiv 2402.05109",
        config=HydraConfig,
        network=later("forerun.drafters.hydra.network:HydraHeads"),
        fitted=later("forerun.drafters.hydra.network:fitted"),
        presets={
            "hydra": Preset(
                "Train Hydra heads: each sees the tokens drafted before its own.", {"heads": 4, "layers": 1}
            ),
            "hydra++": Preset(
                "Train Hydra++ heads: deeper, behind a layer of their own, taught by the target's law.",
                {"heads": 4, "layers": 4, "tied_layers": True, "prefix": True, "dropout": 0.2},
                Weights(text=0.0, teacher=1.0),
                rate=5e-4,
                warmup=100,
                floor=0.33,
                weight_decay=0.1,
            ),
        },
        layouts=(
            Layout(
                "hydra",
                "Hydra's code",
                later("forerun.drafters.hydra.layouts:read_hydra"),
                later("forerun.drafters.hydra.layouts:as_hydra"),
                stem="hydra_lm_head",
                implied=later("forerun.drafters.hydra.layouts:implied"),
            ),
        ),
    ),
)
