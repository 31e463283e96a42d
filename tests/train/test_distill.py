"""Distilled answers: the target's own, each once, whatever interrupted the run; and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import Near, TableNetwork, engine_of
from forerun.engine.engine import Engine
from forerun.errors import RequestError, TrainingError
from forerun.sampling import SamplingParams
from forerun.sources import fingerprint
from forerun.train import distill as module
from forerun.train.distill import Distilled, Ledger, Loops, Sample, Sampling, Tally, deal, distill, read, windows
from forerun.train.looping import COPIES, LEAST, loops

VOCABULARY, CONTEXT, EOS = 16, 96, 3
HEADER = {"forerun": "distilled", "version": 1, "sampling": {"max_new_tokens": 9}, "seed": 0}
PROMPTS = [[1 + (number * step) % 7 for step in range(2 + number % 5)] + [number % 16, 5] for number in range(24)]
EMPTY = 2  # of the greedy answers to them
GREEDY = Sampling(max_new_tokens=9)
MIXED = Sampling(temperatures=(0.0, 0.8), max_new_tokens=9, top_p=0.95)


def engine(drafter: object = "lookup", rows: int = 4, order: int = 3) -> Engine:
    """order: so many tokens the target looks back; with one, what is greedy soon goes round in circles."""
    target = TableNetwork(VOCABULARY, max_length=CONTEXT, order=order)
    return engine_of(target, drafter, {"near": Near(target, 0.5)}, eos=[EOS], max_rows=rows)


def distilled(
    path: Path, sampling: Sampling = MIXED, prompts: Sequence[Sequence[int]] = PROMPTS, **options: object
) -> Tally:
    """One run into a file."""
    questions = deal(prompts, sampling, CONTEXT)
    return distill(engine(**options), questions, sampling, Ledger(path, HEADER), lambda tally, answer: None)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# ---- answers


def test_greedy_answers_are_those_of_plain_decoding_one_by_one(tmp_path):
    distilled(tmp_path / "a.jsonl", GREEDY)
    found = {sample.prompt: list(sample.answer) for sample in read(tmp_path / "a.jsonl").samples}
    alone = engine("none", rows=1)
    outputs = [alone.generate([prompt], SamplingParams(max_new_tokens=9))[0] for prompt in PROMPTS]
    said = {tuple(prompt): output.token_ids for prompt, output in zip(PROMPTS, outputs, strict=True)}
    assert found == {prompt: answer for prompt, answer in said.items() if answer != [EOS]}
    assert len(said) - len(found) == EMPTY


@pytest.mark.parametrize("drafter", ["none", "lookup"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_neither_the_batch_nor_a_deterministic_drafter_changes_an_answer(tmp_path, drafter, rows):
    distilled(tmp_path / "a.jsonl", rows=4)
    distilled(tmp_path / "b.jsonl", rows=rows, drafter=drafter)
    assert sorted(lines(tmp_path / "a.jsonl")) == sorted(lines(tmp_path / "b.jsonl"))


def test_prompts_are_dealt_to_the_temperatures_in_turn():
    questions = deal([[1, 2], [1, 3], [1, 4], [1, 5]], replace(MIXED, temperatures=(0.0, 0.8, 1.2)), CONTEXT)
    assert [question.temperature for question in questions.asked] == [0.0, 0.8, 1.2, 0.0]
    wishes = [question.params(MIXED) for question in questions.asked[:2]]
    assert [wish.top_p for wish in wishes] == [1.0, 0.95], "a filter would make no sense for the greedy ones"
    assert wishes[0].seed != wishes[1].seed != questions.asked[1].params(replace(MIXED, seed=1)).seed


def test_a_filter_without_any_temperature_is_refused():
    with pytest.raises(RequestError, match="top_k has no effect"):
        Sampling(top_k=5)
    with pytest.raises(RequestError, match="temperature=-1"):
        Sampling(temperatures=(0.0, -1))


def test_equal_prompts_are_asked_once_at_a_temperature():
    prompts = [[1, 2], [1, 2], [1, 2], [4, 5]]
    questions = deal(prompts, MIXED, CONTEXT)
    assert [(question.prompt, question.temperature) for question in questions.asked] == [
        ((1, 2), 0.0),
        ((1, 2), 0.8),
        ((4, 5), 0.8),
    ]
    assert (questions.duplicates, questions.too_long) == (1, 0)


def test_prompts_that_fill_the_context_are_left_out_and_counted():
    questions = deal([[1] * CONTEXT, [1, 2]], MIXED, CONTEXT)
    assert (len(questions.asked), questions.too_long) == (1, 1)
    with pytest.raises(TrainingError, match="shorten"):
        deal([[1] * CONTEXT], MIXED, CONTEXT)


def test_an_answer_that_is_only_an_end_is_dropped(tmp_path):
    tally = distilled(tmp_path / "a.jsonl", GREEDY)
    samples = read(tmp_path / "a.jsonl").samples
    assert tally.empty == EMPTY and len(samples) == tally.answers == len(PROMPTS) - EMPTY
    assert all(sample.answer != (EOS,) for sample in samples)
    assert tally.finishes["length"] + tally.finishes["stop"] == tally.answers and tally.finishes["stop"] > 0


def test_the_figures_of_a_run(tmp_path):
    plain = distilled(tmp_path / "a.jsonl", drafter="none")
    near = distilled(tmp_path / "b.jsonl", drafter={"drafter": "small", "checkpoint": "near"})
    assert plain.tokens_per_step == 1 and near.tokens_per_step > 1.3
    said = sum(len(sample.answer) for sample in read(tmp_path / "a.jsonl").samples)
    assert plain.new_tokens == said + plain.empty and plain.tokens_per_second > 0


def test_answers_are_in_the_file_in_the_moment_they_are_complete(tmp_path):
    path, seen = tmp_path / "a.jsonl", []

    def watch(tally, answer):
        if answer:
            seen.append(lines(path)[-1])
            assert json.loads(seen[-1])["key"] == answer.question.key and len(lines(path)) == 1 + tally.answers

    distill(engine(), deal(PROMPTS, MIXED, CONTEXT), MIXED, Ledger(path, HEADER), watch)
    assert len(seen) == len(lines(path)) - 1


# ---- loops


LOOPING = Sampling(temperatures=(0.0, 0.9), max_new_tokens=48, max_looping=1.0)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in lines(path)[1:]]


def test_looping_answers_are_marked_and_counted(tmp_path):
    tally = distilled(tmp_path / "a.jsonl", LOOPING, order=1)
    rows = rows_of(tmp_path / "a.jsonl")
    marked = [row for row in rows if row.get("looping")]
    assert marked == [row for row in rows if row["finish"] == "length" and loops(row["answer"])]
    assert 3 < len(marked) < len(rows) - 3 and tally.loops == Loops(len(marked), 0)
    assert {row["temperature"] for row in marked} == {0.0}, "what is drawn does not go round in circles"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.999])
def test_at_most_their_share_is_kept_whatever_order_they_came_in(share, tmp_path, monkeypatch):
    distilled(tmp_path / "all.jsonl", LOOPING, order=1)
    everything = {row["key"]: row for row in rows_of(tmp_path / "all.jsonl")}
    limited = replace(LOOPING, max_looping=share)
    for rows in (1, 4):
        path = tmp_path / f"{rows}.jsonl"
        tally = distilled(path, limited, rows=rows, order=1)
        kept = {row["key"]: row for row in rows_of(path) if "answer" in row}
        loop = [key for key, row in kept.items() if row.get("looping")]
        assert all(everything[key] == row for key, row in kept.items())
        assert len(loop) <= share * len(kept) < len(loop) + 1 or tally.loops.left_out == 0
        assert (
            tally.loops.found
            == sum("looping" in row for row in everything.values())
            == tally.loops.left_out + len(loop)
        )
        assert [key for key in everything if key not in kept] == [
            key for key, row in everything.items() if row.get("looping") and key not in loop
        ]
        assert len(read(path).samples) == len(kept), "what was left out is no answer to train on"
    assert sorted(lines(tmp_path / "1.jsonl")) == sorted(lines(tmp_path / "4.jsonl"))


def test_what_was_left_out_is_not_asked_again(tmp_path):
    path, limited = tmp_path / "a.jsonl", replace(LOOPING, max_looping=0.1)
    first = distilled(path, limited, order=1)
    before = path.read_bytes()
    again = distilled(path, limited, order=1)
    assert again.known == first.wanted - first.empty and again.answers == 0
    assert again.loops == first.loops and first.loops.left_out > 0 and path.read_bytes() == before


def test_a_full_disk_leaves_out_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    distilled(path, LOOPING, order=1)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "whole", full)
    with pytest.raises(TrainingError, match="make room there"):
        Ledger(path, HEADER).limit(0.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_makes_no_sense(share):
    with pytest.raises(RequestError, match="give a number from 0 to 1"):
        Sampling(max_looping=share)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        ([*range(100), *([1, 2, 3] * 11)], True),
        ([*range(100), *([1, 2, 3] * 11)][:-1], True),  # the last copy may be cut
        ([*range(100), *([1, 2, 3] * 11), 9], False),  # it has got out
        ([*range(64)] * 3, True),
        ([*range(65)] * 3, False),
        ([*range(20)] * 2, False),
        ([*range(200)], False),
        ([], False),
    ],
)
def test_what_loops(answer, expected):
    assert loops(answer) is expected


@given(
    st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 40)
)
def test_copies_of_anything_behind_anything_loop_when_they_are_enough(before, gram, copies):
    answer = [*before, *(gram * copies)]
    if copies >= COPIES and len(gram) * copies >= LEAST:
        assert loops(answer)
    if loops(answer):
        period = next(p for p in range(1, 65) if answer[-max(LEAST, 3 * p) :][p:] == answer[-max(LEAST, 3 * p) :][:-p])
        assert answer[-period:] * COPIES == answer[-COPIES * period :]


# ---- going on


@pytest.mark.parametrize("steps", [1, 5, 20, 41])
def test_an_interrupted_run_goes_on_to_the_same_answers(tmp_path, steps, monkeypatch):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    monkeypatch.setattr(module, "QUEUED_PER_ROW", 2)  # several queues
    distilled(whole)
    step, count = Engine._step, 0

    def interrupted(self):
        nonlocal count
        count += 1
        if count == steps:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distilled(parts)
    before = max(0, len(lines(parts)) - 1)
    tally = distilled(parts)
    assert tally.known == before < tally.wanted
    assert lines(parts)[0] == lines(whole)[0] and sorted(lines(parts)) == sorted(lines(whole))


@pytest.mark.parametrize("cut", [1, 10, 0.5])
def test_a_last_line_that_was_cut_is_made_again(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    distilled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: -cut if cut >= 1 else int(len(whole) * cut)])
    assert len(read(path).samples) < len(whole.splitlines()) - (cut > 1)
    distilled(path)
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_header_that_was_cut_is_written_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for beginning in (b"", json.dumps(HEADER, separators=(",", ":")).encode()[:20]):
        path.write_bytes(beginning)
        tally = distilled(path)
        assert tally.known == 0 and read(path).header == HEADER
        path.unlink()


def test_more_prompts_add_to_what_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    few = distilled(path, prompts=PROMPTS[:10])
    more = distilled(path)
    assert more.known == few.answers and more.wanted > few.wanted
    distilled(tmp_path / "b.jsonl")
    assert sorted(lines(path)) == sorted(lines(tmp_path / "b.jsonl"))


def test_a_file_of_other_answers_is_refused_and_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    distilled(path)
    whole = path.read_bytes()
    for other, named in (
        (HEADER | {"seed": 1}, "seed 0, and now it is 1"),
        (HEADER | {"sampling": {"max_new_tokens": 5}}, "sampling.max_new_tokens 9, and now it is 5"),
        (HEADER | {"template": {"name": "x"}}, 'template.name null, and now it is "x"'),
    ):
        with pytest.raises(TrainingError, match=f"{named}: choose another --out"):
            Ledger(path, other)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", ["a text\n", "a text", '{"prompt": [1], "answer": [2]}\n', '{"prompt": "x"}', "[1]\n"]
)
def test_a_file_that_is_no_answers_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(TrainingError, match="not from forerun distill: choose another --out"):
        Ledger(path, HEADER)
    assert path.read_text() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    distilled(path)
    damaged = lines(path)
    for wrong, named in (("{", "line 3 is not a JSON object"), ("{}", 'line 3 has no "key"')):
        path.write_text("\n".join([*damaged[:2], wrong, *damaged[3:], ""]))
        with pytest.raises(TrainingError, match=named):
            Ledger(path, HEADER)


class Crowded:
    """A file on a disk with room for a few bytes more."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __enter__(self) -> Crowded:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[:7])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("room", [0, 4])
