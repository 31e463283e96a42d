"""EAGLE: a layer that goes on where the target stopped, state by state. This is the entry, which
imports nothing heavy; the network is in `network.py`.

EAGLE-1 (arXiv 2401.15077) foresees the target's next state from its states and the tokens behind
them. EAGLE-2 (arXiv 2406.16858) keeps its weights and grows the tree by confidence: `TopTree` here.
EAGLE-3 (arXiv 2503.01840) fuses a low, a middle and a high state, demands no state of its output,
and learns on what it has said itself ("training-time test"). Where the papers and their code
(SafeAILab/EAGLE) differ, this follows the code; what is reconstructed is said where it stands. The
papers' rate and warm-up are for 800,000 steps of four texts; AdamW's second decay is torch's 0.999
here, and theirs is 0.95.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.drafting.method import Method, later
from forerun.drafting.settings import demand_count, option, setting
from forerun.drafting.trained import HeadsConfig, LayerConfig, Layout, Preset, Trained, Weights, demand_counts
from forerun.errors import DrafterError

LAST = -1


@dataclass(frozen=True)
class EagleConfig(HeadsConfig):
    """heads: the steps that figures look ahead, and taught: those of them that learn; both say
    nothing about the weights. layers: its own. fused: EAGLE-3's form. sources: the target's layers
    that it reads, numbered as hidden states are; LAST is what the output projection sees, however
    many layers there are. layer: the shape of its layers.

    qkv_bias, qk_norm: of its layers, as some families have them. fuse_bias: of the projection that
    joins a token and a state (EAGLE-1's older checkpoints). The others are EAGLE-3's:
    residual_normed: the layer's residual is the normed state; sources_normed, joined_normed: a norm
    for every source, or one over all of them, before they are fused; output_normed: the next step
    reads the normed output (EAGLE-3.1)."""

    heads: int = option(5, "Steps that the figures look ahead.", least=1, flag="--ahead", identifies=False)
    taught: int = option(
        1, "Steps ahead that learn, each on the one before.", least=1, flag="--unrolled", identifies=False
    )
    layers: int = option(1, "Layers of its own.", least=1)
    tied_layers: bool = False
    vocabulary: str = option(
        "shared", "A projection of its own, or the target's.", words=("own", "shared"), shown="the paper's"
    )
    noise: str = option(
        "length",
        "On states in training: 0.1 (at 512 tokens, or flat).",
        words=("length", "flat", "none"),
        identifies=False,
    )
    fused: bool = False
    sources: tuple[int, ...] = (LAST,)
    layer: LayerConfig | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    fuse_bias: bool = False
    residual_normed: bool = False
    sources_normed: bool = False
    joined_normed: bool = False
    output_normed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", tuple(self.sources))
        if isinstance(self.layer, Mapping):
            object.__setattr__(self, "layer", LayerConfig(**self.layer))
        self._demand_sense()

    @property
    def brief(self) -> str:
        return f"EAGLE-{3 if self.fused else 1} of {self.layers} layer{'s' if self.layers > 1 else ''}{self.knows}"

    def _demand_sense(self) -> None:
        if not isinstance(self.layer, LayerConfig):
            raise DrafterError(f"layers of {self.layer!r} make no sense: give their sizes")
        demand_counts(self, ("taught",))
        if self.taught > self.heads:
            raise DrafterError(f"{self.taught} steps cannot learn where {self.heads} are looked at: look further ahead")
        if not self.sources or any(type(one) is not int or one < LAST for one in self.sources):
            raise DrafterError(f"the sources {list(self.sources)} make no sense: give numbers of the target's layers")
        if len(set(self.sources)) < len(self.sources):
            raise DrafterError(f"the sources {list(self.sources)} name a layer twice: give each once")
        if len(self.sources) > 1 and not self.fused:
            raise DrafterError("EAGLE-1 reads one layer of the target: leave the other sources out, or use eagle3")
        if self.noise not in ("length", "flat", "none"):
            raise DrafterError(f"the noise {self.noise!r} makes no sense: give length, flat or none")
        if self.tied_layers:
            raise DrafterError("an eagle has layers of its own: leave tied_layers out")
        self._demand_form()

    def _demand_form(self) -> None:
        of_three = ("residual_normed", "sources_normed", "joined_normed", "output_normed")
        for name in ("fused", "qkv_bias", "qk_norm", "fuse_bias", *of_three):
            if type(getattr(self, name)) is not bool:
                raise DrafterError(f"an eagle with {name} {getattr(self, name)!r} makes no sense: give true or false")
        stranger = next((name for name in of_three if getattr(self, name)), None)
        if not self.fused and (stranger or self.vocabulary != "shared"):
            raise DrafterError(f"EAGLE-1 has no {stranger or 'vocabulary of its own'}: train eagle3 for one")
        if (self.fused and self.fuse_bias) or (self.sources_normed and self.joined_normed):
            raise DrafterError("EAGLE-3 fuses its sources without a bias, and norms them one by one or together")


@dataclass(frozen=True)
class EagleSettings:
    """{"drafter": "eagle", "checkpoint": PATH, "width": 10, "depth": D, "nodes": 59, "tree": TREE, "stopping": RULE}"""

    checkpoint: str | None = setting(None, "The folder of the drafter.", "heads")
    width: int = setting(10, "The nodes of a level that are extended, and the children that each gets.")
    depth: int | None = setting(None, "Levels of a tree; without it the papers' 6, and 8 for EAGLE-3.")
    nodes: int = setting(59, "The most nodes of a tree: the most probable of all that were looked at.")
    tree: str | Sequence[Sequence[int]] | Mapping[str, Any] | None = setting(
        None, "The same tree of ranks at every step instead: static is EAGLE-1's own, or as for heads.", "tree"
    )

    stopping: str | Mapping[str, Any] | None = setting(
        None, "A chain instead, drawn from its law, that ends itself by this rule.", "rule"
    )

    def __post_init__(self) -> None:
        if self.stopping is not None and self.tree is not None:
            raise DrafterError("eagle: give a tree or a stopping rule, which ends a chain, and not both")
        if not isinstance(self.stopping, str | Mapping | None):
            raise DrafterError(f"eagle: stopping is a mapping, or a rule's name, not {self.stopping!r}")
        for name in ("width", "nodes", *(("depth",) if self.depth is not None else ())):
            demand_count("eagle", name, getattr(self, name))


def is_three(config: Mapping[str, Any]) -> bool:
    """Of a config.json: it speaks of EAGLE-3, in speculators' form or a flat one."""
    names = [str(one).lower() for one in config.get("architectures") or ()]
    spoken = any("eagle3" in name for name in names) or "draft_vocab_size" in config
    return config.get("speculators_model_type", "eagle3") == "eagle3" and spoken


def is_one(config: Mapping[str, Any]) -> bool:
    """It says that it is an EAGLE, or it is, as EAGLE's own, that of a Llama with one layer or a bias."""
    names = [str(one).lower() for one in config.get("architectures") or ()]
    spoken = config.get("model_type") == "eagle" or any("eagle" in name for name in names)
    llama = names == ["llamaforcausallm"] and (config.get("num_hidden_layers") == 1 or "bias" in config)
    return not is_three(config) and (spoken or llama)


METHOD = Method(
    "eagle",
    "A layer that foresees the target's next states one after the other, and grows a tree by confidence.",
    EagleSettings,
    later("forerun.drafters.eagle.drafter:build"),
    grows="certain",
    trained=Trained(
        title="EAGLE",
        paper="arXiv 2401.15077",
        config=EagleConfig,
        network=later("forerun.drafters.eagle.network:EagleModule"),
        fitted=later("forerun.drafters.eagle.network:fitted"),
        presets={
            "eagle": Preset(
                "Train an EAGLE drafter: a layer that foresees the target's next state.",
                {"heads": 5, "taught": 1, "vocabulary": "shared"},
                Weights(text=0.0, teacher=0.1, state=1.0),
                rate=3e-5,
                warmup=2000,
                clip=0.5,
            ),
            "eagle3": Preset(
                "Train an EAGLE-3 drafter: on three of the target's layers, and on what it has said itself.",
                {"heads": 7, "taught": 7, "fused": True, "vocabulary": "own", "noise": "none"},
                Weights(text=0.0, teacher=1.25, decay=0.8),  # the first step counts 1, the next 0.8
                rate=5e-5,
                warmup=12000,
                clip=0.5,
            ),
        },
        layouts=(
            Layout(
                "eagle3",
                "speculators (EAGLE-3)",
                later("forerun.drafters.eagle.layouts:read_three"),
                later("forerun.drafters.eagle.layouts:as_speculators"),
                knows=is_three,
            ),
            Layout(
                "specforge",
                "SpecForge and SGLang (EAGLE-3)",
                later("forerun.drafters.eagle.layouts:read_three"),
                later("forerun.drafters.eagle.layouts:as_specforge"),
                knows=is_three,
            ),
            Layout(
                "eagle",
                "EAGLE's code",
                later("forerun.drafters.eagle.layouts:read_one"),
                later("forerun.drafters.eagle.layouts:as_one"),
                knows=is_one,
            ),
        ),
    ),
    variations=({"nodes": 16}, {"nodes": 4}, {"nodes": 8}, {"nodes": 32}),
)
