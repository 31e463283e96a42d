"""Prompts that begin alike are read once, and nobody can tell from what is said.

Bits are compared on real networks; what is remembered, forgotten, broken off and kept apart, on
tables, where one wrong entry of the cache is another law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forerun
import forerun.model
from drafters.heading import filled, lively, needs_kernels, on
from fakes import TableNetwork, engine_of, plain
from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.nn import machine, prefixes
from forerun.nn.backends.native.transformer import pack
from forerun.nn.backends.torch import TorchBackend
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Read
from forerun.nn.foreign.network import Foreign
from forerun.nn.network import Network
from forerun.nn.prefixes import Prefixes
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sampling import SamplingParams
from nn.feeding import saved, small_model

MUCH = 1 << 30
BLOCK, CHUNK = 4, 8


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts need not be long to have several blocks and chunks."""
    monkeypatch.setattr(forerun.model, "CHUNK", CHUNK)
    monkeypatch.setattr(prefixes, "BLOCK", BLOCK)


# ---- bits


@cache
def windowed() -> Transformer:
    """One layer sees ten tokens, the other all."""
    config = TransformerConfig(40, 24, 2, heads=4, kv_heads=2, head_dim=6, mlp_width=40, max_length=256)
    made: Transformer = filled(Transformer(TransformerConfig(**{**vars(config), "windows": (10, None)})), 1.8)
    return made.requires_grad_(False)


def foreign(kind: str, dtype: torch.dtype, **choices: Any) -> Network:
    return Foreign(small_model(kind, **choices).to(dtype).eval(), kind)


def halved(network: Transformer) -> Transformer:
    config = Transformer(network.config)
    config.load_state_dict(network.state_dict())
    return config.to(torch.bfloat16).requires_grad_(False)


NETWORKS: dict[str, Callable[[], Network]] = {
    "torch, fp32": lively,
    "torch, bf16": lambda: halved(lively()),
    "torch, windows": windowed,
    "llama of others, bf16": lambda: foreign("llama", torch.bfloat16),
    "gemma2 of others": lambda: foreign("gemma2", torch.float32, head_dim=8, sliding_window=6),
}
NATIVE: dict[str, Callable[[], Network]] = {
    "native, fp32": lambda: on(lively(), "native"),
    "native, bf16": lambda: pack(halved(lively())),
    "native, int8": lambda: pack(halved(lively()), torch.int8),
    "native, windows": lambda: pack(windowed()),
}
every_network = pytest.mark.parametrize(
    "make",
    [*NETWORKS.values(), *(pytest.param(make, marks=needs_kernels) for make in NATIVE.values())],
    ids=[*NETWORKS, *NATIVE],
)
FIRST = [int(token) for token in torch.randint(3, 39, (31,), generator=torch.Generator().manual_seed(7))]


def wishes(number: int) -> SamplingParams:
    """Greedy and seeded; with the whole law of every token."""
    return SamplingParams(max_new_tokens=9, temperature=number % 2 * 0.9, seed=number, logprobs=40)


def plainly(network: Network, prefix_cache: int = 0) -> Engine:
    return engine_of(network, prefix_cache=prefix_cache)  # type: ignore[arg-type]


@every_network
def test_a_text_has_the_bits_of_one_that_was_read_from_its_start(make: Callable[[], Network]) -> None:
    """A prompt that goes on otherwise, the same prompt again, and a conversation that goes on."""
    network = make()
    one, width = plainly(network, MUCH), BLOCK if network.backend.keeps_bits else CHUNK
    (first,) = one.generate([FIRST], wishes(0))
    other, longer = FIRST[:21] + FIRST[:9], FIRST + first.token_ids + FIRST[:14]
    said = len(FIRST + first.token_ids) - 1 if network.backend.keeps_bits else len(FIRST) - 1
    for number, (prompt, known) in enumerate([(other, 21), (FIRST, len(FIRST) - 1), (longer, said), (longer, 999)]):
        fresh = plainly(network)
        (again,), (expected,) = one.generate([prompt], wishes(number)), fresh.generate([prompt], wishes(number))
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
        assert again.stats.cached_tokens == min(known, len(prompt) - 1) // width * width > 0
        assert expected.stats.cached_tokens == 0


