"""Constrained answers: masks against the slow obvious version, laws by enumeration, texts of the reference family."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import regex
import torch
from tokenizers import Tokenizer, decoders, models

import forerun
from enumeration import Law, Luck, distance, ideal_dice, law_of, one_law
from fakes import TableNetwork, Wild, engine_of
from forerun import Constraint, RequestError, SamplingParams
from forerun.accept import judge
from forerun.chance import key_of
from forerun.constraint import Matcher, of_response_format
from forerun.engine.engine import Engine
from forerun.engine.load import drafter_for
from forerun.grammar import Grammars
from test_engine import SHORT, tables

llguidance = pytest.importorskip("llguidance", reason="constraints need llguidance: pip install 'forerun[grammar]'")

MODELS = Path(__file__).parents[1] / "models"
END = 3
"""Of the toy vocabulary."""


@cache
def family_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODELS / "target" / "tokenizer.json"))


def toy(*words: str) -> Any:
    """A byte-level tokenizer of these words, and one that ends texts."""
    known = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    known.decoder = decoders.ByteLevel()
    known.add_special_tokens(["<end>"])
    return SimpleNamespace(backend_tokenizer=known)


WORDS = ("a", "b", "ab")
TOY = toy(*WORDS)


def spelled(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens if token != END)


# ---- what is allowed: every token is tried behind the whole text


def bytes_of(token: str) -> str | None:
    """What a token of the reference family writes, a character per byte; None for those that write nothing."""
    if re.fullmatch(r"<\|\w+\|>", token):
        return None
    if byte := re.fullmatch(r"<0x(..)>", token):
        return chr(int(byte[1], 16))
    return token.replace("▁", " ").encode().decode("latin-1")


@pytest.mark.parametrize(
    "pattern", [r"(ab|b)*a?", r"[a-z]{1,6}( = \d+)?;", r"x\.(append|extend)\(\w*\)", r"\{\"a\": \[(\d,? ?)*\]\}"]
)
def test_exactly_the_tokens_with_which_the_text_can_still_match_are_allowed(pattern: str) -> None:
    """Walks through random texts, with steps back to any place: every one of 4,096 tokens is judged anew."""
    known = family_tokenizer()
    size, rng = known.get_vocab_size(), np.random.default_rng(len(pattern))
    texts = [bytes_of(known.id_to_token(token)) for token in range(size)]
    matcher = Grammars(known, size, [2]).matcher(Constraint.regex(pattern), [2, 7])
    partial_match = regex.compile(pattern, regex.ASCII).fullmatch
    walks: list[list[int]] = [[]]
    while len(walks) < 12:
        said = walks[rng.integers(len(walks))]
        text = "".join(texts[token] or "" for token in said)
        right = {n for n, more in enumerate(texts) if more and partial_match(text + more, partial=True)}
        is_whole = partial_match(text) is not None
        allowed = matcher.allowed(said)
        assert matcher.is_complete(said) == (is_whole and not right)
        if not right:
            assert allowed is None
            walks.remove(said)
            continue
        assert set(np.flatnonzero(allowed).tolist()) == right | ({2, 7} if is_whole else set())
        walks.append([*said, int(rng.choice(sorted(right)))])


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "constraint", [Constraint.json_schema(SCHEMA), Constraint.json_object()], ids=["schema", "any"]
)
def test_going_back_and_forth_changes_no_answer(constraint: Constraint) -> None:
    """Against a matcher that reads the whole text anew for every token, and has never been anywhere else."""
    words = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", '":', '"a', 'age":', "},", "12", '"]', "Ã", "©"]
    grammars, rng = Grammars(toy(*words).backend_tokenizer, len(words) + 1, [len(words)]), np.random.default_rng(5)

    def anew(said: Sequence[int]) -> bool:
        fresh = grammars.matcher(constraint, [len(words)])
        return fresh.allowed(said) is not None or fresh.is_complete(said)

    matcher, said = grammars.matcher(constraint, [len(words)]), [words.index("{")]
    for _ in range(25):
        allowed = matcher.allowed(said)
        if allowed is None or rng.random() < 0.3:
            said = said[: rng.integers(1, len(said) + 1)]
            continue
        assert [token for token in range(len(words)) if anew([*said, token])] == np.flatnonzero(allowed).tolist()
        said.append(int(rng.choice(np.flatnonzero(allowed))))


def test_the_end_is_allowed_exactly_where_the_constraint_accepts() -> None:
    grammars = Grammars(TOY.backend_tokenizer, 6, [END])  # 4 and 5 are no tokens, and some may name them as ends
    optional = grammars.matcher(Constraint.regex("ab?"), [END, 1, 5, 17])
    assert [optional.allowed(said).tolist() for said in ([], [0])] == [  # type: ignore[union-attr]
        [True, False, True, False, False, False],
        [False, True, False, True, False, True],
    ]
    assert optional.is_complete([2]) and optional.is_complete([0, 1]) and not optional.is_complete([0])
    assert optional.allowed([2]) is None and optional.allowed([1, 0]) is None and optional.allowed([0, END]) is None
    endless = grammars.matcher(Constraint.regex("a*"), [])  # whoever ignores the end
    assert np.flatnonzero(endless.allowed([0])).tolist() == [0]


def test_an_end_that_a_tokenizer_takes_for_text_is_none() -> None:
    """Not every tokenizer marks what ends a text as special."""
    known = toy("a", "b", ">").backend_tokenizer
    matcher = Grammars(known, 4, [2]).matcher(Constraint.regex("a(b|>)"), [2])
    assert np.flatnonzero(matcher.allowed([0])).tolist() == [1]


def test_whitespace_between_the_parts_of_json_comes_to_an_end() -> None:
    known = family_tokenizer()
    brace, blank = known.token_to_id("{"), known.token_to_id("▁")
    matcher = Grammars(known, 4096, [2]).matcher(Constraint.json_schema(SCHEMA), [2])
    assert matcher.allowed([brace, *[blank] * 39])[blank] and not matcher.allowed([brace, *[blank] * 40])[blank]
    own = Constraint.json_schema({**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}})
    assert not Grammars(known, 4096, [2]).matcher(own, [2]).allowed([brace, blank])[blank]


def test_choices_and_grammars() -> None:
    known = family_tokenizer()
    grammars = Grammars(known, 4096, [2])

    def follows(constraint: Constraint, text: str) -> bool:
        """In the tokens of single bytes."""
        matcher = grammars.matcher(constraint, [2])
        said = [known.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        after = matcher.allowed(said)
        return matcher.is_complete(said) or (after is not None and bool(after[2]))

    choice = Constraint.choice(["yes", 'a "no"', "ye", "naïve\n→", ""])
    assert all(follows(choice, text) for text in choice.value)
    assert not any(follows(choice, text) for text in ("y", "yesx", "a no"))
    nested = Constraint.lark('start: "(" start* ")"')
    assert follows(nested, "(()(()))") and not follows(nested, "(()") and not follows(nested, "())")


# ---- the law: what remains of the target's, renormalised, at every node


def constrained_law(target: TableNetwork, prompt: list[int], wishes: SamplingParams, pattern: str) -> Law:
    """Of whole outputs; every token is tried behind the whole text."""
    match, law = regex.compile(pattern).fullmatch, defaultdict(float)
    alive = {(): 1.0}
    while alive:
        output, probability = alive.popitem()
        text = spelled(output)
        may = [bool(match(text + word, partial=True)) for word in WORDS]
        is_over = output and not any(may)
        if is_over or len(output) == wishes.max_new_tokens or output[-1:] == (END,):
            law[output] += probability
            continue
        may.append(bool(match(text)))
        logits = target.logits([*prompt, *output]).clone()
        logits[[not one for one in may]] = -math.inf
        for token, share in enumerate(one_law(logits, wishes).tolist()):
            if share > 0:
                longer = (*output, token)
                alive[longer] = alive.get(longer, 0.0) + probability * share
    return dict(law)


def law_of_engine(make: Callable[[], Engine], prompt: list[int], wishes: SamplingParams) -> Law:
    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        with ideal_dice({key_of(seed): luck for seed, luck in enumerate(lucks)}):
            each = [replace(wishes, seed=seed) for seed in range(len(lucks))]
            return [tuple(one.token_ids) for one in make().generate([prompt] * len(lucks), each)]

    return law_of(program, at_once=128)


PATTERN = "(ab|b)*a?"
"""Where every second token may end the text, and an `a` in the end is the end."""
LAWS = ["none", "lookup", "small", "small, tree", "small, sampled tree", "verified, chain", "cascade, mixed", "wild"]


@cache
def small_tables() -> dict[str, TableNetwork]:
    return tables(4, 2, 1.0)


def toy_engine(drafter: Any, rows: int = 128) -> Engine:
    one = Wild(4, 4, seed=1) if drafter == "wild" else SHORT[drafter]
    return engine_of(small_tables()["target"], one, small_tables(), tokenizer=TOY, eos=[END], max_rows=rows)


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_the_targets_among_what_is_allowed(name: str) -> None:
    wishes = SamplingParams(
        temperature=1.3, top_p=0.95, max_new_tokens=3 if name in ("none", "lookup", "small") else 2, constraint=REGEX
    )
    law = law_of_engine(lambda: toy_engine(name), [1, 0], wishes)
    right = constrained_law(small_tables()["target"], [1, 0], wishes, PATTERN)
    assert distance(law, right) < 1e-6
    assert any(text[-1] == END for text in right) and any(len(text) < wishes.max_new_tokens for text in right)


REGEX = Constraint.regex(PATTERN)


def test_to_ask_the_constraint_before_the_draft_alone_would_be_wrong(monkeypatch: Any) -> None:
    """As if a mask were made for the next token, and not for the nodes of the draft."""
    edits_of = judge.edits_of

    def shallow(scores: torch.Tensor, params: Any, prefixes: Any, parents: Any, matcher: Matcher) -> Any:
        found = edits_of(scores[:1], params, prefixes[:1], parents[:1], matcher)
        return replace(found, scores_NV=torch.cat([found.scores_NV, scores[1:]]))

    monkeypatch.setattr(judge, "edits_of", shallow)
    wishes = SamplingParams(temperature=1.3, max_new_tokens=3, constraint=REGEX)
    law = law_of_engine(lambda: toy_engine("lookup"), [0, 1, 0, 1, 0], wishes)
    right = constrained_law(small_tables()["target"], [0, 1, 0, 1, 0], wishes, PATTERN)
    assert distance(law, right) > 1e-3


# ---- requests


@cache
def loaded(drafter: str) -> Engine:
    if drafter == "none":
        return forerun.load(MODELS / "target")
    base = loaded("none")
    return base.beside(drafter_for(base.target.network, drafter, tokenizer=base.tokenizer))


DRAFTERS = ["lookup", f"small:{MODELS / 'small'}", "hierarchy", "auto"]
PROMPTS = ["def person():\n    return ", "import json\n", "def person():\n    return ", "class Stack:\n"]
JSON = SamplingParams(max_new_tokens=100, constraint=Constraint.json_schema(SCHEMA))
WISHES = [
    JSON,
    replace(JSON, temperature=1.0, seed=1),
    replace(JSON, temperature=0.7, seed=2),
    SamplingParams(max_new_tokens=20),
]


@cache
def plain_texts() -> list[list[int]]:
    return [output.token_ids for output in loaded("none").generate(PROMPTS, WISHES)]


def check_schema(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 8
    assert type(found["age"]) is int and 0 <= found["age"] <= 150
    assert len(found["tags"]) <= 2 and set(found["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda spec: spec.split(":")[0])
def test_texts_of_a_schema_are_json_that_it_describes_whoever_drafts(drafter: str) -> None:
    """A free row runs beside them, and says what it says alone."""
    outputs = loaded(drafter).generate(PROMPTS, WISHES)
    for output in outputs[:3]:
        assert output.finish_reason == "stop" and output.stats.exact
        check_schema(output.text or "")
    same = [0, 3] if drafter.startswith("small") else range(4)  # what is drawn has luck of its own
    assert [outputs[n].token_ids for n in same] == [plain_texts()[n] for n in same]


def test_a_text_ends_where_nothing_else_may_follow() -> None:
    """By the end of the constraint, by the model's own end, or in the middle of what there is room for."""
    one = toy_engine("small", 4)
    (complete,) = one.generate([[1]], constraint={"choice": ["ab"]})
    assert (complete.text, complete.finish_reason) == ("ab", "stop") and END not in complete.token_ids
    assert complete.token_ids in ([0, 1], [2])
    (ended,) = one.generate([[1]], constraint={"regex": "a*"}, logit_bias={END: 9.0})
    assert (ended.token_ids[-1], ended.finish_reason) == (END, "stop")
    (endless,) = one.generate([[1]], constraint={"regex": "a*"}, logit_bias={END: 9.0}, ignore_eos=True, max_tokens=7)
    assert (endless.text, endless.finish_reason) == ("a" * 7, "length")
    (exact,) = one.generate([[1]], constraint={"regex": "a{5}"}, max_tokens=5)
    assert (exact.text, exact.finish_reason) == ("a" * 5, "stop")
    (stopped,) = one.generate([[1]], constraint={"regex": "a{5}"}, stop="aaa")
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_log_probabilities_are_the_models_own() -> None:
    one = toy_engine("lookup", 4)
    (output,) = one.generate([[1]], constraint={"regex": "a{4}"}, logprobs=4)
    prefix = [1]
    for token in output.logprobs or ():
        free = small_tables()["target"].logits(prefix).float().log_softmax(-1)
        assert token.logprob == pytest.approx(float(free[token.token_id]), abs=1e-6) and len(token.alternatives) == 4
        prefix.append(token.token_id)


