"""The seam between Python and the native kernels: what it refuses, what it says, and several threads at once."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forerun.errors import ForerunError
from forerun.native import library, operations
from forerun.native.matrix import Packed
from forerun.native.records import Matrix
from forerun.nn.backends.native.transformer import PackedTransformer, pack
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.load import why_torch
from forerun.nn.transformer import Transformer, TransformerConfig

CPU = torch.device("cpu")
CONFIG = TransformerConfig(61, 48, 2, 4, 2, 12, 50, 64)
needs_kernels = pytest.mark.skipif(
    library.why_not(CPU, torch.float32) is not None, reason=str(library.why_not(CPU, torch.float32))
)


@pytest.fixture
def network() -> PackedTransformer:
    return pack(Transformer(CONFIG).initialise(seed=1).float())


def fresh_cache(network: PackedTransformer, capacity: int = 64) -> Cache:
    cache = Cache(network.cache_shape, network.dtype, CPU)
    cache.reserve(1, capacity)
    cache.admit()
    return cache


def chain(tokens: list[int], length: int = 0) -> Feed:
    return Feed(torch.tensor([tokens]), np.asarray([length]), length + np.arange(len(tokens))[None])


@needs_kernels
def test_one_network_serves_several_threads(network: PackedTransformer) -> None:
    texts = [[3 + (7 * row + 5 * place) % 50 for place in range(5 + 6 * row)] for row in range(8)]
    alone = [network.forward(chain(text), fresh_cache(network)).logits_BNV for text in texts]

    def read(row: int) -> bool:
        caches = [fresh_cache(network, 40 + row) for _ in range(40)]
        return all(torch.equal(network.forward(chain(texts[row]), cache).logits_BNV, alone[row]) for cache in caches)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


@needs_kernels
def test_what_does_not_fit_is_an_error_and_not_a_crash(network: PackedTransformer) -> None:
    with pytest.raises(IndexError, match="vocabulary"):
        network.forward(chain([3, 61]), fresh_cache(network))
    with pytest.raises(IndexError, match="vocabulary"):
        network.forward(chain([-1]), fresh_cache(network))
    with pytest.raises(IndexError, match="no room"):
        network.forward(chain([3] * 5), fresh_cache(network, 4))
    with pytest.raises(IndexError, match="no room"):
        network.forward(replace(chain([3]), start=1), fresh_cache(network))
    with pytest.raises(IndexError, match="position"):
        network.forward(replace(chain([3]), where_BN=np.asarray([[64]])), fresh_cache(network))
    with pytest.raises(ValueError, match="int64"):
        network.forward(replace(chain([3]), tokens_BN=torch.tensor([[3]], dtype=torch.int32)), fresh_cache(network))
    with pytest.raises(ValueError, match="entries"):
        network.forward(replace(chain([3, 4]), paths_BNJ=np.zeros((1, 1, 1), np.int32)), fresh_cache(network))


@needs_kernels
@pytest.mark.parametrize(
    "path", [[0], [-1, -1], [0, 2], [0, 10**9], [1, 0], [0, 0], [1, 1], [-5, 1], [1, -1, 0], []], ids=str
)
def test_a_path_that_leads_nowhere_is_an_error(network: PackedTransformer, path: list[int]) -> None:
    """Token 1 of two, both uncommitted: its path is [1] or [0, 1]."""
    own, reach = [0, *[-1] * 2], 3
    feed = replace(chain([3, 4]), paths_BNJ=np.asarray([[own, path + [-1] * (reach - len(path))]], np.int32))
    if path == [1, -1, 0]:  # whatever is behind the first -1 is padding
        network.forward(feed, fresh_cache(network))
        return
    with pytest.raises(IndexError, match="path"):
        network.forward(feed, fresh_cache(network))
    store = torch.zeros(1, 2, 1, 4, 1, 8)
    assert feed.paths_BNJ is not None
    with pytest.raises(IndexError, match="path"):
        operations.attention(torch.zeros(1, 2, 1, 8), store, 0, np.asarray([0]), paths=feed.paths_BNJ)


@needs_kernels
def test_single_operations_refuse_what_they_cannot_read() -> None:
    packed = Packed.of(torch.randn(8, 6))
    with pytest.raises(ValueError, match="width 5"):
        operations.linear(torch.randn(2, 5), packed)
    with pytest.raises(ValueError, match="residual"):
        operations.linear(torch.randn(2, 6), packed, torch.randn(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="norm"):
        operations.norm(torch.randn(2, 6), torch.ones(6, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match="largest"):
        operations.top(torch.randn(2, 6), 7)


@needs_kernels
def test_a_feed_of_padding_alone_gives_zeros(network: PackedTransformer) -> None:
    feed = replace(chain([3, 4]), counts_B=np.zeros(1, np.int64))
    read = network.forward(feed, fresh_cache(network), (0, 2))
    assert read.best_BN is not None and not read.best_BN.any() and not read.logits_BNV.any()
    assert not any(state.any() for state in read.hidden.values())


@needs_kernels
def test_heads_too_wide_for_the_kernels_run_on_torch() -> None:
    wide = replace(CONFIG, head_dim=576)
    assert "576" in (why_torch(wide, torch.float32, CPU, "auto", "auto") or "")
    with pytest.raises(ForerunError, match="576"):
        why_torch(wide, torch.float32, CPU, "native", "auto")
    with pytest.raises(ValueError, match="576"):
        PackedTransformer(wide, torch.float32)


@needs_kernels
def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *arguments: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("forerun.nn.backends.native.arena.mmap.mmap", Plain)
    pack(Transformer(CONFIG).initialise(seed=1))


@pytest.mark.parametrize(
    ("dtype", "device", "said"), [(torch.float16, "cpu", "float16"), (torch.float32, "cuda", "CPU")]
)
def test_reasons_name_what_is_in_the_way(dtype: torch.dtype, device: str, said: str) -> None:
    assert said in (why_torch(CONFIG, dtype, torch.device(device), "auto", "auto") or "")
    with pytest.raises(ForerunError, match=said):
        why_torch(CONFIG, dtype, torch.device(device), "native", "auto")
    with pytest.raises(ForerunError, match="int8"):
        why_torch(CONFIG, dtype, torch.device(device), "auto", "int8")
    with pytest.raises(ForerunError, match="choose kernels out of"):
        why_torch(CONFIG, dtype, torch.device(device), "fast", "auto")


def test_a_library_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = library._opened.__wrapped__
    monkeypatch.setenv("FORERUN_KERNELS", "0")
    assert opened()[1] == "FORERUN_KERNELS is 0"
    monkeypatch.setenv("FORERUN_KERNELS", str(tmp_path / "nowhere.so"))
    assert "nowhere.so, which is not there" in opened()[1]
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setenv("FORERUN_KERNELS", str(tmp_path / "broken.so"))
    assert "cannot be loaded" in opened()[1]
    (tmp_path / "_kernels.txt").write_text("no compiler\n")
    assert "(no compiler)" in library._why_not_built(tmp_path / "_kernels.so")


@needs_kernels
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(Matrix):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr(library, "RECORDS", (Longer, *library.RECORDS[1:]))
    assert "another version" in library._opened.__wrapped__()[1]


@needs_kernels
def test_infinite_numbers_are_not_nan_too_early() -> None:
    inf = float("inf")
    logits = torch.tensor([[1.0, inf, 2.0], [-inf, -inf, -inf], [0.0, -inf, 0.0]])
    assert torch.equal(operations.top(logits, 2)[2], logits.logsumexp(-1))
    store = torch.zeros(1, 2, 1, 301, 1, 8)
    store[0, 0, 0, :256, 0, 0] = -inf
    store[0, 1, 0, 256:] = 3.0
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    assert torch.equal(operations.attention(q, store, 0, np.asarray([300])), torch.full((1, 1, 8), 3.0))
