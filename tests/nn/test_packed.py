"""Whole forwards on native kernels: close to the torch transformer, and the same bits however a text is read.

"The same" is exact here: logits, hidden states and cache entries of a token do not change with the tokens and rows read
beside it, the tree or slot it stands in, the number of threads, or what was computed before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import forerun
from forerun.bench.suites import load as load_suite
from forerun.native import library
from forerun.nn import ops
from forerun.nn.backends.native.transformer import PackedTransformer, pack
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.formats import Formats
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from nn.feeding import Tree, some_tokens, some_tree
from nn.kernel_oracles import BF16, CPU, FP32, INT8, REASON, guarded, instructions, quantised, same, threads
from test_reference import GREEDY, MODELS, ROWS, SMALL

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ODD = TransformerConfig(
    vocab_size=61, width=40, layers=3, heads=4, kv_heads=2, head_dim=10, mlp_width=70, max_length=1024
)
CONFIGS = {
    "odd sizes": ODD,
    "everything": replace(
        ODD, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, windows=(None, 7, 20), tied=True, rope_scale=1.2
    ),
    "even sizes": replace(
        ODD, vocab_size=128, width=64, heads=8, kv_heads=1, head_dim=16, mlp_width=160, norm_eps=1e-5
    ),
    "wide heads": replace(ODD, layers=2, heads=3, kv_heads=3, head_dim=80, windows=(257, None), tied=True),
}
KINDS = [(BF16, BF16), (FP32, FP32), (BF16, INT8), (FP32, INT8)]
MIXED = Formats(INT8, {"head": BF16, "out": BF16, "1.out": INT8, "1.down": FP32, "2.qkv": FP32, "0.gate_up": BF16})
NAN = float("nan")


def some_transformer(config: TransformerConfig, dtype: torch.dtype = FP32) -> Transformer:
    """Random weights that keep the residual stream, the scores and the logits at a size that matters."""
    model, generator = Transformer(config), torch.Generator().manual_seed(config.width)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 1.2 * weight.shape[-1] ** -0.5 if weight.dim() == 2 else weight + noise * 0.2)
        model.embedding.weight.mul_(4)
    return model.to(dtype).requires_grad_(False)


def id_of(value: Any) -> str:
    return value if isinstance(value, str) else " in ".join(str(dtype).removeprefix("torch.") for dtype in value[::-1])


@pytest.fixture(
    scope="module",
    params=[(name, kind) for name in CONFIGS for kind in KINDS]
    + [("odd sizes", (BF16, MIXED)), ("everything", (FP32, MIXED))],
    ids=lambda p: f"{p[0]}: {id_of(p[1])}",
)
def network(request: pytest.FixtureRequest) -> PackedTransformer:
    name, (dtype, weights) = request.param
    return pack(some_transformer(CONFIGS[name], dtype), weights)


# ---- reading by hand


class Reader:
    """A network and a cache full of NaN."""

    def __init__(self, network: Network, rows: int = 1, capacity: int = 128):
        self.network = network
        self.cache = Cache(network.cache_shape, network.dtype, CPU)
        self.cache.reserve(rows, capacity)
        self.cache.store.fill_(NAN if isinstance(network, PackedTransformer) else 0)  # torch multiplies NaN by zero
        for _ in range(rows):
            self.cache.admit()

    def read(self, parts: Sequence[Sequence[int]], start: int = 0, last: bool = False) -> Read:
        """Commit one piece of text per row."""
        read = self.score(parts, start=start, last=last)
        for row, part in enumerate(parts):
            self.cache.keep(start + row, list(range(len(part))))
        return read

    @torch.inference_mode()
    def score(
        self,
        parts: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]] | None = None,
        held: int = 0,
        start: int = 0,
        last: bool = False,
    ) -> Read:
        """Read uncommitted tokens, all hidden states included. parents: scratch entries, -1 for the
        root; None: chains."""
        rows, counts = len(parts), np.asarray([len(part) for part in parts])
        count = int(counts.max())
        lengths = np.asarray(self.cache.lengths[start : start + rows])
        paths, depths = None, np.broadcast_to(held + np.arange(count), (rows, count))
        if parents is not None:
            paths = np.asarray([paths_of(row, held, held + count) for row in parents], np.int32)
            depths = (paths >= 0).sum(2) - 1
        feed = Feed(
            tokens_BN=torch.tensor([[*part, *[0] * (count - len(part))] for part in parts]),
            lengths_B=lengths,
            where_BN=lengths[:, None] + depths,
            start=start,
            held=held,
            paths_BNJ=paths,
            counts_B=counts,
            last_B=counts - 1 if last else None,
            dtype=self.network.dtype,
        )
        return self.network.forward(feed, self.cache, range(self.network.cache_shape.layers + 1))

    def entries(self, slot: int) -> Tensor:
        """[length, layers, 2, kv_heads, head_dim]."""
        return self.cache.entries(slot).permute(2, 0, 1, 3, 4)


def paths_of(parents: Sequence[int], held: int, scratch: int) -> list[list[int]]:
    """Which of the scratch entries the tokens behind the held ones see, padded. The held entries are a chain."""
    paths: list[list[int]] = []
    for entry, parent in enumerate([*range(-1, held - 1), *parents, *[-1] * (scratch - held - len(parents))]):
        paths.append([*(paths[parent] if parent >= 0 else ()), entry])
    return [path + [-1] * (scratch - len(path)) for path in paths[held:]]


@dataclass(frozen=True)
class Said:
    """What a network says of one text, a line per token: logits, the best token, hidden states, and
    what it remembers."""

    lines: list[Tensor]

    @staticmethod
    def of(read: Read, row: int, entries: Tensor) -> Said:
        assert read.best_BN is not None
        hidden = [read.hidden[layer][row] for layer in sorted(read.hidden)]
        lines = [read.logits_BNV[row], read.best_BN[row], *hidden, entries]
        return Said([tensor[: len(entries)] for tensor in lines])

    def at(self, tokens: slice | list[int]) -> Said:
        return Said([tensor[tokens] for tensor in self.lines])

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Said)
        return all(same(mine, theirs) for mine, theirs in zip(self.lines, other.lines, strict=True))


def by_token(network: Network, text: Sequence[int], after: int = 0) -> Said:
    """Token by token on one thread: what every other way of reading is held against. From token `after` on."""
    reader = Reader(network, capacity=len(text))
    if after:
        reader.read([text[:after]])
    said = []
    for token in text[after:]:
        read = reader.read([[token]])
        said.append(Said.of(read, 0, reader.entries(0)[-1:]))
    return Said([torch.cat(parts) for parts in zip(*(one.lines for one in said), strict=True)])


def said_by(reader: Reader, read: Read, slot: int, count: int, start: int = 0) -> Said:
    """Of the last `count` committed tokens of a slot, which `read` has just read."""
    return Said.of(read, slot - start, reader.entries(slot)[-count:])


# ---- the same bits


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_text_read_in_any_pieces_is_the_same(network: PackedTransformer, count: int) -> None:
    text = some_tokens(140, seed=1)
    expected = by_token(network, text)
    for cuts in ((0, 140), (0, 1, 3, 8, 24, 87, 88, 140), (0, 15, 16, 17, 49, 97, 138, 140)):
        reader = Reader(network, capacity=140)
        for begin, end in pairwise(cuts):
            with threads(count):
                read = reader.read([text[begin:end]])
            assert said_by(reader, read, 0, end - begin) == expected.at(slice(begin, end))


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_threads_that_come_late_change_nothing(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """More threads than cores, many times: some of them find that the others have gone on without them."""
    network, text = pack(some_transformer(ODD, kind[0]), kind[1]), some_tokens(530, seed=2)
    reader = Reader(network, capacity=560)
    reader.read([text])
    for part in ([5], [5, 6, 7], some_tokens(20, seed=3)):
        expected = reader.score([part])
        assert expected.best_BN is not None
        with threads((os.cpu_count() or 1) + 2):
            for _ in range(50):
                read = reader.score([part])
                assert same(read.logits_BNV, expected.logits_BNV)
                assert read.best_BN is not None and read.best_BN.tolist() == expected.best_BN.tolist()
                assert all(same(read.hidden[layer], expected.hidden[layer]) for layer in read.hidden)


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_every_instruction_set_keeps_the_promise(kind: tuple[torch.dtype, torch.dtype], isa: str) -> None:
    network, tree = pack(some_transformer(CONFIGS["everything"], kind[0]), kind[1]), some_tree(20, seed=1)
    text, path = some_tokens(37, seed=1), max((tree.path(node) for node in range(20)), key=len)
    with instructions(isa) as there:
        if not there:
            pytest.skip(f"this processor has no {isa}")
        expected = by_token(network, text + tree.text(path[-1]))
        reader = Reader(network)
        assert said_by(reader, reader.read([text]), 0, 37) == expected.at(slice(0, 37))
        read = reader.score([tree.tokens], [tree.parents])
        reader.cache.keep(0, path)
        assert Said.of(one_row(read, 0, path), 0, reader.entries(0)[37:]) == expected.at(slice(37, None))


@pytest.mark.parametrize(
    "config", [ODD, replace(ODD, heads=3, kv_heads=1, windows=(None, 300, 530))], ids=["pairs", "one head"]
)
@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_a_long_text_is_the_same_on_any_number_of_threads(
    kind: tuple[torch.dtype, torch.dtype], config: TransformerConfig
) -> None:
    """Long enough for a few heads to be shared out among the threads."""
    network, text = pack(some_transformer(config, kind[0]), kind[1]), some_tokens(800, seed=2)
    expected = by_token(network, text)
    for count, cuts in ((1, (0, 255, 800)), (3, (0, 500, 511, 512, 513, 521, 770, 771, 773, 800)), (2, (0, 799, 800))):
        reader = Reader(network, capacity=800)
        for begin, end in pairwise(cuts):
            with threads(count):
                read = reader.read([text[begin:end]])
            assert said_by(reader, read, 0, end - begin) == expected.at(slice(begin, end))


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_is_the_same_in_any_company(network: PackedTransformer, count: int) -> None:
    """Eight rows of different lengths, read together in ragged pieces, then some of them in the middle of the slots."""
    texts = [some_tokens(26 + 3 * row, seed=row) for row in range(8)]
    expected = [by_token(network, text) for text in texts]
    first, reader = [5, 1, 17, 12, 3, 16, 2, 9], Reader(network, rows=8)
    with threads(count):
        read = reader.read([text[:end] for text, end in zip(texts, first, strict=True)])
    for slot, end in enumerate(first):
        assert said_by(reader, read, slot, end) == expected[slot].at(slice(0, end))
    for start, rows, more in ((2, 3, (4, 1, 20)), (0, 8, (1,) * 8), (7, 1, (8,)), (0, 2, (3, 8))):
        begins = reader.cache.lengths[start : start + rows]
        with threads(count):
            read = reader.read(
                [texts[start + row][begins[row] : begins[row] + more[row]] for row in range(rows)], start
            )
        for row, begin in enumerate(begins):
            said = said_by(reader, read, start + row, more[row], start)
            assert said == expected[start + row].at(slice(begin, begin + more[row]))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_path_of_a_tree_is_the_same_as_plain_text(network: PackedTransformer, rows: int) -> None:
    """Every node; and after `keep` the cache remembers what it would have read plainly."""
    trees = [some_tree(size, seed=size) for size in (14, 1, 9, 20, 5, 12, 16, 3)[:rows]]
    texts = [some_tokens(length, seed=length) for length in (13, 2, 30, 1, 16, 40, 9, 8)[:rows]]
    reader = Reader(network, rows)
    reader.read(texts)
    for row, tree in enumerate(trees):
        for node in range(len(tree.tokens)):
            read = reader.score([tree.tokens for tree in trees], [tree.parents for tree in trees])
            path, before = tree.path(node), reader.cache.store.clone()
            reader.cache.keep(row, path)
            expected = by_token(network, texts[row] + tree.text(node), len(texts[row]))
            assert Said.of(one_row(read, row, path), 0, reader.entries(row)[-len(path) :]) == expected
            reader.cache.truncate(row, len(texts[row]))
            reader.cache.store.copy_(before)


def one_row(read: Read, row: int, nodes: list[int]) -> Read:
    assert read.best_BN is not None
    hidden = {layer: states[row : row + 1, nodes] for layer, states in read.hidden.items()}
    return Read(read.logits_BNV[row : row + 1, nodes], hidden, read.best_BN[row : row + 1, nodes])


def test_a_node_is_the_same_in_another_tree_at_other_entries(network: PackedTransformer) -> None:
    text = some_tokens(14, seed=3)
    path = some_tokens(4, seed=4)
    trees = [
        (Tree(path, [-1, 0, 1, 2]), [0, 1, 2, 3]),
        (Tree([7, path[0], 8, path[1], path[2], 9, 9, path[3]], [-1, -1, 1, 1, 3, 4, 0, 4]), [1, 3, 4, 7]),
        (Tree([path[0], 5, 6, 7, path[1], path[2], 8, path[3]], [-1, 0, 0, 1, 0, 4, 5, 5]), [0, 4, 5, 7]),
    ]
    said = []
    for tree, nodes in trees:
        reader = Reader(network)
        reader.read([text])
        read = reader.score([tree.tokens], [tree.parents])
        reader.cache.keep(0, nodes)
        said.append(Said.of(one_row(read, 0, nodes), 0, reader.entries(0)[-4:]))
    assert said[0] == said[1] == said[2] == by_token(network, text + path, 14)


def test_a_tree_grown_in_pieces_is_the_same(network: PackedTransformer) -> None:
    """As a drafter grows one: the earlier nodes are held in scratch."""
    text, tree = some_tokens(15, seed=3), Tree(some_tokens(9, seed=9), [-1, 0, 1, 0, 1, 2, 3, 5, 5])
    reader = Reader(network)
    reader.read([text])
    reader.score([tree.tokens[:3]])
    read = reader.score([tree.tokens[3:]], [tree.parents[3:]], held=3)
    for node in range(3, 9):
        expected = by_token(network, text + tree.text(node), len(text) + len(tree.path(node)) - 1)
        entry = reader.cache.store[:, :, 0, len(text) + node][None]
        assert Said.of(one_row(read, 0, [node - 3]), 0, entry) == expected


def test_a_chain_grown_in_pieces_is_the_same(network: PackedTransformer) -> None:
    text, chain = some_tokens(15, seed=3), some_tokens(6, seed=9)
    reader = Reader(network)
    reader.read([text])
    expected = by_token(network, text + chain, len(text))
    for begin, end in ((0, 1), (1, 3), (3, 6)):
        read = reader.score([chain[begin:end]], held=begin)
        entries = reader.cache.store[:, :, 0, len(text) + begin : len(text) + end].permute(2, 0, 1, 3, 4)
        assert Said.of(read, 0, entries) == expected.at(slice(begin, end))


@pytest.mark.parametrize("count", [1, 3])
def test_only_the_last_token_may_be_scored(network: PackedTransformer, count: int) -> None:
    texts = [some_tokens(length, seed=length) for length in (5, 1, 19)]
    everything = Reader(network, 3).read(texts)
    with threads(count):
        last = Reader(network, 3).read(texts, last=True)
    assert last.best_BN is not None and everything.best_BN is not None
    for row, text in enumerate(texts):
        assert same(last.logits_BNV[row, 0], everything.logits_BNV[row, len(text) - 1])
        assert last.best_BN[row, 0] == everything.best_BN[row, len(text) - 1]
    assert all(same(last.hidden[layer], everything.hidden[layer]) for layer in everything.hidden)


def test_what_was_computed_before_leaves_no_trace(network: PackedTransformer) -> None:
    """The kernels keep their scratch memory: here a larger model has left NaN all over it."""
    texts = [some_tokens(9, seed=1), some_tokens(4, seed=2)]
    reader = Reader(network, 2)
    clean = reader.read(texts)
    spoil(network)
    dirty = Reader(network, 2)
    again = dirty.read(texts)
    for slot, text in enumerate(texts):
        assert said_by(dirty, again, slot, len(text)) == said_by(reader, clean, slot, len(text))


def spoil(network: PackedTransformer) -> None:
    larger = some_transformer(replace(ODD, width=200, heads=8, kv_heads=4, head_dim=64, mlp_width=300, vocab_size=200))
    for weight in larger.parameters():
        weight.fill_(NAN)
    for weights in (network.weights, network.dtype):
        Reader(pack(larger.to(network.dtype), weights), 2).read([[1] * 30, [2] * 30])


# ---- what is not a number


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_a_bad_token_spoils_only_what_follows_it(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """The padding is bad as well: token 0."""
    model = some_transformer(ODD, kind[0])
    texts = [[5, 6, 7, 8, 9, 10], [5, 6, 3, 8, 9, 10, 11], [4, 1]]
    clean = Reader(pack(model, kind[1]), 3).read(texts)
    model.embedding.weight[[0, 3]] = NAN
    reader = Reader(pack(model, kind[1]), 3)
    read = reader.read(texts)
    good = [(0, 6), (1, 2), (2, 2)]
    for row, count in good:
        for mine, theirs in (
            (read.logits_BNV, clean.logits_BNV),
            *((read.hidden[i], clean.hidden[i]) for i in range(4)),
        ):
            assert same(mine[row, :count], theirs[row, :count])
    assert read.best_BN is not None
    assert read.logits_BNV[1, 2:].isnan().all() and (read.best_BN[1, 2:] == 0).all()
    tree = Tree([12, 3, 13, 14, 15], [-1, 0, 0, 1, 2])
    read = reader.score([tree.tokens] * 3, [tree.parents] * 3)
    assert read.logits_BNV[[0, 2]].isnan().all(-1).tolist() == [[False, True, False, True, False]] * 2
    assert read.logits_BNV[[0, 2]].isnan().any(-1).tolist() == [[False, True, False, True, False]] * 2


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_best_token_is_that_of_argmax(dtype: torch.dtype, count: int) -> None:
    """The first of equals; a NaN beats everything, the first NaN other NaN; infinities and nothing but zeros."""
    model = some_transformer(replace(ODD, vocab_size=150), dtype)
    head, text = model.head.weight, some_tokens(12, seed=1)
    rows = {token: head[token].clone() for token in range(150)}
    for change in (
        {},
        dict.fromkeys((20, 33, 64, 149), rows[140]),
        dict.fromkeys((40, 41, 99), rows[3] * 9),
        dict.fromkeys(range(150), rows[0] * 0),
        {149: rows[0] * NAN},
        {130: rows[0] * NAN, 70: rows[0] * NAN, 17: rows[0] * NAN},
        {token: torch.full_like(rows[0], float("-inf")) for token in range(150)},
        {token: rows[0] * float("inf") for token in (60, 100)},
        {token: torch.nextafter(rows[0] * 0, rows[0]) for token in (31, 32)},
    ):
        for token in range(150):
            head[token] = change.get(token, rows[token])
        with threads(count):
            read = Reader(pack(model)).read([text])
        assert read.best_BN is not None
        assert torch.equal(read.best_BN, read.logits_BNV.argmax(-1))


@pytest.mark.parametrize("kind", KINDS[:2], ids=id_of)
def test_a_bad_weight_of_the_head_spoils_one_logit(kind: tuple[torch.dtype, torch.dtype]) -> None:
    model, text = some_transformer(ODD, kind[0]), some_tokens(12, seed=1)
    clean = Reader(pack(model, kind[1])).read([text]).logits_BNV
    model.head.weight[60, 3] = NAN
    read = Reader(pack(model, kind[1])).read([text])
    assert read.best_BN is not None
    assert read.logits_BNV[..., 60].isnan().all() and (read.best_BN == 60).all()
    assert same(read.logits_BNV[..., :60], clean[..., :60])


# ---- memory


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_results_fill_their_memory_and_nothing_beside_it(
    network: PackedTransformer, count: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(network, 4, capacity=24)
    reader.cache.store.copy_(torch.randn(reader.cache.store.shape))
    texts = [some_tokens(length, seed=length) for length in (5, 9, 2, 4)]
    reader.read(texts[:3], start=1)
    before = reader.cache.store.clone()
    with threads(count), guarded(monkeypatch) as made:
        read = reader.score([[9, 8, 7], [6], [5, 4]], start=1, last=last)
    assert len(made) >= 3 + network.config.layers
    for memory in made:
        memory.check()
    for row, tokens in enumerate((3, 1, 2)):
        begin = reader.cache.lengths[1 + row]
        written = reader.cache.store[:, :, 1 + row, begin : begin + tokens]
        assert (written != before[:, :, 1 + row, begin : begin + tokens]).float().mean() > 0.9
        before[:, :, 1 + row, begin : begin + tokens] = written
        padding = [states[row, tokens:] for states in read.hidden.values()]
        padding += [] if last else [read.logits_BNV[row, tokens:]]
        assert all((one == 0).all() for one in padding)
    assert same(reader.cache.store, before)


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_without_tokens_is_all_padding(network: PackedTransformer, count: int) -> None:
    texts = [some_tokens(5, seed=1), [], some_tokens(3, seed=2)]
    with threads(count):
        reader = Reader(network, 3)
        read = reader.read(texts)
    assert read.best_BN is not None and (read.best_BN[1] == 0).all() and (read.logits_BNV[1] == 0).all()
    for slot in (0, 2):
        assert said_by(reader, read, slot, len(texts[slot])) == by_token(network, texts[slot])


# ---- close to torch


def both(reader: Reader, texts: Sequence[Sequence[int]], trees: Sequence[Tree]) -> list[Read]:
    """A ragged batch, committed, and trees behind it; two reads without their padding."""
    first = reader.read(texts)
    then = reader.score([tree.tokens for tree in trees], [tree.parents for tree in trees])
    return [
        *(one_row(with_best(first), row, list(range(len(text)))) for row, text in enumerate(texts)),
        *(one_row(with_best(then), row, list(range(len(tree.tokens)))) for row, tree in enumerate(trees)),
    ]


def with_best(read: Read) -> Read:
    return replace(read, best_BN=read.logits_BNV.argmax(-1)) if read.best_BN is None else read


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_is_what_torch_says(name: str, isa: str) -> None:
    model = some_transformer(CONFIGS[name])
    texts, trees = [some_tokens(length, seed=length) for length in (40, 7)], [some_tree(9, 1), some_tree(6, 2)]
    theirs = both(Reader(model, 2), texts, trees)
    with instructions(isa) as there:
        if not there:
            pytest.skip(f"this processor has no {isa}")
        ours = both(Reader(pack(model), 2), texts, trees)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.logits_BNV, yours.logits_BNV, atol=1e-4, rtol=1e-4)
        assert mine.hidden.keys() == yours.hidden.keys()
        for layer in mine.hidden:
            torch.testing.assert_close(mine.hidden[layer], yours.hidden[layer], atol=1e-4, rtol=1e-4)
        assert mine.best_BN is not None and torch.equal(mine.best_BN, mine.logits_BNV.argmax(-1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weights", [BF16, INT8], ids=str)
def test_rounded_weights_and_inputs_stay_close(name: str, weights: torch.dtype) -> None:
    model, text = some_transformer(CONFIGS[name], BF16), some_tokens(60, seed=1)
    exact = Reader(some_transformer(CONFIGS[name], BF16).float()).read([text]).logits_BNV
    theirs = Reader(model).read([text]).logits_BNV.float()
    ours = Reader(pack(model, weights)).read([text]).logits_BNV
    allowed = 1.05 if weights == BF16 else 5
    assert (ours - exact).abs().mean() < allowed * (theirs - exact).abs().mean()


def rounded(x: Tensor, weights: torch.dtype) -> Tensor:
    """Inputs as a product with such weights sees them."""
    return quantised(x).float() if weights == INT8 else x.to(weights).float()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_in_a_format_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against products in torch, with the matrices and the inputs rounded as the record says.

    One of several texts must agree: where an input lies between two bytes, sums in another order may
    round it to the other one, and all that follows differs.
    """
    oracle, texts = some_transformer(CONFIGS[name], FP32), [some_tokens(30, seed) for seed in range(5)]
    exact = [Reader(oracle).read([text]).logits_BNV for text in texts]
    network = pack(oracle, MIXED)
    if oracle.config.tied:
        oracle.head.weight = torch.nn.Parameter(oracle.head.weight.clone(), requires_grad=False)
    kinds = {}
    for index, layer in enumerate(network.layers):
        for matrix, packed in layer.items():
            weight = oracle.get_submodule(f"blocks.{index}.{matrix}").weight
            parts = [packed.unpacked(part=part) for part in range(1 + packed.record.gated)]
            weight.copy_(torch.cat(parts))
            kinds[weight.data_ptr()] = MIXED.layer(index, matrix)
    oracle.head.weight.copy_(network.head.unpacked())
    kinds[oracle.head.weight.data_ptr()] = MIXED.head
    multiply = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, w, bias=None: multiply(rounded(x, kinds[w.data_ptr()]), w, bias))
    theirs = [Reader(oracle).read([text]).logits_BNV for text in texts]
    ours = [Reader(network).read([text]).logits_BNV for text in texts]
    parts = zip(ours, theirs, exact, strict=True)
    assert min(float((our - their).abs().mean() / (their - bare).abs().mean()) for our, their, bare in parts) < 0.05


