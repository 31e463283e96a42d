"""The reference family itself: every drafter writes what plain decoding writes, token for token,
over 1,000 tokens; eight rows at a time, and one by one. One drafter of each kind runs in fp32 too; all
others in bf16 alone, which is quicker and which native kernels keep exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import forerun
from forerun.bench.suites import load as load_suite
from forerun.drafting.spec import describe
from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.native import library

MODELS = Path(__file__).parents[1] / "models"
SMALL, WIDE = str(MODELS / "small"), str(MODELS / "wide")
DRAFTERS = {
    "lookup": "lookup",
    "small": f"small:{SMALL}",
    "wide": f"small:{WIDE}",
    "confident": {"drafter": "small", "checkpoint": SMALL, "stopping": {"rule": "confidence", "threshold": 0.5}},
    "tree": {"drafter": "small", "checkpoint": SMALL, "tree": {"width": 3, "depth": 4, "nodes": 12}},
    "sampled tree": {"drafter": "small", "checkpoint": WIDE, "widths": [2, 2, 1]},
    "hsd": str(MODELS / "hsd.yaml"),
    "medusa": f"medusa:{MODELS / 'medusa'}",
    "hydra": f"hydra:{MODELS / 'hydra'}",
    "hydra++": f"hydra:{MODELS / 'hydra++'}",
    "hydra++, the published tree": {
        "drafter": "hydra",
        "checkpoint": str(MODELS / "hydra++"),
        "tree": "mc_sim_7b_63",
    },
}
REASON = library.why_not(torch.device("cpu"), torch.bfloat16)
ROWS, TOKENS = 8, 128
IN_FP32 = {"lookup", "small", "tree", "hsd", "hydra++"}
"""One of each kind, eight rows at a time: tokens of the text, a chain, a tree, a hierarchy, heads."""
ONE_BY_ONE = {"lookup", "small", "confident", "tree", "hsd", "medusa", "hydra++"}
"""The others differ from one of these in nothing but a checkpoint or a tree."""
CASES = [(name, rows) for name in DRAFTERS for rows in (1, ROWS) if rows > 1 or name in ONE_BY_ONE]
GREEDY = forerun.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    engine = forerun.load(MODELS / "target", dtype="fp32")
    return [engine.encode(item.prompt)[-200:] for item in load_suite()[::6]][:ROWS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    engine = forerun.load(MODELS / "target", dtype="fp32")
    return [output.token_ids for output in engine.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def expected_bf16(prompts: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for output in forerun.load(MODELS / "target", dtype="bf16").generate(prompts, GREEDY)]


def dtype_of(name: str, rows: int) -> str:
    return "fp32" if REASON is not None or (rows > 1 and name in IN_FP32) else "bf16"


def drafted(name: str, rows: int) -> Engine:
    return forerun.load(MODELS / "target", drafter=DRAFTERS[name], dtype=dtype_of(name, rows), max_rows=rows)


Written = Callable[[str, int], list[Output]]


@pytest.fixture(scope="module")
def written(prompts: list[list[int]]) -> Written:
    """What a drafter makes of the prompts, so many rows at once; generated once."""
    return cache(lambda name, rows: drafted(name, rows).generate(prompts, GREEDY))


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_a_thousand_greedy_tokens_are_identical(
    name: str, rows: int, written: Written, request: pytest.FixtureRequest
) -> None:
    outputs = written(name, rows)
    assert sum(len(output.token_ids) for output in outputs) >= 1000
    expected = request.getfixturevalue("expected_bf16" if dtype_of(name, rows) == "bf16" else "expected")
    assert [output.token_ids for output in outputs] == expected


def test_every_drafter_helps(written: Written) -> None:
    for name in ("lookup", "small", "wide", "medusa", "hydra", "hydra++"):
        stats = [output.stats for output in written(name, ROWS)]
        assert sum(one.accepted_tokens for one in stats) > 0.2 * sum(one.steps for one in stats), name


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", ["medusa", "hydra", "hydra++"])
def test_heads_in_bf16_change_nothing(name: str, prompts: list[list[int]], expected_bf16: list[list[int]]) -> None:
    """Those above are int8 on this target. These guess a little differently, and the target says what it says."""
    description = {**describe(DRAFTERS[name]), "weights": "target"}
    outputs = forerun.load(MODELS / "target", drafter=description, dtype="bf16").generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected_bf16
    assert sum(len(output.token_ids) for output in outputs) >= 1000


def test_a_deterministic_drafter_samples_the_same_text_as_plain_decoding(prompts: list[list[int]]) -> None:
    params = forerun.SamplingParams(max_new_tokens=64, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True)
    plain = forerun.load(MODELS / "target", dtype=dtype_of("lookup", 1)).generate(prompts, params)
    for name in ("lookup", "tree", "hydra++"):
        one = forerun.load(MODELS / "target", drafter=DRAFTERS[name], dtype=dtype_of("lookup", 1))
        outputs = one.generate(prompts, params)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]


def test_sampled_text_looks_like_python(prompts: list[list[int]]) -> None:
    params = forerun.SamplingParams(max_new_tokens=TOKENS, temperature=0.7, seed=1, ignore_eos=True)
    outputs = forerun.load(MODELS / "target").generate(prompts, params)
    lines = [line for output in outputs for line in (output.text or "").splitlines()]
    indents = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip()]
    assert sum(indent % 4 == 0 for indent in indents) > 0.7 * len(indents)
    opened = [(before, after) for before, after in pairwise(lines) if before.rstrip().endswith(":") and after.strip()]
    deeper = [len(after) - len(after.lstrip(" ")) > len(b) - len(b.lstrip(" ")) for b, after in opened]
    assert sum(deeper) > 0.5 * len(deeper)
