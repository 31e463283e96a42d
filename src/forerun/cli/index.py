"""`forerun index`: texts into a store that drafters copy from."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from forerun.stores.index import Contents
    from forerun.stores.texts import Encode, Texts

log = logging.getLogger(__name__)

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILES...",
        help='Text files, folders of them, or .jsonl with "text", with "prompt" and "answer", or from forerun distill.',
    ),
]
Tokenizer = Annotated[
    str, typer.Option(metavar="MODEL", help="The target: a folder in Hugging Face format, or a hub id.")
]
Out = Annotated[Path, typer.Option(metavar="STORE", help="The file to write.")]

EXAMPLES = """
forerun index src docs --tokenizer MODEL --out code.store
forerun generate MODEL "def main():" --drafter hierarchy:code.store
"""


def index(files: Files, tokenizer: Tokenizer, out: Out) -> None:
    """Sort texts so that a drafter finds in microseconds what came next at places like this one.

    Every file is one text, and every row of a .jsonl file. Whatever a store holds, it changes how
    fast a model speaks and never what it says.
    """
    from forerun.sources.tokenizer import fingerprint_of
    from forerun.stores.index import build, write
    from forerun.stores.texts import find

    _demand_place(out)
    began = time.perf_counter()
    texts = find(files)
    _demand_no_loss(out, [file.path for file in texts.files])
    encode, size, names = _vocabulary(tokenizer)
    with _bar() as progress:
        reading = progress.add_task("reading", total=texts.size)
        sorting = progress.add_task("sorting", total=None)
        documents = texts.documents(encode, lambda done: progress.advance(reading, done))
        contents = build(documents, size, lambda done, total: progress.update(sorting, completed=done, total=total))
    write(contents, out, fingerprint_of(names))
    _report(contents, texts, out, time.perf_counter() - began)


def _demand_place(out: Path) -> None:
    from forerun.cli.files import demand_place
    from forerun.errors import ForerunError

    demand_place(out)
    if out.exists() and not out.is_file():
        raise ForerunError(f"cannot write {out}, for it is no file: name a file, which may be there already")


def _demand_no_loss(out: Path, files: Iterable[Path]) -> None:
    """Nothing but an older store is written over."""
    from forerun.errors import ForerunError
    from forerun.stores.index import is_store

    if not out.exists():
        return
    if any(out.samefile(file) for file in files):
        raise ForerunError(f"{out} is one of the texts to be indexed: name another file to write")
    try:
        is_free = not out.stat().st_size or is_store(out)
    except OSError as error:
        raise ForerunError(f"cannot write {out} ({error.strerror}): name another file") from None
    if not is_free:
        raise ForerunError(f"{out} is there and is no store of forerun index: name another file, or remove this one")


def _vocabulary(model: str) -> tuple[Encode, int, dict[str, int]]:
    """How a model's tokenizer reads a text, how many tokens the model knows, and what they are called."""
    from transformers import AutoConfig

    from forerun.cli.engines import quiet
    from forerun.errors import CheckpointError
    from forerun.sources.source import Source
    from forerun.sources.tokenizer import tokenizer_of

    quiet()
    file = Source.of(model) if Path(model).expanduser().is_file() else None
    tokenizer: Any = file.tokenizer if file else tokenizer_of(model)
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer: name a folder with a tokenizer.json")
    try:
        config = file.config if file else AutoConfig.from_pretrained(model, trust_remote_code=False)
        size = config.get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        size = len(tokenizer)  # a tokenizer on its own
    backend = tokenizer.backend_tokenizer
    return lambda text: backend.encode(text, add_special_tokens=False).ids, size, tokenizer.get_vocab()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import Progress

    from forerun.cli.narration import on_stderr

    console = on_stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _report(contents: Contents, texts: Texts, out: Path, seconds: float) -> None:
    size = out.stat().st_size
    print(
        f"{out}: {contents.size:,} tokens of {contents.documents:,} texts from {len(texts.files):,} files,"
        f" {size / contents.size:.2f} bytes per token, {seconds:.1f} s"
    )
    if texts.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in texts.skipped.items())
        log.info("skipped in folders: %s", reasons)
