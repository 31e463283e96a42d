"""`forerun generate`: text, JSON, several prompts, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import transformers
from rich.console import Console

from forerun.cli.narration import Scribe
from forerun.engine.engine import Engine
from forerun.engine.requests import Piece

STATS = {
    "steps", "new_tokens", "tokens_per_step", "accepted", "seconds", "draft_seconds", "verify_seconds",
    "tokens_per_second", "drafter", "rule", "exact",
}  # fmt: skip
PROMPT = "def main(argv):\n    return"


def test_the_object_holds_what_the_contract_names(family, said):
    options = ("generate", family / "target", PROMPT, "--max-new-tokens", 12, "--dtype", "fp32")
    found = said(*options, "--drafter", "none")
    assert set(found) == {"text", "token_ids", "finish_reason", "stats"}
    assert set(found["stats"]) >= STATS
    assert len(found["token_ids"]) == found["stats"]["new_tokens"] == found["stats"]["steps"] == 12
    fast = said(*options)
    assert fast["stats"]["drafter"] == "auto" and fast["token_ids"] == found["token_ids"]
    assert set(fast) == {*found, "parts"}
    assert found["finish_reason"] == "length"
    assert found["stats"]["drafter"] == "none" and found["stats"]["exact"] is True


def test_the_tokens_are_those_of_transformers_and_the_text_is_theirs(family, said):
    found = said("generate", family / "target", PROMPT, "--max-new-tokens", 12, "--dtype", "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "target")
    model = transformers.AutoModelForCausalLM.from_pretrained(family / "target")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found["token_ids"] == theirs
    assert found["text"] == tokenizer.decode(theirs)


@pytest.mark.parametrize("drafter", ["lookup", "small"])
def test_a_drafter_changes_nothing_but_the_statistics(family, said, drafter):
    spec = f"small:{family / 'small'}" if drafter == "small" else drafter
    options = ("generate", family / "target", PROMPT * 3, "--max-new-tokens", 40, "--dtype", "fp32")
    plain, drafted = said(*options), said(*options, "--drafter", spec)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["stats"]["drafter"] == drafter


def test_what_the_parts_of_a_drafter_did_is_told(family, said, forerun):
    options = (family / "target", PROMPT * 3, "--max-new-tokens", 40, "--dtype", "fp32")
    for spec, names in (
        ("hierarchy", ["context", "model"]),
        (f"lookup | small:{family / 'small'}", ["fallback, lookup", "fallback, small"]),
        (f"verified:{family / 'small'}(lookup)", ["verified"]),
    ):
        found = said("generate", *options, "--drafter", spec)
        assert [part["name"] for part in found["parts"]] == names
        kept = sum(sum(part["accepted"]) for part in found["parts"])
        assert kept >= found["stats"]["accepted_tokens"], "and what the end of the text cut off"
        assert sum(part["asked"] for part in found["parts"]) > 0
        code, _, err = forerun("generate", *options, "--drafter", spec)
        assert code == 0 and all(f"  {name}: asked" in err for name in names)


def test_lenient_acceptance_is_said_to_be_lossy(family, said, forerun):
    options = ("generate", family / "target", PROMPT, "--max-new-tokens", 12, "--dtype", "fp32", "--drafter", "lookup")
    for rule in ("lenient", "lenient:3"):
        stats = said(*options, "--acceptance", rule)["stats"]
        assert (stats["exact"], stats["rule"]) == (False, "lenient review (lossy)")
    code, _, err = forerun(*options, "--acceptance", "lenient:0.5")
    assert code == 2 and "a factor above 1" in err


def test_a_composed_drafter_comes_from_a_file(family, said, tmp_path):
    description = {"drafter": "verified", "checkpoint": str(family / "small"), "inner": "lookup", "length": 3}
    (tmp_path / "mine.json").write_text(json.dumps(description))
    found = said(
        "generate",
        family / "target",
        PROMPT,
        "--max-new-tokens",
        8,
        "--dtype",
        "fp32",
        "--drafter",
        tmp_path / "mine.json",
    )
    assert found["stats"]["drafter"] == "verified"


def test_several_prompts_and_samples_stand_under_outputs(family, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "import os"}\n{"prompt": "class A:"}\n')
    (tmp_path / "one.txt").write_text("x = 1\n")
    files = ("--prompt-file", tmp_path / "rows.jsonl", "--prompt-file", tmp_path / "one.txt")
    sampling = ("--temperature", 1, "--n", 2, "--seed", 3, "--max-new-tokens", 4, "--ignore-eos")
    found = said("generate", family / "target", "first", *files, *sampling)
    places = [(one["prompt_index"], one["sample"]) for one in found["outputs"]]
    assert places == [(prompt, sample) for prompt in range(4) for sample in range(2)]


def test_equal_seeds_give_equal_texts(family, said):
    options = ("generate", family / "target", PROMPT, "--temperature", 1, "--max-new-tokens", 10, "--seed")
    assert said(*options, 5)["token_ids"] == said(*options, 5)["token_ids"] != said(*options, 6)["token_ids"]


def test_a_prompt_from_standard_input(family, said, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    piped = said("generate", family / "target", "-", "--max-new-tokens", 5)
    assert piped["token_ids"] == said("generate", family / "target", PROMPT, "--max-new-tokens", 5)["token_ids"]


def test_stop_strings_and_logprobs(family, said):
    options = ("generate", family / "target", PROMPT, "--max-new-tokens", 24, "--dtype", "fp32")
    whole = said(*options, "--logprobs", 2)
    assert [one["token_id"] for one in whole["logprobs"]] == whole["token_ids"]
    assert all(len(one["alternatives"]) == 2 and one["logprob"] <= 0 for one in whole["logprobs"])
    stop = whole["text"][6:9]
    cut = said(*options, "--stop", stop, "--stop", "never said")
    assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_text_goes_to_stdout_and_its_cost_to_stderr(family, forerun, said):
    options = ("generate", family / "target", PROMPT, "--max-new-tokens", 16, "--drafter", "none")
    code, out, err = forerun(*options)
    assert code == 0 and out == said(*options)["text"] + "\n"
    assert len(err.splitlines()) == 1 and "tokens per step" in err and "drafter none" in err


def test_several_texts_have_titles(family, forerun):
    _, out, _ = forerun("generate", family / "target", "a", "b", "--max-new-tokens", 3)
    assert [line for line in out.splitlines() if line.startswith("──")] == ["── prompt 1", "── prompt 2"]


# ---- Ctrl-C


@contextmanager
def interrupting(monkeypatch, at: int):
    """A real SIGINT in the middle of step number `at`."""
    step, count = Engine._step, 0

    def counted(engine):
        nonlocal count
        count += 1
        if count == at:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "_step", counted)
    yield
    monkeypatch.undo()


def test_interrupted_json_holds_what_was_generated(family, forerun, monkeypatch):
    with interrupting(monkeypatch, at=9):
        plainly = ("--drafter", "none", "--max-new-tokens", 900, "--ignore-eos", "--json")
        code, out, err = forerun("generate", family / "target", PROMPT, *plainly)
    found = json.loads(out)
    assert code == 130 and found["finish_reason"] == "interrupted"
    assert len(found["token_ids"]) == 8 and found["stats"]["new_tokens"] == 8
    assert err == "forerun: interrupted\n"


def test_interrupted_before_the_first_token_is_still_one_object(family, forerun, monkeypatch):
    with interrupting(monkeypatch, at=1):
        code, out, _ = forerun("generate", family / "target", PROMPT, "--json", "--drafter", "none")
    assert code == 130 and json.loads(out) == {"outputs": []}


def test_interrupted_text_stays_on_the_screen(family):
    command = [
        sys.executable,
        "-c",
        "import forerun.cli; forerun.cli.main()",
        "generate",
        str(family / "target"),
        PROMPT,
    ]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "1000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first + rest and "Traceback" not in err
    assert "tokens per step" in err and err.splitlines()[-1] == "forerun: interrupted"


# ---- marking


def piece(request: int, texts: list[str], drafted: list[bool], end: str | None = None) -> Piece:
    return Piece(request, request, 0, list(range(len(texts))), ["lookup" if one else "" for one in drafted], texts, end)


def written(pieces: list[Piece], terminal: bool, **options) -> str:
    file = io.StringIO()
    scribe = Scribe(
        Console(file=file, force_terminal=terminal, color_system="truecolor" if terminal else None), **options
    )
    for one in pieces:
        scribe.show(one)
    scribe.close()
    return file.getvalue()


def test_drafted_tokens_are_marked_on_a_terminal_and_nowhere_else():
    pieces = [piece(0, ["a", "b", "c"], [True, True, False]), piece(0, ["d"], [False], "length")]
    assert written(pieces, terminal=False) == "abcd\n"
    shown = written(pieces, terminal=True)
    assert re.sub(r"\x1b\[[1-9][\d;]*m(.)\x1b\[0m", r"<\1>", shown) == "<a><b>cd\n"


def test_who_thought_of_a_token_shows_in_its_colour():
    file = io.StringIO()
    scribe = Scribe(Console(file=file, force_terminal=True, color_system="truecolor"))
    scribe.show(Piece(0, 0, 0, [1, 2, 3], ["context", "small", "context"], ["a", "b", "c"], "length"))
    one, two, three = re.findall(r"\x1b\[([\d;]+)m[abc]\x1b", file.getvalue())
    assert one == three != two
    assert [label for label, _ in scribe.ink.legend()] == ["context (this text)", "small"]


def test_later_requests_wait_for_earlier_ones():
    pieces = [
        piece(1, ["x"], [False]),
        piece(0, ["a"], [False]),
        piece(1, ["y"], [False], "stop"),
        piece(0, ["b"], [False], "stop"),
    ]
    assert written(pieces, terminal=False, titles=["one", "two"]) == "── one\nab\n── two\nxy\n"


def test_what_was_interrupted_is_written_in_order():
    pieces = [piece(2, ["z"], [False]), piece(0, ["a"], [False]), piece(1, ["x"], [False])]
    assert written(pieces, terminal=False) == "a\nx\nz\n"


def test_without_a_tokenizer_ids_are_written():
    assert written([piece(0, ["", ""], [False, True], "length")], terminal=False, as_ids=True) == "0 1 \n"


def test_a_folder_is_no_question_for_the_models_of_transformers(forerun, family, monkeypatch):
    """To ask for them imports all that they are built of, which takes seconds of every start."""
    monkeypatch.setattr("forerun.engine.load.transformers", object())
    assert forerun("generate", family / "target", "x", "-n", 2, "--drafter", "none")[0] == 0
