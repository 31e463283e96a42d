"""`forerun chat`: a conversation with a model, in which one sees which words were drafted, and by whom."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import openings, options, speculation
from forerun.cli.ink import Ink, label
from forerun.errors import ForerunError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from forerun.cli.engines import Machine
    from forerun.engine.engine import Engine
    from forerun.engine.requests import Output, Piece
    from forerun.sampling import SamplingParams

log = logging.getLogger(__name__)

Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="For base models: what you type is text, which goes on.", rich_help_panel=options.PROMPTS
    ),
]

Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="After every answer plain decoding's: both speeds, and whether they are identical.",
        rich_help_panel=options.OUTPUT,
    ),
]

DRAFTER = "auto"
HELP = """/stats          what the last answer and the conversation cost, and who drafted what
/drafter SPEC   draft with something else: none, lookup, small:MODEL, ...
/system TEXT    begin anew with this system message (without TEXT: with none)
/reset          begin anew
/exit           end (as Ctrl-D does)
//TEXT          say /TEXT to the model"""
EXAMPLES = """
forerun chat MODEL --drafter lookup
forerun chat MODEL --drafter "hierarchy | small:DRAFT_MODEL" --system "Be brief."
forerun chat BASE_MODEL --raw
"""


def chat(
    model: options.Model,
    system: options.System = None,
    raw: Raw = False,
    chat_template: options.Template = None,
    compare: Compare = False,
    drafter: options.Drafter = DRAFTER,
    num_speculative_tokens: options.SpeculativeTokens = None,
    speculative_config: options.SpeculativeConfig = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    acceptance: options.Acceptance = "exact",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    prefix_cache: options.PrefixCache = None,
    revision: options.Revision = None,
) -> None:
    """Talk to a model. Answers stream; what a drafter proposed is coloured, a colour for each.

    /help lists what else you can type. Ctrl-C ends an answer, Ctrl-D the conversation. Standard input that is no
    terminal is read a message per line.
    """
    from forerun.cli import comparison, engines
    from forerun.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    if raw and (system is not None or chat_template):
        raise RequestError("--raw is text without a template: leave --system and --chat-template out")
    spec = speculation.chosen(drafter, speculative_config, num_speculative_tokens, DRAFTER)
    manner = openings.Manner.of(True, system, chat_template)
    machine = engines.Machine(dtype, device, kernels, weights, threads)
    model = options.at(model, revision)
    engine = engines.load(model, spec, machine, 1, acceptance, options.bytes_of(prefix_cache))
    reader = openings.Reader(engine, manner)
    if engine.tokenizer is None:
        raise RequestError(f"{model} has no tokenizer, and nobody talks in token ids: use forerun generate")
    if not raw and reader.template is None:
        raise RequestError(
            f"{model} has no chat template, as base models have none: give one with --chat-template FILE, or let it"
            " continue plain text with --raw"
        )
    history: Conversation | Text = Text(engine) if raw else Conversation(reader, system)
    if compare and params.seed is None:
        params = replace(params, seed=0)
    plain = engines.beside(engine, "none", machine) if compare else None
    if plain:
        comparison.warm(plain, engine, engine.encode("\n"))
    Talk(engine, history, params, machine, plain).run()


# ---- what has been said


