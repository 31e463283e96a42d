"""`forerun generate` with --json-schema, --regex, --choice and --lark."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("llguidance")

SHORT = ("x = ", "--max-new-tokens", 40, "--dtype", "fp32", "--drafter", "lookup")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 23]}},
    "required": ["a"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " ?"},
}


def test_the_text_is_what_was_asked_for(family, said, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "pairs.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('start: "(" pair? ")"\npair: "x" | "y"\n')
    for given in (schema, json.dumps(SCHEMA)):
        found = said("generate", family / "target", *SHORT, "--json-schema", given)
        assert json.loads(found["text"])["a"] in (1, 23) and found["finish_reason"] == "stop"
    options = ("generate", family / "target", *SHORT, "--temperature", 1, "--seed", 3)
    assert re.fullmatch(r"[a-c]{4}", said(*options, "--regex", "[a-c]{4}")["text"])
    assert said(*options, "--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    assert said(*options, "--lark", grammar)["text"] in ("()", "(x)", "(y)")


def test_rows_of_another_constraint_are_not_gone_on_with(family, forerun, refused, tmp_path):
    options = ("generate", family / "target", *SHORT, "--out", tmp_path / "o.jsonl", "--choice", "yes")
    assert forerun(*options)[0] == 0
    row = json.loads((tmp_path / "o.jsonl").read_text())
    assert row["settings"]["constraint"] == {"choice": ["yes"]} and row["text"] == "yes"
    assert forerun(*options)[1].endswith("0 new texts, 1 from before\n")
    assert 'with constraint {"choice": ["yes"]}, and now' in refused(*options, "--choice", "no")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--regex", "a", "--choice", "b"), "--regex and --choice exclude one another"),
        (("--regex", "(a"), "unclosed group"),
        (("--json-schema", "{'a': 1}"), "is not JSON"),
        (("--json-schema", "nowhere.json"), "cannot read nowhere.json (No such file or directory)"),
        (("--lark", "."), "cannot read . ("),
    ],
)
def test_what_cannot_be_followed_is_refused(family, refused, options, says):
    assert says in refused("generate", family / "target", *SHORT, *options)
