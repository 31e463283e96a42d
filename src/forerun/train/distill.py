"""The target's own answers as training data: prompts dealt to temperatures, answers streamed into a
file, and read back.

A file of answers is JSON lines. The first line says what made it; every other is one answer. Tokens
are ids, because what was generated is what is trained on (the same text could be cut into other
tokens):

    {"forerun": "distilled", "version": 1, "target": {...}, "sampling": {...}, "source": {...}, "seed": 0, ...}
    {"key": "9f02...", "prompt": [1, 17, 4], "answer": [5, 8, 2], "temperature": 0.0, "finish": "stop"}

An answer that loops (train/looping.py) says so, with "looping": true. When all is asked, those that
are too many leave nothing but their keys, so that they are not asked again:

    {"key": "41aa...", "looping": true}

The luck of an answer follows from the run's seed and its own key. So a run that was interrupted and
goes on leaves the same answers as one that was not, though perhaps in another order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forerun.engine.engine import Engine
from forerun.engine.requests import Piece
from forerun.errors import RequestError, TrainingError
from forerun.files import claim, whole
from forerun.sampling import SamplingParams
from forerun.sources.fingerprint import digest
from forerun.sources.source import Source
from forerun.train.looping import allowed, loops

FORMAT, VERSION = "distilled", 1
QUEUED_PER_ROW = 32
"""Prompts queued at once for every row: the batch runs dry only at a queue's end, and the engine
remembers no more than one."""


@dataclass(frozen=True)
class Sample:
    """One answer to train on, as ids; the token that ended it is its last. temperature: 0 where a row does not say."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    temperature: float = 0.0

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Distilled:
    """What a file of answers holds. header: {} where rows stand alone."""

    header: dict[str, Any]
    samples: list[Sample]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Prompts are dealt to the temperatures in turn. The filters concern those above 0; where there is
    none they are refused. max_looping: the share of all answers that may loop (see
    train/looping.py). Raises RequestError for values that make no sense, as SamplingParams does.
    """

    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 256
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_looping: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.max_looping <= 1:
            raise RequestError(f"max_looping {self.max_looping} is no share of the answers: give a number from 0 to 1")
        for temperature in self.temperatures:
            self.params(temperature)

    def params(self, temperature: float, seed: int | None = None) -> SamplingParams:
        """The request's parameters at one of the temperatures."""
        limits = {"max_new_tokens": self.max_new_tokens, "temperature": temperature, "seed": seed}
        if temperature == 0 and any(self.temperatures):
            return SamplingParams.of(limits)
        return SamplingParams.of(limits | {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p})

    def as_dict(self) -> dict[str, Any]:
        """For the header, which has the seed elsewhere."""
        values = asdict(self) | {"temperatures": list(self.temperatures)}
        return {name: value for name, value in values.items() if name != "seed"}


@dataclass(frozen=True)
class Question:
    """A prompt at a temperature. key: a hash of the prompt and of all that shapes its answer but the seed."""

    key: str
    prompt: tuple[int, ...]
    temperature: float

    def params(self, sampling: Sampling) -> SamplingParams:
        """Its request: the seed is its own, whichever requests run before it or beside it."""
        luck = hashlib.sha256(f"{sampling.seed} {self.key}".encode()).digest()
        return sampling.params(self.temperature, int.from_bytes(luck[:8], "big") >> 1)


@dataclass(frozen=True)
class Questions:
    """What is to be asked, each once; how often something was asked again, and how many prompts
    fill the context alone."""

    asked: list[Question]
    duplicates: int = 0
    too_long: int = 0


@dataclass(frozen=True)
class Answer:
    """What the target said. finish: "stop" (the last token ends the text) or "length"."""

    question: Question
    tokens: tuple[int, ...]
    finish: str

    @property
    def is_empty(self) -> bool:
        """Nothing but the token that ends a text."""
        return self.finish == "stop" and len(self.tokens) == 1

    @property
    def is_looping(self) -> bool:
        return self.finish == "length" and loops(self.tokens)

    def as_dict(self) -> dict[str, Any]:
        asked = self.question
        return {
            "key": asked.key,
            "prompt": list(asked.prompt),
            "answer": list(self.tokens),
            "temperature": asked.temperature,
            "finish": self.finish,
            **({"looping": True} if self.is_looping else {}),
        }


