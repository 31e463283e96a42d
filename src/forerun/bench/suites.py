"""Prompts to measure on: the built-in suite, or a JSON-lines file of your own.

The built-in suite continues Python files that the reference family was never trained on. Its four categories differ in
what a drafter can know: `stdlib` and `library` are code that a model has to think about, `docs` is prose inside a
docstring or a comment, and in `repetitive` much of the continuation already stands in the prompt, where a lookup
shines.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import accumulate, chain, islice, zip_longest
from pathlib import Path
from typing import Any

from forerun.errors import RequestError, TrainingError
from forerun.files import put

CATEGORIES = ("stdlib", "library", "docs", "repetitive")
PROMPTS_PER_CATEGORY = 12
SHORTEST, LONGEST, FOLLOWING = 300, 700, 300
"""A built-in prompt's length in tokens of the reference tokenizer, and how much real text follows it in its file."""

IdsOf = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""


@dataclass(frozen=True)
class Prompt:
    """One text to continue, and where it comes from."""

    id: str
    category: str
    source: str
    licence: str
    prompt: str


def load(name: str | Path = "builtin") -> list[Prompt]:
    """The built-in suite, or the rows of a `.jsonl` file: each an object with at least a "prompt".

    Raises RequestError, a ValueError, for an unknown name, a missing file or a row that is not a prompt.
    """
    if str(name) == "builtin":
        return parse(
            resources.files("forerun.bench").joinpath("suite.jsonl").read_text(encoding="utf-8"), "the built-in suite"
        )
    if Path(name).suffix != ".jsonl":
        raise RequestError(
            f"unknown suite '{name}'; use 'builtin' or the path of a .jsonl file with a \"prompt\" in every row"
        )
    try:
        return parse(Path(name).read_text(encoding="utf-8"), str(name))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the suite '{name}': {error}") from error


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One of every category, then the second of every category, and so on: any beginning of it is a fair selection."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    return [prompt for layer in zip_longest(*groups.values()) for prompt in layer if prompt is not None]


def parse(text: str, origin: str) -> list[Prompt]:
    """The prompts in JSON lines; `origin` names the file in error messages."""
    numbered = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    prompts = [_parse_row(line, f"{origin}, line {number}", number) for number, line in numbered]
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise RequestError(f"{origin} uses the id '{repeated[0]}' more than once; every row needs its own")
    if not prompts:
        raise RequestError(f'{origin} holds no prompts; write one JSON object with a "prompt" per line')
    return prompts


