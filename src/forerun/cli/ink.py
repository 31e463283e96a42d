"""One colour for everyone who thinks of tokens, the same on a terminal and in a picture."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

PAPERS = ("#b5e3a8", "#a8d1f5", "#ffd487", "#d6c1f5", "#f7b9c4", "#9fe0d6")
"""Backgrounds, because half of what is drafted is blanks and line ends. Dark text is legible on each."""
OWN = "the target itself"
SENSES = {"context": "this text", "model": "earlier answers", "corpus": "a corpus"}
"""What the names of stores mean to one who does not know them."""


class Ink:
    """Hands out colours in the order in which names are met; a name keeps its own. The target's words have none."""

    def __init__(self, names: Iterable[str] = ()):
        self._places: dict[str, int] = {}
        for name in names:
            self.paper(name)

    def paper(self, origin: str) -> str:
        """The background as #rrggbb; empty for the target's own words."""
        if not origin:
            return ""
        return PAPERS[self._places.setdefault(origin, len(self._places)) % len(PAPERS)]

    def style(self, origin: str) -> str:
        """The same as rich writes it."""
        return f"black on {self.paper(origin)}" if origin else ""

    def legend(self) -> list[tuple[str, str]]:
        """Everyone met so far: what to call them, and their colour."""
        return [(label(name), self.paper(name)) for name in self._places]

    def legend_text(self) -> Text:
        """One line for a terminal."""
        chips = [(f" {label} ", f"black on {paper}") for label, paper in self.legend()]
        return Text("  ").join([Text(OWN), *(Text(*chip) for chip in chips)])


def label(name: str) -> str:
    """What to call who thought of a token."""
    return f"{name} ({SENSES[name]})" if name in SENSES else name or OWN