@dataclass(frozen=True)
class Loops:
    """Of all answers that were ever asked for in a file: how many loop, and how many of these were left out."""

    found: int = 0
    left_out: int = 0


@dataclass
class Tally:
    """What a run has done so far. known: answers that an earlier run left; seconds: of generation, prompts included."""

    wanted: int
    known: int = 0
    answers: int = 0
    empty: int = 0
    new_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    finishes: Counter[str] = field(default_factory=Counter)
    loops: Loops = Loops()

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def note(self, piece: Piece) -> None:
        self.steps += 1
        self.new_tokens += len(piece.token_ids)

    def count(self, answer: Answer) -> None:
        if answer.is_empty:
            self.empty += 1
        else:
            self.answers += 1
            self.finishes[answer.finish] += 1


Watch = Callable[[Tally, Answer | None], None]
"""Told after every step of a row; the answer is there when it is complete (and not empty)."""


# ---- what is asked


def deal(prompts: Iterable[Sequence[int]], sampling: Sampling, context: int) -> Questions:
    """Prompts dealt to the temperatures in turn; equal ones at one temperature are asked once, and
    those that leave no room for an answer in `context` tokens not at all.

    Raises TrainingError if nothing is left.
    """
    asked: dict[str, Question] = {}
    given = too_long = 0
    for number, prompt in enumerate(prompts):
        given += 1
        if len(prompt) >= context:
            too_long += 1
            continue
        question = _question(tuple(prompt), sampling.temperatures[number % len(sampling.temperatures)], sampling)
        asked.setdefault(question.key, question)
    if not asked:
        reason = f"all {given} prompts have {context} tokens, the whole context, or more: shorten them"
        raise TrainingError(reason if given else "there are no prompts: give at least one")
    return Questions(list(asked.values()), given - too_long - len(asked), too_long)


def _question(prompt: tuple[int, ...], temperature: float, sampling: Sampling) -> Question:
    params = sampling.params(temperature)
    shaping = [params.max_new_tokens, *map(float, params.filter)]
    return Question(digest([list(prompt), shaping])[:32], prompt, float(temperature))