def _parse_row(line: str, where: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise RequestError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    given = {field: str(row.get(field, default)) for field, default in _defaults(number).items()}
    return Prompt(prompt=row["prompt"], **given)


def _defaults(number: int) -> dict[str, str]:
    return {"id": f"row-{number}", "category": "custom", "source": "", "licence": ""}


# -- building the built-in suite --------------------------------------------------------------------------------------
#
# Every line end of every held-out file is a possible cut. A cut that has a readable place to start from, 300 to 700
# tokens earlier, becomes a window; windows are sorted into categories by what follows the cut, and taken without
# overlap, few from one file.

_COPYLEFT = ("GPL", "MPL", "Mozilla", "unknown")
_PROSE, _CODE = 0.95, 0.4
_LEAD = 5  # lines before the cut that count too: the prompt must already be inside the docstring
_LINK = "://"  # nobody can predict an address, and a suite should not send readers anywhere
_GRAM = 4
_MOST_PER_FILE = {"stdlib": 5, "library": 1, "docs": 2, "repetitive": 2}
_MOST_PER_DISTRIBUTION = {"stdlib": PROMPTS_PER_CATEGORY, "library": 2, "docs": 3, "repetitive": 3}
_STDLIB = "python-stdlib"


@dataclass(frozen=True)
class Window:
    """Lines `start` to `cut` of a file are the prompt, `cut` to `end` what follows it.

    `prose`: the share of lines inside docstrings and comments, around and after the cut.
    `repeated`: the share of following token 4-grams that the prompt holds too.
    """

    document: dict[str, str]
    start: int
    cut: int
    end: int
    prompt: str
    prose: float
    repeated: float

    @property
    def rank(self) -> bytes:
        return hashlib.sha256(f"{self.document['name']}:{self.cut}".encode()).digest()

    def overlaps(self, other: Window) -> bool:
        is_same_file = self.document is other.document
        return is_same_file and self.start < other.end and other.start < self.end


def build_suite(heldout_jsonl: Path, ids_of: IdsOf, out: Path) -> list[Prompt]:
    """Writes the suite's rows to `out`; the same documents and tokenizer always give the same rows.

    `heldout_jsonl` is what `forerun.train.corpus.write` leaves: rows of name, distribution, licence, text.
    Raises TrainingError if a category cannot be filled.
    """
    documents = [json.loads(line) for line in heldout_jsonl.read_text(encoding="utf-8").split("\n") if line]
    usable = [document for document in documents if not any(word in document["licence"] for word in _COPYLEFT)]
    windows = [window for document in usable for window in windows_of(document, ids_of)]
    prompts = list(_named(choose(windows)))
    rows = "".join(json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    put(out, rows.encode())
    return prompts


def _named(chosen: dict[str, list[Window]]) -> Iterator[Prompt]:
    for category in CATEGORIES:
        for number, window in enumerate(sorted(chosen[category], key=lambda window: window.rank), start=1):
            document = window.document
            source = f"{document['distribution']}: {document['name']}"
            yield Prompt(f"{category}-{number:02d}", category, source, document["licence"], window.prompt)


def choose(windows: Sequence[Window]) -> dict[str, list[Window]]:
    """Twelve windows a category. The scarce ones choose first: the most repetitive code, then prose, then the rest."""
    code = sorted((window for window in windows if window.prose <= _CODE), key=lambda window: window.rank)
    prose = sorted((window for window in windows if window.prose >= _PROSE), key=lambda window: window.rank)
    wishes = {
        "repetitive": sorted(code, key=lambda window: -window.repeated),
        "docs": prose,
        "stdlib": [window for window in code if window.document["distribution"] == _STDLIB],
        "library": [window for window in code if window.document["distribution"] != _STDLIB],
    }
    taken: list[Window] = []
    chosen: dict[str, list[Window]] = {}
    for category, wished in wishes.items():
        chosen[category] = list(islice(_spread(wished, category, taken), PROMPTS_PER_CATEGORY))
        if len(chosen[category]) < PROMPTS_PER_CATEGORY:
            raise TrainingError(
                f"only {len(chosen[category])} held-out passages fit '{category}'; {PROMPTS_PER_CATEGORY} are needed"
            )
    return chosen


def _spread(wished: Iterable[Window], category: str, taken: list[Window]) -> Iterator[Window]:
    """In the order wished, without overlap, and not too many from one file or one distribution."""
    files: Counter[str] = Counter()
    distributions: Counter[str] = Counter()
    for window in wished:
        name, distribution = window.document["name"], window.document["distribution"]
        is_full = (
            files[name] >= _MOST_PER_FILE[category] or distributions[distribution] >= _MOST_PER_DISTRIBUTION[category]
        )
        if is_full or any(window.overlaps(other) for other in taken):
            continue
        files[name] += 1
        distributions[distribution] += 1
        taken.append(window)
        yield window


def windows_of(document: dict[str, str], ids_of: IdsOf) -> Iterator[Window]:
    """Every usable cut of one document, each with the starting place that makes a prompt of a length drawn by hash."""
    lines = document["text"].splitlines(keepends=True)
    ids = [list(ids_of(line)) if line.strip() else [] for line in lines]  # a blank line may join the token before it
    position = list(accumulate(map(len, ids), initial=0))
    is_prose = _prose_lines(document["text"], len(lines))
    starts = [line for line in range(len(lines)) if _is_start(lines, line)]
    for cut in range(_LEAD, len(lines)):
        end = next((line for line in range(cut, len(lines) + 1) if position[line] - position[cut] >= FOLLOWING), None)
        start = _start_for(cut, starts, position, document["name"])
        if end is None or start is None or not lines[cut - 1].strip():
            continue
        prompt = "".join(lines[start:cut])
        if _LINK in prompt or not SHORTEST <= len(ids_of(prompt)) <= LONGEST:
            continue
        yield Window(
            document, start, cut, end, prompt,
            prose=sum(is_prose[cut - _LEAD : end]) / (end - cut + _LEAD),
            repeated=_repeated(list(chain(*ids[start:cut])), list(chain(*ids[cut:end]))),
        )  # fmt: skip


def _is_start(lines: Sequence[str], line: int) -> bool:
    """The file's first line, or a definition after a blank line: where a reader would begin to quote."""
    if line == 0:
        return True
    return not lines[line - 1].strip() and lines[line].lstrip().startswith(("def ", "class ", "async def ", "@", "#"))


def _start_for(cut: int, starts: Sequence[int], position: Sequence[int], name: str) -> int | None:
    draw = int.from_bytes(hashlib.sha256(f"{name}:{cut}".encode()).digest()[-4:], "big")
    wanted = SHORTEST + draw % (LONGEST - SHORTEST)
    fitting = [start for start in starts if start < cut and SHORTEST <= position[cut] - position[start] <= LONGEST]
    return min(fitting, key=lambda start: abs(position[cut] - position[start] - wanted), default=None)


def _prose_lines(text: str, count: int) -> list[bool]:
    """Which lines stand inside a docstring (with a line of it before them) or are comments."""
    prose = [False] * (count + 1)
    try:
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                prose[node.lineno : node.end_lineno] = [True] * ((node.end_lineno or node.lineno) - node.lineno)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                prose[token.start[0] - 1] = True
    except (SyntaxError, tokenize.TokenError):
        return [False] * count
    return prose[:count]


def _repeated(prompt: Sequence[int], following: Sequence[int]) -> float:
    known = set(_grams(prompt))
    grams = list(_grams(following))
    return sum(gram in known for gram in grams) / max(len(grams), 1)


def _grams(ids: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(*(ids[offset:] for offset in range(_GRAM)), strict=False)
