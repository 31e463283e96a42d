"""Everything that `forerun train lm` decides before the run begins, and what it leaves when the run has ended.

A model starts from random weights, from a shallower model whose layers are stacked (growth), or from some layers of a
deeper one (a drafter for it). Sources are model folders or the folders of finished runs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.errors import ForerunError, TrainingError
from forerun.files import whole_folder
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.nn.save import save_pretrained
from forerun.nn.transformer import Transformer, TransformerConfig, stack
from forerun.train import corpus as corpora
from forerun.train import tokenizer
from forerun.train.events import Events
from forerun.train.objectives.descent import OPTIMISER
from forerun.train.objectives.next_token import NextToken, TokenWindows
from forerun.train.run import STATE, Record, Run, Watch, read_run, unwatched
from forerun.train.schedule import Schedule

REFERENCE = TransformerConfig(
    vocab_size=4096, width=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_width=1536, max_length=2048, tied=True
)
"""The reference target: what is not said otherwise is as here."""
SHAPE = "shape.json"
END = {"bos_token_id": 1, "eos_token_id": [2, 1]}
"""Documents follow one another behind a begin token, so a model that has finished its text says that token."""


@dataclass(frozen=True)
class Sizes:
    """Sizes asked for; None: as in the model to start from, else as in the reference target."""

    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    max_length: int | None = None

    def over(self, base: TransformerConfig, vocab_size: int, layers: int) -> TransformerConfig:
        """`base` with these sizes, and so many layers. Raises TrainingError for sizes that do not fit together."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        wish = {name: value for name, value in given.items() if value is not None} | {"layers": layers}
        if "head_dim" not in wish and ("width" in wish or "heads" in wish):
            wish["head_dim"] = wish.get("width", base.width) // max(1, wish.get("heads", base.heads))
        config = replace(base, vocab_size=vocab_size, **wish)
        _demand_sizes(config)
        return config


@dataclass(frozen=True)
class Start:
    """Where weights come from: a model folder or a run's folder. layers: which to take; none: all, repeated to fill."""

    source: str | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelRecipe:
    """A whole training. rows x length tokens per step; first: batches that an earlier run has seen
    (the text comes in one order for all runs, so that this means something); seed: of the first
    weights."""

    corpus: Path
    sizes: Sizes
    start: Start
    teacher: str | None
    schedule: Schedule
    rows: int = 8
    length: int = 512
    first: int = 0
    seed: int = 0
    compile: bool = False


def build_corpus(folder: Path, vocabulary: int, watch: Watch = unwatched) -> str:
    """Corpus and tokenizer from the Python source on this machine, into `folder`; says what it made.
    watch: told of the files that are cut into tokens, once there is a tokenizer."""
    parts = corpora.split(corpora.collect(corpora.installed()))
    model = tokenizer.train((document.text for document in parts.train), tokenizer.Settings(vocabulary))
    tokenizer.write(model, folder / "tokenizer")
    encode, files, done = tokenizer.processor_of(model).encode, len(parts.train) + len(parts.held_out), count(1)

    def ids_of(text: str) -> list[int]:
        watch(next(done), files)
        return list(encode(text))

    summary = corpora.write(parts, ids_of, folder)
    return (
        f"{folder}: {summary['train_tokens']:,} tokens to train on, {summary['heldout_tokens']:,} held out,"
        f" from {summary['train_files']:,} files"
    )


def train(recipe: ModelRecipe, run: Path, out: Path | None, device: torch.device, events: Events | None = None) -> str:
    """Train to the schedule's end and write the model to `out`; says what came of it.

    Raises TrainingError for a recipe that cannot be followed, before anything is written.
    """
    module = start(recipe).to(device)
    text, teacher = _text(recipe, module.config), _teacher(recipe, module, device)
    objective = NextToken(module, text, recipe.schedule, teacher, recipe.compile)
    figures = Run(objective, recipe.schedule, run, _record(module.config), events).finish((out or run).name)
    if out is not None:
        write_model(module, recipe.corpus / "tokenizer", out)
    return f"{out or run}: validation loss {figures['loss']:.4f} nats per token after {recipe.schedule.steps} steps"


