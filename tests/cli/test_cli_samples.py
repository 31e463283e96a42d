"""A sample as training shows it: special tokens can be seen, what is trained on is marked."""

from __future__ import annotations

import pytest
import transformers

from forerun.cli.narration import DRAFTED
from forerun.cli.samples import SPECIAL, decoded, marked

PROMPT, ANSWER = "def main(", " return 1"


@pytest.fixture(scope="module")
def tokenizer(family):
    return transformers.AutoTokenizer.from_pretrained(family / "target")


@pytest.fixture
def ids(tokenizer):
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    return [1, *tokenizer.encode(PROMPT, add_special_tokens=False)], [*answer, 2]


def test_special_tokens_are_spelled_and_have_a_colour_of_their_own(tokenizer, ids):
    begin, end = tokenizer.convert_ids_to_tokens([1, 2])
    text = marked(tokenizer, *ids, in_colour=True, lines=9)
    assert text.plain == f"{begin}{PROMPT}{ANSWER}{end}"
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == SPECIAL]
    assert coloured == [begin, end]
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == DRAFTED] == [f"{ANSWER}{end}"]


def test_without_colour_there_are_brackets(tokenizer, ids):
    end = tokenizer.convert_ids_to_tokens(2)
    assert marked(tokenizer, *ids, in_colour=False, lines=9).plain.endswith(f"{PROMPT}⟦{ANSWER}{end}⟧")


def test_of_a_long_prompt_the_last_lines(tokenizer):
    prompt = tokenizer.encode("a = 1\nb = 2\nc = 3\n", add_special_tokens=False)
    assert marked(tokenizer, prompt, [2], in_colour=False, lines=2).plain.startswith("c = 3\n⟦")


def test_ids_for_want_of_a_tokenizer():
    assert decoded(None, [1, 2], [3, 4]) == ("1 2 ", "3 4")
    assert marked(None, [1, 2], [3, 4], in_colour=False, lines=9).plain == "1 2 ⟦3 4⟧"