def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch, room):
    path, open_, count = tmp_path / "a.jsonl", Path.open, 0

    def opened(self, mode="r", *rest, **named):
        nonlocal count
        file = open_(self, mode, *rest, **named)
        count += mode == "ab"
        return Crowded(file) if mode == "ab" and count > room else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(
        TrainingError, match=r"No space left on device\): make room there, and the same command goes on"
    ):
        distilled(path)
    monkeypatch.undo()
    assert path.exists() == (room > 0)
    assert not room or (len(lines(path)) == 1 + room and len(read(path).samples) == room)
    distilled(path)
    distilled(tmp_path / "b.jsonl")
    assert sorted(lines(path)) == sorted(lines(tmp_path / "b.jsonl"))


# ---- windows of a corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    (np.arange(5000) % 1000).astype(np.uint16).tofile(tmp_path / "train.bin")
    return tmp_path


def test_windows_are_those_of_their_seed(corpus):
    cut = windows(corpus, (4, 9), 300, seed=1)
    assert cut == windows(corpus, (4, 9), 300, seed=1) != windows(corpus, (4, 9), 300, seed=2)
    assert windows(corpus, (4, 9), 20, seed=1) == cut[:20], "a longer run begins with the shorter one's prompts"
    assert {len(window) for window in cut} == set(range(4, 10))
    assert all((second - first) % 1000 == 1 for window in cut for first, second in pairwise(window))


