"""Draft heads as a backend gets them, and what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from forerun.native.matrix import Packed
from forerun.ranktree import RankTree


@dataclass(frozen=True)
class HeadWeights:
    """One draft head as matrices: `y = through z + silu(first z + first_bias)`, then `y = y +
    silu(W y + b)` for every block, and `logits = vocabulary y + vocabulary_bias`.

    through: None stands for the identity. A tensor that is given more than once is packed once:
    tied blocks, or a vocabulary that heads share. vocabulary may be packed already, such as the
    target's own head.
    """

    first: Tensor  # [D, M]
    first_bias: Tensor | None  # [D]
    through: Tensor | None  # [D, M]
    through_bias: Tensor | None  # [D]
    blocks: tuple[tuple[Tensor, Tensor], ...]  # [D, D] and [D] each
    vocabulary: Tensor | Packed  # [V, D], or of the tokens that are known
    vocabulary_bias: Tensor | None  # [V]


class DraftHeads(Protocol):
    """The module of `count` heads, as it is trained. sees_tokens: heads see the tokens drafted
    before theirs, not only the context. markov: if set, they see of these the one before theirs alone, through two
    tables (drafting/markov.py). known: the tokens that they propose, ascending, None: all.

    `logits` and `head_logits` are the readable arithmetic of all heads and of one (see
    `HeadsModule`); `weights` is the same as plain matrices, for kernels. head: the target's output
    projection, for heads that share it.
    """

    sees_tokens: bool
    markov: Any
    count: int

    @property
    def known(self) -> Tensor | None: ...

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor: ...

    def head_logits(self, index: int, z: Tensor, head_VD: Tensor) -> Tensor: ...

    def weights(self, head_VD: Any) -> list[HeadWeights]: ...


class Drafting(Protocol):
    """Grows a static tree: the tokens of every node of every row, the root first."""

    def draft(self, context_BD: Tensor, roots: Sequence[int], tree: RankTree) -> list[list[int]]: ...