@every_network
def test_the_slot_of_a_row_holds_what_reading_would_have_left(make: Callable[[], Network]) -> None:
    """Bit for bit, in another slot than before, beside others."""
    network = make()
    one, fresh = plainly(network, MUCH), plainly(network)
    one.generate([FIRST], wishes(0))
    for engine in (one, fresh):
        engine.add([5, 6, 7], wishes(1))
        engine.step()
        engine.add([*FIRST[:26], 9, 9, 9], wishes(1))
        while len(engine._running) < 2:
            engine.step()
    entries = [engine.target.cache.entries(1) for engine in (one, fresh)]
    count = min(part.shape[2] for part in entries)
    assert count >= 28 and torch.equal(*(part[:, :, :28] for part in entries))


# ---- tables


class Exactly(TorchBackend):
    keeps_bits = True


class Table(TableNetwork):
    """Depends on every token of a text; may keep bits, fail at times, and looks whether memory is within its bound."""

    def __init__(self, keeps_bits: bool = True):
        super().__init__(4, seed=1, order=1000)
        if keeps_bits:
            self.backend = Exactly()
        self.perhaps: Callable[[], None] = lambda: None

    def forward(self, *given: Any) -> Read:
        self.perhaps()
        return super().forward(*given)


def text(seed: int, length: int) -> list[int]:
    return Random(seed).choices(range(4), k=length)


def only(engine: Engine, prompt: Sequence[int], **wishes: Any) -> Output:
    (output,) = engine.generate([list(prompt)], **{"max_new_tokens": 3} | wishes)
    return output


def test_tenants_do_not_know_each_others_beginnings() -> None:
    """Not even by the time that reading takes."""
    one, prompt = engine_of(Table(), prefix_cache=MUCH), text(1, 30)
    assert [only(one, prompt, tenant=name).stats.cached_tokens for name in ("a", "b", "", "a", "b")] == [
        0, 0, 0, 28, 28,
    ]  # fmt: skip


def test_samples_of_a_prompt_read_it_once_side_by_side() -> None:
    one = engine_of(Table(), prefix_cache=MUCH)
    outputs = one.generate([text(1, 30)], n=3, temperature=1.0, seed=3, max_new_tokens=4)
    assert [output.stats.cached_tokens for output in outputs] == [0, 28, 28]
    assert outputs[0].stats.as_dict()["cached_tokens"] == 0


@pytest.mark.parametrize("keeps_bits", [True, False])
def test_draft_models_share_the_memory_and_read_less_too(keeps_bits: bool) -> None:
    """Every one of a hierarchy; what they draft is in tests/drafters/test_conformance.py."""
    target, bound, prompt = Table(keeps_bits), 3 * 20 * CHUNK * 16, text(1, 40)
    one = engine_of(target, "verified:a(small:b)", {"a": Table(keeps_bits), "b": Table(keeps_bits)}, prefix_cache=bound)
    passes = []
    for _ in range(2):
        before = [model.passes for model in one.drafter.models]
        assert only(one, prompt, max_new_tokens=9).token_ids == plain(target, prompt, 9)
        passes.append([model.passes - count for model, count in zip(one.drafter.models, before, strict=True)])
    assert len(one.drafter.models) == 2 and all(less < more for more, less in zip(*passes, strict=True))
    kept = [model.prefixes for model in (one.target, *one.drafter.models)]
    assert sum(part.bound for part in kept) <= bound and all(0 < part.nbytes <= part.bound for part in kept)
    one.drafter.reset()
    assert [part.nbytes for part in kept[1:]] == [0, 0] and kept[0].nbytes


def test_without_memory_everything_is_read() -> None:
    one, prompt = engine_of(Table()), text(1, 30)
    assert [only(one, prompt).stats.cached_tokens for _ in range(2)] == [0, 0] and one.prefixes.nbytes == 0


