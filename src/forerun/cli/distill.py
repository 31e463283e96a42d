"""`forerun distill`: the target's own answers to prompts, as training data for draft heads."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options

if TYPE_CHECKING:
    from forerun.engine.engine import Engine
    from forerun.train.distill import Answer, Ledger, Questions, Sampling, Tally

PROMPTS = "Prompts"
LOG_EVERY_SECONDS = 30.0
SHOWN_LINES = 10

Target = Annotated[str, typer.Argument(metavar="TARGET", help="A folder in Hugging Face format, or a hub id.")]
Out = Annotated[Path, typer.Option(metavar="FILE", help="JSON lines; an interrupted run into it goes on.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='A .txt file with a prompt per line, or .jsonl with "prompt", "messages" or "prompt_ids" in every row.',
        rich_help_panel=PROMPTS,
    ),
]
Builtin = Annotated[bool, typer.Option("--builtin", help="The prompts of the built-in suite.", rich_help_panel=PROMPTS)]
Corpus = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Windows cut from a folder's train.bin, as forerun train lm has it.",
        rich_help_panel=PROMPTS,
    ),
]
PromptLength = Annotated[
    str, typer.Option(metavar="LOW,HIGH", help="With --corpus: tokens of a window.", rich_help_panel=PROMPTS)
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Only the first so many prompts; with --corpus: how many to cut.",
        rich_help_panel=PROMPTS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="A prompt is what a user says: render the chat template.", rich_help_panel=PROMPTS),
]
Template = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A chat template (Jinja) instead of the model's own.", rich_help_panel=PROMPTS),
]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        show_default="0",
        help="0 is greedy; may be repeated: prompts are dealt to the temperatures in turn.",
        rich_help_panel=options.SAMPLING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Of answers, and of the windows of --corpus.", rich_help_panel=options.SAMPLING),
]
MaxLooping = Annotated[
    float,
    typer.Option(
        metavar="FRACTION",
        help="Of all answers, how many may end in a loop of the same words; what is more is left out.",
        rich_help_panel=options.OUTPUT,
    ),
]
Rows = Annotated[int, typer.Option(min=1, help="Answers that grow side by side.", rich_help_panel=options.MACHINE)]


def distill(
    target: Target,
    out: Out,
    prompts: PromptFile = None,
    builtin: Builtin = False,
    corpus: Corpus = None,
    prompt_length: PromptLength = "32,256",
    limit: Limit = None,
    chat: Chat = False,
    template: Template = None,
    drafter: options.Drafter = "lookup",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: Temperatures = None,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    max_looping: MaxLooping = 0.1,
    seed: Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    rows: Rows = 16,
) -> None:
    """Let a model answer prompts and keep what it says, token for token: data to train draft heads on.

    Answers are written as they finish. After Ctrl-C the same command goes on, and the answers are
    those of a run without it.
    """
    from forerun.cli import engines
    from forerun.cli.files import demand_place
    from forerun.train.distill import Ledger, Sampling, deal, demand_tokenizer, header_of

    sampling = Sampling(tuple(temperature or (0.0,)), max_new_tokens, top_k, top_p, min_p, seed, max_looping)
    demand_place(out)
    wish = _Wish(prompts, builtin, corpus, prompt_length, limit, chat, template)
    source = _source(wish, seed)
    rendering = _template(template)
    engine = engines.load(target, drafter, engines.Machine(dtype, device, kernels, weights), rows)
    if corpus is not None:
        demand_tokenizer(corpus, engine)
    reader = _Encoder(engine, rendering, chat)
    ids = [reader.ids(opening) for opening in source.openings]
    header = header_of(target, engine, sampling, source.header, reader.template)
    questions = deal(ids, sampling, engine.target.max_length)
    _run(engine, questions, sampling, Ledger(out, header))


# ---- prompts


@dataclass(frozen=True)
class _Wish:
    """The options about prompts."""

    file: Path | None
    builtin: bool
    corpus: Path | None
    prompt_length: str
    limit: int | None
    chat: bool
    template: Path | None


@dataclass(frozen=True)
class Opening:
    """What an answer is to follow: a text, a conversation, or token ids. where: its place, for messages."""

    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Openings:
    """Openings, and what the file of answers says about where they come from."""

    openings: list[Opening]
    header: dict[str, Any]


def _source(wish: _Wish, seed: int) -> Openings:
    from forerun.errors import RequestError

    given = [wish.file is not None, wish.builtin, wish.corpus is not None]
    if sum(given) != 1:
        wrong = "are several sources of prompts" if any(given) else "is no source of prompts"
        raise RequestError(f"there {wrong}: give one of --prompts FILE, --builtin and --corpus DIR")
    if wish.corpus:
        return _from_corpus(wish, seed)
    source = _from_file(wish.file) if wish.file else _from_suite()
    openings = source.openings[: wish.limit]
    if wish.template and not wish.chat and not any(opening.messages for opening in openings):
        raise RequestError('--template has nothing to render: add --chat, or give rows with "messages"')
    return Openings(openings, source.header)


def _from_corpus(wish: _Wish, seed: int) -> Openings:
    from forerun.errors import RequestError
    from forerun.sources.fingerprint import fingerprint
    from forerun.train.distill import windows

    assert wish.corpus is not None
    if wish.chat or wish.template:
        raise RequestError("--chat and --template have no place with --corpus: its windows are token ids")
    if wish.limit is None:
        raise RequestError("--corpus gives as many prompts as you like: say how many with --limit N")
    low, high = _lengths(wish.prompt_length)
    cut = windows(wish.corpus, (low, high), wish.limit, seed)
    openings = [Opening(f"{wish.corpus}, window {number}", ids=tuple(ids)) for number, ids in enumerate(cut, start=1)]
    header = {
        "kind": "corpus",
        "name": wish.corpus.resolve().name,
        "fingerprint": fingerprint([wish.corpus / "train.bin"]),
        "prompt_length": [low, high],
    }
    return Openings(openings, header)


def _lengths(text: str) -> tuple[int, int]:
    from forerun.errors import RequestError

    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--prompt-length {text!r} is not a range: write 32,256") from None
    return low, high


def _from_suite() -> Openings:
    from forerun.bench import suites
    from forerun.sources.fingerprint import digest

    prompts = suites.load()
    openings = [Opening(f"the built-in suite, {prompt.id}", prompt.prompt) for prompt in prompts]
    return Openings(openings, {"kind": "builtin", "fingerprint": digest([prompt.prompt for prompt in prompts])})


def _from_file(path: Path) -> Openings:
    from forerun.errors import RequestError
    from forerun.sources.fingerprint import digest

    if path.suffix not in (".txt", ".jsonl"):
        raise RequestError(f"{path} is neither .txt (a prompt per line) nor .jsonl (an object per line): convert it")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"the prompt file {path} is not UTF-8 text: convert it first") from None
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    told = [(where, line.removesuffix("\r")) for where, line in numbered if line.strip()]
    openings = [parse(line, where) if path.suffix == ".jsonl" else Opening(where, line) for where, line in told]
    if not openings:
        raise RequestError(f"{path} holds no prompts: write one per line")
    return Openings(openings, {"kind": "prompts", "name": path.name, "fingerprint": digest(text)})


KINDS = "prompt", "messages", "prompt_ids"


def parse(line: str, where: str) -> Opening:
    """A row of a .jsonl file. RequestError names its place if it is not one of the three kinds."""
    from forerun.errors import RequestError

    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    given = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if len(given) != 1:
        raise RequestError(f'{where} needs one of "prompt", "messages" and "prompt_ids": write {{"prompt": "..."}}')
    value = row[given[0]]
    if given[0] == "prompt" and isinstance(value, str) and value:
        return Opening(where, value)
    if given[0] == "prompt_ids" and isinstance(value, list) and value and all(type(one) is int for one in value):
        return Opening(where, ids=tuple(value))
    if given[0] == "messages" and isinstance(value, list) and all(map(_is_message, value)):
        return Opening(where, messages=_up_to_the_answer(value, where))
    wants = {"prompt": '"a text"', "prompt_ids": "[1, 2, 3]", "messages": '[{"role": "user", "content": "..."}]'}
    raise RequestError(f'{where} has a wrong "{given[0]}": write "{given[0]}": {wants[given[0]]}')


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _up_to_the_answer(messages: list[dict[str, Any]], where: str) -> tuple[dict[str, Any], ...]:
    """Somebody else's answer at the end of a conversation goes: the target gives its own."""
    from forerun.errors import RequestError

    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise RequestError(f"{where} has no message to answer: give one whose role is user")
    return tuple(asked)


