"""What methods whose heads are trained state beyond the rest: architecture, presets, joint
training, foreign layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from forerun.drafting.settings import option, setting
from forerun.errors import DrafterError

if TYPE_CHECKING:
    from forerun.chance import Ints
    from forerun.nn.transformer import TransformerConfig

LARGEST = 1 << 24
"""Of any size in an architecture."""


@dataclass(frozen=True)
class HeadSettings:
    """Of a drafter with trained heads: {"checkpoint": PATH, "tree": TREE, "weights": "auto" | "int8" | "target"}"""

    checkpoint: str | None = setting(None, "The folder of the heads.", "heads")
    tree: str | Sequence[Sequence[int]] | Mapping[str, Any] | None = setting(
        None,
        "A published tree's name, a file of `forerun calibrate`, or a list of paths of ranks; without it, the tree"
        " beside the"
        " checkpoint, else a small one.",
        "tree",
    )
    weights: str = setting("auto", "auto, int8 or target: the number format of the heads.")


@dataclass(frozen=True)
class HeadsConfig:
    """An architecture, as a checkpoint holds it. width, vocab_size: the target's. heads: K. layers:
    blocks per head, one set of weights for all if tied_layers. vocabulary: "own" (a projection per
    head) or "shared" (the target's). kept: the tokens that can be proposed, ascending, where they are not
    all; known: how many of them training is to choose, 0 for all. temperatures: by depth, what logits are
    divided by before they are probabilities (deeper: the last); none: nothing."""

    width: int
    vocab_size: int
    heads: int = option(4, "How many heads.", least=1)
    layers: int = option(1, "Blocks per head.", least=1)
    tied_layers: bool = option(
        False, "One block, repeated, or each its own weights.", flag="--tied-layers/--own-layers"
    )
    vocabulary: str = option(
        "own", "A projection per head, or the target's for all.", words=("own", "shared"), shown="own"
    )
    known: int = option(0, "Propose the most frequent tokens alone.", least=0, shown="all", identifies=False, rare=True)
    kept: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """DrafterError for an architecture that no heads can have: made by training or from a file."""
        demand_counts(self, ("width", "vocab_size", "heads", "layers"))
        if type(self.tied_layers) is not bool:
            raise DrafterError(f"heads with tied_layers {self.tied_layers!r} make no sense: give true or false")
        if self.vocabulary not in ("own", "shared"):
            raise DrafterError(f"heads with the vocabulary {self.vocabulary!r} make no sense: give own or shared")
        for name in ("kept", "temperatures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._demand_tokens()

    def _demand_tokens(self) -> None:
        kept = self.kept
        if type(self.known) is not int or not 0 <= self.known <= self.vocab_size:
            raise DrafterError(f"there are no {self.known!r} of {self.vocab_size} tokens to know: give fewer, or 0")
        ascending = all(type(one) is int for one in kept) and all(a < b for a, b in pairwise(kept))
        if kept and not (ascending and kept[0] >= 0 and kept[-1] < self.vocab_size):
            raise DrafterError(f"a part of the vocabulary is ascending token ids below {self.vocab_size}")
        if not all(isinstance(one, int | float) and 0 < one < inf for one in self.temperatures):
            raise DrafterError(f"the temperatures {list(self.temperatures)} make no sense: give numbers above 0")

    @property
    def candidates(self) -> int:
        """How many tokens can be proposed."""
        return len(self.kept) or self.vocab_size

    @property
    def brief(self) -> str:
        """A few words about its shape."""
        tied = " (tied)" if self.layers > 1 and self.tied_layers else ""
        return f"{self.heads} heads of {self.layers} layer{'s' if self.layers > 1 else ''}{tied}{self.knows}"

    @property
    def knows(self) -> str:
        """The end of `brief`."""
        return f", {len(self.kept)} tokens" if self.kept else ""


Config = TypeVar("Config", bound=HeadsConfig)


def narrowed(config: Config, counts_V: Ints) -> Config:
    """With the most frequent tokens, if only some are to be known and nobody has chosen them yet. counts: how often
    each token is in the answers."""
    if not config.known or config.kept:
        return config
    best = (-counts_V).argsort(kind="stable")[: config.known]
    return replace(config, kept=tuple(sorted(best.tolist())))


def demand_counts(config: Any, names: Sequence[str]) -> None:
    """DrafterError unless these fields are sizes that something can have."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise DrafterError(f"heads with {name} {value!r} make no sense: give a whole number of 1 or more")


@dataclass(frozen=True)
class LayerConfig:
    """The shape of layers that heads have of their own: that of one of the target's."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        demand_counts(self, ("heads", "kv_heads", "head_dim", "mlp_width", "max_length"))
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise DrafterError(
                f"layers of {self.heads} heads of {self.head_dim} with {self.kv_heads} key heads make no sense"
            )
        if not all(isinstance(value, int | float) and value > 0 for value in (self.norm_eps, self.rope_theta)):
            raise DrafterError(
                f"layers with {self.norm_eps!r} and {self.rope_theta!r} in their norms and angles make no sense"
            )

    def transformer(self, width: int, layers: int = 1, **more: Any) -> TransformerConfig:
        """So many of them, reading states of this width. more: what differs in fields of the config."""
        from forerun.nn.transformer import TransformerConfig

        return TransformerConfig(**(asdict(self) | {"vocab_size": 0, "width": width, "layers": layers} | more))


@dataclass(frozen=True)
class Weights:
    """Of the terms of a heads' loss. text: cross-entropy with the next token; teacher: with the
    target's law; distance: the L1 distance between the head's law and the target's, which is twice the chance that
    a token drawn from the head is rejected; lk: see train/objectives/losses.py; state: the smooth L1 distance of a
    guess at the target's state from that state, the mean over its numbers, for heads that guess one. The k-th head
    counts decay^k (k from 1), and with `pace` also as far as the ones before it are likely to be right."""

    text: float = option(1.0, "Of the next token's log-probability.", least=0.0, flag="--text-weight")
    teacher: float = option(0.0, "Of the target's whole law there.", least=0.0, flag="--teacher-weight")
    decay: float = option(1.0, "Head k counts this to the power of k.", least=0.0, flag="--head-decay")
    distance: float = option(0.0, "Of the L1 distance to that law.", least=0.0, flag="--distance-weight", rare=True)
    state: float = option(
        0.0, "Of the distance to its state, where one is foreseen.", least=0.0, flag="--state-weight", rare=True
    )
    lk: float = option(
        0.0, "Of the divergence and the distance, mixed by how close they are; 3 is usual.", least=0.0, rare=True
    )
    pace: bool = option(
        False, "Heads count as far as those before are likely to be right.", flag="--pace/--no-pace", rare=True
    )

    @property
    def asks_target(self) -> bool:
        """A term asks for the target's law."""
        return bool(self.teacher or self.distance or self.lk)


SEES = ("embedding", "law", "token", "state")
"""What a discriminator may see of a law."""


@dataclass(frozen=True)
class Adversary:
    """A discriminator that heads learn against (see train/objectives/adversarial.py). weight: of its term in their
    loss, to begin with; balanced: changed then so that its gradient stays a twentieth to three tenths of the rest's.
    sees: what it sees of a law: the expected embedding, the law itself, a token drawn from it, or of heads that foresee
    states that state. warmup: the share of the steps before it begins. width: of its layers, 0 for a quarter of the
    target's. rounds: its steps in every step of the heads; rate: its learning rate, in multiples of theirs. smoothing:
    how far from certain it is to be about the target."""

    weight: float = option(
        0.1,
        "Learn against a discriminator too; 0.1 is usual (KOALA).",
        least=0.0,
        flag="--adversarial",
        shown="off",
        rare=True,
    )
    sees: str = option(
        "embedding",
        "What it sees of a law.",
        words=SEES,
        flag="--discriminator-sees",
        shown="embedding",
        rare=True,
    )
    warmup: float = option(
        0.1,
        "Share of the steps before it begins.",
        least=0.0,
        most=1.0,
        flag="--discriminator-warmup",
        shown="0.1",
        rare=True,
    )
    balanced: bool = True
    width: int = 0
    rounds: int = 1
    rate: float = 1.0
    smoothing: float = 0.1


@dataclass(frozen=True)
class Preset:
    """A paper's training as data. sense: one line. architecture: fields of the config, except for
    those that follow from the target. warmup: a share of the steps, or steps if 1 or more. floor:
    the share of the rate at the end. muon: the rate of matrices, moved by Muon (0: AdamW moves all). share: of the
    places of a batch, how many teach, drawn anew for every batch. clip: the largest norm of a step's gradient."""

    sense: str
    architecture: Mapping[str, object]
    weights: Weights = field(default_factory=Weights)
    rate: float = 1e-3
    warmup: float = 0.1
    floor: float = 0.0
    weight_decay: float = 0.0
    muon: float = 0.0
    share: float = 1.0
    clip: float = 1.0


@dataclass(frozen=True)
class Joint:
    """Heads trained together with their target, which adapters move (Medusa-2). The loss is keep + head_weight * ramp
    * heads'.

    heads: their settings; the rate is the backbone's. head_rate: how much faster all of the heads'
    parameters learn (the published code leaves their biases at the backbone's rate). keep: what
    holds the target in place, "original" (the divergence from its own original law) or "text"
    (cross-entropy with the answers). ramp: see `Ramp` in train/objectives/joint.py. rank, alpha: of
    the adapters."""

    heads: Preset
    keep: str
    head_weight: float
    ramp: str
    head_rate: float = 4.0
    rank: int = 32
    alpha: float = 16.0


@dataclass(frozen=True)
class JointMethod:
    """A command that trains heads and target together. name: the command's. sense: one line.
    preset: that of the heads, by name. presets: by what keeps the target."""

    name: str
    sense: str
    preset: str
    presets: Mapping[str, Joint]


@dataclass(frozen=True)
class Layout:
    """How other code stores the heads; it is written by its name.

    sense: whose it is, as in "the layout of ...". stem: the file that heads lie in alone,
    .safetensors or .pt; without one they lie in a whole model, whose config `knows`, under names
    that begin with `prefix`. read: (Stored, Base | None) to Heads. pack: (Heads, Base | None) to
    the Parcel to write; None: a layout that is only read. The target that reading a parcel back
    asks for is `implied` by the heads, where nobody gave one: (Heads, folder) to Base.
    """

    name: str
    sense: str
    read: Callable[..., Any]
    pack: Callable[..., Any] | None = None
    stem: str = ""
    knows: Callable[[Mapping[str, Any]], bool] = lambda config: False
    prefix: str = ""
    implied: Callable[..., Any] = lambda heads, folder: None


@dataclass(frozen=True)
class Trained:
    """Heads that are trained on a target. title: what they are called in sentences. paper: its
    number, by which methods are listed, the oldest first. config: the record of the architecture,
    whose options the command line offers. network: from a config to the heads without their
    weights. fitted: from (fields of a config, the target's network) to the fields with what follows
    from the target. presets: by name, each a command. joint: with the target together. layouts: of
    other code."""

    title: str
    paper: str
    config: type[HeadsConfig]
    network: Callable[[Any], Any]
    presets: Mapping[str, Preset]
    fitted: Callable[[dict[str, Any], Any], dict[str, Any]] = lambda fields, network: fields
    joint: JointMethod | None = None
    layouts: Sequence[Layout] = ()
