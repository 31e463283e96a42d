"""The reference family's tokenizer: a SentencePiece BPE, written so that every engine reads the same ids.

A model folder gets `tokenizer.model` (SentencePiece; llama.cpp's converter wants it) and `tokenizer.json` with
`tokenizer_config.json` (Hugging Face). Source text round trips exactly: nothing is normalised, no blank is added in
front, and a character outside the vocabulary becomes its UTF-8 bytes. Two exceptions are inherited: U+2581,
SentencePiece's own sign for a blank, comes back as one, and Hugging Face reads the literal name of a special token as
that token.

Python's layout is made cheap without special symbols. A line end belongs to the end of the line before it (`:` and its
line end are one token) and never to the text after it, so a text cut at a line end is cut at a token's end; runs of
blanks are tokens of their own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.errors import TrainingError
from forerun.files import put
from forerun.sources.tokenizer import merges_of

UNKNOWN, BOS, EOS = "<|unk|>", "<|bos|>", "<|eos|>"  # not "<s>": source code writes that, in regular expressions
SPACE_MARK = "\u2581"
MODEL_MAX_LENGTH = 2048

_BOUNDARY = "\ue000"  # private use; tells the trainer where no piece may cross, and is gone afterwards
_PASSAGE_CHARACTERS = 4000
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F))) + "\n"


@dataclass(frozen=True)
class Settings:
    """The size of the vocabulary, and about how many characters of text to read for it."""

    vocabulary: int = 4096
    characters: int = 80_000_000


def train(texts: Iterable[str], settings: Settings = Settings()) -> bytes:
    """A SentencePiece model, as its file's bytes. Raises TrainingError if the texts cannot fill the vocabulary."""
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=passages(texts, settings.characters),
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocabulary,
            byte_fallback=True,
            unk_piece=UNKNOWN,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            split_digits=True,
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pretokenization_delimiter=_BOUNDARY,
            required_chars=_PRINTABLE,
            character_coverage=0.9997,
            max_sentence_length=16 * _PASSAGE_CHARACTERS,
            max_sentencepiece_length=16,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = f"cannot train a vocabulary of {settings.vocabulary} tokens on this text: {error}"
        raise TrainingError(reason) from error
    return model.getvalue()


def passages(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts in passages of a few thousand characters, with a boundary after every run of line ends.

    Stops after about `characters`. The boundary also keeps a passage's last line end, which the trainer would strip.
    """
    for text in texts:
        for start in range(0, min(len(text), characters), _PASSAGE_CHARACTERS):
            passage = text[start : start + _PASSAGE_CHARACTERS].replace("\t", "    ").replace("\0", "")
            yield re.sub(r"\n+", lambda ends: ends.group() + _BOUNDARY, passage.replace(_BOUNDARY, ""))
        characters -= len(text)
        if characters <= 0:
            return


def write(model: bytes, folder: Path) -> None:
    """Writes the SentencePiece model and its Hugging Face twin into a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / "tokenizer.model", model)
    put(folder / "tokenizer.json", fast(model).to_str(pretty=True).encode() + b"\n")
    put(folder / "tokenizer_config.json", json.dumps(config(), indent=2).encode() + b"\n")
    put(folder / "special_tokens_map.json", json.dumps(_special_tokens(), indent=2).encode() + b"\n")


def config() -> dict[str, Any]:
    """tokenizer_config.json. The general fast class reads tokenizer.json as it stands, without a conversion."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
    }


def _special_tokens() -> dict[str, str]:
    return {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS}


def fast(model: bytes) -> Any:
    """The `tokenizers.Tokenizer` with the ids of SentencePiece; special tokens, when wanted, are BOS in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = pieces_of(model)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = merges_of([piece for piece in pieces if not _is_special(piece)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (UNKNOWN, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def pieces_of(model: bytes) -> list[str]:
    """The vocabulary in id order; merged pieces come in the order in which they were merged, then single characters."""
    processor = processor_of(model)
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]


def _is_special(piece: str) -> bool:
    return piece in (UNKNOWN, BOS, EOS) or re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None


def processor_of(model: bytes) -> Any:
    """SentencePiece's own reading of a model: `.encode(text)` gives ids without BOS."""
    return _sentencepiece().SentencePieceProcessor(model_proto=model)


@dataclass(frozen=True)
class Agreement:
    """What `compare` found: how many texts, how many of them differ, and how well the vocabulary compresses them."""

    texts: int
    differing: int
    not_round_tripping: int
    characters_per_token: float

    @property
    def is_exact(self) -> bool:
        return self.differing == 0 and self.not_round_tripping == 0


def compare(folder: Path, texts: Iterable[str]) -> Agreement:
    """Encodes every text by SentencePiece and by transformers' AutoTokenizer, and decodes it again."""
    from transformers import AutoTokenizer

    ours = processor_of((folder / "tokenizer.model").read_bytes())
    theirs = AutoTokenizer.from_pretrained(folder)
    count = differing = broken = characters = tokens = 0
    for text in texts:
        ids = ours.encode(text)
        count, characters, tokens = count + 1, characters + len(text), tokens + len(ids)
        differing += theirs(text)["input_ids"] != [ours.bos_id(), *ids]
        broken += theirs.decode(ids) != text or ours.decode(ids) != text
    return Agreement(count, differing, broken, characters / max(tokens, 1))


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        reason = "training a tokenizer needs sentencepiece; install it with: pip install 'forerun[train]'"
        raise TrainingError(reason) from error
    return sentencepiece
