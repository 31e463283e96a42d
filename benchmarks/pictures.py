"""The picture of the README: a text as it was generated, every token in the colour of who thought of it, and the table.

    python benchmarks/pictures.py [more options of forerun demo, such as --rounds 5]

The text continues the prompt below; the table is measured on it and on seven prompts of the built-in suite.
`--rounds 0` leaves out what a busy machine would spoil.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from forerun.bench import suites
from forerun.cli import run

PICTURE = Path("docs/pictures/drafted.svg")
PROMPTS, TOKENS = 8, 128
DRAFTERS = ("lookup", "hierarchy | small:models/small", "models/hsd.yaml", "small:models/wide", "hydra:models/hydra++")

PROMPT = '''\
class Table:
    """Rows of numbers.

    Parameters
    ----------
    rows : list of list of float
        The numbers, row by row.
    """

    def __init__(self, rows):
        self.rows = rows

    def sum(self, axis=0):
        """Return the sum along an axis.

        Parameters
        ----------
        axis : int, optional
            0 for columns, 1 for rows.
        """
        rows = zip(*self.rows) if axis == 0 else self.rows
        return [sum(row) for row in rows]

    def max(self, axis=0):
'''


def main() -> int:
    others = [prompt.prompt for prompt in suites.spread(suites.load())[: PROMPTS - 1]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in (PROMPT, *others)))
        drafters = [word for one in DRAFTERS for word in ("--drafter", one)]
        asked = ["--prompts", str(file), "--limit", str(PROMPTS), "--max-new-tokens", str(TOKENS), *sys.argv[1:]]
        return run(["demo", "models/target", *drafters, "--show", DRAFTERS[1], *asked, "--picture", str(PICTURE)])


if __name__ == "__main__":
    sys.exit(main())
