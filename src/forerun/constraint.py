"""Constraints: what the text of an answer must be. As data; `grammar` follows them token by token."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forerun.errors import RequestError


@dataclass(frozen=True)
class Constraint:
    """What an answer must be, from its first token to its last. Make one with the function of its kind.

    kind: json_schema, json_object, regex, choice or lark. text: the schema or the choices as JSON, the regular
    expression, the grammar. RequestError for what is none of these.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _DEMANDS:
            near = difflib.get_close_matches(str(self.kind), _DEMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(_DEMANDS)}"
            raise RequestError(f"unknown constraint {self.kind!r}; {hint}")
        _DEMANDS[self.kind](self.value)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON that a schema describes; the schema as a mapping, or as JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else _as_json(schema))

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, expression: str) -> Constraint:
        """Text that matches as a whole. The dialect is that of Rust's `regex`: no look-around, no back-references."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of these texts."""
        return cls("choice", _as_json(choices))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """What a context-free grammar derives from `start`, written as llguidance's variant of Lark."""
        return cls("lark", grammar)

    @classmethod
    def of(cls, given: Constraint | Mapping[str, Any]) -> Constraint:
        """From a mapping of one kind to what it wants, such as {"regex": "[0-9]+"}; {"json_object": true}."""
        if isinstance(given, Constraint):
            return given
        if len(given) != 1:
            raise RequestError(f"a constraint has one kind, not {len(given)}: give one of {', '.join(_DEMANDS)}")
        [(kind, value)] = given.items()
        if kind == "json_object" and value is not True:
            raise RequestError(f"json_object wants no more than true, not {value!r}: a schema goes to json_schema")
        makers: dict[str, Callable[[Any], Constraint]] = {
            "json_schema": cls.json_schema,
            "json_object": lambda _: cls.json_object(),
            "regex": cls.regex,
            "choice": cls.choice,
            "lark": cls.lark,
        }
        return makers[kind](value) if kind in makers else cls(kind)

    @property
    def value(self) -> Any:
        """What was given: a schema, an expression, the choices, a grammar; True for any JSON object."""
        if self.kind == "json_object":
            return True
        if self.kind not in ("json_schema", "choice"):
            return self.text
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the constraint's {_called(self.kind)} is not JSON ({error}): mend it") from None

    def as_dict(self) -> dict[str, Any]:
        """As `of` takes it."""
        return {self.kind: self.value}


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a constraint must be made of what JSON has ({error}): mend it") from None


def _called(kind: str) -> str:
    return kind.replace("_", " ").replace("json", "JSON")


def _demand_schema(value: object) -> None:
    if not isinstance(value, dict):
        raise RequestError(f"a JSON schema is an object, not {value!r}: give one such as {{'type': 'object'}}")


def _demand_choices(value: object) -> None:
    if not (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
        raise RequestError(f"a choice is made among texts, not {value!r}: give a list of at least one string")


def _demand_text(value: object) -> None:
    if not (isinstance(value, str) and value):
        raise RequestError(f"a regular expression or a grammar is a text, not {value!r}: give one that is not empty")


_DEMANDS: dict[str, Callable[[object], None]] = {
    "json_schema": _demand_schema,
    "json_object": lambda _: None,
    "regex": _demand_text,
    "choice": _demand_choices,
    "lark": _demand_text,
}
"""Per kind: a RequestError for a value that it cannot have. What is wrong within is found out by `grammar`."""


def of_response_format(asked: object) -> Constraint | None:
    """What OpenAI's `response_format` asks for; None for text.

    {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": {...}}}, where a
    name, a description and `strict` may stand beside the schema: it always holds. RequestError for anything else.
    """
    if asked is None:
        return None
    if not isinstance(asked, Mapping) or "type" not in asked:
        raise RequestError('response_format must be an object with a type, such as {"type": "json_object"}')
    kind, given = asked["type"], asked.get("json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint.json_object()
    if kind != "json_schema":
        raise RequestError(f"response_format.type is {kind!r}: use text, json_object or json_schema")
    if not isinstance(given, Mapping) or not isinstance(given.get("schema"), Mapping):
        raise RequestError('response_format.json_schema must hold the schema: give {"name": ..., "schema": {...}}')
    if not isinstance(given.get("strict"), bool | None):
        raise RequestError(f"response_format.json_schema.strict is {given['strict']!r}: give true or false")
    return Constraint.json_schema(given["schema"])


class Matcher(Protocol):
    """What a row's constraint says of texts: token ids behind the prompt. A function of these alone, whoever has
    asked for what before."""

    @property
    def problem(self) -> str:
        """Why some text could not be followed; empty if none."""
        ...

    def allowed(self, said: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which tokens may follow, [V]; None where none may, because the text is complete or cannot be so."""
        ...

    def is_complete(self, said: Sequence[int]) -> bool:
        """The constraint accepts the text, and nothing may follow but its end. `said` is settled: shorter texts
        will not be asked about again."""
        ...
