"""Every experiment has the same form and stands in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
INDEX = (FOLDER / "index.md").read_text()
EXPERIMENTS = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
ROW = re.compile(r"^\| (\S+) \| (.+?) \| (.+?) \| \[.+?\]\((.+?)\) \|$", re.MULTILINE)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_asks_shows_and_decides(path: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+", path.stem)
    text = path.read_text()
    question, first, command, second, result, third, decision = re.split(r"^(## .+)$", text, flags=re.MULTILINE)
    assert re.fullmatch(r"# .+\?", question.strip())
    assert (first, second, third) == ("## Command", "## Result", "## Decision")
    assert command.strip() and result.strip() and decision.strip()
    assert not [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|")]


def test_the_index_lists_every_experiment_newest_first() -> None:
    rows = ROW.findall(INDEX)
    assert sorted(name for _, _, _, name in rows) == [path.name for path in EXPERIMENTS]
    dates = [date for date, _, _, _ in rows]
    assert dates == sorted(dates, reverse=True)
    for date, question, answer, name in rows:
        assert name.startswith(date)
        assert (FOLDER / name).read_text().startswith(f"# {question}\n")
        assert len(answer.split()) <= 10
