"""The one reader of prompts, for every command that has any: files, and what they become in a model's words.

A file is read by the end of its name:

    .txt      a prompt per line
    .jsonl    an object per line with one of
              "prompt": "a text"
              "messages": [{"role": "user", "content": "..."}]     rendered with the chat template
              "turns": ["...", "..."]                              as Spec-Bench has them: the first is asked
              "prompt_ids": [1, 2, 3]
              and, if you like, an "id" (or "question_id")
    others    the whole file is one prompt
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.errors import RequestError

if TYPE_CHECKING:
    from forerun.engine.engine import Engine

log = logging.getLogger(__name__)

KINDS = "prompt", "messages", "turns", "prompt_ids"
WANTED = {
    "prompt": '"a text"',
    "messages": '[{"role": "user", "content": "..."}]',
    "turns": '["a question", "another"]',
    "prompt_ids": "[1, 2, 3]",
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Opening:
    """What an answer is to follow: a text, a conversation, or token ids. where: its place, for
    messages. is_said: the text is what a user says, where the model can chat. name: the row's own
    id."""

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    is_said: bool = False
    name: str | int | None = None

    @property
    def shown(self) -> str:
        """Its text for the eye."""
        return self.text or (str(self.messages[-1]["content"]) if self.messages else " ".join(map(str, self.ids)))


# ---- files


def read(path: Path) -> list[Opening]:
    """The prompts of a file, at least one. RequestError names the line that is none."""
    text = text_of(path)
    if path.suffix not in (".txt", ".jsonl"):
        found = [Opening(str(path), text)] if text else []
    else:
        numbered = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        told = [(where, line.removesuffix("\r")) for where, line in numbered if line.strip()]
        found = [parse(line, where) if path.suffix == ".jsonl" else Opening(where, line) for where, line in told]
    if not found:
        raise RequestError(f"{path} holds no prompts: write one per line")
    return found


def text_of(path: Path, what: str = "prompt file") -> str:
    """A text file's content."""
    if path.suffix in (".json", ".csv", ".parquet"):
        raise RequestError(f"the {what} {path} is neither text nor .jsonl: convert it to an object per line")
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark of its encoding
    except OSError as error:
        raise RequestError(f"cannot read the {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"the {what} {path} is not UTF-8 text: convert it first") from None


def parse(line: str, where: str) -> Opening:
    """A row of a .jsonl file. RequestError names its place if it is not one of the kinds."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    given = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if len(given) != 1:
        listed = f"{', '.join(map(json.dumps, KINDS[:-1]))} and {json.dumps(KINDS[-1])}"
        raise RequestError(f'{where} needs one of {listed}: write {{"prompt": "..."}}')
    kind, value = given[0], row[given[0]]
    if not _is_sound(kind, value):
        raise RequestError(f'{where} has a wrong "{kind}": write "{kind}": {WANTED[kind]}')
    name = row.get("id", row.get("question_id"))
    if kind == "prompt":
        return Opening(where, value, name=name)
    if kind == "prompt_ids":
        return Opening(where, ids=tuple(value), name=name)
    if kind == "turns":
        return Opening(where, value[0], is_said=True, name=name)
    return Opening(where, messages=_up_to_the_answer(value, where), name=name)


def _is_sound(kind: str, value: object) -> bool:
    if kind == "prompt":
        return isinstance(value, str) and value != ""
    if not isinstance(value, list) or not (value or kind == "messages"):
        return False
    if kind == "prompt_ids":
        return all(type(one) is int for one in value)
    if kind == "turns":
        return all(isinstance(one, str) and one for one in value)
    return all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _up_to_the_answer(messages: list[Message], where: str) -> tuple[Message, ...]:
    """Somebody else's answer at the end of a conversation goes: the target gives its own."""
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise RequestError(f"{where} has no message to answer: give one whose role is user")
    return tuple(asked)


# ---- from prompts to ids


@dataclass(frozen=True)
class Template:
    """A chat template (Jinja)."""

    name: str
    text: str


@dataclass(frozen=True)
class Manner:
    """How prompts are put to a model. chat: a text is what a user says. template: of the user's,
    instead of the model's own."""

    chat: bool = False
    system: str | None = None
    template: Template | None = None

    @staticmethod
    def of(chat: bool, system: str | None, template: Path | None) -> Manner:
        """As the options say; a system message means a chat."""
        found = Template(template.name, text_of(template, "chat template")) if template else None
        return Manner(chat or system is not None, system, found)


class Reader:
    """Openings to ids with the target's tokenizer. used: the chat template that was needed, if any was."""

    def __init__(self, engine: Engine, manner: Manner):
        self._engine, self._manner = engine, manner
        self._tokenizer: Any = engine.tokenizer
        self.template = manner.template or self._own_template()
        self.used: Template | None = None

    def all_ids(self, openings: Sequence[Opening]) -> list[list[int]]:
        """RequestError too if a template was given that none of them needs."""
        found = [self.ids(one) for one in openings]
        if self._manner.template and not self.used:
            raise RequestError("--chat-template has no place in plain prompts: add --chat, or leave it out")
        return found

    def ids(self, opening: Opening) -> list[int]:
        """RequestError names the opening's place if the target cannot read it."""
        try:
            messages = self._messages(opening)
            return self._engine.encode(self.rendered(messages) if messages else opening.text or opening.ids)
        except RequestError as error:
            raise RequestError(f"{opening.where}: {error}") from None

    def _messages(self, opening: Opening) -> list[Message]:
        """Those to render; none for what is text as it is. A row's own system message goes before ours."""
        messages = list(opening.messages)
        if opening.text and (self._manner.chat or (opening.is_said and self.template)):
            messages = [{"role": "user", "content": opening.text}]
        if messages and self._manner.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._manner.system})
        return messages

    def _own_template(self) -> Template | None:
        text = getattr(self._tokenizer, "chat_template", None)
        text = text.get("default") if isinstance(text, dict) else text
        return Template("the model's own", text) if text else None

    def rendered(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, up to where the model answers. The template writes special tokens itself."""
        from forerun.engine.prompts import demand_characters
        from forerun.sources.folder import brief

        if self._tokenizer is None or self.template is None:
            raise RequestError(
                "the model has no chat template for messages: give --chat-template FILE, or plain prompts"
            )
        for message in messages:
            demand_characters(message["content"])
        self.used = self.template
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template.text,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template is a program, and may raise whatever it likes
            raise RequestError(f"the chat template cannot render this ({brief(error)}): mend either") from None
        return ids
