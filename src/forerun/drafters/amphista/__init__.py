"""Amphista-style heads (a reconstruction after Li et al. 2024, arXiv 2406.13170): independent heads that hear one
another, behind layers of their own. This is their entry, which imports nothing heavy; the network is in `network.py`.

The paper's body was not available to us. Its abstract and reviews of it say what there is: causal adaptation layers in
two stages that are given the token just sampled, an auto-embedding block in which the heads attend to one another in
both directions, one draft forward for all heads. How it is made in detail, and every number of the preset, is ours.

Preset: five heads; per head 1.0 of the cross-entropy with the target's law and 0.1 of that with the text, head k
counting 0.8^(k-1); AdamW at 3e-4, cosine, clipped at 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forerun.drafting.method import Method, later
from forerun.drafting.settings import option
from forerun.drafting.trained import HeadsConfig, HeadSettings, LayerConfig, Preset, Trained, Weights, demand_counts
from forerun.errors import DrafterError

ALL, FIRST, NO = "all", "first", "no"
BOTH, ONE_WAY, NONE = "both", "one-way", "none"


@dataclass(frozen=True)
class AmphistaConfig(HeadsConfig):
    """stages: of adaptation layers, `layers` in each. sampled_token: which stages are given the newest token.
    auto_embedding: whether heads hear one another, or only those before them, or nobody. ae_positions, ae_mlp: whether
    that block has learned positions, and a feed-forward part; ae_layers: its depth. layer: the shape of all these
    layers, None until a target is known. The defaults are the method, everything else an ablation."""

    heads: int = option(5, "How many heads.", least=1)
    layers: int = option(1, "Layers of a stage.", least=1)
    tied_layers: bool = False
    stages: int = option(2, "Stages of adaptation layers.", least=0, most=2)
    sampled_token: str = option(ALL, "Stages that are given the newest token.", words=(ALL, FIRST, NO))
    auto_embedding: str = option(BOTH, "How heads hear one another.", words=(BOTH, ONE_WAY, NONE))
    ae_layers: int = 1
    ae_mlp: bool = True
    ae_positions: bool = True
    layer: LayerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        demand_counts(self, ("ae_layers",))
        if type(self.stages) is not int or not 0 <= self.stages <= 2:
            raise DrafterError(f"{self.stages!r} stages make no sense: give 0, 1 or 2")
        if self.sampled_token not in (ALL, FIRST, NO):
            raise DrafterError(f"a sampled_token for {self.sampled_token!r} makes no sense: give all, first or no")
        if self.auto_embedding not in (BOTH, ONE_WAY, NONE):
            raise DrafterError(f"an auto_embedding {self.auto_embedding!r} makes no sense: give both, one-way or none")
        for name in ("ae_mlp", "ae_positions"):
            if type(getattr(self, name)) is not bool:
                raise DrafterError(f"{name} {getattr(self, name)!r} makes no sense: give true or false")
        if self.tied_layers:
            raise DrafterError("the layers of a stage are never one and the same: leave tied_layers out")
        if isinstance(self.layer, Mapping):
            object.__setattr__(self, "layer", LayerConfig(**self.layer))
        if not isinstance(self.layer, LayerConfig):
            raise DrafterError(f"layers of {self.layer!r} make no sense: give their sizes")

    @property
    def split(self) -> int:
        """So many heads, the first ones, read the first of two stages."""
        return self.heads // 2 if self.stages == 2 else 0

    def is_given(self, stage: int) -> bool:
        """Whether a stage, from 0, sees the newest token."""
        return self.sampled_token == ALL or (self.sampled_token == FIRST and stage == 0)


METHOD = Method(
    "amphista",
    "Heads that hear one another in both directions, behind causal layers that see the newest token.",
    HeadSettings,
    later("forerun.drafters.amphista.drafter:build"),
    grows="ranks",
    trained=Trained(
        title="Amphista",
        paper="arXiv 2406.13170",
        config=AmphistaConfig,
        network=later("forerun.drafters.amphista.network:AmphistaHeads"),
        fitted=later("forerun.drafters.amphista.network:fitted"),
        presets={
            "amphista": Preset(
                "Train Amphista-style heads: they hear one another, behind layers of their own.",
                {"heads": 5, "layers": 1},
                Weights(text=0.1 / 0.8, teacher=1 / 0.8, decay=0.8),  # decay^k, and the first is to count 1
                rate=3e-4,
            ),
        },
    ),
)
