"""Block drafters: a whole block of tokens from one draft forward. This is their entry, which imports nothing heavy;
the network is in `network.py`.

The form is that of DSpark (deepseek-ai/DeepSpec): rows of [anchor, MASK, ...] that see the target's states of several
layers, fused, and one another; a low-rank Markov term makes what a row says depend on the token before it. Without the
term (rank 0) it is DFlash (arXiv 2602.06036), whose number stands for the family here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.drafting.method import Method, later
from forerun.drafting.settings import demand_count, option, setting
from forerun.drafting.trained import (
    LARGEST,
    HeadsConfig,
    LayerConfig,
    Layout,
    Preset,
    Trained,
    Weights,
    demand_counts,
)
from forerun.errors import DrafterError

LAST = -1
"""What the target's output projection sees, however many layers there are."""


@dataclass(frozen=True)
class BlockConfig(HeadsConfig):
    """heads: the tokens that a block proposes. layers: its own. rank: of the Markov term, 0 without. sources: the
    target's layers whose states are fused, numbered as hidden states are, or LAST. mask_token: the token whose
    embedding stands in the rows behind the anchor; None: a vector that is learnt. from_anchor: whether the anchor's own
    row proposes a token, as DSpark's does and DFlash's does not. layer: the shape of its layers, None until a target is
    known."""

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
    sources: tuple[int, ...] = option(
        (), "Layers of the target that are read; -1 is what its projection sees.", shown="three of them", rare=True
    )
    mask_token: int | None = option(
        None,
        "A token that no text has, for the rows of what is not known.",
        least=0,
        shown="a vector that is learnt",
        rare=True,
    )
    from_anchor: bool = option(
        True,
        "The newest token's row proposes one, or (DFlash) only those behind it.",
        flag="--from-anchor/--past-anchor",
        shown="from-anchor",
        rare=True,
    )
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
        mask = self.mask_token
        if mask is not None and (type(mask) is not int or not 0 <= mask < self.vocab_size):
            raise DrafterError(f"a mask_token {mask!r} makes no sense: give one of the {self.vocab_size} tokens")
        if type(self.from_anchor) is not bool:
            raise DrafterError(f"from_anchor {self.from_anchor!r} makes no sense: give true or false")

    @property
    def rows(self) -> int:
        """Of a block: one for every token that it proposes, and one for an anchor that proposes none."""
        return self.heads if self.from_anchor else self.heads + 1


def speaks_of(algorithm: str) -> Callable[[Mapping[str, Any]], bool]:
    """Of a config.json: it is speculators', for this one of their algorithms."""
    return lambda config: config.get("speculators_model_type") == algorithm


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
        layouts=(
            Layout(
                "dspark",
                "speculators (DSpark)",
                later("forerun.drafters.block.layouts:read"),
                later("forerun.drafters.block.layouts:as_dspark"),
                knows=speaks_of("dspark"),
            ),
            Layout(
                "dflash",
                "speculators (DFlash)",
                later("forerun.drafters.block.layouts:read"),
                later("forerun.drafters.block.layouts:as_dflash"),
                knows=speaks_of("dflash"),
            ),
        ),
    ),
    variations=({"nodes": 7}, {"nodes": 4}, {"nodes": 14}),
)