def test_a_window_may_be_the_whole_corpus(corpus):
    (np.arange(6)).astype(np.uint16).tofile(corpus / "train.bin")
    assert windows(corpus, (6, 6), 1, seed=0) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("lengths, count", [((9, 4), 1), ((0, 4), 1), ((1, 4), 0)])
def test_windows_that_make_no_sense(corpus, lengths, count):
    with pytest.raises(TrainingError, match="cannot be cut"):
        windows(corpus, lengths, count, seed=0)


def test_a_corpus_that_is_not_there(corpus):
    with pytest.raises(TrainingError, match=r"train\.bin is missing or shorter than 9000 tokens"):
        windows(corpus, (1, 9000), 1, seed=0)
    with pytest.raises(TrainingError, match="--build-corpus"):
        windows(corpus / "nowhere", (1, 9), 1, seed=0)


# ---- reading


def test_reading_gives_ids_and_the_header(tmp_path):
    path = tmp_path / "a.jsonl"
    distilled(path)
    found = read(path)
    rows = [json.loads(line) for line in lines(path)[1:]]
    assert found.header == HEADER
    assert found.samples == [Sample(tuple(row["prompt"]), tuple(row["answer"]), row["temperature"]) for row in rows]
    assert {sample.temperature for sample in found.samples} == {0.0, 0.8}