@pytest.mark.parametrize("name", ["none", "small", "small, sampled tree"])
def test_whoever_has_nothing_left_to_say_is_told_so_and_the_others_go_on(name: str) -> None:
    one = toy_engine(name, 4)
    [stuck] = one.add(
        [1], SamplingParams(max_new_tokens=30, constraint=Constraint.regex("aaba"), logit_bias={1: -math.inf})
    )
    [free] = one.add([1], SamplingParams(max_new_tokens=30))
    pieces = []
    while not one.is_idle:
        pieces += one.step()
    last = {piece.request: piece for piece in pieces if piece.output}
    assert isinstance(last[stuck].error, RequestError) and "forbid every token" in str(last[stuck].error)
    assert (last[stuck].output.token_ids, last[stuck].finish_reason) == ([0, 0], "interrupted")
    assert last[free].error is None and last[free].output.token_ids == one.generate([[1]], max_tokens=30)[0].token_ids


def test_a_constraint_that_outgrows_its_limits_ends_its_own_text(monkeypatch: Any) -> None:
    limits = llguidance.LLParserLimits
    monkeypatch.setattr(llguidance, "LLParserLimits", partial(limits, max_lexer_states=60))
    one = toy_engine("none", 2)
    wishes = SamplingParams(max_new_tokens=400, constraint=Constraint.regex("(a|b|[ab]{1,4}){3,300}"), ignore_eos=True)
    with pytest.raises(RequestError, match=r"cannot be followed any further \(.*lexer.*\): give a simpler one"):
        one.generate([[1]], wishes)
    assert one.generate([[1]], max_tokens=3)


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"regx": "a"}, "did you mean regex?"),
        ({"regex": "a", "choice": ["b"]}, "one kind, not 2"),
        ({}, "one kind, not 0"),
        ({"regex": 5}, "is a text, not 5"),
        ({"regex": ""}, "not empty"),
        ({"lark": None}, "is a text"),
        ({"choice": "yes"}, "a choice is made among texts, not 'yes'"),
        ({"choice": []}, "at least one string"),
        ({"choice": [1, 2]}, "at least one string"),
        ({"choice": {"a"}}, "what JSON has"),
        ({"json_schema": "{'a': 1}"}, "is not JSON"),
        ({"json_schema": "[" * 100_000}, "is not JSON"),
        ({"json_schema": [1]}, "a JSON schema is an object, not [1]"),
        ({"json_schema": {"const": math.nan}}, "what JSON has"),
        ({"json_object": {"type": "object"}}, "a schema goes to json_schema"),
        (7, "constraint=7 makes no sense"),
    ],
    ids=str,
)
def test_what_is_no_constraint_is_refused(given: Any, says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        SamplingParams(constraint=given)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint.regex("(ab"), "unclosed group"),
        (Constraint.regex("(" * 5000), r"\( \.\.\. .*error"),
        (Constraint.regex("(?=a)b"), "look-around"),
        (Constraint.regex("c"), "allows no text that the tokenizer can spell"),
        (Constraint.regex("(a|b){0}"), "allows nothing but the empty text"),
        (Constraint.choice([""]), "allows nothing but the empty text"),
        (Constraint.json_schema({"type": "strin"}), "Invalid type: strin"),
        (Constraint.json_schema({"not": {"type": "null"}}), "Unimplemented keys"),
        (Constraint.json_schema({"type": "null", "x-guidance": 5}), "cannot be used"),
        (Constraint.lark("start: foo"), 'unknown name: "foo"'),
        (Constraint.lark("start: start"), "cannot be used|allows no text"),
        (Constraint.lark('start: "' + "a" * 500), r"a\.\.\. cannot be used"),
    ],
    ids=lambda one: one.text[:12] if isinstance(one, Constraint) else "",
)
def test_what_cannot_be_followed_is_refused_in_one_sentence_before_anything_runs(
    constraint: Constraint, says: str
) -> None:
    one = toy_engine("none", 2)
    with pytest.raises(RequestError, match=says) as refusal:
        one.stream([[1], [0]], [SamplingParams(), SamplingParams(constraint=constraint)])
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400 and one.is_idle