@dataclass
class Conversation:
    """Messages, rendered with the chat template."""

    reader: openings.Reader
    system: str | None
    messages: list[openings.Message] = field(default_factory=list)

    def asked(self, text: str) -> list[int]:
        """The ids that the model answers to. Nothing is remembered before `answered`."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.reader.rendered([*first, *self.messages, {"role": "user", "content": text}])

    def answered(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        self.messages.clear()


@dataclass
class Text:
    """One plain text, to which the user and the model add in turn."""

    engine: Engine
    text: str = ""
    system: str | None = None

    def asked(self, text: str) -> list[int]:
        return self.engine.encode(self._with(text))

    def answered(self, text: str, answer: str) -> None:
        self.text = self._with(text) + answer

    def reset(self) -> None:
        self.text = ""

    def _with(self, text: str) -> str:
        return f"{self.text}\n{text}" if self.text else text


# ---- the talk


class Talk:
    """Reads what the user types, and answers until there is no more. plain: answers too, to be compared with."""

    def __init__(
        self,
        engine: Engine,
        history: Conversation | Text,
        params: SamplingParams,
        machine: Machine,
        plain: Engine | None = None,
    ):
        from forerun.cli.narration import on_stdout

        self._console: Console = on_stdout()
        self._machine, self._params, self._history = machine, params, history
        self._engine, self._plain, self._ink = engine, plain, Ink()
        self._outputs: list[Output] = []
        self._credits: list[Counter[str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/drafter": self._drafter,
            "/system": self._system,
            "/reset": self._reset,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> None:
        if sys.stdin.isatty():
            self._note(f"drafter {self._engine.drafter.name}; /help says what else you can type")
        self._talk()
        if self._outputs:
            from forerun.cli.narration import summary

            log.info(summary(self._outputs, sum(one.stats.seconds for one in self._outputs)))

    def _talk(self) -> None:
        for line in self._lines():
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit", "/bye"):
                return
            try:
                if word.startswith("//"):
                    self._answer(line.lstrip()[1:])
                elif word.startswith("/"):
                    self._command(word, rest.strip())
                elif word:
                    self._answer(line)
            except ForerunError as error:
                self._note(str(error))

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        with suppress(ImportError):  # where there is none, input() neither edits its line nor remembers earlier ones
            import readline  # noqa: F401

        while True:
            try:
                line = input(">>> ")
            except KeyboardInterrupt:  # one too many, behind an answer: what was said is worth more
                print()
                self._note("Ctrl-D ends the conversation")
                continue
            except EOFError:
                print()
                return
            yield line

    def _command(self, word: str, rest: str) -> None:
        if word not in self._commands:
            known = ", ".join([*self._commands, "/exit"])
            raise RequestError(f"there is no {word}: take one of {known}, or begin with // to say it to the model")
        self._commands[word](rest)

    def _answer(self, text: str) -> None:
        ids = self._history.asked(text)
        try:
            pieces = self._engine.stream(ids, self._params)
        except RequestError as error:
            raise RequestError(f"{error} (/reset begins a new conversation)") from None
        credit = Counter[str]()

        def show(piece: Piece) -> None:
            for text, origin in zip(piece.texts, piece.origins, strict=True):
                credit[origin] += 1
                self._print(text, origin)
            self._console.file.flush()

        started = time.perf_counter()
        outputs = pieces.outputs(show)
        seconds = time.perf_counter() - started
        self._console.print()
        if not outputs:
            return
        self._outputs.append(outputs[0])
        self._credits.append(credit)
        self._history.answered(text, outputs[0].text or "")
        self._legend(credit)
        if outputs[0].finish_reason != "interrupted":
            self._compare(ids, outputs, seconds)

    def _compare(self, ids: list[int], outputs: list[Output], seconds: float) -> None:
        from forerun.cli.comparison import Side, verdict

        if self._plain is None:
            return

        started = time.perf_counter()
        alone = self._plain.stream(ids, self._params).outputs()
        if alone and alone[0].finish_reason != "interrupted":
            plain = Side(alone, time.perf_counter() - started)
            self._note(verdict(plain, Side(outputs, seconds), self._plain))

    def _print(self, text: str, origin: str) -> None:
        if self._console.is_terminal:
            from rich.text import Text as Styled

            self._console.print(Styled(text, self._ink.style(origin)), end="", soft_wrap=True)
        else:
            self._console.file.write(text)

    def _legend(self, credit: Counter[str]) -> None:
        """What the colours mean, and what the answer cost: on a terminal, below it."""
        if not self._console.is_terminal:
            return
        from rich.text import Text as Styled

        stats = self._outputs[-1].stats
        parts = [(f" {label(name)} {count} ", self._ink.style(name)) for name, count in credit.items() if name]
        cost = f" {stats.tokens_per_second:.0f} tokens/s, {stats.tokens_per_step:.2f} tokens per step"
        self._console.print(Styled.assemble(*parts, (cost, "dim")), highlight=False)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    # ---- what begins with a slash

    def _stats(self, _: str) -> None:
        from forerun.cli.narration import parts, summary

        if not self._outputs:
            self._note("nothing has been said yet")
            return
        for title, outputs, credits in (
            ("last answer", self._outputs[-1:], self._credits[-1:]),
            ("conversation", self._outputs, self._credits),
        ):
            self._note(f"{title}: {summary(outputs, sum(one.stats.seconds for one in outputs))}")
            total = sum(credits, Counter[str]())
            self._note("  " + ", ".join(f"{label(name)} {n} tokens" for name, n in total.most_common()))
        for line in parts(self._engine.drafter.tallies()):
            self._note(line)

    def _drafter(self, spec: str) -> None:
        from forerun.cli import engines

        if not spec:
            raise RequestError(f"the drafter is {self._engine.drafter.name}: name another, as in /drafter lookup")
        self._engine = engines.beside(self._engine, spec, self._machine)
        self._note(f"drafter {self._engine.drafter.name}")

    def _system(self, text: str) -> None:
        if isinstance(self._history, Text):
            raise RequestError("plain text has no system message: leave --raw out, for a model that can chat")
        self._history.system = text or None
        self._reset("")

    def _reset(self, _: str) -> None:
        self._history.reset()
        self._note("a new conversation")
