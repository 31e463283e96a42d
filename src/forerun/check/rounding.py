"""How much rounding alone can move a logit here: measured, not assumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forerun.check.texts import PlainText
from forerun.model import Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree

LENGTH = 64
"""New tokens of each text that are read again."""
TEXTS = 4
WIDTHS = (2, 8, 16)
"""Tokens per forward to try, beside the drafter's own; kernels differ by size."""


def rounding_bound(model: Model, texts: Sequence[PlainText], width: int, rows: int) -> float:
    """The largest logit gap that rounding can turn around, on these texts.

    The same texts are read token by token, as plain decoding does, and in blocks as verification does, alone and side by
    side, each on the cache that it wrote itself. The bound is twice the largest difference of any logit, because the two
    tokens of a tie can be off in opposite directions. `width`: the drafter's largest tree, node 0 included.
    """
    chosen = [text for text in texts[:TEXTS] if len(text.new) > 1]
    if not chosen:
        return 0.0
    length = min(LENGTH, *(len(text.new) for text in chosen))
    plain = [_read(model, [text], length, 1)[0] for text in chosen]
    groups = [[index] for index in range(len(chosen))]
    if rows > 1:
        groups.append(list(range(len(chosen))))
    worst = 0.0
    for block in sorted({*WIDTHS, min(width, length)} - {0, 1}):
        for group in groups:
            read = _read(model, [chosen[index] for index in group], length, block)
            off = [(read[row] - plain[index]).abs().max() for row, index in enumerate(group)]
            worst = max(worst, float(torch.stack(off).max()))
    return 2 * worst


def _read(model: Model, texts: Sequence[PlainText], length: int, width: int) -> Tensor:
    """Logits [B, length, V] after the prompt's last token and the new tokens behind it, `width` tokens per forward."""
    model.scratch = max(model.scratch, width)
    rows = [_row(text) for text in texts]
    for row, text in zip(rows, texts, strict=True):
        slot = model.admit(len(text.prompt) + length)
        while model.prefill(row, slot) is not None:
            pass
    blocks = []
    for start in range(0, length, width):
        count = min(width, length - start)
        tree = _chains([([*text.prompt[-1:], *text.new])[start : start + count] for text in texts], model.device)
        blocks.append(model.score(tree, rows).logits_BNV.float())
        model.keep([list(range(count))] * len(rows))
        for row, text in zip(rows, texts, strict=True):
            row.tokens += text.new[start : start + count]
    while model.cache.rows:
        model.release(model.cache.rows - 1)
    return torch.cat(blocks, 1)


def _row(text: PlainText) -> Row:
    tokens = len(text.prompt)
    return Row(list(text.prompt), tokens, SamplingParams(), key=0, limit=tokens + len(text.new))


def _chains(tokens: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
    return TokenTree.chain(np.asarray(tokens).tolist(), device)