def test_what_is_cleared_is_read_again() -> None:
    one, prompt = engine_of(Table(), prefix_cache=MUCH), text(1, 30)
    only(one, prompt)
    one.prefixes.clear()
    assert one.prefixes.nbytes == 0 and only(one, prompt).stats.cached_tokens == 0


@pytest.mark.parametrize("end", ["cancel", "error"])
def test_a_prompt_that_was_half_read_is_not_offered(end: str) -> None:
    network, prompt = Table(), text(1, 30)
    one = engine_of(network, prefix_cache=MUCH)
    only(one, [1, 2])
    one.add([0], SamplingParams(max_new_tokens=50))
    one.step()
    (number,) = one.add(prompt, SamplingParams(max_new_tokens=3))
    one.step()
    assert one._reading is not None
    if end == "cancel":
        one.cancel(number)
    else:
        network.perhaps = lambda: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(ZeroDivisionError):
            one.step()
        network.perhaps = lambda: None
    output = only(one, prompt)
    assert output.stats.cached_tokens == 0 and output.token_ids == plain(network, prompt, 3)


def test_a_row_that_is_cancelled_leaves_what_was_read_and_said() -> None:
    one, prompt = engine_of(Table(), prefix_cache=MUCH), text(1, 13)
    one.add(prompt, SamplingParams(max_new_tokens=50))
    for _ in range(9):
        one.step()
    one.clear()
    assert only(one, plainly_on(prompt, 30)).stats.cached_tokens == 20


def plainly_on(prompt: list[int], count: int) -> list[int]:
    return prompt + plain(Table(), prompt, count)


@pytest.mark.parametrize("keeps_bits", [True, False])
def test_an_interrupted_step_counts_and_keeps_nothing_twice(keeps_bits: bool) -> None:
    """The row begins again, and knows its own prompt; the caller is told of the first time."""
    network, prompt = Table(keeps_bits), text(1, 30)
    one, steps = engine_of(network, prefix_cache=MUCH), iter(range(99))

    def interrupt() -> None:
        if next(steps) == 6:
            raise KeyboardInterrupt

    network.perhaps = interrupt
    one.add(prompt, SamplingParams(max_new_tokens=9))
    pieces = []
    while not one.is_idle:
        try:
            pieces += one.step()
        except KeyboardInterrupt:
            network.perhaps = lambda: None
    output = pieces[-1].output
    assert output is not None and output.token_ids == plain(network, prompt, 9)
    assert output.stats.cached_tokens == 0
    assert only(one, prompt).stats.cached_tokens == (28 if keeps_bits else 24)


