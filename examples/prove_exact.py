"""Prove that a drafter changes nothing a model says, as far as so many tokens and samples can.

    python examples/prove_exact.py MODEL --drafter hydra:HEADS --tokens 1000 --samples 400

Greedy texts must be equal token by token, alone and in a batch, and sampled ones must follow the
same law. The exit code is 1 if they do not.
"""

from __future__ import annotations

import argparse
import sys

import forerun
from forerun.bench import suites
from forerun.check import Amount, check


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="models/target", help="a folder in Hugging Face format, or a hub id"
    )
    parser.add_argument("--drafter", default="lookup")
    parser.add_argument("--tokens", type=int, default=200, help="greedy tokens to compare, for 1 row and for 4")
    parser.add_argument("--samples", type=int, default=100, help="per prompt and arm, for the law")
    parser.add_argument("--acceptance", default="exact", help="typical or lenient: lossy rules, which fail here")
    parser.add_argument("--dtype", default="auto", help="fp32 leaves no ties")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    plain = forerun.load(asked.model, dtype=asked.dtype)
    drafted = forerun.load(asked.model, drafter=asked.drafter, dtype=asked.dtype, acceptance=asked.acceptance)
    amount = Amount(tokens=asked.tokens, rows=(1, 4), samples=asked.samples)
    report = check(plain, drafted, [prompt.prompt for prompt in suites.load()], amount)
    print("\n".join(report.verdicts()))
    sys.exit(not report.passed)


if __name__ == "__main__":
    main()
