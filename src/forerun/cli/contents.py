"""What a file or folder is that some command of forerun, or another engine, has written. As plain values."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.drafting.acceptance import KIND
from forerun.errors import CheckpointError, ForerunError
from forerun.sources.folder import CONFIG
from forerun.sources.gguf.head import Head, Held

if TYPE_CHECKING:
    import torch

    from forerun.sources.source import Source

Facts = dict[str, Any]


def of_file(path: Path) -> dict[str, Facts]:
    """What a file is (but a GGUF), under the word for its kind. Raises ForerunError if it is nothing that we know."""
    from forerun.stores.index import is_store

    if path.suffix in (".json", ".yaml", ".yml"):
        return _described(path)
    if is_store(path):
        return {"store": _store(path)}
    if found := _rows(path):
        return found
    raise ForerunError(
        f"{path} is nothing that forerun knows: give a model's or heads' folder, a store, a tree, a drafter's"
        " description, answers, or a GGUF"
    )


def heads_in(folder: Path) -> Facts | None:
    """What the draft heads in a folder are, in any layout; None if it holds none."""
    from forerun.drafting.checkpoint import TREE

    config = _parsed(_text(folder / CONFIG)) if (folder / CONFIG).is_file() else {}
    if not _are_heads(folder, config):
        return None
    if config.get("drafter") == KIND:
        return _acceptance_head(folder)
    from forerun.layouts import exchange

    heads = exchange.read(folder)
    training = heads.training
    data = training.get("data") or {}
    found = {
        "path": str(folder),
        "drafter": heads.drafter,
        "layout": heads.layout,
        "preset": training.get("preset", ""),
        "for_the_target": heads.target,
        "heads": heads.config.heads,
        "layers_per_head": heads.config.layers,
        "width": heads.config.width,
        "vocabulary": heads.config.vocab_size,
        "output_matrices": heads.config.vocabulary,
        "parameters": heads.parameters,
        "dtype": str(heads.dtype).removeprefix("torch."),
        "trained_on": (data.get("source") or {}).get("kind", ""),
        "use": f"--drafter {heads.drafter}:{folder}"
        if heads.layout == "ours"
        else f"forerun convert {folder} --to ours",
    }
    tree = _tree(folder / TREE) if (folder / TREE).is_file() else {"tree": "not calibrated: see forerun calibrate"}
    return {name: value for name, value in found.items() if value != ""} | tree


def _acceptance_head(folder: Path) -> Facts:
    from forerun.drafting import checkpoint as checkpoints
    from forerun.drafting.acceptance.head import opened

    stored, head = checkpoints.read(folder), opened(str(folder))
    return {
        "path": str(folder),
        "kind": "acceptance head",
        "for_the_target": stored.target,
        "draft_model": stored.training.get("draft_model", ""),
        "width": head.config.width,
        "blocks": head.config.depth,
        "tied": head.config.tie_blocks,
        "parameters": sum(one.numel() for one in head.parameters()),
        "use": json.dumps(
            {
                "drafter": stored.training.get("drafter", "small"),
                "checkpoint": stored.training.get("draft_model", "PATH"),
                "stopping": f"acceptance:{folder}",
            }
        ),
    }


def _are_heads(folder: Path, config: Mapping[str, Any]) -> bool:
    """Ours say which drafter they are; others are folders that hold no model which transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from forerun.drafting.registry import layouts

    if "drafter" in config:
        return True
    if config.get("model_type") in CONFIG_MAPPING_NAMES:
        return False
    named = any(
        (folder / f"{one.stem}{end}").is_file() for one in layouts() for end in (".safetensors", ".pt") if one.stem
    )
    return named or any(one.knows(config) for one in layouts())


# ---- files


def _described(path: Path) -> dict[str, Facts]:
    """A tree of forerun calibrate, or a drafter."""
    from forerun.drafting.spec import describe

    content = _parsed(_text(path)) if path.suffix == ".json" else {}
    if "paths" in content:
        return {"tree": {"path": str(path), **_tree(path)}}
    found = describe(str(path))
    if not isinstance(found.get("drafter"), str):
        raise ForerunError(f"{path} is neither a tree nor a drafter: if it is part of a folder, give that")
    return {
        "drafter": {"path": str(path), "names": list(dict.fromkeys(_names(found))), "description": json.dumps(found)}
    }