# ---- from prompts to ids


@dataclass(frozen=True)
class _Template:
    """A chat template of the user's."""

    name: str
    text: str


def _template(path: Path | None) -> _Template | None:
    from forerun.errors import RequestError

    if path is None:
        return None
    try:
        return _Template(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the chat template {path}: {error}") from None


class _Encoder:
    """Openings to ids with the target's tokenizer. template: what the header says about the one
    that was used, if any."""

    def __init__(self, engine: Engine, template: _Template | None, chat: bool):
        self._engine, self._chat = engine, chat
        self._tokenizer: Any = engine.tokenizer
        self._template = template or self._own_template()
        self.template: dict[str, Any] | None = None

    def ids(self, opening: Opening) -> list[int]:
        """RequestError names the opening's place if the target cannot read it."""
        from forerun.errors import RequestError

        messages = opening.messages
        if self._chat and opening.text:
            messages = ({"role": "user", "content": opening.text},)
        try:
            return self._engine.encode(self._rendered(messages) if messages else opening.text or opening.ids)
        except RequestError as error:
            raise RequestError(f"{opening.where}: {error}") from None

    def _own_template(self) -> _Template | None:
        text = getattr(self._tokenizer, "chat_template", None)
        text = text.get("default") if isinstance(text, dict) else text
        return _Template("the model's own", text) if text else None

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        from forerun.errors import RequestError
        from forerun.sources.fingerprint import digest
        from forerun.sources.folder import brief

        used = self._template
        if self._tokenizer is None or used is None:
            raise RequestError("the model has no chat template for messages: give --template FILE, or plain prompts")
        self.template = {"name": used.name, "fingerprint": digest(used.text), "chat": self._chat}
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=used.text, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and may raise whatever it likes
            raise RequestError(f"the chat template cannot render this ({brief(error)}): mend either") from None
        # The template writes the special tokens itself.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


# ---- the run


def _run(engine: Engine, questions: Questions, sampling: Sampling, ledger: Ledger) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from forerun.train.distill import distill as answer_all

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("[bold]answers"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        watch = _Display(console, progress, engine.tokenizer, questions)
        try:
            tally = answer_all(engine, questions, sampling, ledger, watch)
        except KeyboardInterrupt:
            print(f"{ledger.path} holds {len(ledger.keys)} answers; the same command goes on", file=sys.stderr)
            raise
    print(f"{ledger.path}: {summary(tally, questions)}")


class _Display:
    """The first answer as an example, then how far the run has come: a bar, or a line now and then in a log."""

    def __init__(self, console: Any, progress: Any, tokenizer: Any, questions: Questions):
        self._console, self._progress, self._tokenizer = console, progress, tokenizer
        self._task = progress.add_task("", total=len(questions.asked), note="")
        self._shown = False
        self._logged = time.perf_counter()

    def __call__(self, tally: Tally, answer: Answer | None) -> None:
        if answer and not self._shown:
            self._shown = True
            show_example(self._console, self._tokenizer, answer)
        done = tally.known + tally.answers + tally.empty
        note = f"{done} of {tally.wanted}  {tally.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=done, note=note)
        if not self._console.is_terminal and time.perf_counter() - self._logged > LOG_EVERY_SECONDS:
            self._logged = time.perf_counter()
            self._console.print(f"answers: {note}", soft_wrap=True)


def show_example(console: Any, tokenizer: Any, answer: Answer) -> None:
    """The end of a prompt and its answer, which is marked."""
    from forerun.cli.samples import marked

    console.print(
        f"An example: what is marked is trained on ({len(answer.tokens)} tokens, {answer.finish}).\n", style="bold"
    )
    asked, is_terminal = answer.question, console.is_terminal
    console.print(marked(tokenizer, asked.prompt, answer.tokens, is_terminal, SHOWN_LINES), "\n", soft_wrap=True)


def summary(tally: Tally, questions: Questions) -> str:
    """One line about what a run did."""
    finishes = ", ".join(f"{count} {finish}" for finish, count in sorted(tally.finishes.items()))
    before = f", {tally.known} from before" if tally.known else ""
    parts = [
        f"{tally.answers} answers{f' ({finishes})' if finishes else ''}{before}",
        f"{tally.new_tokens:,} new tokens in {tally.seconds:.1f} s",
        f"{tally.tokens_per_second:,.0f} tokens/s, prompts included",
        f"{tally.tokens_per_step:.2f} tokens per step",
    ]
    left_out = {"duplicate": questions.duplicates, "empty": tally.empty, "too long for the context": questions.too_long}
    skipped = [f"{count} {what}" for what, count in left_out.items() if count]
    if tally.loops.found:
        parts.append(f"{tally.loops.found} loop to their end, {tally.loops.left_out} of them left out")
    return " · ".join([*(parts if tally.steps else [parts[0], *parts[4:]]), f"skipped: {', '.join(skipped) or 'none'}"])
