"""Text comes in whole characters, loses nothing, and never shows what a stop string takes away."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from forerun.engine.text import TextStream


def byte_level() -> Tokenizer:
    """256 bytes, a few merges and a special token, as GPT-2 writes them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    for merge in (("t", "h"), ("th", "e"), ("Ġ", "the")):
        vocab["".join(merge)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Pieces with blanks in front and bytes for the rest, as SentencePiece writes them."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "▁the", "the", "a", "b", "▁a", ".", "e", "n", "d"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
every_kind = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text byte by byte, whatever the tokenizer would rather do."""
    if tokenizer is KINDS["byte fallback"]:
        return [byte + 1 for byte in text.encode()]
    return [token for letter in text for token in tokenizer.encode(letter).ids]


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], *stops: str) -> tuple[TextStream, list]:
    one = TextStream(tokenizer, prompt, stops)
    return one, [*(one.feed(token) for token in output), one.finish()]


@every_kind
def test_a_character_appears_when_its_last_byte_has_come(tokenizer: Tokenizer) -> None:
    one, pieces = stream(tokenizer, spelled(tokenizer, "x"), spelled(tokenizer, "aé€😀b"))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert one.text == "aé€😀b"


@every_kind
@settings(max_examples=60, deadline=None)
@given(st.text("ab é€😀字.\n", min_size=1, max_size=20), st.text("ab é€😀字.\n", max_size=20))
def test_the_pieces_are_what_decoding_everything_adds(tokenizer: Tokenizer, prompt: str, output: str) -> None:
    one, pieces = stream(tokenizer, spelled(tokenizer, prompt), spelled(tokenizer, output))
    assert "".join(pieces) == one.text == output


@every_kind
@settings(max_examples=40, deadline=None)
@given(st.text("aé€😀字", min_size=2, max_size=12), st.data())
def test_a_prompt_may_end_within_a_character(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """The output completes the character, and nothing that stood before it is said again."""
    tokens = spelled(tokenizer, text)
    cut = data.draw(st.integers(1, len(tokens)))
    before = text.encode()[:cut].decode(errors="ignore")
    one, pieces = stream(tokenizer, tokens[:cut], tokens[cut:])
    assert "".join(pieces) == one.text == text[len(before) :]


@every_kind
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 40))
def test_any_tokens_make_some_text(tokenizer: Tokenizer, seed: int, before: int, after: int) -> None:
    """Models say bytes that are no characters; decoders that stream may give up on them ("invalid prefix")."""
    rng = random.Random(seed)
    tokens = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(before + after)]
    one, pieces = stream(tokenizer, tokens[:before], tokens[before:])
    assert "".join(pieces) == one.text
    whole, known = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens, tokens[:before]))
    if "�" not in whole + known:
        assert known + one.text == whole


@every_kind
def test_a_character_that_is_never_finished_is_broken_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = spelled(tokenizer, "a€")[:-1]
    one, pieces = stream(tokenizer, spelled(tokenizer, "x"), tokens)
    assert one.text.startswith("a�") and set(one.text[1:]) == {"�"}
    assert pieces[:-1] == ["a", "", ""]


def test_the_first_blank_of_the_output_is_not_lost() -> None:
    tokenizer = KINDS["byte fallback"]
    blank_the, a = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("a")
    assert stream(tokenizer, [a], [blank_the, blank_the])[0].text == " the the"
    assert stream(KINDS["byte level"], [0], [258, 258])[0].text == " the the"


@every_kind
def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<end>")
    a, b = spelled(tokenizer, "ab")
    _, pieces = stream(tokenizer, [end], [a, end, end, b, end])
    assert pieces == ["a", "", "", "b", "", ""]


# ---- stop strings


@every_kind
def test_a_stop_string_across_tokens_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    one = TextStream(tokenizer, spelled(tokenizer, "x"), ("end",))
    assert [one.feed(token) for token in spelled(tokenizer, "b en")] == ["b", " ", "", ""]
    assert not one.stopped
    assert one.feed(spelled(tokenizer, "d")[0]) == "" and one.stopped
    assert one.text == "b "
    assert one.feed(spelled(tokenizer, "a")[0]) == "" and one.finish() == "" and one.text == "b "


@every_kind
def test_what_looked_like_a_stop_string_is_text_after_all(tokenizer: Tokenizer) -> None:
    one, pieces = stream(tokenizer, spelled(tokenizer, "x"), spelled(tokenizer, "eena.en"), "end", "na!")
    assert pieces == ["", "e", "", "e", "na.", "", "", "en"]
    assert not one.stopped and one.text == "eena.en"


def test_of_two_stop_strings_the_one_that_begins_first_counts() -> None:
    tokenizer = KINDS["byte level"]
    the = tokenizer.encode(" the").ids  # one token that completes both
    assert stream(tokenizer, [0], the, "he", "e")[0].text == " t"
    assert stream(tokenizer, [0], the, "e", " th")[0].text == ""


def test_a_stop_string_may_end_within_a_token() -> None:
    tokenizer = KINDS["byte level"]
    one, pieces = stream(tokenizer, [0], [*spelled(tokenizer, "b"), *tokenizer.encode(" the").ids], "b t")
    assert one.stopped and one.text == "" and pieces == ["", "", ""]


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    tokenizer = KINDS["byte level"]
    one, _ = stream(tokenizer, spelled(tokenizer, "end en"), spelled(tokenizer, "d a"), "end")
    assert not one.stopped and one.text == "d a"


def test_a_stop_string_may_hold_characters_of_several_bytes() -> None:
    for tokenizer in KINDS.values():
        one, pieces = stream(tokenizer, spelled(tokenizer, "x"), spelled(tokenizer, "a€😀b"), "€😀")
        assert one.stopped and one.text == "a" and "".join(pieces) == "a"


@settings(max_examples=80, deadline=None)
@given(
    st.text("ab.", max_size=25),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_where_a_reader_would_first_see_a_stop_string(text: str, stops: list[str]) -> None:
    """Token by token, the first prefix of the text that holds a stop string ends it, where the stop string begins."""
    tokenizer = KINDS["byte level"]
    one, pieces = stream(tokenizer, spelled(tokenizer, "x"), spelled(tokenizer, text), *stops)
    expected = text
    for length in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:length].find(stop)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert one.text == expected == "".join(pieces)
    assert one.stopped == (expected != text)
