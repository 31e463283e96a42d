"""The acceptance head of SpecDec++ (arXiv 2405.19715). This is its record, which imports nothing heavy; the head is in
`head.py`, and the rule that it serves in `drafting/stopping.py`."""

from __future__ import annotations

from dataclasses import dataclass

from forerun.drafting.settings import option
from forerun.errors import DrafterError

KIND = "acceptance"
"""What the checkpoint of such a head calls itself."""


@dataclass(frozen=True)
class AcceptanceConfig:
    """width: of the draft model's states. depth: blocks; 0 is a linear classifier. weight: what a rejection counted in
    the loss that the head learnt, beside an acceptance."""

    width: int
    depth: int = option(3, "Blocks of the head; each costs a product per drafted token.", least=0, most=64, shown="3")
    tie_blocks: bool = option(
        False, "One block, repeated, or each its own weights.", flag="--tie-blocks/--own-blocks", shown="own"
    )
    weight: float = option(
        6.0, "How much a rejection counts in the loss.", least=1e-3, flag="--rejection-weight", shown="6"
    )

    def __post_init__(self) -> None:
        """DrafterError for a head that cannot be: made by training or from a file."""
        if type(self.width) is not int or self.width < 1 or type(self.depth) is not int or not 0 <= self.depth <= 64:
            raise DrafterError(
                f"an acceptance head of width {self.width!r} and depth {self.depth!r} makes no sense: give whole"
                " numbers, a width of 1 or more and a depth up to 64"
            )
        if type(self.tie_blocks) is not bool:
            raise DrafterError(f"a head with tie_blocks {self.tie_blocks!r} makes no sense: give true or false")
        if not isinstance(self.weight, int | float) or not 0 < self.weight < float("inf"):
            raise DrafterError(f"a head with the weight {self.weight!r} makes no sense: give a number above 0")
