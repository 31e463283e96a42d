"""`forerun distill`: the target's own answers to prompts, as training data for draft heads."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import openings, options, speculation
from forerun.cli.openings import Opening

if TYPE_CHECKING:
    from forerun.engine.engine import Engine
    from forerun.train.distill import Answer, Ledger, Questions, Sampling, Tally

LOG_EVERY_SECONDS = 30.0
SHOWN_LINES = 10

Target = Annotated[str, typer.Argument(metavar="TARGET", help="A folder in Hugging Face format, or a hub id.")]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="JSON lines; an interrupted run into it goes on.", rich_help_panel=options.OUTPUT
    ),
]
Builtin = Annotated[
    bool, typer.Option("--builtin", help="The prompts of the built-in suite.", rich_help_panel=options.PROMPTS)
]
Corpus = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Windows of the corpus that forerun train lm made there.",
        rich_help_panel=options.PROMPTS,
    ),
]
PromptLength = Annotated[
    str, typer.Option(metavar="LOW,HIGH", help="With --corpus: tokens of a window.", rich_help_panel=options.ADVANCED)
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Only so many prompts; with --corpus: how many to cut.",
        rich_help_panel=options.PROMPTS,
    ),
]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        show_default="0",
        help="0 is greedy; if repeated, prompts are dealt to them in turn.",
        rich_help_panel=options.SAMPLING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Of answers, and of the windows of --corpus.", rich_help_panel=options.ADVANCED),
]
MaxLooping = Annotated[
    float,
    typer.Option(
        metavar="FRACTION",
        help="Of all answers, how many may end in a loop of the same words; what is more is left out.",
        rich_help_panel=options.OUTPUT,
    ),
]
Rows = Annotated[
    int,
    typer.Option(
        "--rows", "--batch-size", min=1, help="Answers that grow side by side.", rich_help_panel=options.MACHINE
    ),
]

DRAFTER = "lookup"
EXAMPLES = """
forerun distill MODEL --prompts prompts.jsonl --out answers.jsonl
forerun distill MODEL --prompts questions.txt --chat --temperature 0 --temperature 0.8 --out answers.jsonl
"""


def distill(
    target: Target,
    out: Out,
    prompts: options.PromptFile = None,
    builtin: Builtin = False,
    corpus: Corpus = None,
    prompt_length: PromptLength = "32,256",
    limit: Limit = None,
    chat: options.Chat = False,
    system: options.System = None,
    chat_template: options.Template = None,
    drafter: options.Drafter = DRAFTER,
    num_speculative_tokens: options.SpeculativeTokens = None,
    speculative_config: options.SpeculativeConfig = None,
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
    threads: options.Threads = None,
    rows: Rows = 16,
    revision: options.Revision = None,
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
    wish = _Wish(prompts, builtin, corpus, prompt_length, limit, chat or system is not None, chat_template)
    source = _source(wish, seed)
    manner = openings.Manner.of(chat, system, chat_template)
    target = options.at(target, revision)
    spec = speculation.chosen(drafter, speculative_config, num_speculative_tokens, DRAFTER)
    engine = engines.load(target, spec, engines.Machine(dtype, device, kernels, weights, threads), rows)
    if corpus is not None:
        demand_tokenizer(corpus, engine)
    reader = openings.Reader(engine, manner)
    ids = reader.all_ids(source.openings)
    header = header_of(target, engine, sampling, source.header, _described(reader, manner))
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
    asked = source.openings[: wish.limit]
    if wish.template and not wish.chat and not any(one.messages or one.is_said for one in asked):
        raise RequestError('--chat-template has nothing to render: add --chat, or give rows with "messages"')
    return Openings(asked, source.header)


def _from_corpus(wish: _Wish, seed: int) -> Openings:
    from forerun.errors import RequestError
    from forerun.sources.fingerprint import fingerprint
    from forerun.train.distill import windows

    assert wish.corpus is not None
    if wish.chat or wish.template:
        raise RequestError("--chat and --chat-template have no place with --corpus: its windows are token ids")
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
    from forerun.sources.fingerprint import digest

    found = openings.read(path)
    return Openings(found, {"kind": "prompts", "name": path.name, "fingerprint": digest(openings.text_of(path))})


def _described(reader: openings.Reader, manner: openings.Manner) -> dict[str, Any] | None:
    """What the file says about the chat template that was used, if one was."""
    from forerun.sources.fingerprint import digest

    if reader.used is None:
        return None
    found = {"name": reader.used.name, "fingerprint": digest(reader.used.text), "chat": manner.chat}
    return found if manner.system is None else found | {"system": manner.system}


# ---- the run


def _run(engine: Engine, questions: Questions, sampling: Sampling, ledger: Ledger) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from forerun.cli.narration import on_stderr
    from forerun.train.distill import distill as answer_all

    console = on_stderr()
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
