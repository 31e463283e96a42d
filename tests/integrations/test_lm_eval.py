"""The harness's model class against the harness's own for transformers: the same numbers, the same texts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'forerun[eval]'")
pytest.importorskip("accelerate", reason="the harness's own model, which is compared with, needs accelerate")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from forerun.errors import RequestError
from forerun.integrations.lm_eval import ForerunLM

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "models" / "target")
LONG = "def add(a, b):\n    return a + b\n\n" * 400  # more than the context holds
PAIRS = [
    ("import os\nimport ", "sys"),
    ("for i in range(10):\n    ", "print(i)\n"),
    ("", "class Node:\n"),
    ("def main(): ", " pass"),
    (LONG, "def sub"),
]
GREEDY: dict[str, Any] = {"until": ["\n\n"], "max_gen_toks": 48, "do_sample": False}
CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
DOCUMENTS = """\
{"text": "for i in range(", "choices": ["10):", "def class"]}
{"text": "import os\\nimport ", "choices": ["sys", "while:"]}
{"text": "    return ", "choices": ["import import", "None"]}
"""


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return HFLM(pretrained=TARGET, dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def ours() -> ForerunLM:
    """With a drafter, which must not show."""
    return ForerunLM(pretrained=TARGET, drafter="lookup", dtype="fp32", device="cpu", batch_size=4)


def test_log_likelihoods_are_equal(ours: ForerunLM, theirs: Any) -> None:
    asked = instances("loglikelihood", PAIRS)
    for one, other in zip(ours.loglikelihood(asked, True), theirs.loglikelihood(asked, True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=2e-3)
        assert one[1] == other[1]


def test_rolling_log_likelihoods_are_equal(ours: ForerunLM, theirs: Any) -> None:
    asked = instances("loglikelihood_rolling", [("x = 1\n",), (LONG,)])
    found, expected = ours.loglikelihood_rolling(asked, True), theirs.loglikelihood_rolling(asked, True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_greedy_texts_are_equal(ours: ForerunLM, theirs: Any) -> None:
    contexts = ["def fibonacci(n):\n", "import ", "class Stack:\n    def push(self, item):\n", LONG]
    asked = instances("generate_until", [(context, dict(GREEDY)) for context in contexts])
    found = ours.generate_until(asked, True)
    assert found == theirs.generate_until(asked, True)
    assert all(found) and not any("\n\n" in text for text in found)


def test_unknown_wishes_are_refused(ours: ForerunLM) -> None:
    asked = instances("generate_until", [("x", GREEDY | {"num_beams": 4})])
    with pytest.raises(RequestError, match="num_beams"):
        ours.generate_until(asked, True)


def test_filters_are_nothing_to_greedy_decoding(ours: ForerunLM) -> None:
    """Tasks name them beside do_sample=False, and forerun refuses them there."""
    plain, filtered = (
        ours.generate_until(instances("generate_until", [("import ", GREEDY | more)]), True)
        for more in ({}, {"top_p": 0.9, "temperature": 0.7})
    )
    assert plain == filtered


def test_a_continuation_beyond_the_context_is_refused() -> None:
    small = ForerunLM(pretrained=TARGET, dtype="fp32", device="cpu", max_length=8)
    with pytest.raises(RequestError, match="leave this task out"):
        small.loglikelihood(instances("loglikelihood", [("x", LONG)]), True)


def test_the_harness_finds_it_by_name_and_scores_a_task(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(DOCUMENTS)
    (tmp_path / "tiny.yaml").write_text(CHOICES.format(data=tmp_path / "data.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    accuracy = {}
    for name, dtype in (("forerun", "fp32"), ("hf", "float32")):
        found = lm_eval.simple_evaluate(
            model=name,
            model_args=f"pretrained={TARGET},dtype={dtype}",
            tasks=["tiny_choices"],
            task_manager=tasks,
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
        )
        accuracy[name] = found["results"]["tiny_choices"]["acc,none"]
    assert accuracy["forerun"] == accuracy["hf"] == pytest.approx(2 / 3)


def test_its_own_command_line_is_the_harness_with_one_model_more() -> None:
    command = [sys.executable, "-m", "forerun.integrations.lm_eval", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--model_args" in done.stdout, done.stderr