def test_a_tokenizer_that_does_not_tell_its_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    gaps = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 3}, []))
    gaps.decoder = decoders.ByteLevel()
    for known, says in ((words, "does not tell them .*decoder"), (gaps, "its ids have gaps")):
        with pytest.raises(RequestError, match=says):
            Grammars(known, 4, []).matcher(Constraint.regex("a"), [])
    with pytest.raises(RequestError, match="needs a tokenizer"):
        engine_of(small_tables()["target"]).generate([[1]], constraint={"regex": "a"})


# ---- as data


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.json_schema(SCHEMA),
        Constraint.json_schema(json.dumps(SCHEMA)),
        Constraint.json_object(),
        Constraint.regex("a+"),
        Constraint.choice(("yes", "no")),
        Constraint.lark('start: "a"'),
    ],
    ids=lambda one: one.kind,
)
def test_a_constraint_is_data(constraint: Constraint) -> None:
    assert Constraint.of(json.loads(json.dumps(constraint.as_dict()))) == constraint
    assert SamplingParams.of({"constraint": constraint.as_dict()}) == SamplingParams(constraint=constraint)
    assert hash(constraint) == hash(replace(constraint))


def test_properties_keep_their_order() -> None:
    schema = {"properties": {"b": {}, "a": {}}}
    assert list(Constraint.json_schema(schema).value["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("asked", "means"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint.json_object()),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, Constraint.json_schema(SCHEMA)),
        (
            {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}},
            Constraint.json_schema(SCHEMA),
        ),
    ],
)
def test_response_formats_of_openai(asked: Any, means: Constraint | None) -> None:
    assert of_response_format(asked) == means


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("json", "must be an object with a type"),
        ({"schema": {}}, "must be an object with a type"),
        ({"type": "yaml"}, "'yaml': use text, json_object or json_schema"),
        ({"type": ["text"]}, "use text, json_object or json_schema"),
        ({"type": "json_schema"}, "must hold the schema"),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": "object"}}, "must hold the schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}, "give true or false"),
    ],
    ids=str,
)
def test_response_formats_that_make_no_sense_are_refused(asked: Any, says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        of_response_format(asked)
