"""`forerun generate --out` and `--compare`."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest

from forerun.cli import comparison
from forerun.cli.comparison import Side
from forerun.engine.engine import Engine
from forerun.engine.requests import Output, Stats
from forerun.files import claim

SHORT = ("-n", 6, "--dtype", "fp32", "--ignore-eos")


@pytest.fixture
def target(family) -> Path:
    return family / "target"


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"x = {n}", "id": f"q{n}"}) + "\n" for n in range(5)))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- --out


def test_a_row_per_text_with_all_that_it_is(target, prompts, forerun, said, tmp_path):
    out = tmp_path / "o.jsonl"
    options = ("--prompts", prompts, *SHORT, "--drafter", "lookup")
    code, told, err = forerun("generate", target, *options, "--out", out)
    assert code == 0 and told == f"{out}: 5 new texts, 0 from before\n" and "tokens per step" in err
    found = sorted(rows_of(out), key=lambda row: row["prompt_index"])
    whole = said("generate", target, *options)["outputs"]
    assert [row["id"] for row in found] == [f"q{n}" for n in range(5)]
    for row, other in zip(found, whole, strict=True):
        assert {name: row[name] for name in ("text", "token_ids", "finish_reason", "prompt_index", "sample")} == {
            name: other[name] for name in ("text", "token_ids", "finish_reason", "prompt_index", "sample")
        }
        assert row["stats"]["new_tokens"] == 6 and row["settings"]["drafter"] == {"drafter": "lookup"}
        assert row["settings"]["ignore_eos"] is True and "top_k" not in row["settings"]


def test_rows_are_written_as_they_end(target, prompts, forerun, tmp_path, monkeypatch):
    out, seen, step = tmp_path / "o.jsonl", [], Engine._step

    def counted(engine):
        seen.append(len(rows_of(out)) if out.exists() else 0)
        return step(engine)

    monkeypatch.setattr(Engine, "_step", counted)
    assert forerun("generate", target, "--prompts", prompts, *SHORT, "--batch-size", 1, "--out", out)[0] == 0
    assert set(seen) == {0, 1, 2, 3, 4}


def test_an_interrupted_run_goes_on(target, prompts, forerun, tmp_path, monkeypatch):
    out, alone = tmp_path / "o.jsonl", tmp_path / "alone.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--batch-size", 1, "--temperature", 1, "--seed", 3)
    assert forerun(*base, "--out", alone)[0] == 0
    step, count = Engine._step, 0

    def counted(engine):
        nonlocal count
        count += 1
        if count == 15:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "_step", counted)
    code, _, err = forerun(*base, "--out", out)
    monkeypatch.undo()
    before = out.read_text()
    assert (
        code == 130
        and 0 < len(rows_of(out)) < 5
        and f"holds {len(rows_of(out))} texts; the same command goes on" in err
    )
    with out.open("a") as file:
        file.write('{"id": "q4", "prompt_ind')  # and killed in the middle of a line
    asked = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, ids, params: asked.extend(ids) or stream(self, ids, params))
    code, told, _ = forerun(*base, "--out", out)
    done = before.count("\n")
    assert code == 0 and told == f"{out}: {5 - done} new texts, {done} from before\n" and len(asked) == 5 - done
    assert out.read_text().startswith(before)

    def texts(path: Path) -> dict:
        return {row["prompt_index"]: row["token_ids"] for row in rows_of(path)}

    assert texts(out) == texts(alone)
    whole = out.read_bytes()
    assert forerun(*base, "--out", out)[1] == f"{out}: 0 new texts, 5 from before\n" and out.read_bytes() == whole


def test_missing_samples_are_asked_again(target, prompts, forerun, tmp_path):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--temperature", 1, "--seed", 3, "--n", 2, "--out", out)
    assert forerun(*base)[0] == 0 and len(rows_of(out)) == 10
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-3]))
    assert forerun(*base)[0] == 0
    assert sorted((row["prompt_index"], row["sample"], row["text"]) for row in rows_of(out)) == sorted(
        (row["prompt_index"], row["sample"], row["text"]) for row in map(json.loads, lines)
    )


def test_changed_settings_prompts_and_strangers_are_refused(target, prompts, forerun, refused, tmp_path):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, "--dtype", "fp32", "--out", out)
    assert forerun(*base, "-n", 6)[0] == 0
    whole = out.read_bytes()
    assert "max_new_tokens 6, and now it is 7" in refused(*base, "-n", 7)
    assert 'drafter {"drafter": "auto"}' in refused(*base, "-n", 6, "--drafter", "lookup")
    assert "top_k null, and now it is 5" in refused(*base, "-n", 6, "--temperature", 1, "--top-k", 5).replace(
        "temperature null, and now it is 1.0", "top_k null, and now it is 5"
    )
    prompts.write_text(prompts.read_text().replace("x = 2", "y = 2"))
    assert "another prompt 3" in refused(*base, "-n", 6)
    assert out.read_bytes() == whole
    for content in ("hello\n", "hello", '{"id": 3}\n', "[1]\n", '{"prompt_index": 1, "sample": 0, "prompt": "x"}\n'):
        out.write_text(content)
        assert "not from forerun generate" in refused(*base, "-n", 6)
        assert out.read_text() == content
    assert "no file" in refused(*base[:-1], tmp_path, "-n", 6)
    assert "exclude" in refused(*base, "--json")
    assert "exclude" in refused(*base, "--compare")


def test_a_last_line_without_its_end(target, prompts, forerun, refused, tmp_path):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--out", out)
    assert forerun(*base)[0] == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])  # an editor has dropped the end of the last line
    assert forerun(*base)[1] == f"{out}: 0 new texts, 5 from before\n" and out.read_bytes() == whole
    for cut in (1, 5, 20):  # killed in the middle of the first row
        out.write_bytes(whole[:cut])
        assert forerun(*base)[1] == f"{out}: 5 new texts, 0 from before\n"
    prompt = '{"id": "q1", "prompt": "somebody\'s only prompt"}'
    out.write_text(prompt)
    assert "not from forerun generate" in refused(*base)
    assert out.read_text() == prompt, "what is no row of ours is never cut away"


def test_a_file_that_cannot_be_written_is_found_before_the_work(target, prompts, refused, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--out", out)
    monkeypatch.setattr(Engine, "stream", lambda *_: pytest.fail("a text was asked for"))
    for number, mend in ((errno.EROFS, "name another --out"), (errno.ENOSPC, "make room")):

        def refusing(path, content, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("forerun.files.append", refusing)
        assert f"({os.strerror(number)}): " in (sentence := refused(*base)) and mend in sentence
        assert ("make room" in sentence) == (number == errno.ENOSPC)


def test_a_name_of_half_a_character(target, forerun, tmp_path):
    out, prompts = tmp_path / "o.jsonl", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x", "id": "é\\ud800"}\n')
    assert forerun("generate", target, "--prompts", prompts, *SHORT, "--out", out)[0] == 0
    assert rows_of(out)[0]["id"] == "é\ud800"


def test_a_prompt_file_may_grow(target, prompts, forerun, tmp_path):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--out", out)
    assert forerun(*base)[0] == 0
    with prompts.open("a") as file:
        file.write('{"prompt": "z = 9"}\n')
    assert forerun(*base)[1] == f"{out}: 1 new text, 5 from before\n"
    assert rows_of(out)[-1]["id"] == "prompt-6"


# ---- --compare


def test_plain_stands_beside_drafted(target, family, forerun, said):
    options = ("generate", target, "def f(x):\n" * 6, "-n", 40, "--dtype", "fp32", "--drafter", "lookup")
    code, out, _ = forerun(*options, "--compare")
    *text, plain, drafted, last = out.splitlines()
    assert code == 0 and "\n".join(text) == said(*options)["text"].rstrip("\n")
    assert re.fullmatch(r"plain +\d+\.\d tokens/s +1\.00 tokens per step", plain)
    assert re.fullmatch(r"lookup +\d+\.\d tokens/s +\d+\.\d\d tokens per step +\d+\.\d\dx", drafted)
    assert last == "identical: 40 tokens of 1 text"
    _, sampled, _ = forerun(*options, "--compare", "--temperature", 1)
    assert sampled.splitlines()[-1] == "identical: 40 tokens of 1 text", "one seed for both"


def side(*texts: list[int], rule: str = "greedy match", exact: bool = True) -> Side:
    stats = Stats("lookup", rule, exact, steps=2, new_tokens=4)
    return Side([Output(None, ids, "length", None, stats, number) for number, ids in enumerate(texts)], 2.0)


def test_the_first_difference_is_shown_with_its_reason(target):
    import forerun

    engine = forerun.load(target, dtype="fp32")
    word = engine.tokenizer.backend_tokenizer.decode
    same, other = [5, 40, 41], [5, 42, 41]
    last = comparison.verdict(side(same, same), side(same, other), engine).splitlines()[-1]
    assert last.startswith(f"first difference: prompt 2, new token 2: plain {word([40])!r}, drafted {word([42])!r}")
    assert "should not happen" in last
    assert "drafted ends" in comparison.verdict(side(same), side(same[:2]), engine)
    assert "lossy" in comparison.verdict(side(same), side(other, exact=False), engine)
    assert "follow the same law" in comparison.verdict(side(same), side(other, rule="speculative sampling"), engine)


def test_two_writers_of_one_file_are_one_too_many(target, prompts, refused, forerun, tmp_path):
    out = tmp_path / "o.jsonl"
    base = ("generate", target, "--prompts", prompts, *SHORT, "--out", out)
    claimed = claim(out)
    assert "written by another command" in refused(*base) and not out.read_text()
    claimed.give_up()
    assert forerun(*base)[0] == 0 and forerun(*base)[1].endswith("0 new texts, 5 from before\n")


def test_anybody_may_read_what_was_written(target, prompts, forerun, tmp_path):
    out = tmp_path / "o.jsonl"
    before = os.umask(0o022)
    try:
        assert forerun("generate", target, "--prompts", prompts, *SHORT, "--out", out)[0] == 0
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o644