def windows(corpus: Path, lengths: tuple[int, int], count: int, seed: int) -> list[list[int]]:
    """`count` prompts cut from a corpus's train.bin, their lengths drawn evenly from lengths[0] ... lengths[1] tokens.

    The same seed cuts the same windows, and the first of them whatever the count. Raises
    TrainingError if it cannot be done.
    """
    low, high = lengths
    if not 1 <= low <= high or count < 1:
        raise TrainingError(
            f"{count} prompts of {low} to {high} tokens cannot be cut: give at least 1, the shorter first"
        )
    path = corpus / "train.bin"
    if not path.is_file() or path.stat().st_size < 2 * high:
        raise TrainingError(
            f"{path} is missing or shorter than {high} tokens: name a folder that forerun train lm --build-corpus has"
            " made"
        )
    tokens = np.memmap(path, dtype=np.uint16, mode="r", shape=(path.stat().st_size // 2,))
    draw = np.random.default_rng(seed)
    cut = []
    for _ in range(count):
        length = int(draw.integers(low, high + 1))
        start = int(draw.integers(0, len(tokens) - length + 1))
        cut.append(tokens[start : start + length].tolist())
    return cut


def demand_tokenizer(corpus: Path, engine: Engine) -> None:
    """TrainingError if a corpus was cut by another tokenizer than the model's: its windows would be
    noise to it, and nothing else would say so. A corpus or model without a tokenizer is taken at
    its word."""
    from tokenizers import Tokenizer

    file = corpus / "tokenizer" / "tokenizer.json"
    if engine.tokenizer is None or not file.is_file():
        return
    if Tokenizer.from_file(str(file)).get_vocab() != engine.tokenizer.backend_tokenizer.get_vocab():
        raise TrainingError(
            f"the corpus {corpus} was cut by another tokenizer than the model's: use a corpus made for this model, or"
            " --prompts"
        )


# ---- what made a file


def header_of(
    model: str, engine: Engine, sampling: Sampling, source: Mapping[str, Any], template: Any
) -> dict[str, Any]:
    """The first line of a file of answers: everything that they depend on. Not the batch and not
    the drafter, which do not change what the target says.

    source: where the prompts come from. template: the chat template that they were rendered with, or None.
    """
    target, network = Source.of(model), engine.target.network
    return {
        "forerun": FORMAT,
        "version": VERSION,
        "target": {"name": target.name, "fingerprint": target.fingerprint},
        "dtype": str(network.dtype).removeprefix("torch."),
        "weights": str(network.weights).removeprefix("torch."),
        "kernels": network.backend.name,
        "sampling": sampling.as_dict(),
        "template": template,
        "source": dict(source),
        "seed": sampling.seed,
    }


# ---- the answers


def distill(engine: Engine, questions: Questions, sampling: Sampling, ledger: Ledger, watch: Watch) -> Tally:
    """Ask what the ledger does not know, and enter every answer in the moment it is complete.

    Raises TrainingError if the file cannot be written, or for an engine with a lossy rule: that
    does not say what the target says. Whatever interrupts this, finished answers are in the file.
    """
    if engine.lossy is not None:
        raise TrainingError("a lossy rule does not keep what the target says: distill with an engine that is exact")
    left = [question for question in questions.asked if question.key not in ledger.keys]
    tally = Tally(len(questions.asked), len(questions.asked) - len(left))
    begun = time.perf_counter()
    with contextlib.closing(_pieces(engine, left, sampling)) as pieces:
        for piece, answer in pieces:
            tally.note(piece)
            if answer is not None:
                tally.count(answer)
                if answer.is_empty:
                    answer = None
                else:
                    ledger.enter(answer)
            tally.seconds = time.perf_counter() - begun
            watch(tally, answer)
    tally.loops = ledger.limit(sampling.max_looping)
    return tally


def _pieces(
    engine: Engine, questions: Sequence[Question], sampling: Sampling
) -> Generator[tuple[Piece, Answer | None], None, None]:
    """Every step of every request, and the answer with the step that completes it."""
    size = QUEUED_PER_ROW * engine.max_rows
    for group in (questions[start : start + size] for start in range(0, len(questions), size)):
        said: list[list[int]] = [[] for _ in group]
        prompts, params = [one.prompt for one in group], [one.params(sampling) for one in group]
        with engine.stream(prompts, params, text=False) as pieces:
            for piece in pieces:
                tokens, question = said[piece.prompt_index], group[piece.prompt_index]
                tokens += piece.token_ids
                finish = piece.finish_reason
                yield piece, Answer(question, tuple(tokens), finish) if finish else None


class Ledger:
    """A file of answers that is being written. keys: of the answers in it.

    Opening one that exists goes on with it: a last line that was cut in the middle is forgotten,
    and another header is refused (TrainingError), as is a file that somebody else is writing. The file
    is there from the beginning, and empty before the first answer.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self._header = _line(header)
        self.keys: set[str] = set()
        self._end = 0  # bytes of whole lines
        try:
            self._claim = claim(path, 0o666)
        except BlockingIOError:
            raise TrainingError(f"{path} is being written by another run: wait for it, or name another --out") from None
        except OSError as error:
            raise TrainingError(f"{path} cannot be written ({error.strerror}): name another --out") from None
        self._resume()

    def enter(self, answer: Answer) -> None:
        """Append an answer, on disk when this returns. TrainingError if there is no room; what was there stays."""
        line = _line(answer.as_dict())
        content = line if self._end else self._header + line
        try:
            if self.path.is_file() and self.path.stat().st_size > self._end:
                os.truncate(self.path, self._end)
            with self.path.open("ab") as file:
                file.write(content)
        except OSError as error:
            self._forget_half_a_line()
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}): make room there, and the same command goes on"
            ) from None
        self._end += len(content)
        self.keys.add(answer.question.key)

    def limit(self, share: float) -> Loops:
        """Leave of looping answers at most this share of all: those whose keys come first, whatever
        order they came in. TrainingError if the file cannot be written; what was there stays."""
        looping, others, left_out = list[str](), 0, 0
        for _, row, _ in _rows(self.path) if self._end else ():
            if not row.get("looping"):
                others += "answer" in row
            elif "answer" in row:
                looping.append(row["key"])
            else:
                left_out += 1
        surplus = set(sorted(looping)[allowed(others, share) :]) if share < 1 else set()
        if surplus:
            self._leave_out(surplus)
        return Loops(len(looping) + left_out, left_out + len(surplus))

    def _leave_out(self, keys: set[str]) -> None:
        end = 0
        try:
            with whole(self.path) as file:
                for _, row, _ in _rows(self.path):
                    key = row.get("key")
                    end += file.write(_line({"key": key, "looping": True} if key in keys else row))
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}): make room there, and the same command goes on"
            ) from None
        self._end = end

    def _forget_half_a_line(self) -> None:
        with contextlib.suppress(OSError):
            if self._end:
                os.truncate(self.path, self._end)
            elif self.path.is_file():
                self.path.unlink()

    def _resume(self) -> None:
        with _opened(self.path) as file:
            first = file.readline()
        if self._header.startswith(first) and first != self._header:
            return  # empty, or cut within our own header
        found = _object(first) or {}
        if found.get("forerun") != FORMAT:
            raise TrainingError(f"{self.path} exists and is not from forerun distill: choose another --out")
        _demand_equal(self.path, found, json.loads(self._header))
        rows = _rows(self.path)
        self._end = next(rows)[2]
        for number, row, end in rows:
            if not isinstance(row.get("key"), str):
                raise TrainingError(
                    f'{self.path}, line {number} has no "key": remove the line, or choose another --out'
                )
            self.keys.add(row["key"])
            self._end = end


def _demand_equal(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The same header, or a sentence about the first difference."""
    theirs, ours = _flat(found), _flat(wanted)
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            before, now = (json.dumps(values.get(name)) for values in (theirs, ours))
            raise TrainingError(
                f"{path} holds answers with {name} {before}, and now it is {now}: choose another --out, or ask as"
                " before"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return found


# ---- reading


def read(path: Path) -> Distilled:
    """The answers in a file of `forerun distill`, or in plain rows of {"prompt": [ids], "answer": [ids]}.

    The last line of a run that was interrupted may be half a line, and is left out. Raises
    TrainingError, which names the line, for anything else that is not an answer, and for a file
    without any.
    """
    header: dict[str, Any] = {}
    samples: list[Sample] = []
    for number, row, _ in _rows(path, whole_lines=False):
        if not samples and not header and "forerun" in row:
            header = _checked_header(path, row)
        elif "answer" in row or not row.get("looping"):
            samples.append(_sample(row, f"{path}, line {number}"))
    if not samples:
        raise TrainingError(f"{path} holds no answers: make some with forerun distill --out {path}")
    return Distilled(header, samples)


def _checked_header(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    if (row["forerun"], row.get("version")) != (FORMAT, VERSION):
        kind = f"{row['forerun']!r}, version {row.get('version')!r}"
        raise TrainingError(f"{path} is {kind}, and {FORMAT!r}, version {VERSION} can be read: distill again")
    return row


def _sample(row: Mapping[str, Any], where: str) -> Sample:
    for name in ("prompt", "answer"):
        if not _are_ids(row.get(name)):
            raise TrainingError(f'{where} has no token ids under "{name}": write "{name}": [1, 2, 3]')
    temperature = row.get("temperature", 0.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TrainingError(f"{where} has the temperature {temperature!r}: write a number, or leave it out")
    return Sample(tuple(row["prompt"]), tuple(row["answer"]), float(temperature))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _rows(path: Path, whole_lines: bool = True) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Number, object and end (in bytes) of every line. A last one without its line end was cut;
    without `whole_lines` it counts as one if it can be read."""
    end = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            end += len(line)
            is_cut = not line.endswith(b"\n")
            if not line.strip() or (is_cut and whole_lines):
                continue
            row = _object(line)
            if row is not None:
                yield number, row, end
            elif not is_cut:
                raise TrainingError(f"{path}, line {number} is not a JSON object: remove the line, or distill again")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}): name a file of forerun distill") from None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
