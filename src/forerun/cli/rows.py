"""A file of generated texts, a JSON object per line, that grows while they end and can be gone on with.

    {"id": "q7", "prompt_index": 6, "sample": 0, "text": "...", "token_ids": [...], "finish_reason": "stop",
     "stats": {...}, "prompt": "9f0c...", "settings": {"model": "target", "drafter": {...}, ...}}

Every row says what it depends on, so that rows of several files can be put together and a changed setting is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from forerun import files
from forerun.cli.complaint import NO_ROOM
from forerun.cli.openings import Opening
from forerun.errors import ForerunError, RequestError
from forerun.sampling import SamplingParams
from forerun.sources.fingerprint import digest

BEGINNING = b'{"id": '
"""Of every row."""


class Job(Protocol):
    """What is asked: openings and their ids, and how."""

    @property
    def openings(self) -> Sequence[Opening]: ...

    @property
    def ids(self) -> Sequence[list[int]]: ...

    @property
    def params(self) -> SamplingParams: ...


class Rows:
    """The rows of one file. known: texts that were there when it was opened.

    A last line that was cut in the middle is forgotten. Rows of other settings, of other prompts,
    or that are none are refused (RequestError). A file that cannot be written is found at once (ForerunError).
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], job: Job):
        self._path, self._job = path, job
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._prompts = [digest(ids)[:16] for ids in job.ids]
        self._there: set[tuple[int, int]] = set()
        if files.is_special(path):
            raise RequestError(f"cannot write {path}, for it is no file: name a file for --out")
        self._claim = self._claimed()
        self._resume()
        self._append(b"")
        self.known = len(self._there)

    def left(self) -> list[int]:
        """Prompts of which a sample is missing."""
        samples = range(self._job.params.n)
        return [index for index in range(len(self._prompts)) if any((index, one) not in self._there for one in samples)]

    def enter(self, index: int, output: Any, record: Mapping[str, Any]) -> bool:
        """Write a text that has ended; False if it is there already. ForerunError if there is no room."""
        place = (index, output.sample)
        if place in self._there:
            return False
        name = self._job.openings[index].name
        row = {
            "id": f"prompt-{index + 1}" if name is None else name,
            "prompt_index": index,
            "sample": output.sample,
            **record,
            "prompt": self._prompts[index],
            "settings": self._settings,
        }
        # Half a character, which a name in JSON may hold, is written as JSON escapes it.
        self._append(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._there.add(place)
        return True

    def _claimed(self) -> files.Claim:
        try:
            return files.claim(self._path, 0o666)
        except BlockingIOError:
            raise RequestError(
                f"{self._path} is being written by another command: wait for it, or name another --out"
            ) from None
        except OSError as error:
            raise self._unwritten(error) from None

    def _append(self, line: bytes) -> None:
        try:
            files.append(self._path, line)
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> ForerunError:
        mend = "make room" if error.errno in NO_ROOM else "mend that, or name another --out"
        return ForerunError(f"cannot write {self._path} ({error.strerror}): {mend}, and the same command goes on")

    def _resume(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            self._take(line, number)
        if rest := content[len(whole) :]:
            self._end(rest, whole)

    def _end(self, rest: bytes, whole: bytes) -> None:
        """A last line without its end: a row that lacks nothing else stays, half a row goes."""
        if _is_json(rest):
            self._take(rest, whole.count(b"\n") + 1)
            self._append(b"\n")
            return
        if not whole and not (rest.startswith(BEGINNING) or BEGINNING.startswith(rest)):
            raise RequestError(self._stranger(1))
        with self._path.open("r+b") as file:
            file.truncate(len(whole))

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            place, prompt, settings = (
                (int(row["prompt_index"]), int(row["sample"])),
                row["prompt"],
                dict(row["settings"]),
            )
        except (ValueError, KeyError, TypeError):
            raise RequestError(self._stranger(number)) from None
        for name in [*self._settings, *settings]:
            if settings.get(name) != self._settings.get(name):
                before, now = json.dumps(settings.get(name)), json.dumps(self._settings.get(name))
                raise RequestError(
                    f"{self._path} was written with {name} {before}, and now it is {now}: choose another --out, or ask"
                    " as before"
                )
        if place[0] >= len(self._prompts) or self._prompts[place[0]] != prompt:
            raise RequestError(
                f"{self._path}, line {number} answers another prompt {place[0] + 1} than the one given now: choose"
                " another --out, or ask as before"
            )
        self._there.add(place)

    def _stranger(self, number: int) -> str:
        return f"{self._path}, line {number} is not from forerun generate: choose another --out"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
