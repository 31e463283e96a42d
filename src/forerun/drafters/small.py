"""A smaller language model of the same vocabulary drafts: Leviathan et al. 2023, Chen et al. 2023.

It grows any form of tree (`drafting/growth.py`): a chain that a stopping rule ends, the best
continuations, a sampled tree, or the same ranks at every step.

Rows at temperature 0 draft greedily, others sample from the draft model's law under the row's own sampling parameters.
Stopping rules see the draft model's bare probabilities (temperature 1, nothing filtered), whatever the row asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain, Form, ModelExpander, SampledTree, TopTree
from forerun.drafting.method import Method
from forerun.drafting.settings import MOST, setting
from forerun.drafting.stopping import LAST, Fixed, Rule, prepared, rule_of
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.nn.network import Network
from forerun.row import Row
from forerun.tree import TokenTree


class DraftModel(Drafter):
    """A model of its own, which reads what was accepted and forgets the rest, and the form of the trees that it grows.

    Raises DrafterError for a form that reads layers which the model does not have.
    """

    name = "small"

    def __init__(self, model: Model, form: Form):
        layers = model.network.cache_shape.layers
        outside = [layer for layer in form.reads if layer != LAST and not 0 <= layer <= layers]
        if outside:
            raise DrafterError(f"the stopping rule reads layer {outside[0]}, and the draft model has {layers}")
        self.model, self.form = model, form
        self.models = (model,)
        self.max_nodes = form.max_nodes
        self._entries: Sequence[
            Sequence[int]
        ] = []  # per row: where each node of the last tree is in scratch, -1 if unread

    @staticmethod
    def on(network: Network, form: Form) -> DraftModel:
        """With a memory that holds such a tree."""
        return DraftModel(Model(network, form.scratch), form)

    @property
    def bytes_per_token(self) -> float:
        """Weights that are read for one drafted token."""
        return float(self.model.network.footprint.weight_bytes)

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.model.admit(row.limit)

    def release(self, slot: int) -> None:
        self.model.release(slot)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        if self._entries:
            kept = [[entries[n] for n in path[1:]] for entries, path in zip(self._entries, verdict.kept, strict=True)]
            self.model.keep([[entry for entry in row if entry >= 0] for row in kept])
        self._entries = []

    def reset(self) -> None:
        self.model.prefixes.clear()

    def retract(self, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            self.model.truncate(slot, length)

    def propose(self, context: Context) -> TokenTree:
        """Draft where a row has room for it, in its own text and in the draft model's context."""
        self._entries = []  # an interrupted step may have left some
        room = [self.model.max_length - len(row.tokens) for row in context.rows]
        depths = [max(0, min(least)) for least in zip(context.depths, context.budgets, room, strict=True)]
        if not any(depths):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        asked = [depth > 0 for depth in depths]
        grown = self.form.grow(ModelExpander(self.model, context.rows, self.form.reads, asked), context, depths)
        self._entries = grown.entries
        return grown.tree


@dataclass(frozen=True)
class Settings:
    """{"drafter": "small", "checkpoint": PATH, ...} and one of

    "length": N                                          a chain of N tokens (the default, 3)
    "stopping": {"rule": "confidence", "threshold": 0.4} a chain that ends itself
    "stopping": "acceptance:PATH"                        the same by a head that was trained to tell (SpecDec++)
    "tree": {"width": 4, "depth": 5, "nodes": 16}        the best continuations as a tree
    "widths": [3, 2, 1]                                  a sampled tree
    """

    checkpoint: str | None = setting(None, "The draft model, of the target's vocabulary.", "model")
    length: int | None = setting(None, "A chain of so many tokens (without anything else, 3).")
    stopping: str | Mapping[str, Any] | None = setting(None, "A chain that ends itself, by this rule.", "rule")
    tree: Mapping[str, int] | None = setting(None, "The best continuations as a tree: its width, depth and nodes.")
    widths: Sequence[int] | None = setting(None, "A sampled tree: the children of a node, by depth.")

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.length, self.stopping, self.tree, self.widths)) > 1:
            raise DrafterError("small: give only one of length, stopping, tree, widths")
        kinds = {
            "tree": (Mapping, "mapping"),
            "stopping": (str | Mapping, "rule's name, or a mapping"),
            "widths": (list, "list"),
        }
        for name, (kind, sense) in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise DrafterError(f"small: {name} is a {sense}, not {value!r}")
        shape, widths, length = self.shape, self.widths, self.length
        if set(shape) != {"width", "depth", "nodes"} or not _are_counts(shape.values()):
            raise DrafterError(f"small: a tree has width, depth and nodes of at least 1, not {dict(self.tree or {})}")
        if widths is not None and not (widths and _are_counts(widths)):
            raise DrafterError(f"small: widths are numbers of children per level, at least 1, not {list(widths)}")
        if length is not None and not _are_counts([length]):
            raise DrafterError(f"small: a length of {length} drafts nothing; give 1 or more, or use the drafter none")
        _ = self.rule

    @property
    def shape(self) -> dict[str, int]:
        return {"width": 4, "depth": 5, "nodes": 16, **(self.tree or {})}

    @property
    def rule(self) -> Rule:
        return rule_of(self.stopping) if self.stopping is not None else Fixed(self.length or 3)


def build(workshop: Workshop, settings: Settings) -> Drafter:
    network = workshop.network(settings.checkpoint, "small")
    if settings.tree is not None:
        return DraftModel.on(network, TopTree(**settings.shape))
    if settings.widths is not None:
        return DraftModel.on(network, SampledTree(settings.widths))
    return DraftModel.on(network, Chain(prepared(settings.rule, network.output_shape[1], network.device)))


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST for value in values)


METHOD = Method(
    "small",
    "A smaller language model of the same vocabulary.",
    Settings,
    build,
    grows="drawn",
    variations=(
        *({"length": length} for length in (3, 1, 2, 4, 6, 8)),
        *({"stopping": {"rule": "cumulative", "threshold": least, "most": 12}} for least in (0.3, 0.1, 0.5)),
        *({"tree": {"width": 3, "depth": depth, "nodes": nodes}} for depth, nodes in ((3, 4), (4, 8), (5, 16))),
    ),
)
