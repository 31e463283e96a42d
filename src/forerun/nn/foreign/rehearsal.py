"""The rehearsal of a foreign model: through our cache, masks and positions it must say what it says by itself.

Two rows of different lengths are read, a long chain and a short one, and a tree behind each. Every token must get the
logits that it gets in plain forwards without a cache. Windows show only to those who look beyond them: so the chain is
longer than every window that the model has. Where that would take thousands of tokens, a miniature of the model with
shorter windows rehearses in its place, for how windows are handled depends on the code and the config, not on weights.
In half precision rounding hides what a window or a sibling changes, so there a miniature in fp32 rehearses as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forerun.errors import CheckpointError
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.foreign.miniature import miniature, windows_of
from forerun.nn.foreign.network import NOT_CAUSAL, Foreign, refusing
from forerun.sources.folder import brief

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2
"""How far the rehearsal may be off in fp32 and in half precision, as a part of the spread of the
logits: rounding, and the odd expert that a mixture routes elsewhere. An ignored mask or position is
off by about as much as the logits spread."""
AFFORDABLE = 64
"""Tokens: up to this window a model rehearses itself."""
BEYOND, SHORT = 8, 3
"""Tokens: how far the long chain goes beyond the longest window, and the length of the short one."""
PARENTS = (-1, 0, 0, 2)
"""The tree behind each row: its root has the children 1 and 2, and 3 is a child of 2."""
BRANCHES = ((0, 1), (0, 2, 3))


class _DifferenceError(CheckpointError):
    """What it says through our cache is not what it says by itself."""


@torch.inference_mode()
def rehearse(foreign: Foreign, name: str) -> None:
    """CheckpointError unless `foreign` reads chains and trees right. `name` is what the error calls it."""
    windows = windows_of(foreign.model.config, foreign.max_length)
    within_reach = {field: size for field, size in windows.items() if size <= AFFORDABLE}
    is_precise = foreign.dtype == torch.float32
    difference = None
    try:
        _compare(foreign, name, within_reach)
        if is_precise and within_reach == windows:
            return
    except _DifferenceError as error:
        if is_precise:
            raise
        difference = error  # or rounding may have routed a token of a mixture elsewhere: its copy in fp32 will tell
    try:
        copy = _copy(foreign, name, windows)
    except CheckpointError:
        if windows or difference:
            raise
        return  # it has no windows, and said the same as far as its own number format can show
    _compare(copy, name, windows)


def _copy(foreign: Foreign, name: str, windows: dict[str, int]) -> Foreign:
    """A miniature that reaches beyond all windows in few tokens."""
    what = f"cannot be tried out{_beyond(windows)} on a small copy"
    try:
        copy = Foreign(miniature(foreign.model.config, windows), name)
    except Exception as error:  # any line of any model's own code
        raise CheckpointError(f"{name} {what} ({brief(error)}): choose another model") from error
    shortened = windows_of(copy.model.config, copy.max_length)
    if shortened.keys() != windows.keys() or any(size > AFFORDABLE for size in shortened.values()):
        raise CheckpointError(f"{name} {what} (it cannot be shortened): choose another model")
    return copy


def _compare(foreign: Foreign, name: str, windows: dict[str, int]) -> None:
    """windows: those to look beyond, as errors name them; in a miniature they are shorter."""
    own = windows_of(foreign.model.config, foreign.max_length)
    longest, room = max((own[field] for field in windows), default=0), foreign.max_length - len(PARENTS)
    rows = [_text(foreign, min(longest + BEYOND, room), 3), _text(foreign, min(SHORT, room), 5)]
    trees = [_text(foreign, len(PARENTS), 11), _text(foreign, len(PARENTS), 13)]
    with refusing(name, "cannot read a tree"):
        ours = _through_cache(foreign, rows, trees)
        for text, tree, said in zip(rows, trees, ours, strict=True):
            plain = [_plain(foreign, text + [tree[node] for node in path]) for path in BRANCHES]
            _demand_causal(foreign, name, *(logits[: len(text) + 1] for logits in plain))
            for path, logits in zip(BRANCHES, plain, strict=True):
                places = [*range(len(text)), *(len(text) + node for node in path)]
                _demand_same(foreign, name, said[places], logits, windows)


def _demand_causal(foreign: Foreign, name: str, one_NV: Tensor, other_NV: Tensor) -> None:
    """What was said by itself about one text in front of two ends."""
    if one_NV.isnan().any():
        raise CheckpointError(f"{name} gives no numbers in {foreign.dtype}: choose another dtype or model")
    if _first_difference(foreign, one_NV, other_NV) is not None:
        raise CheckpointError(f"{name} {NOT_CAUSAL}")


def _demand_same(foreign: Foreign, name: str, ours_NV: Tensor, plain_NV: Tensor, windows: dict[str, int]) -> None:
    first = _first_difference(foreign, ours_NV, plain_NV)
    if first is not None:
        raise _DifferenceError(
            f"{name} does not honour given masks and positions{_beyond(windows)}, from token {first} on: "
            "choose another model"
        )


def _first_difference(foreign: Foreign, logits_NV: Tensor, plain_NV: Tensor) -> int | None:
    """The first token, counted from 1, about which more than rounding differs."""
    share = TOLERANCE if foreign.dtype == torch.float32 else HALF_TOLERANCE
    logits_NV, plain_NV = logits_NV.float(), plain_NV.float()
    allowed_N = share * (plain_NV.amax(1) - plain_NV.amin(1))
    differs_N = ~((logits_NV - plain_NV).abs().amax(1) <= allowed_N)  # True for NaN
    return int(differs_N.nonzero()[0, 0]) + 1 if bool(differs_N.any()) else None


def _beyond(windows: dict[str, int]) -> str:
    return f" beyond its {_listed(windows)}" if windows else ""


def _listed(windows: dict[str, int]) -> str:
    return " and its ".join(f"{field} of {size}" for field, size in windows.items())


def _text(foreign: Foreign, count: int, step: int) -> list[int]:
    return [(step * place * place + 7 * place + step) % foreign.vocab_size for place in range(count)]


def _plain(foreign: Foreign, tokens: Sequence[int]) -> Tensor:
    """What the model says by itself after each token of a text: [N, V]."""
    ids = torch.tensor([tokens], device=foreign.device)
    logits: Tensor = foreign.model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
    return logits


def _through_cache(foreign: Foreign, rows: Sequence[Sequence[int]], trees: Sequence[Sequence[int]]) -> list[Tensor]:
    """What it says through our cache and masks, the rows first, then the trees: [N, V] for each row."""
    cache = Cache(foreign.cache_shape, foreign.dtype, foreign.device)
    lengths, longest = [len(row) for row in rows], max(map(len, rows))
    cache.reserve(len(rows), longest + len(PARENTS))
    for _ in rows:
        cache.admit()
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    chain = [[*range(place + 1), *[-1] * (longest - place - 1)] for place in range(longest)]
    texts = foreign.forward(_feed(foreign, padded, [0, 0], chain), cache).logits_BNV
    for slot, length in enumerate(lengths):
        cache.keep(slot, list(range(length)))
    ends = foreign.forward(_feed(foreign, trees, lengths, _paths(PARENTS)), cache).logits_BNV
    return [torch.cat([text[:length], end]) for text, end, length in zip(texts, ends, lengths, strict=True)]


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """The path to every node, from the root to itself, padded with -1."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    longest = max(map(len, paths))
    return [[*path, *[-1] * (longest - len(path))] for path in paths]


def _feed(foreign: Foreign, tokens: Sequence[Sequence[int]], lengths: list[int], paths: list[list[int]]) -> Feed:
    """The same paths for every row."""
    paths_BNJ = np.broadcast_to(np.asarray(paths, np.int32), (len(tokens), len(paths), len(paths[0])))
    depths_BN = (paths_BNJ >= 0).sum(2) - 1
    return Feed(
        tokens_BN=torch.tensor(tokens, device=foreign.device),
        lengths_B=np.asarray(lengths),
        where_BN=np.asarray(lengths)[:, None] + depths_BN,
        paths_BNJ=paths_BNJ,
        dtype=foreign.dtype,
    )
