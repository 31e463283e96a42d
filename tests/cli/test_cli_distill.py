"""`forerun distill`: sources of prompts, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

import forerun as library
from forerun.cli.distill import summary
from forerun.cli.openings import parse
from forerun.engine.engine import Engine
from forerun.errors import RequestError
from forerun.sampling import SamplingParams
from forerun.train.distill import Loops, Questions, Tally, read

SHORT = ("--max-new-tokens", 6, "--dtype", "fp32")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEXTS = ["def wrap(text):", "import argparse", "class Parser:", "def wrap(text):", "for line in lines:", "return x"]


@pytest.fixture
def target(family) -> Path:
    return family / "target"


@pytest.fixture
def chatty(target, tmp_path) -> Path:
    """The target with a chat template."""
    folder = Path(shutil.copytree(target, tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    np.random.default_rng(0).integers(3, 600, 3000).astype(np.uint16).tofile(folder / "train.bin")
    return folder


@pytest.fixture
def distil(forerun, tmp_path):
    """Run the command into tmp_path / name; the file, and what was said on stdout and stderr."""

    def call(model: Path, name: str, *options: object) -> tuple[Path, str, str]:
        out = tmp_path / name
        code, said, err = forerun("distill", model, "--out", out, *SHORT, *options)
        assert code == 0, err
        return out, said, err

    return call


def rows_of(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts_in(path: Path) -> list[list[int]]:
    return [list(sample.prompt) for sample in read(path).samples]


def test_answers_are_what_generate_says(target, texts, distil):
    out, said, err = distil(target, "a.jsonl", "--prompts", texts)
    engine = library.load(target, dtype="fp32")
    found = {sample.prompt: list(sample.answer) for sample in read(out).samples}
    for text in set(TEXTS):
        (output,) = engine.generate(text, SamplingParams(max_new_tokens=6))
        assert found[tuple(engine.encode(text))] == output.token_ids
    assert len(found) == len(set(TEXTS))
    assert said.startswith(f"{out}: 5 answers (") and "1 duplicate" in said and "tokens per step" in said
    assert "what is marked is trained on" in err and "⟦" in err and any(text in err for text in TEXTS)


def test_the_header_says_what_made_the_file(target, texts, distil):
    out, *_ = distil(target, "a.jsonl", "--prompts", texts, "--temperature", 0, "--temperature", 0.7, "--top-k", 9)
    header = read(out).header
    assert (header["forerun"], header["version"], header["seed"]) == ("distilled", 1, 0)
    assert header["target"]["name"] == "target" and len(header["target"]["fingerprint"]) == 64
    assert (header["dtype"], header["weights"]) == ("float32", "float32") and header["kernels"] in ("native", "torch")
    sampling = {
        "temperatures": [0.0, 0.7],
        "max_new_tokens": 6,
        "top_k": 9,
        "top_p": 1.0,
        "min_p": 0.0,
        "max_looping": 0.1,
    }
    assert header["sampling"] == sampling and header["template"] is None
    assert header["source"]["kind"] == "prompts" and header["source"]["name"] == "prompts.txt"
    assert [sample.temperature for sample in read(out).samples].count(0.7) == 3


def test_the_built_in_suite(target, distil):
    out, said, _ = distil(target, "a.jsonl", "--builtin", "--limit", 4)
    count = len(read(out).samples)
    assert count >= 1 and read(out).header["source"]["kind"] == "builtin"
    assert f"{4 - count} too long for the context" in said, "this tokenizer makes many tokens of a text"


def test_rows_of_three_kinds(chatty, tmp_path, distil):
    asked = [{"role": "user", "content": "Wrap this."}]
    answered = [*asked, {"role": "assistant", "content": "No."}]
    prompts = rows_of(
        tmp_path / "p.jsonl",
        {"prompt": "def f():"},
        {"messages": asked},
        {"messages": answered},
        {"prompt_ids": [1, 40]},
    )
    out, said, _ = distil(chatty, "a.jsonl", "--prompts", prompts, "--rows", 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    rendered = tokenizer("<|bos|>user: Wrap this.\nassistant:", add_special_tokens=False)["input_ids"]
    assert prompts_in(out) == [tokenizer("def f():")["input_ids"], rendered, [1, 40]]
    assert rendered[0] == 1 and "1 duplicate" in said, "the conversation's own answer is left out"
    assert read(out).header["template"]["name"] == "the model's own"


def test_chat_renders_plain_prompts_too(target, chatty, texts, tmp_path, distil):
    (tmp_path / "other.jinja").write_text(TEMPLATE)
    own, *_ = distil(chatty, "own.jsonl", "--prompts", texts, "--chat", "--rows", 1)
    given, *_ = distil(
        target, "given.jsonl", "--prompts", texts, "--chat", "--template", tmp_path / "other.jinja", "--rows", 1
    )
    assert prompts_in(own) == prompts_in(given)
    theirs, ours = read(given).header["template"], read(own).header["template"]
    assert theirs == ours | {"name": "other.jinja"}
    text = transformers.AutoTokenizer.from_pretrained(target).decode(prompts_in(own)[0])
    assert text == f"<|bos|>user: {TEXTS[0]}\nassistant:"


def test_windows_of_a_corpus(target, corpus, distil):
    options = ("--corpus", corpus, "--limit", 8, "--prompt-length", "5,20", "--rows", 3)
    out, *_ = distil(target, "a.jsonl", *options)
    again, *_ = distil(target, "b.jsonl", *options)
    other, *_ = distil(target, "c.jsonl", *options, "--seed", 1)
    assert sorted(prompts_in(out)) == sorted(prompts_in(again)) != sorted(prompts_in(other))
    assert len(prompts_in(out)) == 8 and all(5 <= len(prompt) <= 20 for prompt in prompts_in(out))
    more, said, _ = distil(target, "a.jsonl", *options, "--limit", 10)
    assert len(prompts_in(more)) == 10 and "2 answers" in said and "8 from before" in said


def test_a_corpus_of_another_tokenizer_is_refused(target, corpus, distil, refused, tmp_path):
    """Its windows would be noise, and the answers too, without anybody noticing."""
    shutil.copytree(target, corpus / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    options = ("--corpus", corpus, "--limit", 2, "--prompt-length", "5,9")
    distil(target, "a.jsonl", *options)
    file = corpus / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    complaint = refused("distill", target, "--out", tmp_path / "b.jsonl", *options)
    assert "another tokenizer" in complaint and not (tmp_path / "b.jsonl").exists()


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    target, corpus, forerun, distil, tmp_path, monkeypatch
):
    options = ("--corpus", corpus, "--limit", 9, "--prompt-length", "5,9", "--rows", 2, "--temperature", 0.9)
    whole, *_ = distil(target, "whole.jsonl", *options)
    step, count = Engine._step, 0

    def interrupted(self):
        nonlocal count
        count += 1
        if count == 14:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "_step", interrupted)
    code, _, err = forerun("distill", target, "--out", tmp_path / "parts.jsonl", *SHORT, *options)
    monkeypatch.undo()
    before = len(read(tmp_path / "parts.jsonl").samples)
    assert code == 130 and 0 < before < 9
    assert f"parts.jsonl holds {before} answers; the same command goes on" in err
    parts, said, _ = distil(target, "parts.jsonl", *options)
    assert f"{before} from before" in said
    assert sorted(parts.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    finished, said, err = distil(target, "parts.jsonl", *options)
    assert said == f"{finished}: 0 answers, 9 from before · skipped: none\n" and "trained on" not in err


def test_another_question_needs_another_file(target, family, texts, distil, refused):
    out, *_ = distil(target, "a.jsonl", "--prompts", texts)
    base, whole = ("--out", out, "--prompts", texts), out.read_bytes()
    assert "seed 0, and now it is 3: choose another --out" in refused("distill", target, *base, *SHORT, "--seed", 3)
    assert "target.name" in refused("distill", family / "small", *base, *SHORT)
    assert "sampling.temperatures [0.0], and now" in refused("distill", target, *base, *SHORT, "--temperature", 1)
    texts.write_text("another")
    assert "source.fingerprint" in refused("distill", target, *base, *SHORT)
    assert "not from forerun distill" in refused("distill", target, "--out", texts, "--prompts", texts, *SHORT)
    assert out.read_bytes() == whole and texts.read_text() == "another"


def test_a_model_with_other_weights_is_another_target(target, family, texts, distil, refused, tmp_path):
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    out, *_ = distil(copy, "a.jsonl", "--prompts", texts)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "target.fingerprint" in refused("distill", copy, "--out", out, "--prompts", texts, *SHORT)


def test_one_source_of_prompts(target, texts, corpus, refused, tmp_path):
    base = ("distill", target, "--out", tmp_path / "a.jsonl")
    assert "no source of prompts: give one of" in refused(*base)
    assert "several sources" in refused(*base, "--builtin", "--prompts", texts)
    assert "--limit N" in refused(*base, "--corpus", corpus)
    assert "--chat" in refused(*base, "--corpus", corpus, "--limit", 3, "--chat")
    assert "write 32,256" in refused(*base, "--corpus", corpus, "--limit", 3, "--prompt-length", "7")
    assert "the shorter first" in refused(*base, "--corpus", corpus, "--limit", 3, "--prompt-length", "7,3")
    assert "--build-corpus" in refused(*base, "--corpus", tmp_path / "nowhere", "--limit", 3)
    assert "nothing to render" in refused(*base, "--builtin", "--template", texts)
    assert "cannot read the chat template" in refused(*base, "--builtin", "--chat", "--template", tmp_path / "no")
    assert not (tmp_path / "a.jsonl").exists()


def test_how_many_answers_loop_is_said():
    tally = Tally(wanted=20, known=3, answers=17, loops=Loops(9, 7))
    assert "9 loop to their end, 7 of them left out" in summary(tally, Questions([]))
    assert "loop" not in summary(Tally(wanted=20, answers=20, steps=1), Questions([]))


def test_values_that_make_no_sense(target, texts, refused, tmp_path):
    base = ("distill", target, "--prompts", texts, "--out", tmp_path / "a.jsonl")
    assert "top_p has no effect at temperature 0" in refused(*base, "--top-p", 0.5)
    assert "max_new_tokens=0" in refused(*base, "--max-new-tokens", 0)
    assert "temperature=-1" in refused(*base, "--temperature", 0, "--temperature", -1)
    assert "give a number from 0 to 1" in refused(*base, "--max-looping", 1.5)
    assert "nonsense" in refused(*base, "--drafter", "nonsense")
    assert "no folder" in refused("distill", target, "--prompts", texts, "--out", tmp_path / "no" / "a.jsonl")
    assert "Is a directory" in refused("distill", target, "--prompts", texts, "--out", tmp_path)
    assert not (tmp_path / "a.jsonl").exists()


def test_prompts_that_cannot_be_read(target, corpus, refused, tmp_path):
    base = ("distill", target, "--out", tmp_path / "a.jsonl", "--prompts")
    assert "No such file" in refused(*base, tmp_path / "no.txt")
    (tmp_path / "p.json").write_text("[]")
    assert "neither text nor .jsonl" in refused(*base, tmp_path / "p.json")
    (tmp_path / "p.txt").write_bytes(b"\xff")
    assert "not UTF-8" in refused(*base, tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("\n\n")
    assert "holds no prompts" in refused(*base, tmp_path / "p.txt")
    messages = {"messages": [{"role": "user", "content": "x"}]}
    complaint = refused(*base, rows_of(tmp_path / "p.jsonl", {"prompt": "x"}, messages))
    assert "p.jsonl, line 2" in complaint and "no chat template" in complaint and "--chat-template FILE" in complaint
    assert "no chat template" in refused("distill", target, "--out", tmp_path / "a.jsonl", "--builtin", "--chat")
    complaint = refused(*base, rows_of(tmp_path / "p.jsonl", {"prompt_ids": [1, 600]}))
    assert "line 1: token id 600 is outside the vocabulary of 600" in complaint
    np.full(3000, 700, dtype=np.uint16).tofile(corpus / "train.bin")
    complaint = refused("distill", target, "--out", tmp_path / "a.jsonl", "--corpus", corpus, "--limit", 1)
    assert "window 1: token id 700 is outside" in complaint
    complaint = refused(*base, rows_of(tmp_path / "p.jsonl", {"prompt_ids": [1] * 1024}))
    assert "all 1 prompts have 1024 tokens" in complaint
    assert not (tmp_path / "a.jsonl").exists()


def test_a_template_that_fails_is_named(target, tmp_path, refused):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('system first') }}")
    prompts = rows_of(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    base = ("distill", target, "--out", tmp_path / "a.jsonl", "--prompts", prompts)
    complaint = refused(*base, "--template", tmp_path / "t.jinja")
    assert "line 1" in complaint and "system first" in complaint


@pytest.mark.parametrize(
    "line, named",
    [
        ("{", "is not JSON"),
        ("[]", "needs one of"),
        ('{"text": "x"}', "needs one of"),
        ('{"prompt": "x", "prompt_ids": [1]}', "needs one of"),
        ('{"prompt": ""}', 'wrong "prompt": write "prompt": "a text"'),
        ('{"prompt": 3}', 'wrong "prompt"'),
        ('{"prompt_ids": []}', 'wrong "prompt_ids"'),
        ('{"prompt_ids": [1.5]}', 'wrong "prompt_ids"'),
        ('{"messages": "x"}', 'wrong "messages"'),
        ('{"messages": [{"role": "user"}]}', 'wrong "messages"'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message to answer"),
        ('{"messages": []}', "no message to answer"),
    ],
)
def test_rows_that_are_no_prompts(line, named):
    with pytest.raises(RequestError) as caught:
        parse(line, "p.jsonl, line 4")
    assert named in str(caught.value) and str(caught.value).startswith("p.jsonl, line 4 ")
