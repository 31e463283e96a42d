"""`forerun chat`: what is remembered, what begins with a slash, and who drafted what."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import transformers
from rich.console import Console

import forerun as library
from forerun.cli.chat import Talk, Text
from forerun.cli.engines import Machine
from forerun.engine.engine import Engine
from forerun.sampling import SamplingParams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT = ("-n", 8, "--dtype", "fp32")


@pytest.fixture
def chatty(family, tmp_path) -> Path:
    folder = Path(shutil.copytree(family / "target", tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def talked(forerun, monkeypatch):
    """Type these lines into a chat; what was said on stdout."""

    def call(model: Path, lines: list[str], *options: object) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = forerun("chat", model, *SHORT, *options)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def answer(said):
    """What the model says after a rendered text."""

    def call(model: Path, text: str) -> str:
        ids = transformers.AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
        (model / "ids.jsonl").write_text(json.dumps({"prompt_ids": ids}))
        return said("generate", model, "--prompts", model / "ids.jsonl", *SHORT)["text"]

    return call


def test_the_model_answers_and_remembers(chatty, talked, answer):
    first = answer(chatty, "<|bos|>user: Hi\nassistant:")
    second = answer(chatty, f"<|bos|>user: Hi\nassistant: {first}\nuser: Why?\nassistant:")
    assert talked(chatty, ["Hi", "Why?"]) == f"{first}\n{second}\n"
    assert talked(chatty, ["Hi", "", "/exit", "Why?"]) == f"{first}\n", "nothing is read after the end"


def test_a_system_message_and_a_new_beginning(chatty, talked, answer):
    first = answer(chatty, "<|bos|>user: Hi\nassistant:")
    brief = answer(chatty, "<|bos|>system: Be brief.\nuser: Hi\nassistant:")
    out = talked(chatty, ["Hi", "/reset", "Hi", "/system Be brief.", "Hi", "/system", "Hi"])
    new = "a new conversation"
    assert out == "\n".join([first, new, first, new, brief, new, first, ""])
    assert talked(chatty, ["Hi"], "--system", "Be brief.") == f"{brief}\n"


def test_another_drafter_says_the_same(chatty, family, talked):
    plain = talked(chatty, ["Hi", "Why?"], "--drafter", "none").splitlines()
    out = talked(chatty, ["Hi", f"/drafter small:{family / 'small'}", "Why?", "/stats"]).splitlines()
    assert "drafter small" in out
    assert [line for line in out if line in plain] == plain
    stats = "\n".join(out)
    assert "last answer" in stats and "drafter auto and small" in stats and "tokens per step" in stats


def test_what_is_wrong_is_said_and_the_talk_goes_on(chatty, talked):
    out = talked(chatty, ["/stats", "/colour", "/drafter", "/drafter lokup", "word " * 2000, "/help", "Hi"])
    for words in ("nothing has been said", "there is no /colour", "name another", "did you mean", "/reset begins"):
        assert words in out
    assert "/drafter SPEC" in out and len(out.splitlines()[-1]) > 0


def test_a_model_that_cannot_chat_is_refused_and_goes_on_with_plain_text(family, refused, talked, said, tmp_path):
    sentence = refused("chat", family / "target")
    assert "no chat template" in sentence and "--chat-template FILE" in sentence and "--raw" in sentence
    out = talked(family / "target", ["def f():", "x = 1"], "--raw")
    first = said("generate", family / "target", "def f():", *SHORT)["text"]
    second = said("generate", family / "target", f"def f():{first}\nx = 1", *SHORT)["text"]
    assert out == f"{first}\n{second}\n"
    assert "no system message" in talked(family / "target", ["/system x"], "--raw")
    assert "--raw is text" in refused("chat", family / "target", "--raw", "--system", "x")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert talked(family / "target", ["Hi"], "--chat-template", tmp_path / "t.jinja")


def test_ctrl_c_ends_an_answer_and_not_the_talk(chatty, talked, monkeypatch):
    whole = talked(chatty, ["Hi"], "--drafter", "none").rstrip("\n")
    step, count = Engine._step, 0

    def counted(engine):
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "_step", counted)
    first, *rest = talked(chatty, ["Hi", "/reset", "Hi"], "--drafter", "none").rstrip("\n").split("\n", 1)
    assert whole.startswith(first) and len(first) < len(whole)
    assert rest[0] == f"a new conversation\n{whole}"


# ---- colours


def test_every_drafter_has_its_colour_and_the_legend_says_which(family, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'a b ' * 8}\n/drafter small:{family / 'target'}\nc\n"))
    engine = library.load(family / "target", "lookup", dtype="fp32")
    talk = Talk(engine, Text(engine), SamplingParams(max_new_tokens=40, ignore_eos=True), Machine(dtype="fp32"))
    talk._console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100)
    talk.run()
    shown = talk._console.file.getvalue()
    colours = {name: re.search(rf"\x1b\[([\d;]+)m {name} \d+ ", shown) for name in ("lookup", "small")}
    assert all(colours.values()) and colours["lookup"][1] != colours["small"][1]
    assert shown.count("tokens per step") == 2


def test_ctrl_c_where_nothing_is_said_does_not_end_the_conversation(chatty, forerun, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter([KeyboardInterrupt, "/stats", EOFError])

    def asked(prompt: str) -> str:
        now = next(typed)
        if isinstance(now, str):
            return now
        raise now

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", asked)
    code, out, err = forerun("chat", chatty, *SHORT)
    assert code == 0 and "interrupted" not in err
    assert out.index("Ctrl-D ends the conversation") < out.index("nothing has been said yet")


def test_two_slashes_say_one(chatty, talked, answer):
    said = answer(chatty, "<|bos|>user: /usr is what?\nassistant:")
    assert talked(chatty, ["//usr is what?"]) == f"{said}\n"
    assert "begin with // to say it" in talked(chatty, ["/usr is what?"])


def test_an_answer_is_compared_with_plain_decoding_and_the_end_says_what_it_cost(chatty, forerun, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nWhy?\n"))
    code, out, err = forerun("chat", chatty, *SHORT, "--compare")
    assert code == 0 and out.count("identical: ") == 2 and out.count("\nplain ") == 2
    (summary,) = [line for line in err.splitlines() if "tokens per step" in line]
    assert "tokens/s" in summary
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    code, out, err = forerun("chat", chatty, *SHORT)
    assert code == 0 and "identical" not in out and "tokens/s" in err
