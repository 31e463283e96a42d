"""Train draft heads for a model, from its own answers; the model stays as it is.

    python examples/train_heads.py MODEL --out heads --prompts prompts.jsonl --tokens 256 \\
        --steps 2000 --rows 16 --length 512 --start-batches 64

Three commands in a row, each of which goes on where it was interrupted. The settings as they stand
are for seeing them run. Thousands of prompts and steps make heads that are worth having.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import forerun
from forerun.cli import run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="models/target", help="a folder in Hugging Face format, or a hub id"
    )
    parser.add_argument("--out", type=Path, default=Path("heads"), help="where the heads go; the answers stand beside")
    parser.add_argument("--kind", default="hydra", help="medusa, hydra or hydra++")
    parser.add_argument("--prompts", type=Path, help="a .txt or .jsonl file; without it, the built-in suite")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per answer")
    parser.add_argument("--steps", type=int, default=8, help="of training")
    parser.add_argument("--rows", type=int, default=4, help="answers per step")
    parser.add_argument("--length", type=int, default=192, help="tokens of an answer with its prompt")
    parser.add_argument("--start-batches", type=int, default=2, help="batches of the least-squares start")
    parser.add_argument("--calibrate", type=int, default=4, help="answers on which the tree is fitted to this machine")
    return parser.parse_args()


def command(*words: object) -> int:
    """As the command line would run it; its exit code."""
    print("\n$ forerun", *words, flush=True)
    return run([str(word) for word in words])


def main() -> None:
    asked = arguments()
    answers = asked.out.with_name(asked.out.name + ".jsonl")
    source = ["--prompts", asked.prompts] if asked.prompts else ["--builtin"]
    luck = ("--temperature", 0, "--temperature", 0.8)  # greedy answers alone repeat themselves
    failed = command("distill", asked.model, *source, "--out", answers, "--max-new-tokens", asked.tokens, *luck)
    failed = failed or command(
        *("train", asked.kind, "--target", asked.model, "--data", answers, "--out", asked.out),
        *("--steps", asked.steps, "--rows", asked.rows, "--length", asked.length),
        *("--start-batches", asked.start_batches),
    )
    if failed:
        sys.exit(failed)
    drafter = f"{asked.kind.rstrip('+')}:{asked.out}"
    # Where no tree beats plain decoding, or nothing can be measured, the heads keep a small one.
    sizes = ("--answers", asked.calibrate, "--max-new-tokens", min(max(asked.tokens // 2, 1), 192))
    command("calibrate", asked.model, "--drafter", drafter, *sizes)
    engine = forerun.load(asked.model, drafter=drafter)
    (output,) = engine.generate("def main():\n", forerun.SamplingParams(max_new_tokens=asked.tokens))
    print(f"\n{output.text}\n\n{drafter}: {output.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main()