def start(recipe: ModelRecipe) -> Transformer:
    """The module before its first step."""
    vocabulary = vocabulary_of(recipe.corpus)
    if recipe.start.source is None:
        layers = REFERENCE.layers if recipe.sizes.layers is None else recipe.sizes.layers
        return Transformer(recipe.sizes.over(REFERENCE, vocabulary, layers)).initialise(recipe.seed)
    config, weights = read_source(recipe.start.source)
    if len(weights["embedding.weight"]) != vocabulary:
        raise TrainingError(
            f"{recipe.start.source} has a vocabulary of {len(weights['embedding.weight'])} tokens and the corpus one of"
            f" {vocabulary}: start from a model of the same tokenizer"
        )
    picks = _picks(recipe, 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")))
    module = Transformer(recipe.sizes.over(config, vocabulary, len(picks)))
    stacked = stack(weights, picks)
    own = {name: parameter.shape for name, parameter in module.named_parameters()}
    wrong = [name for name, shape in own.items() if name not in stacked or stacked[name].shape != shape]
    if wrong:
        theirs = list(stacked[wrong[0]].shape) if wrong[0] in stacked else "not there"
        raise TrainingError(
            f"{recipe.start.source} does not fit the sizes asked for ({wrong[0]} is {theirs}, not"
            f" {list(own[wrong[0]])}): leave the sizes out, or give those of the source"
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(stacked[name])
    return module


def _picks(recipe: ModelRecipe, available: int) -> list[int]:
    """Which block of the source becomes which of ours."""
    source, wanted = recipe.start.source, recipe.sizes.layers
    if recipe.start.layers:
        outside = [layer for layer in recipe.start.layers if not 0 <= layer < available]
        if outside:
            raise TrainingError(f"{source} has no layer {outside[0]}: it has layers 0 to {available - 1}")
        if wanted not in (None, len(recipe.start.layers)):
            raise TrainingError(
                f"{len(recipe.start.layers)} layers to start from do not make {wanted}: leave --layers out"
            )
        return list(recipe.start.layers)
    wanted = wanted or available
    if wanted % available:
        raise TrainingError(
            f"{source} has {available} layers, and {wanted} is no multiple of that: give another --layers"
        )
    return list(range(available)) * (wanted // available)


def read_source(source: str) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Shape and weights of a run's folder or a model's. A run from before its shape was recorded
    has the reference's."""
    folder = Path(source)
    if (folder / STATE).is_file():
        _, state = read_run(folder / STATE)
        weights = {name: value for name, value in state.items() if not name.startswith(OPTIMISER)}
        return _recorded_shape(folder) or REFERENCE, weights
    network = load_network(source, torch.float32, torch.device("cpu"))
    if not isinstance(network, Transformer):
        raise TrainingError(f"{source} is not a Llama, Mistral or Qwen: only those can be started from")
    return network.config, {name: weight.detach() for name, weight in network.named_parameters()}


def vocabulary_of(corpus: Path) -> int:
    """Tokens in the corpus's vocabulary."""
    from tokenizers import Tokenizer

    path = corpus / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise TrainingError(f"{corpus} holds no tokenizer/tokenizer.json: make the corpus with --build-corpus")
    try:
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    except Exception as error:  # the binding raises bare Exceptions
        raise TrainingError(f"{path} cannot be read ({error}): make the corpus again with --build-corpus") from None


def _text(recipe: ModelRecipe, config: TransformerConfig) -> TokenWindows:
    train_path, heldout_path = recipe.corpus / "train.bin", recipe.corpus / "heldout.bin"
    for path in (train_path, heldout_path):
        if not path.is_file() or path.stat().st_size < 2 * (recipe.length + 1):
            raise TrainingError(f"{path} is missing or shorter than one window: make the corpus with --build-corpus")
    if not 1 <= recipe.length <= config.max_length or recipe.rows < 1:
        raise TrainingError(
            f"batches of {recipe.rows} x {recipe.length} tokens do not fit a context of {config.max_length}:"
            f" give --rows of 1 or more and a --length from 1 to {config.max_length}"
        )
    return TokenWindows(train_path, heldout_path, recipe.rows, recipe.length, first=recipe.first)


def _teacher(recipe: ModelRecipe, module: Transformer, device: torch.device) -> Transformer | None:
    if recipe.teacher is None:
        return None
    network = load_network(recipe.teacher, dtype_of("auto", device), device)
    if not isinstance(network, Transformer):
        raise TrainingError(f"the teacher {recipe.teacher} is not a Llama, Mistral or Qwen: choose one that is")
    if network.vocab_size != module.vocab_size:
        raise TrainingError(
            f"the teacher {recipe.teacher} has {network.vocab_size} tokens and the corpus {module.vocab_size}:"
            " teacher and pupil must share a tokenizer"
        )
    return network


def _demand_sizes(config: TransformerConfig) -> None:
    sizes = (config.width, config.layers, config.heads, config.kv_heads, config.head_dim, config.mlp_width)
    if min(*sizes, config.max_length) < 1:
        raise TrainingError(f"a model needs sizes of at least 1, and these are {sizes}")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise TrainingError(
            f"{config.heads} heads of width {config.head_dim} with {config.kv_heads} key heads do not fit together:"
            " the number of heads must be a multiple of the key heads', and a head's width even"
        )


def _record(config: TransformerConfig) -> Record:
    """A run's folder remembers its shape; another one must not go on there."""
    shape = {name: value for name, value in asdict(config).items() if name != "source"}
    known = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    return Record(shape, SHAPE, "shape", {name: known[name] for name in shape.keys() & known.keys()})


def _recorded_shape(run: Path) -> TransformerConfig | None:
    if not (run / SHAPE).is_file():
        return None
    try:
        values = json.loads((run / SHAPE).read_text())
        sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return TransformerConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{run / SHAPE} cannot be read ({error}): remove the run, or repair the file") from None


def write_model(module: Transformer, tokenizer_folder: Path, out: Path) -> None:
    """Weights, config and tokenizer as one folder that appears complete; files of an older model are replaced."""
    try:
        with whole_folder(out) as beside:
            save_pretrained(module, beside)
            (beside / "generation_config.json").write_text(json.dumps(END, indent=2) + "\n")
            for path in sorted(tokenizer_folder.iterdir()):
                shutil.copyfile(path, beside / path.name)
    except OSError as error:
        raise TrainingError(
            f"{out} cannot be written ({error.strerror}): make room, or choose another folder"
        ) from None
    except ForerunError as error:
        raise TrainingError(str(error).replace(str(beside), str(out))) from None
