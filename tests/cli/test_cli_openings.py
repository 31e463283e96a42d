"""The one reader of prompts: files, chats, and the commands that have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

import forerun as library
from forerun.cli.openings import Opening, read
from forerun.errors import RequestError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT = ("-n", 4, "--dtype", "fp32", "--ignore-eos")


@pytest.fixture
def chatty(family, tmp_path) -> Path:
    """The target with a chat template."""
    folder = Path(shutil.copytree(family / "target", tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in values))
    return path


def test_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\r\n")
    assert [one.text for one in read(tmp_path / "a.txt")] == ["one", "  two"]
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    assert read(tmp_path / "a.py") == [Opening(str(tmp_path / "a.py"), "x = 1\ny = 2\n")]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    found = read(
        rows(
            tmp_path / "a.jsonl",
            {"prompt": "one", "id": "first"},
            {"messages": talk},
            {"turns": ["Why?", "And then?"], "question_id": 81, "category": "writing"},
            {"prompt_ids": [1, 2]},
        )
    )
    assert [one.name for one in found] == ["first", None, 81, None]
    assert [one.shown for one in found] == ["one", "Hi", "Why?", "1 2"]
    assert found[1].messages == ({"role": "user", "content": "Hi"},) and found[2].is_said


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "one\r\ntwo"), ("a.jsonl", '{"prompt": "one"}\r\n'), ("a", "one")]
)
def test_a_mark_of_the_encoding_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(tmp_path / name)[0].text == "one"


def test_half_characters_are_refused(chatty, refused):
    wrong = rows(chatty / "h.jsonl", {"prompt": "x\ud800"})
    assert "line 1: " in (sentence := refused("generate", chatty, "--prompts", wrong)) and "UTF-8" in sentence
    assert "prompt 1: " in (sentence := refused("generate", chatty, "x\udcff")) and "UTF-8" in sentence
    assert "UTF-8" in refused("generate", chatty, "x\udcff", "--chat")
    with pytest.raises(RequestError, match="UTF-8"):
        library.load(chatty).chat([{"role": "user", "content": "x\ud800"}])


def test_a_template_that_no_prompt_needs_is_refused(chatty, refused, tmp_path):
    template = ("--chat-template", chatty / "chat_template.jinja")
    assert "add --chat" in refused("generate", chatty, "x", *template)
    assert "add --chat" in refused("check", chatty, "--drafter", "lookup", *template)
    plain = rows(tmp_path / "p.jsonl", {"prompt": "x"})
    assert "add --chat" in refused("distill", chatty, "--prompts", plain, "--out", tmp_path / "o.jsonl", *template)


@pytest.mark.parametrize("row", [{"turns": []}, {"turns": "x"}, {"turns": [""]}, {"turns": ["x"], "prompt": "x"}, {}])
def test_rows_that_are_no_prompts_are_named(tmp_path, row):
    with pytest.raises(RequestError, match="line 1"):
        read(rows(tmp_path / "a.jsonl", row))


def test_a_chat_is_rendered_as_the_template_says(chatty, said):
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)

    def expected(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return said("generate", chatty, *SHORT, "--prompts", rows(chatty / "ids.jsonl", {"prompt_ids": ids}))[
            "token_ids"
        ]

    asked = said("generate", chatty, "Hi", "--chat", *SHORT)["token_ids"]
    assert asked == expected("<|bos|>user: Hi\nassistant:") != said("generate", chatty, "Hi", *SHORT)["token_ids"]
    with_system = said("generate", chatty, "Hi", "--system", "Be brief.", *SHORT)["token_ids"]
    assert with_system == expected("<|bos|>system: Be brief.\nuser: Hi\nassistant:")
    turns = rows(chatty / "t.jsonl", {"turns": ["Hi", "Ho"]})
    assert said("generate", chatty, "--prompts", turns, *SHORT)["token_ids"] == asked
    own = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    own = rows(chatty / "m.jsonl", own)
    assert said("generate", chatty, "--prompts", own, "--system", "Be long.", *SHORT)["token_ids"] == with_system


def test_turns_are_text_for_a_model_that_cannot_chat(family, said, refused, tmp_path):
    turns = rows(tmp_path / "t.jsonl", {"turns": ["Hi"]})
    base = ("generate", family / "target")
    assert said(*base, "--prompts", turns, *SHORT)["token_ids"] == said(*base, "Hi", *SHORT)["token_ids"]
    assert "--chat-template FILE" in refused(*base, "Hi", "--chat")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert said(*base, "Hi", "--chat", "--chat-template", tmp_path / "t.jinja", *SHORT)["token_ids"]


def test_every_command_with_prompts_reads_them_so(chatty, forerun, family):
    file = rows(chatty / "p.jsonl", {"turns": ["Wrap this text"]}, {"messages": [{"role": "user", "content": "Hi"}]})
    short = ("--prompts", file, "-n", 6, "--dtype", "fp32")
    for command in (
        ("generate", chatty),
        ("check", chatty, "--drafter", "lookup", "--tokens", 8, "--batch-size", "1", "--samples", 0),
        ("demo", chatty, "--drafters", "lookup", "--rounds", 1),
        ("distill", chatty, "--out", chatty / "answers.jsonl"),
    ):
        code, out, err = forerun(*command, *short)
        assert code == 0 and out, (command, err)


def test_demo_says_what_became_of_the_number_of_prompts(refused, family):
    assert "--limit 4" in refused("demo", family / "target", "--prompts", 4)