streams = st.lists(
    st.tuples(
        st.integers(0, 2),  # a common beginning
        st.integers(0, 40),  # how much of it
        st.integers(0, 9),  # what follows
        st.integers(1, 12),  # new tokens
        st.sampled_from(["", "a"]),  # tenant
        st.sampled_from(["", "", "", "cancel", "interrupt", "error"]),
        st.integers(0, 7),  # steps until the next one comes
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(0, 12), st.booleans())
def test_whatever_comes_and_goes_every_text_is_its_own_within_the_bound(
    coming: list[tuple[int, int, int, int, str, str, int]], blocks: int, keeps_bits: bool
) -> None:
    network, width = Table(keeps_bits), BLOCK if keeps_bits else CHUNK
    bound = blocks * width * 16 + 5  # an entry of a table is two numbers of eight bytes
    one = engine_of(network, "lookup", max_rows=3, prefix_cache=bound)
    asked: dict[int, tuple[list[int], int]] = {}
    outputs: dict[int, Output] = {}

    def step() -> None:
        assert one.prefixes.nbytes <= bound
        try:
            pieces = one.step()
        except (KeyboardInterrupt, ZeroDivisionError):
            network.perhaps = lambda: None
            pieces = []
        outputs.update({piece.request: piece.output for piece in pieces if piece.output})
        assert one.prefixes.nbytes <= bound

    for number, (beginning, share, rest, count, tenant, trouble, pause) in enumerate(coming):
        prompt = [*text(beginning, 40)[:share], *text(100 + number, rest + 1)]
        (request,) = one.add(prompt, SamplingParams(max_new_tokens=count, tenant=tenant))
        asked[request] = prompt, count
        for _ in range(pause):
            step()
        if trouble == "cancel":
            one.cancel(request)
        elif trouble:
            network.perhaps = partial(_raise, KeyboardInterrupt if trouble == "interrupt" else ZeroDivisionError)
    while not one.is_idle:
        step()
    assert outputs.keys() == asked.keys()
    for request, (prompt, count) in asked.items():
        expected, output = plain(network, prompt, count), outputs[request]
        is_whole = output.finish_reason == "length"
        assert output.token_ids == (expected if is_whole else expected[: len(output.token_ids)])
        assert output.stats.cached_tokens <= max(0, len(prompt) - 1) and output.stats.cached_tokens % width == 0


def _raise(error: type[BaseException]) -> None:
    raise error


# ---- what is forgotten


@pytest.fixture
def store() -> Iterator[tuple[Prefixes, Callable[[Sequence[int]], None], Callable[[Sequence[int]], int]]]:
    """Memory for three blocks, how a text gets there, and how much of one is known."""
    cache = Cache(CacheShape(1, 1, 1), torch.float64, torch.device("cpu"))
    cache.reserve(1, 64)
    kept = Prefixes(cache, 1, 3 * BLOCK * 16)

    def read(tokens: Sequence[int]) -> None:
        slot = cache.admit()
        cache.extend(slot, torch.tensor(tokens, dtype=torch.float64).view(1, 1, -1, 1, 1).expand(1, 2, -1, 1, 1))
        kept.remember("", tokens, slot, {})
        cache.release(slot)

    def known(tokens: Sequence[int]) -> int:
        slot = cache.admit()
        kept.recall("", tokens, slot)
        found = cache.entries(slot)[0, 0, :, 0, 0].tolist()
        assert found == list(tokens[: len(found)])
        cache.release(slot)
        return len(found)

    yield kept, read, known
    assert kept.nbytes <= kept.bound


A, B, C = [1] * BLOCK, [2] * BLOCK, [3] * BLOCK


def test_what_was_of_no_use_for_longest_is_forgotten_first(store: Any) -> None:
    _, read, known = store
    read(A + B)
    read(C)
    assert known(A + B) == 8  # and so C is the oldest now
    read(B)
    assert (known(C), known(A + B), known(B)) == (0, 8, 4)


def test_the_end_of_a_text_is_forgotten_before_its_beginning(store: Any) -> None:
    _, read, known = store
    read(A + B + C)
    read(B)
    assert (known(A + B + C), known(B)) == (8, 4)


def test_of_a_text_that_is_too_long_the_beginning_is_kept(store: Any) -> None:
    kept, read, known = store
    read(C)
    read(A + B + C + A + B)
    assert known(A + B + C + A + B) == 12 and known(C) == 0 and kept.nbytes == kept.bound


def test_a_part_of_a_block_is_not_known(store: Any) -> None:
    _, read, known = store
    read(A + B[:3])
    assert known(A + B) == 4 and known(A[:3]) == 0 and known([9, *A]) == 0


# ---- how much there is


def test_memory_is_what_a_container_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (limit, tmp_path / "missing"))
    whole = machine.memory(torch.device("cpu"))
    limit.write_text("max\n")
    assert machine.memory(torch.device("cpu")) == whole > 1 << 20
    limit.write_text("1048576\n")
    assert machine.memory(torch.device("cpu")) == 1 << 20


def test_a_model_of_a_folder_remembers_and_one_in_memory_does_not(tmp_path: Path) -> None:
    """Its weights may change between two requests."""
    model = small_model("llama")
    assert forerun.load(model, kernels="torch").prefixes.bound == 0
    assert forerun.load(model, kernels="torch", prefix_cache=5).prefixes.bound == 5
    one = forerun.load(saved(model, tmp_path))
    assert 16 * one.prefix_cache == pytest.approx(machine.memory(one.target.device), abs=16)
    assert one.beside(one.drafter).prefixes.bound == one.prefixes.bound == one.prefix_cache