def _names(value: Any) -> Iterator[str]:
    """Every drafter that a description speaks of, the outermost first."""
    if isinstance(value, Mapping):
        if isinstance(value.get("drafter"), str):
            yield value["drafter"]
        for inside in value.values():
            yield from _names(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _names(inside)


def _tree(path: Path) -> Facts:
    from forerun.drafting.checkpoint import read_tree

    paths, content = read_tree(path).paths, _parsed(_text(path))
    machine = content.get("machine") or {}
    found = {
        "tree_nodes": len(paths),
        "tree_depth": max(map(len, paths), default=0),
        "projected_speedup": content.get("speedup"),
        "measured_rows": content.get("rows"),
        "measured_answers": content.get("answers"),
        "measured_on": ", ".join(str(machine[name]) for name in ("processor", "threads", "dtype") if name in machine),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _store(path: Path) -> Facts:
    from forerun.stores.corpus import Corpus

    corpus = Corpus.open(path)
    return {
        "path": str(path),
        "tokens": corpus.size,
        "texts": corpus.documents,
        "vocabulary": corpus.vocabulary,
        "bytes": path.stat().st_size,
        "longest_match": corpus.depth,
        "tokenizer": corpus.fingerprint[:16] or "not known",
        "use": f"--drafter hierarchy:{path}",
    }


def _rows(path: Path) -> dict[str, Facts]:
    """A file of JSON lines, by its first; empty if it is none of ours."""
    with path.open("rb") as file:
        first = _parsed(file.readline(1 << 20))
    kinds: dict[str, Callable[[Path, Facts], dict[str, Facts]]] = {"distilled": _answers, "said": _said}
    kind = first.get("forerun")
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind](path, first)
    settings = first.get("settings")
    if isinstance(settings, dict) and {"prompt_index", "token_ids"} <= first.keys():
        return {
            "texts": {"path": str(path), "texts": _count(path), **{name: str(one) for name, one in settings.items()}}
        }
    return {}


def _answers(path: Path, header: Facts) -> dict[str, Facts]:
    from forerun.train.distill import read

    samples = read(path).samples
    found = {
        "path": str(path),
        "answers": len(samples),
        "tokens": sum(len(one.answer) for one in samples),
        "target": header["target"]["name"],
        "temperatures": sorted({one.temperature for one in samples}),
        "prompts": header["source"].get("name") or header["source"]["kind"],
        "use": f"forerun train PRESET --target MODEL --data {path} --out heads",
    }
    return {"answers": found}


def _said(path: Path, header: Facts) -> dict[str, Facts]:
    found = {
        "path": str(path),
        "what": "what a model said, for the store model:FILE of the drafter hierarchy",
        "texts": _count(path) - 1,
        "vocabulary": header.get("vocabulary"),
    }
    return {"store": found}


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def gguf(path: Path, dtype: torch.dtype, weights: str) -> Facts:
    """From the metadata alone; weights stay on disk. What it needs here: with numbers in `dtype`, or in int8."""
    from forerun.sources.source import Source

    source = Source.of(path)
    head = Head.of(path)
    kind, fields, tensors = head.fields.get("general.architecture"), head.fields, head.tensors
    found = {
        "path": str(path),
        "name": fields.get("general.name"),
        "architecture": kind,
        "parameters": sum(prod(held.shape) for held in tensors.values()),
        "bytes": sum(file.stat().st_size for file in head.files),
        "files": len(head.files) if len(head.files) > 1 else None,
        "formats": _formats(tensors),
        "layers": fields.get(f"{kind}.block_count"),
        "width": fields.get(f"{kind}.embedding_length"),
        "heads": fields.get(f"{kind}.attention.head_count"),
        "kv_heads": fields.get(f"{kind}.attention.head_count_kv"),
        "context": fields.get(f"{kind}.context_length"),
        "vocabulary": len(fields.get("tokenizer.ggml.tokens", ())) or None,
        "tokenizer": fields.get("tokenizer.ggml.model"),
        "chat_template": "tokenizer.chat_template" in fields,
        **_needs(source, dtype, weights),
    }
    return {name: one for name, one in found.items() if one is not None}


def _formats(tensors: Mapping[str, Held]) -> list[str]:
    """Of every kind of matrix, the number formats and how many there are of each."""
    kinds: dict[str, Counter[str]] = {}
    for name, held in tensors.items():
        if len(held.shape) > 1:
            kind = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
            kinds.setdefault(kind, Counter())[held.format] += 1
    return [
        f"{kind} {' + '.join(f'{count} {name}' for name, count in sorted(formats.items()))}"
        for kind, formats in kinds.items()
    ]


def _needs(source: Source, dtype: torch.dtype, weights: str) -> Facts:
    """Memory of a model of a family that is run from GGUF files; of another the reason why it is not."""
    from forerun.nn.translate import translate

    try:
        source.weights.stored()
        config = translate(source.config, source.path)
        ends = list(source.ends)
    except CheckpointError as error:
        return {"does_not_run": str(error)}
    if config is None:
        return {}
    vocabulary, shape = config.vocab_size * config.width, config.cache_shape
    in_int8 = (config.parameters_outside_vocabulary + vocabulary) * 33 // 32 + vocabulary * dtype.itemsize
    return {
        "eos": ends,
        "weight_bytes": in_int8 if weights == "int8" else config.parameters * dtype.itemsize,
        "cache_bytes_per_token": 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ForerunError(f"{path} is not UTF-8 text: is the end of its name right?") from None


def _parsed(text: str | bytes) -> Facts:
    """A JSON object; empty for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
