"""A GGUF file's tokenizer gives the tokens of the one that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import forerun
from forerun.cli import run
from forerun.drafters.auto import beside
from forerun.drafting.planned import place_of_plan
from forerun.errors import CheckpointError
from forerun.nn.load import load_network
from forerun.nn.save import save_beside
from forerun.nn.transformer import Transformer
from forerun.sampling import SamplingParams
from forerun.sources.source import Source
from nn.feeding import CPU, small_model
from sources.exported import Vocabulary, export, sentencepiece

TARGET = Path(__file__).parents[2] / "models" / "target"
HARD = (
    "",
    " ",
    "plain words",
    "  two spaces,   three,\tand a tab\t\t",
    "a\nb\n\nc\r\nd\n\n\n    indented(self):\n\t\treturn",
    "Größe naïve café co\u0301mbining e\u0301 ÅA\u030a",
    "日本語と中文混排 한국어 العربية עברית हिन्दी ไทย",
    "emoji 🙂👩‍👩‍👧‍👦 flags 🇩🇪 rare \U0001d518\U0001d52b \U0001f9ff",
    "numbers 1 12 123 1234 12345 3.14 1,000,000 ½ ②",
    "don't I'll WE'VE it\u2019s ''quoted'' \"double\" #$%^&*()_+",
    "zero\u200bwidth nbsp\u00a0here \u3000wide \ufeff bom \x00\x01 control",
    "CamelCase snake_case kebab-case iPhone McDonald's",
    "<|bos|>special<|eos|> <s> </s> <0x0A> [INST] <|im_start|>user\nhi<|im_end|>\n<think>why</think>",
    "\u2581\u2581marks\u2581 itself",
    "trailing   ",
)


def with_vocabulary(path: Path, vocabulary: Vocabulary) -> Source:
    return Source.of(export(small_model("llama", vocab_size=8), path, vocabulary=vocabulary))


def assert_same(ours: Any, theirs: Any, texts: Sequence[str] = HARD) -> None:
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


# ---- SentencePiece


def test_the_reference_target(tmp_path: Path) -> None:
    source, original = with_vocabulary(tmp_path / "m.gguf", sentencepiece(TARGET)), Source.of(TARGET)
    assert_same(source.tokenizer, original.tokenizer, [*HARD, (TARGET.parents[1] / "README.md").read_text()])
    assert source.vocabulary_fingerprint == original.vocabulary_fingerprint
    assert source.tokenizer is source.tokenizer and source.template is None and source.ends == (2,)


def test_a_space_before_the_text(tmp_path: Path) -> None:
    """As Llama 2 and Mistral have it."""
    spm = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString((TARGET / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    processor = spm.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def spaced(writer: Any) -> None:
        sentencepiece(TARGET)(writer)
        writer.kv_data[0].pop("tokenizer.ggml.add_space_prefix")

    ours: Any = with_vocabulary(tmp_path / "m.gguf", spaced).tokenizer
    for text in HARD:
        if "<|" not in text and "\u2581" not in text and "\0" not in text:
            ids = processor.encode(text)
            assert ours(text)["input_ids"] == [1, *ids], text
            assert ours.decode(ids) == text
    assert ours("<|eos|>a")["input_ids"] == [1, 2, *processor.encode("a")]


# ---- bytes

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ORIGINALS: dict[str, Callable[[], tuple[Any, list[Any], bool]]] = {
    "qwen2": lambda: (normalizers.NFC(), _split(WORDS + r"\p{N}" + REST), False),
    "llama-bpe": lambda: (None, _split(WORDS + r"\p{N}{1,3}" + REST), True),
    "gpt-2": lambda: (None, [pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "smollm": lambda: (None, [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
}
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def trained(pre: str) -> Any:
    """A byte-level tokenizer as a family publishes it, with 600 tokens learnt from this file."""
    normalizer, splits, whole = ORIGINALS[pre]()
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(), *HARD], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level(original: Any, pre: str | None) -> Vocabulary:
    """What the converter says of a tokenizer.json."""
    state = original.backend_tokenizer
    model = __import__("json").loads(state.to_str())["model"]

    def add(writer: Any) -> None:
        tokens = [token for token, _ in sorted(state.get_vocab().items(), key=lambda pair: pair[1])]
        kinds = [3 if token in SPECIAL else 4 if "think" in token else 1 for token in tokens]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, "[PAD606]", "[PAD607]"])
        writer.add_token_types([*kinds, 5, 5])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(tokens.index("<|begin|>"))
        writer.add_eos_token_id(tokens.index("<|endoftext|>"))
        writer.add_add_bos_token(False)
        writer.add_chat_template(
            "{{ bos_token }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
        )

    return add


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    original = trained(pre)
    source = with_vocabulary(tmp_path / "m.gguf", byte_level(original, pre))
    assert_same(source.tokenizer, original, [*HARD, Path(__file__).read_text()])
    assert source.vocabulary_fingerprint  # ids without tokens are no tokens
    assert source.tokenizer is not None
    assert source.tokenizer.backend_tokenizer.get_vocab() == original.backend_tokenizer.get_vocab()
    ids = original.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert source.ends == tuple(ids)
    assert source.template is not None
    found: Any = source.tokenizer
    said = found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|begin|>userhi<|endoftext|>"


def test_the_begin_token(tmp_path: Path) -> None:
    """Where a file is silent, the rule by which it splits decides; and some end what they begin."""
    original = trained("llama-bpe")
    begin, end = original.convert_tokens_to_ids(["<|begin|>", "<|endoftext|>"])

    def silent(writer: Any) -> None:
        byte_level(original, "llama-bpe")(writer)
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token")
        writer.add_add_eos_token(True)

    ours: Any = with_vocabulary(tmp_path / "m.gguf", silent).tokenizer
    assert ours("a")["input_ids"] == [begin, *original("a")["input_ids"], end]


# ---- refusals


def test_tokenizers_that_are_not_known(tmp_path: Path) -> None:
    original = trained("gpt-2")
    for pre, words in (("strange", "splits a text as strange"), (None, "does not say how its tokenizer splits")):
        with pytest.raises(CheckpointError, match=words):
            _ = with_vocabulary(tmp_path / "m.gguf", byte_level(original, pre)).tokenizer

    def other(writer: Any) -> None:
        writer.add_tokenizer_model("rwkv")

    with pytest.raises(CheckpointError, match="a tokenizer of the kind rwkv, and llama, gpt2 are read"):
        _ = with_vocabulary(tmp_path / "m.gguf", other).tokenizer

    def broken(writer: Any) -> None:
        byte_level(original, "gpt-2")(writer)
        writer.kv_data[0].pop("tokenizer.ggml.merges")
        writer.add_token_merges(["no such"])

    with pytest.raises(CheckpointError, match=r"the tokenizer in .* is damaged"):
        _ = with_vocabulary(tmp_path / "m.gguf", broken).tokenizer


def test_no_tokenizer(tmp_path: Path) -> None:
    source = Source.of(export(small_model("llama"), tmp_path / "m.gguf"))
    assert source.tokenizer is None and source.vocabulary_fingerprint == "" and source.ends == ()


# ---- all of it


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference target as a file of bf16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype="float32")
    return export(model, tmp_path_factory.mktemp("gguf") / "target.gguf", "BF16", sentencepiece(TARGET))


def test_the_reference_target_says_the_same(target: Path) -> None:
    params = SamplingParams(max_new_tokens=16)
    said = [forerun.load(path, dtype="fp32").generate("def main(", params)[0].text for path in (target, TARGET)]
    assert said[0] == said[1] and said[0]


def test_a_draft_model_made_out_of_a_file_has_its_tokenizer(target: Path, tmp_path: Path) -> None:
    network = load_network(target, torch.float32, CPU)
    assert isinstance(network, Transformer)
    save_beside(network, Source.of(target), tmp_path / "made")
    made, original = Source.of(tmp_path / "made"), Source.of(target)
    assert made.ends == original.ends and made.vocabulary_fingerprint == original.vocabulary_fingerprint
    assert_same(made.tokenizer, original.tokenizer)
    assert made.weights.dtype == torch.bfloat16


def test_what_lies_beside_a_file(target: Path, tmp_path: Path) -> None:
    """A much smaller file of the same tokens drafts; one of other tokens, and what is no model, do not."""
    large = tmp_path / "large.gguf"
    large.write_bytes(target.read_bytes())
    small = export(small_model("llama", vocab_size=4096), tmp_path / "small.gguf", vocabulary=sentencepiece(TARGET))
    export(small_model("llama"), tmp_path / "other.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    heads, models = beside(large)
    assert heads == [] and models == [{"drafter": "small", "checkpoint": str(small)}]
    assert place_of_plan(large) == tmp_path / "large.forerun-plan.json"
    assert place_of_plan(tmp_path) == tmp_path / "forerun-plan.json"


def test_a_command(target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--drafter", "lookup", "--max-new-tokens", "8", "--quiet"]
    said = []
    for path in (target, TARGET):
        assert run(["generate", str(path), "def main(", "--dtype", "fp32", *options]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 8