@pytest.mark.parametrize(
    ("exceptions", "said"),
    [({"tail": BF16}, "no matrix"), ({"x.down": BF16}, "no matrix"), ({"embedding": INT8}, "float")],
)
def test_formats_name_matrices(exceptions: dict[str, torch.dtype], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Formats(INT8, exceptions)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    engine = forerun.load(MODELS / "target", dtype="bf16", kernels="native")
    return [engine.encode(item.prompt)[-200:] for item in load_suite()[::6]][:ROWS]


def test_bf16_is_at_least_as_close_to_fp32_as_torch(prompts: list[list[int]]) -> None:
    def logits(dtype: torch.dtype, kernels: str, weights: str = "auto") -> Tensor:
        reader = Reader(load_network(MODELS / "target", dtype, CPU, kernels, weights), capacity=200)
        return reader.read(prompts[:1]).logits_BNV.double()

    exact = logits(FP32, "torch")
    theirs = (logits(BF16, "torch") - exact).abs().mean()
    assert (logits(BF16, "native") - exact).abs().mean() < 1.05 * theirs
    assert (logits(FP32, "native") - exact).abs().max() < 3e-5 * exact.abs().max()
    assert (logits(BF16, "native", "int8") - exact).abs().mean() < 10 * theirs


# ---- the promise as users see it


DRAFTERS = {
    "lookup": "lookup",
    "small": f"small:{SMALL}",
    "tree": str(MODELS / "tree.yaml"),
    "hsd": str(MODELS / "hsd.yaml"),
}


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return generated("none", 1, prompts)


def generated(drafter: str, rows: int, prompts: list[list[int]]) -> list[list[int]]:
    engine = forerun.load(MODELS / "target", drafter=drafter, dtype="bf16", max_rows=rows, kernels="native")
    return [output.token_ids for output in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_thousand_greedy_tokens_in_bf16_are_identical(
    name: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Eight rows at a time; tests/test_reference.py has them one by one."""
    outputs = generated(DRAFTERS[name], ROWS, prompts)
    assert sum(map(len, outputs)) >= 1000
    assert outputs == expected
