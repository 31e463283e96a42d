"""Answers that loop: the target says the same words again and again until its tokens are used up.

Small models do so often at temperature 0. Heads that learn from such answers become good at what
nobody wants to read, and every figure that is measured on them flatters whoever copies.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 64
"""Tokens of an n-gram that is looked for."""
COPIES = 3
"""So often in a row it must stand at the end."""
LEAST = 32
"""Tokens that all copies have together: a short run of blanks is no loop."""


def loops(answer: Sequence[int]) -> bool:
    """Whether an answer that ran into its length limit ends with the same n-gram again and again:
    up to 64 tokens long, three times or more, 32 tokens or more in all. The last copy may be cut."""
    return any(_has_period(answer, period) for period in range(1, LONGEST + 1))


def _has_period(answer: Sequence[int], period: int) -> bool:
    span = max(LEAST, COPIES * period)
    if span > len(answer):
        return False
    tail = answer[-span:]
    return tail[period:] == tail[:-period]


def allowed(others: int, share: float) -> int:
    """How many looping answers may stand beside so many others, for `share` of them all to loop at most."""
    return int(share * others / (1 - share) + 1e-9)
