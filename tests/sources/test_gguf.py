"""GGUF files: the same model as in a Hugging Face folder, and one sentence for whatever cannot be read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from forerun.errors import CheckpointError, ForerunError
from forerun.native.library import why_not
from forerun.nn.load import load_network
from forerun.sources.gguf import head as heads
from forerun.sources.gguf import weights as pieces
from forerun.sources.source import Source
from forerun.sources.weights import whole
from nn.feeding import CPU, Reader, plain, saved, small_model, some_tokens
from sources.exported import export, gguf

TEXT = some_tokens(12)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
"""Blocks of the K formats are 256 numbers."""
QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
HAND_MADE = {"Q2_K": 2, "Q3_K": 1, "Q4_K": 2, "Q5_K": 2, "Q6_K": 1, "IQ4_NL": 1, "IQ4_XS": 1}
"""The package cannot make these: random bits under scales of a sensible size. So many half floats are scales."""
SCALES = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208, "IQ4_NL": 0, "IQ4_XS": 0}
KERNELS = ["torch", *([] if why_not(CPU, torch.float32, at_any_speed=True) else ["native"])]


def logits(path: Path, kernels: str = "torch", **options: Any) -> Tensor:
    return Reader(load_network(path, torch.float32, CPU, kernels, **options)).read([TEXT]).logits_BNV


def blocks(shape: tuple[int, ...], format_: str) -> np.ndarray:
    """Random bytes with scales of about a hundredth."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_]]
    chance = np.random.default_rng(len(format_))
    found = chance.integers(0, 256, (shape[0], shape[1] // size, nbytes), dtype=np.uint8)
    for number in range(HAND_MADE[format_]):
        scale = chance.uniform(0.0001, 0.0003, found.shape[:2]).astype(np.float16)
        begin = SCALES[format_] + 2 * number
        found[..., begin : begin + 2] = scale[..., None].view(np.uint8)
    return found.reshape(shape[0], -1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return export(small_model("llama"), tmp_path / "tiny.gguf")


@pytest.fixture
def refused() -> Callable[[Path], str]:
    def refusal(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            load_network(path, torch.float32, CPU)
        return str(error.value)

    return refusal


# ---- the same model


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "wide heads": ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_what_its_folder_says_bit_for_bit(family: str, tmp_path: Path) -> None:
    kind, choices = FAMILIES[family]
    model = small_model(kind, **choices)
    window = choices.get("sliding_window")
    path = export(
        model,
        tmp_path / "model.gguf",
        metadata=lambda writer: writer.add_sliding_window(window) if window else None,
    )
    folder = saved(model, tmp_path / "folder")
    assert Source.of(path).config.model_type == kind
    for kernels in KERNELS:
        assert torch.equal(logits(path, kernels), logits(folder, kernels))
    torch.testing.assert_close(logits(path), plain(model, TEXT).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("format_", ["F16", "BF16", *QUANTISED, *HAND_MADE])
def test_every_format(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are those of a folder with the numbers that the package makes of the blocks. Pieces are small, so that
    permuted rows come from several."""
    monkeypatch.setattr(pieces, "NUMBERS", 256 * 24)
    model = small_model("llama", **WIDE, num_key_value_heads=2)

    def make(tensors: dict[str, tuple[np.ndarray, str]]) -> None:
        for name, (array, kind) in tensors.items():
            if kind in HAND_MADE:
                tensors[name] = (blocks(array.shape, kind), kind)

    path = export(model, tmp_path / "model.gguf", format_, change=make)
    config = saved(model, tmp_path / "folder") / "config.json"
    save_file(_numbers(path), config.with_name("model.safetensors"), metadata={"format": "pt"})
    assert all(torch.isfinite(tensor).all() for tensor in _numbers(path).values())
    for kernels in KERNELS:
        assert torch.equal(logits(path, kernels), logits(config.parent, kernels))


def _numbers(path: Path) -> dict[str, Tensor]:
    """All tensors of a Llama as the package reads them, in Hugging Face's order."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for part, count in (("attn_q", 4), ("attn_k", 2)):
            if part in tensor.name:
                numbers = numbers.view(count, -1, 2, numbers.shape[-1]).transpose(1, 2).reshape(numbers.shape)
        found[pieces.published(tensor.name)] = numbers.contiguous()
    return found


def test_a_format_for_each_kind_of_matrix_and_int8(tmp_path: Path) -> None:
    model = small_model("llama", **WIDE)
    path = export(model, tmp_path / "model.gguf", {"attn_q": "Q8_0", "ffn_down": "Q5_1", "token_embd": "F16"})
    assert logits(path).isfinite().all()
    assert Source.of(path).weights.dtype == torch.bfloat16
    if "native" in KERNELS:
        int8 = logits(path, "native", weights="int8")
        torch.testing.assert_close(int8, logits(path, "native"), atol=0.5, rtol=0.5)


def test_shards(tiny: Path, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    whole_file = heads.Head.of(tiny)
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    names = list(whole_file.tensors)
    for path, some in zip(parts, (names[:9], names[9:]), strict=True):
        model = small_model("llama")
        export(model, path, change=lambda tensors, some=some: [tensors.pop(n) for n in [*tensors] if n not in some])
    assert torch.equal(logits(parts[0]), logits(tiny))
    assert torch.equal(logits(parts[1]), logits(tiny))
    assert Source.of(parts[0]).name == "m"
    parts[1].unlink()
    assert "m-00002-of-00002.gguf is missing" in refused(parts[0])


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rotary_frequencies(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": 16}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = small_model("llama", rope_parameters=rope, head_dim=32)

    def say(writer: Any) -> None:
        if kind != "llama3":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(16)

    def add(tensors: dict[str, tuple[np.ndarray, str]]) -> None:
        if kind == "llama3":
            plain_ones = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
            scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model.config)
            tensors["rope_freqs.weight"] = ((plain_ones / scaled).numpy(), "F32")

    path = export(model, tmp_path / "model.gguf", change=add, metadata=say)
    assert torch.equal(logits(path), logits(saved(model, tmp_path / "folder")))
    assert not torch.equal(logits(path), logits(export(model, tmp_path / "unscaled.gguf")))


def test_loading_needs_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "NUMBERS", 1000)
    path = export(small_model("llama", **WIDE), tmp_path / "model.gguf", "Q8_0")
    source = Source.of(path)
    sizes = [piece.rows.numel() for piece in source.weights.pieces(source.weights.stored())]
    assert max(sizes) <= 1000 and sum(sizes) == sum(
        np.prod(held.shape) for held in heads.Head.of(path).tensors.values()
    )
    assert whole(source.weights, "model.embed_tokens.weight").shape == (61, 256)


# ---- fingerprints


def test_a_copy_is_the_same_model_and_a_change_is_another(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    assert Source.of(copy).fingerprint == Source.of(tiny).fingerprint
    changed = bytearray(tiny.read_bytes())
    changed[-5] ^= 1
    copy.write_bytes(changed)
    assert Source.of(copy).fingerprint != Source.of(tiny).fingerprint
    export(small_model("llama"), copy, metadata=lambda writer: writer.add_name("another"))
    assert Source.of(copy).fingerprint != Source.of(tiny).fingerprint


# ---- refusals


def test_files_that_are_damaged(tiny: Path, refused: Callable[[Path], str]) -> None:
    content = tiny.read_bytes()
    for cut in (30, 200, len(content) - 1):
        tiny.write_bytes(content[:cut])
        assert "cut short" in refused(tiny) and refused(tiny).count("\n") == 0
    tiny.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF of version 1" in refused(tiny)
    tiny.write_bytes(b"hello")
    assert "is no GGUF file" in refused(tiny)
    tiny.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64))
    assert "damaged" in refused(tiny)


def test_tensors_that_are_not_there_or_too_many(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    model = small_model("llama")
    path = export(model, tmp_path / "m.gguf", change=lambda tensors: tensors.pop("blk.1.attn_q.weight"))
    assert "missing     model.layers.1.self_attn.q_proj.weight [32, 32]" in refused(path)
    assert "not those that its metadata calls for" in refused(path)
    extra = (np.ones((2, 2), np.float32), "F32")
    path = export(model, tmp_path / "m.gguf", change=lambda tensors: tensors.update({"blk.1.strange.weight": extra}))
    assert "unexpected  blk.1.strange.weight [2, 2]" in refused(path)


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (lambda writer: writer.add_expert_count(8), "asks for llama.expert_count 8"),
        (lambda writer: writer.add_rope_dimension_count(4), "rope.dimension_count 4 with heads of 8"),
        (lambda writer: writer.add_logit_scale(0.5), "asks for llama.logit_scale 0.5"),
    ],
)
def test_what_our_families_do_not_have(say: Any, words: str, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    assert words in refused(export(small_model("llama"), tmp_path / "m.gguf", metadata=say))


def test_metadata_that_is_missing(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((3, 8), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert "says nothing for llama.embedding_length" in refused(path)


def test_strange_architectures_and_formats(tiny: Path, refused: Callable[[Path], str]) -> None:
    content = tiny.read_bytes()
    tiny.write_bytes(content.replace(b"llama", b"mamba"))
    assert "holds the architecture mamba, and of GGUF files llama, qwen2, qwen3 are read" in refused(tiny)
    tiny.write_bytes(_with_type(content, "blk.0.attn_q.weight", gguf.GGMLQuantizationType.MXFP4))
    assert "has blk.0.attn_q.weight [32, 32] in the format MXFP4" in refused(tiny)
    tiny.write_bytes(_with_type(content, "blk.0.attn_q.weight", 99))
    assert "in the format type 99" in refused(tiny)
    tiny.write_bytes(_with_type(content, "output_norm.weight", gguf.GGMLQuantizationType.Q8_0))
    assert "has output_norm.weight [32] in the format Q8_0" in refused(tiny)
    tiny.write_bytes(_with_type(content, "output_norm.weight", gguf.GGMLQuantizationType.Q4_K))
    assert "rows of 32 numbers in blocks of 256" in refused(tiny)


def _with_type(content: bytes, name: str, kind: int) -> bytes:
    """The same file, with another number for the format of a tensor."""
    at = content.index(name.encode()) + len(name)
    (dimensions,) = struct.unpack_from("<I", content, at)
    changed = bytearray(content)
    struct.pack_into("<I", changed, at + 4 + 8 * dimensions, kind)
    return bytes(changed)


def test_a_folder_of_files_and_other_files(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds models in GGUF files: give one of them, such as .*tiny\.gguf"):
        load_network(tiny.parent, torch.float32, CPU)
    (tiny.parent / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is a file: give the folder .*, or a GGUF file"):
        Source.of(tiny.parent / "text.txt")


def test_without_the_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ForerunError, match=r"pip install 'forerun\[gguf\]'"):
        load_network(tiny, torch.float32, CPU)
