"""Block drafters: a whole block of tokens from one draft forward. This is their entry, which imports nothing heavy;
the network is in `network.py`.

The form is that of DSpark (deepseek-ai/DeepSpec): rows of [anchor, MASK, ...] that see the target's states of several
layers, fused, and one another; a low-rank Markov term makes what a row says depend on the token before it. Without the
term (rank 0) it is DFlash (arXiv 2602.06036), whose number stands for the family here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.drafting.method import Method, later
from forerun.drafting.settings import demand_count, option, setting
from forerun.drafting.trained import LARGEST, HeadsConfig, LayerConfig, Preset, Trained, Weights, demand_counts
from forerun.errors import DrafterError

LAST = -1
"""What the target's output projection sees, however many layers there are."""


@dataclass(frozen=True)
class BlockConfig(HeadsConfig):
    """heads: the tokens of a block. layers: its own. rank: of the Markov term, 0 without. sources: the target's layers
    whose states are fused, numbered as hidden states are, or LAST. layer: the shape of its layers, None until a target
    is known."""

    heads: int = option(7, "Tokens of a block.", least=1, flag="--block")
    layers: int = option(1, "Layers of its own.", least=1)
    tied_layers: bool = False
    vocabulary: str = "shared"
    rank: int = option(
        64,
        "Of the term that ties a token to the one before it; 0 leaves it out.",
        least=0,
        flag="--markov-rank",
        rare=True,
    )
    sources: tuple[int, ...] = ()
    layer: LayerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rank) is not int or not 0 <= self.rank <= LARGEST:
            raise DrafterError(f"a Markov term of rank {self.rank!r} makes no sense: give a whole number from 0")
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources or any(type(one) is not int or one < LAST for one in self.sources):
            raise DrafterError(f"the sources {list(self.sources)} make no sense: give numbers of the target's layers")
        if isinstance(self.layer, Mapping):
            object.__setattr__(self, "layer", LayerConfig(**self.layer))
        if not isinstance(self.layer, LayerConfig):
            raise DrafterError(f"layers of {self.layer!r} make no sense: give their sizes")
        if self.tied_layers or self.vocabulary != "shared":
            raise DrafterError("a block drafter has layers of its own, and the target's vocabulary matrix")
        demand_counts(self, ("heads", "layers"))


@dataclass(frozen=True)
class BlockSettings:
    """{"drafter": "block", "checkpoint": PATH, "nodes": N, "tree": TREE, "weights": "auto" | "int8" | "target"}"""

    checkpoint: str | None = setting(None, "The folder of the block drafter.", "heads")
    nodes: int = setting(7, "The most nodes of a tree, of which those are proposed that are worth their cost.")
    tree: str | Sequence[Sequence[int]] | Mapping[str, Any] | None = setting(
        None, "The same tree of ranks at every step instead, as for heads.", "tree"
    )
    weights: str = setting("auto", "auto, int8 or target: the number format of the network.")

    def __post_init__(self) -> None:
        demand_count("block", "nodes", self.nodes)


_SENSE = "Train a block drafter: all tokens of a draft from one forward."
_WEIGHTS = Weights(text=0.0, teacher=0.1, distance=0.9, decay=0.7788)
"""DSpark's: 0.1 of cross-entropy and 0.9 of the L1 distance, weighted by exp(-k / 4)."""

METHOD = Method(
    "block",
    "A small network on several of the target's layers that drafts a block of tokens in one forward.",
    BlockSettings,
    later("forerun.drafters.block.drafter:build"),
    grows="certain",
    trained=Trained(
        title="Block drafter",
        paper="arXiv 2602.06036",
        config=BlockConfig,
        network=later("forerun.drafters.block.network:BlockModule"),
        fitted=later("forerun.drafters.block.network:fitted"),
        presets={
            "block": Preset(_SENSE, {"heads": 7, "layers": 1}, _WEIGHTS, rate=1e-3, warmup=0.04, muon=2e-3, share=0.25),
        },
    ),
)
