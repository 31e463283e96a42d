"""What a drafting method is, as data: its one entry, from which everybody else learns what there is to know about it.

    METHOD = Method("lookup", "What followed the last tokens earlier in the text.", Settings, build, grows="certain")

Every module and package in `forerun/drafters/` has one. Nothing here needs torch, and the entry of
a method that is trained must not either: the command line reads it to say which options there are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from forerun.drafting.settings import Kind
from forerun.drafting.trained import Trained
from forerun.errors import DrafterError

if TYPE_CHECKING:
    from forerun.drafting.drafter import Drafter

Grows = Literal["nothing", "certain", "ranks", "drawn"]


@dataclass(frozen=True)
class Method:
    """A way of drafting.

    name: that of its module. sense: one line. settings: a frozen dataclass, the checked record of
    what a description may set, its fields made with `setting`; it raises DrafterError for what
    makes no sense. build: from (Workshop, settings) to the drafter. grows: the kind of tree:
    "nothing"; "certain" (no luck is involved, so a seed's text is that of plain decoding); "ranks"
    (certain, and a static tree of ranks, which can be calibrated); "drawn" (groups may be drawn,
    with their law). trained: about heads that are trained on a target, None for others. example:
    settings of a small one, where a model is called MODEL and a store of tokens STORE: for tests,
    where the kinds of the settings do not say enough. variations: settings that are worth trying, the
    most usual first, for a planner, where a description says nothing of any of them.
    """

    name: str
    sense: str
    settings: type[Any]
    build: Callable[[Any, Any], Drafter]
    grows: Grows
    trained: Trained | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    variations: tuple[Mapping[str, Any], ...] = ()

    @property
    def kinds(self) -> dict[str, Kind | None]:
        """What every setting names, None for those that name nothing outside the description."""
        return {one.name: one.metadata.get("kind") for one in fields(self.settings)}

    def varied(self, description: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A description of this method in its variations, or as it is where it settles one itself."""
        settled = {name for each in self.variations for name in each} & description.keys()
        if settled or not self.variations:
            return [dict(description)]
        return [{**description, **each} for each in self.variations]

    def checked(self, given: Mapping[str, Any]) -> Any:
        """The settings as their record; DrafterError for one that there is not, or that makes no sense."""
        for key in given:
            if key not in self.kinds:
                takes = f"it takes {', '.join(self.kinds)}" if self.kinds else "it takes no settings"
                raise DrafterError(f"the drafter {self.name} has no setting {key!r}: {takes}")
        return self.settings(**given)


def later(reference: str) -> Callable[..., Any]:
    """The function or class behind "module:name", imported when it is first called."""
    module, _, name = reference.partition(":")

    def call(*values: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*values)

    return call
