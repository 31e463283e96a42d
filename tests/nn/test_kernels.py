"""The native kernels, one operation at a time, for every instruction set that this processor runs.

What they compute is held against float64 (nn/kernel_oracles.py); what they promise is held against
themselves, bit by bit: a token's result does not depend on what is computed beside it, where its
tree stands, or how many threads there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from forerun.native import library, operations
from forerun.native.matrix import Packed, padded
from nn import kernel_oracles as oracle
from nn.kernel_oracles import (
    BF16,
    FP32,
    INT8,
    REASON,
    Attending,
    guarded,
    instructions,
    same,
    some,
    some_examples,
    some_paths,
    strided,
    threads,
)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = (BF16, FP32)
KINDS = [(weights, gated) for weights in (BF16, FP32, INT8) for gated in (False, True)]
NAN, INFINITY = float("nan"), float("inf")
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=library.ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instructions(request.param) as there:
        if not there:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


def packed(
    out: int, in_: int, weights: torch.dtype, gated: bool = False, biased: bool = False, seed: int = 0
) -> Packed:
    bias = some(out * (1 + gated), seed=seed + 1) if biased else None
    return Packed.of(some(out * (1 + gated), in_, seed=seed), weights, bias, gated)


# ---- packed matrices


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_packing_loses_nothing(dtype: torch.dtype, gated: bool) -> None:
    weight = some(70, 75, seed=0, dtype=dtype)
    matrix = Packed.of(weight, gated=gated)
    parts = [matrix.unpacked(part=part) for part in range(1 + gated)]
    assert torch.equal(torch.cat(parts), weight.float())
    assert torch.equal(matrix.unpacked(3, 9), weight[3:12].float())


@pytest.mark.parametrize("dtype", (BF16, FP32, INT8))
def test_a_matrix_filled_in_pieces_by_many_threads_is_the_same_matrix(dtype: torch.dtype) -> None:
    weight = some(75, 130, seed=0)
    whole, memory = Packed.of(weight, dtype), torch.zeros(Packed.bytes_for(dtype, 75, 130) + 64, dtype=torch.uint8)
    pieces = Packed.at(padded(memory.data_ptr(), 64), memory, dtype, 75, 130)
    with threads(3):
        for begin in (40, 0, 20):
            pieces.fill(weight[begin : min(begin + 35, 75)], begin)
    assert torch.equal(pieces.unpacked(), whole.unpacked())
    assert same(operations.linear(some(3, 130, seed=1), pieces), operations.linear(some(3, 130, seed=1), whole))


def test_int8_weights_are_bytes_with_a_scale_per_128_inputs() -> None:
    weight = some(40, 300, seed=0) * torch.logspace(-3, 3, 40)[:, None]
    weight[7, 128:256] = 0
    scales = [part.abs().amax(1, keepdim=True) / 127 for part in weight.split(128, 1)]
    steps = [(part / scale).nan_to_num().round() for part, scale in zip(weight.split(128, 1), scales, strict=True)]
    rounded = torch.cat([step * scale for step, scale in zip(steps, scales, strict=True)], 1)
    assert torch.equal(Packed.of(weight, INT8).unpacked(), rounded)
    halves = torch.cat([torch.tensor([127.0]), torch.arange(-63, 64) / 2.0])[None]
    assert torch.equal(Packed.of(halves, INT8).unpacked(), halves.round())  # to even, as torch rounds


def test_fp16_weights_become_bf16() -> None:
    weight = some(33, 40, seed=0).half()
    assert torch.equal(Packed.of(weight, BF16).unpacked(), weight.to(BF16).float())


# ---- products


@some_examples
@given(
    out=st.integers(1, 140),
    in_=st.integers(1, 300),
    tokens=st.integers(1, 64),
    dtype=st.sampled_from(FLOATS),
    weights=st.sampled_from((BF16, FP32, INT8)),
    form=st.sampled_from(("plain", "residual", "gated")),
    biased=st.booleans(),
    seed=seeds,
)
@example(100, 75, 17, BF16, BF16, "plain", True, 0)
@example(100, 75, 17, FP32, FP32, "residual", True, 0)
@example(100, 75, 17, BF16, INT8, "gated", True, 0)
@example(17, 640, 64, FP32, INT8, "residual", True, 0)
@example(96, 1024, 14, BF16, BF16, "gated", False, 0)
def test_products(
    out: int, in_: int, tokens: int, dtype: torch.dtype, weights: torch.dtype, form: str, biased: bool, seed: int
) -> None:
    matrix = packed(out, in_, weights, form == "gated", biased, seed)
    x = strided(some(tokens, in_, seed=seed + 2, dtype=dtype))
    residual = strided(some(tokens, out, seed=seed + 3, dtype=dtype)) if form == "residual" else None
    oracle.linear(x, matrix, residual).check(operations.linear(x, matrix, residual))


def test_leading_dimensions_stay_and_nothing_gives_nothing() -> None:
    matrix = packed(40, 24, BF16)
    assert operations.linear(some(2, 3, 24, seed=0), matrix).shape == (2, 3, 40)
    assert operations.linear(some(0, 24, seed=0), matrix).shape == (0, 40)


def test_int8_inputs_are_rounded_half_to_even() -> None:
    """Inputs that are halves exactly: 127 sets the scale to one. The weights pick out single inputs."""
    x = torch.cat([torch.tensor([127.0]), torch.arange(-63, 64) / 2.0])[None]
    y = operations.linear(x, Packed.of(torch.eye(128) * 127, INT8))
    assert torch.equal(y, x.round() * 127)


def test_int8_products_are_close_to_what_they_round() -> None:
    weight, x = some(200, 512, seed=0), some(40, 512, seed=1)
    error = operations.linear(x, Packed.of(weight, INT8)).double() - x.double() @ weight.double().T
    assert 0.001 < error.std() / 512**0.5 < 0.02


@pytest.mark.parametrize(("weights", "gated"), KINDS)
def test_a_product_is_the_same_alone_and_in_any_company(weights: torch.dtype, gated: bool) -> None:
    matrix, x = packed(70, 200, weights, gated, True), some(64, 200, seed=2)
    alone = torch.cat([operations.linear(x[token : token + 1], matrix) for token in range(64)])
    for width in range(1, 65):
        assert same(operations.linear(x[:width], matrix), alone[:width])
        assert same(operations.linear(x[-width:], matrix), alone[-width:])
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert same(operations.linear(x[shuffled], matrix), alone[shuffled])


@pytest.mark.parametrize(("weights", "gated"), KINDS)
def test_a_product_is_the_same_on_any_number_of_threads(weights: torch.dtype, gated: bool) -> None:
    matrix, x = packed(130, 75, weights, gated, True), some(17, 75, seed=2, dtype=BF16)
    alone = operations.linear(x, matrix)
    for count in (2, 3):
        with threads(count):
            assert same(operations.linear(x, matrix), alone)


# ---- norms, gates, the largest


@some_examples
@given(width=st.integers(1, 300), tokens=st.integers(1, 9), dtype=st.sampled_from(FLOATS), seed=seeds)
@example(75, 5, FP32, 0)
@example(1024, 2, BF16, 0)
def test_norms(width: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    x = strided((some(tokens, width, seed=seed) * 3 + 1).to(dtype))
    weight, bias = some(width, seed=seed + 1), some(width, seed=seed + 2)
    oracle.norm(x, weight, 1e-5).check(operations.norm(x, weight, 1e-5))
    oracle.norm(x, weight, 1e-3, bias, True).check(operations.norm(x, weight, 1e-3, bias, True))
    oracle.norm(x, weight, 1e-3, None, True).check(operations.norm(x, weight, 1e-3, centred=True))


@some_examples
@given(width=st.integers(1, 100), tokens=st.integers(1, 9), dtype=st.sampled_from(FLOATS), seed=seeds)
def test_gates(width: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = strided((some(tokens, 2 * width, seed=seed) * 10).to(dtype))
    oracle.silu_gate(gate_up).check(operations.silu_gate(gate_up))


def test_gates_of_any_size() -> None:
    gates = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30])])
    gate_up = torch.cat([gates, torch.ones_like(gates)])
    oracle.silu_gate(gate_up).check(operations.silu_gate(gate_up))


@some_examples
@given(
    vocabulary=st.integers(1, 3000),
    tokens=st.integers(1, 5),
    k=st.integers(1, 70),
    levels=st.sampled_from((3, 50, 10**6)),
    seed=seeds,
)
@example(61, 2, 61, 3, 0)
@example(4096, 1, 4, 50, 0)
@example(16, 1, 17, 3, 0)
def test_the_largest(vocabulary: int, tokens: int, k: int, levels: int, seed: int) -> None:
    """Few levels: many equal logits, of which the first count."""
    k = min(k, vocabulary)
    logits = (some(tokens, vocabulary, seed=seed) * levels).round() / levels * 9
    values, indices, total = operations.top(strided(logits), k)
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, ordered.values[:, :k])
    assert torch.equal(indices, ordered.indices[:, :k])
    torch.testing.assert_close(total.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=2e-6)


def test_the_largest_of_logits_that_were_ruled_out() -> None:
    logits = torch.full((2, 50), -INFINITY)
    logits[0, 20], logits[1, 3], logits[1, 49] = 1.5, 2.0, 2.0
    values, indices, total = operations.top(logits, 3)
    assert indices.tolist() == [[20, 0, 1], [3, 49, 0]]
    assert values.tolist() == [[1.5, -INFINITY, -INFINITY], [2.0, 2.0, -INFINITY]]
    torch.testing.assert_close(total, logits.logsumexp(-1))


def test_rows_are_the_same_alone_in_company_and_on_any_number_of_threads() -> None:
    x, weight = some(9, 150, seed=0), some(150, seed=1)
    for run in (
        lambda x: operations.norm(x, weight, 1e-5),
        lambda x: operations.norm(x, weight, 1e-5, weight, True),
        operations.silu_gate,
        lambda x: torch.cat([part.view(len(x), -1).float() for part in operations.top(x, 5)], 1),
    ):
        alone = torch.cat([run(x[row : row + 1]) for row in range(9)])
        for count in (1, 2, 3):
            with threads(count):
                assert same(run(x), alone)


# ---- attention


@st.composite
def attentions(draw: st.DrawFn) -> Attending:
    rows = draw(st.sampled_from((1, 2, 3, 5, 16)))
    tokens = draw(st.sampled_from((1, 1, 2, 3, 12, 40) if rows < 4 else (1, 2, 3)))
    lengths = st.one_of(st.sampled_from((0, 1, 15, 16, 17, 255, 256, 257, 511, 512)), st.integers(0, 700))
    return attending(
        lengths=draw(st.lists(lengths, min_size=rows, max_size=rows)),
        tokens=tokens,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from((2, 5, 10, 16, 24, 64, 80, 128))),
        dtype=draw(st.sampled_from(FLOATS)),
        held=draw(st.sampled_from((0, 0, 1, 4, 17))),
        tree=draw(st.booleans()),
        ragged=draw(st.booleans()),
        start=draw(st.integers(0, 2)),
        window=draw(st.sampled_from((None, None, None, 1, 7, 15, 16, 17, 30, 255, 256, 257, 300))),
        seed=draw(seeds),
    )


def attending(
    lengths: list[int],
    tokens: int,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = FP32,
    held: int = 0,
    tree: bool = False,
    ragged: bool = False,
    start: int = 0,
    window: int | None = None,
    seed: int = 0,
) -> Attending:
    """Random queries, keys and values. The fullest row fills its slot; layer 1 of 2 is attended to."""
    rows, chance = len(lengths), np.random.default_rng(seed)
    capacity = max(lengths) + held + tokens
    store = some(2, 2, start + rows + 1, capacity, kv_heads, head_dim, seed=seed, dtype=dtype)
    q = strided(some(rows, tokens, kv_heads * group, head_dim, seed=seed + 1, dtype=dtype) * 2)
    paths = some_paths(rows, tokens, held, seed) if tree else None
    counts = chance.integers(1, tokens + 1, rows) if ragged else None
    return Attending(q, store, np.asarray(lengths), held, paths, counts, start, window, 1)


@some_examples
@given(attentions())
def test_attention(case: Attending) -> None:
    case.expected().check(case.run(case.poisoned()))


@pytest.mark.parametrize("window", [None, 1, 15, 16, 17, 32, 255, 256, 257])
def test_attention_at_the_edges_of_blocks_and_chunks(window: int | None) -> None:
    lengths = [0, 1, 13, 14, 15, 16, 29, 30, 31, 32, 253, 254, 255, 256, 257, 271, 272, 510, 511, 512]
    for tokens, tree in ((1, False), (4, False), (4, True)):
        case = attending(lengths, tokens, 1, 2, head_dim=8, window=window, tree=tree)
        case.expected().check(case.run(case.poisoned()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", [3, 300, 610])
def test_one_key_may_outweigh_all_others(first: int, dtype: torch.dtype) -> None:
    """Scores so far apart that e to their difference is zero, or infinite the wrong way round, in
    whichever chunk they are."""
    case = attending([610], 3, dtype=dtype)
    for scale in (60.0, -1.0):
        case.store[1, 0, :, first] *= scale
        case.expected().check(case.run())


@some_examples
@given(attentions())
def test_a_token_attends_alike_alone_and_in_any_company(case: Attending) -> None:
    y = case.run()
    for row, token in case.real():
        assert same(case.only(row, token).run()[0, 0], y[row, token])


@some_examples
@given(attentions())
def test_a_path_of_a_tree_attends_like_committed_text(case: Attending) -> None:
    y = case.run()
    for row, token in case.real():
        assert same(case.as_text(row, token).run()[0, 0], y[row, token])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [None, 20, 300])
def test_text_that_crosses_blocks_and_chunks_attends_like_single_tokens(dtype: torch.dtype, window: int | None) -> None:
    for length, tokens in ((0, 64), (200, 64), (250, 20), (495, 40), (760, 40)):
        case = attending([length], tokens, 1, 2, 32, dtype, window=window, seed=length)
        y = case.run()
        for _, token in case.real():
            assert same(case.as_text(0, token).run()[0, 0], y[0, token])


@some_examples
@given(attentions())
def test_attention_is_the_same_on_any_number_of_threads(case: Attending) -> None:
    y = case.run()
    for count in (2, 3):
        with threads(count):
            assert same(case.run(), y)


@pytest.mark.parametrize("window", [None, 270, 600])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_long_context_shared_out_among_threads_is_the_same(
    kv_heads: int, tree: bool, dtype: torch.dtype, window: int | None
) -> None:
    for length, tokens in ((512, 1), (600, 7), (790, 3), (1100, 2)):
        case = attending([length], tokens, kv_heads, 3, 20, dtype, held=2, tree=tree, window=window, seed=length)
        y = case.run()
        case.expected().check(y)
        for count in (2, 3, 4):
            with threads(count):
                assert same(case.run(), y)


def reordered(case: Attending, order: list[int]) -> Attending:
    """The same trees with their tokens at other scratch entries; a parent must stay before its children."""
    assert case.paths is not None
    store, moved = case.store.clone(), [*range(case.held), *(case.held + node for node in order)]
    for row, length in enumerate(case.lengths.tolist()):
        scratch = case.store[:, :, case.start + row, length : length + len(moved)]
        store[:, :, case.start + row, length : length + len(moved)] = scratch[:, :, moved]
    numbers = np.array([*np.argsort(moved), -1], np.int32)  # of the entries that were; -1 stays what it is
    paths = numbers[case.paths[:, order]]
    return Attending(case.q[:, order], store, case.lengths, case.held, paths, None, case.start, case.window, case.layer)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [None, 18])
def test_a_token_attends_alike_wherever_its_tree_keeps_it(dtype: torch.dtype, window: int | None) -> None:
    """Layer by layer instead of branch by branch."""
    case = attending([3, 14, 250, 300], 20, held=3, tree=True, dtype=dtype, window=window, seed=5)
    assert case.paths is not None
    case.paths[:] = case.paths[:1]
    depths = (case.paths[0] >= 0).sum(1)
    order = sorted(range(20), key=lambda node: (depths[node], -node))
    assert order != list(range(20))
    assert same(reordered(case, order).run(), case.run()[:, order])


# ---- what is not a number


def pattern(y: Tensor) -> Tensor:
    """0: a number; 1: NaN; 2, 3: infinities."""
    return y.isnan() + 2 * (y == INFINITY) + 3 * (y == -INFINITY)


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize(("weights", "gated"), KINDS)
def test_a_bad_input_spoils_its_own_token_only(weights: torch.dtype, gated: bool, bad: float) -> None:
    matrix, x = packed(40, 200, weights, gated), some(9, 200, seed=2)
    clean = operations.linear(x, matrix)
    for at in (0, 17, 199):
        spoilt = x.clone()
        spoilt[3, at] = bad
        y = operations.linear(spoilt, matrix)
        others = [token for token in range(9) if token != 3]
        assert same(y[others], clean[others])
        if weights == INT8:
            assert y[3].isnan().all()
        elif not gated:
            assert torch.equal(pattern(y[3]), pattern(spoilt[3] @ matrix.unpacked().T))
        else:
            assert not (y[3].isfinite() & (y[3] != 0)).any()


@pytest.mark.parametrize("bad", [NAN, INFINITY])
@pytest.mark.parametrize(("weights", "gated"), KINDS)
def test_a_bad_weight_spoils_its_own_output_only(weights: torch.dtype, gated: bool, bad: float) -> None:
    weight, x = some(40 * (1 + gated), 200, seed=0), some(20, 200, seed=2)
    clean = operations.linear(x, Packed.of(weight, weights, gated=gated))
    weight[33, 150] = bad
    y = operations.linear(x, Packed.of(weight, weights, gated=gated))
    others = [output for output in range(40) if output != 33]
    assert same(y[:, others], clean[:, others])
    assert not (y[:, 33].isfinite() & (y[:, 33] != 0)).any()


def test_bad_numbers_in_norms_and_gates_stay_where_they_are() -> None:
    x, weight = some(6, 75, seed=0), torch.ones(75)
    x[2, 40], x[4, 74] = NAN, INFINITY
    for centred in (False, True):
        y = operations.norm(x, weight, 1e-5, None, centred)
        assert y[2].isnan().all() and y[4, 74].isnan() and y[[0, 1, 3, 5]].isfinite().all()
    gate_up = torch.tensor([NAN, 1.0, INFINITY, -INFINITY, INFINITY, 2.0, 1.0, NAN, 1.0, 1.0, 0.0, 3.0])
    gate, up = gate_up.chunk(2)
    assert torch.equal(pattern(operations.silu_gate(gate_up)), pattern(torch.nn.functional.silu(gate) * up))


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [0, 14, 250])
def test_bad_keys_and_values_reach_exactly_those_who_see_them(length: int, dtype: torch.dtype, tree: bool) -> None:
    case = attending([length, length + 5], 12, 2, 2, 16, dtype, tree=tree, seed=7)
    clean = case.run().view(2, 12, 2, 2, 16)
    for which, bad, entry in ((0, NAN, 3), (1, NAN, 3), (1, INFINITY, 0), (0, NAN, 11), (1, -INFINITY, 11)):
        store = case.store.clone()
        store[1, which, 1, length + 5 + entry, 1, 9] = bad
        y = case.run(store).view(2, 12, 2, 2, 16)
        hit = torch.zeros(2, 12, 2, 2, 16, dtype=torch.bool)
        sees = torch.tensor([length + 5 + entry in case.seen(1, token) for token in range(12)])
        hit[1, sees, 1, :, slice(None) if which == 0 else 9] = True
        assert torch.equal(~y.isfinite(), hit)
        assert same(y[~hit], clean[~hit])


def test_a_bad_query_spoils_its_own_head_only() -> None:
    case = attending([300, 20], 5, 2, 2, 16, seed=7)
    clean = case.run().view(2, 5, 4, 16)
    case.q[1, 3, 2, 15] = NAN
    y = case.run().view(2, 5, 4, 16)
    assert y[1, 3, 2].isnan().all()
    y[1, 3, 2] = clean[1, 3, 2]
    assert same(y, clean)


# ---- memory


@pytest.mark.parametrize("count", [1, 3])
def test_results_fill_their_memory_and_nothing_beside_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [packed(45, 75, weights, gated, True) for weights, gated in KINDS]
    case, weight = attending([0, 30, 300], 5, 1, 3, 10, BF16, tree=True, ragged=True), some(75, seed=0)
    runs: list[Any] = [case.run, lambda: operations.top(some(3, 61, seed=0), 5)]
    for dtype in FLOATS:
        x = some(5, 75, seed=1, dtype=dtype)
        residual = some(5, 45, seed=2, dtype=dtype)
        runs += [lambda m=m, x=x: operations.linear(x, m) for m in matrices]
        runs += [lambda m=m, x=x, r=residual: operations.linear(x, m, r) for m in matrices[::2]]
        runs += [lambda x=x: operations.norm(x, weight, 1e-5), lambda x=x: operations.silu_gate(x[:, :74])]
    with threads(count), guarded(monkeypatch) as made:
        for run in runs:
            run()
    assert len(made) >= len(runs) + 2
    for memory in made:
        memory.check()


def test_padding_attends_to_nothing_and_is_zero() -> None:
    case = attending([20, 0, 3], 6, ragged=True, dtype=BF16)
    case.counts, case.q[1, 2:] = np.asarray([6, 2, 1]), NAN
    y = case.run(case.poisoned())
    assert (y[1, 2:] == 0).all() and (y[2, 1:] == 0).all()
    case.q[1, 2:] = 0
    case.expected().check(y)


@pytest.mark.parametrize(("weights", "gated"), KINDS)
def test_what_was_computed_before_leaves_no_trace(weights: torch.dtype, gated: bool) -> None:
    """The kernels keep their scratch memory: here it is full of NaN when the next product or attention begins."""
    matrix, x, case = packed(45, 75, weights, gated, True), some(3, 75, seed=1), attending([20], 3, 1, 2, 10, BF16)
    clean = operations.linear(x, matrix), case.run()
    operations.linear(torch.full((40, 300), NAN), packed(200, 300, weights, gated))
    large = attending([300], 20, 2, 4, 64)
    large.run(torch.full_like(large.store, NAN))
    assert same(operations.linear(x, matrix), clean[0])
    assert same(case.run(), clean[1])