def test_plain_rows_are_read_without_a_header(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": [1], "answer": [2, 3]}\n\n{"prompt": [4], "answer": [5], "temperature": 1}')
    assert read(path) == Distilled({}, [Sample((1,), (2, 3), 0.0), Sample((4,), (5,), 1.0)])


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "holds no answers"),
        ('{"forerun":"distilled","version":1}\n', "holds no answers"),
        ('{"forerun":"distilled","version":2}\n', "version 2, and 'distilled', version 1 can be read"),
        ('{"prompt": [1], "answer": [2]}\nx\n', "line 2 is not a JSON object"),
        ('{"prompt": [1], "answer": [2]}\n[3]\n', "line 2 is not a JSON object"),
        ('{"prompt": [1]}\n', 'line 1 has no token ids under "answer"'),
        ('{"prompt": "text", "answer": [1]}\n', 'line 1 has no token ids under "prompt"'),
        ('{"prompt": [1], "answer": []}\n', 'line 1 has no token ids under "answer"'),
        ('{"prompt": [1], "answer": [-1]}\n', 'line 1 has no token ids under "answer"'),
        ('{"prompt": [1], "answer": [true]}\n', 'line 1 has no token ids under "answer"'),
        ('{"prompt": [1], "answer": [2], "temperature": "hot"}\n', "line 1 has the temperature 'hot'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, named):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(TrainingError) as caught:
        read(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainingError, match="No such file"):
        read(tmp_path / "a.jsonl")


def test_a_fingerprint_sees_contents_in_large_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "BLOCK", 8)
    path = tmp_path / "weights"
    content = bytes(range(256)) * 16
    path.write_bytes(content)
    before = fingerprint.fingerprint([path])
    assert before == fingerprint.fingerprint([path])
    for place in (0, len(content) - 1):
        path.write_bytes(content[:place] + b"\xaa" + content[place + 1 :])
        assert fingerprint.fingerprint([path]) != before


def test_two_writers_of_one_file_are_one_too_many(tmp_path):
    """The second one would cut off what the first one had written since."""
    path = tmp_path / "answers.jsonl"
    ledger = Ledger(path, {"forerun": "distilled"})
    with pytest.raises(TrainingError, match="written by another run"):
        Ledger(path, {"forerun": "distilled"})
    del ledger
    Ledger(path, {"forerun": "distilled"})
