"""What a greedy draft model would have saved, found out from recorded answers: the target is not run.

A draft that follows the target's greedy answer stands behind the answer's own tokens, and what comes behind its first
mistake is thrown away. So one reading of the answer tells all: at each place, whether the model would have said the
token that came. An iteration drafts K tokens, keeps those in front of the first mistake, and adds the target's own next
one, as the engine does ("Decoding Speculative Decoding", whose demo drafts every time anew and comes to the same).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]
"""Of one answer, [A]: whether the model's best token, the answer read so far, is the one that came."""


def emitted(hits: Hits, length: int, guard: bool = False) -> list[int]:
    """Tokens that each iteration settles when drafts have `length` tokens, to the end of the answer.

    guard: stop where fewer than length + 2 tokens are left, as the paper's code does, so that no iteration is cut off
    by the end.
    """
    misses = [*np.flatnonzero(~np.asarray(hits, np.bool_)).tolist(), len(hits)]
    found, place, next_miss = list[int](), 0, 0
    last = len(hits) - length - 2 if guard else len(hits) - 1
    while place <= last:
        while misses[next_miss] < place:
            next_miss += 1
        run = min(misses[next_miss] - place, length)
        found.append(min(run + 1, len(hits) - place))
        place += found[-1]
    return found


def tokens_per_step(answers: Sequence[Hits], length: int) -> float:
    """The mean over all iterations of all answers: accepted tokens and one more. 1 without any."""
    each = [emitted(hits, length) for hits in answers]
    steps = sum(map(len, each))
    return sum(map(sum, each)) / steps if steps else 1.0
