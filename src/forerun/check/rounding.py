"""How much rounding alone can move a logit here: measured, not assumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forerun.check.texts import ALTERNATIVES, PlainText
from forerun.model import Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree

LENGTH = 64
"""New tokens of each text that are read again."""
TEXTS = 2
WIDTHS = (2, 8, 16)
"""Tokens per forward to try, beside the drafter's own; kernels differ by size."""


def rounding_bound(model: Model, texts: Sequence[PlainText], width: int, rows: int) -> float:
    """The largest gap between two likely tokens' logits that rounding can turn around, on these texts.

    The same texts are read token by token, as plain decoding does, and in blocks as verification
    does, alone and side by side, each on the cache that it wrote itself. The bound is the most by
    which the distance of any likely token from the best one changed. `width`: the drafter's largest
    tree, node 0 included.
    """
    chosen = [text for text in texts[:TEXTS] if len(text.new) > 1]
    if not chosen:
        return 0.0
    length = min(LENGTH, *(len(text.new) for text in chosen))
    plain = [_read(model, [text], length, 1)[0] for text in chosen]
    groups = [[index] for index in range(len(chosen))]
    if rows > 1 and len(chosen) > 1:
        groups.append(list(range(len(chosen))))
    worst = 0.0
    for block in sorted({*WIDTHS, min(width, length)} - {0, 1}):
        for group in groups:
            read = _read(model, [chosen[index] for index in group], length, block)
            worst = max(worst, *(moved(plain[index], read[row]) for row, index in enumerate(group)))
    return worst


def moved(plain_NV: Tensor, other_NV: Tensor) -> float:
    """By how much the gap between the best token and another likely one changed at most."""
    likely = plain_NV.topk(min(ALTERNATIVES, plain_NV.shape[-1]), -1).indices
    left, right = plain_NV.gather(-1, likely), other_NV.gather(-1, likely)
    return float(((left[:, :1] - left) - (right[:, :1] - right)).abs().max())


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
