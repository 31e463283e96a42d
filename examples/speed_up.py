"""Make a model faster: which drafter helps on this machine, on prompts of yours?

    python examples/speed_up.py MODEL --prompts prompts.txt --tokens 256
    python examples/speed_up.py MODEL --drafter hierarchy --drafter hydra:HEADS

No drafter changes the text. Where none of them helps, that is the answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import forerun
from forerun.bench import suites


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="models/target", help="a folder in Hugging Face format, or a hub id"
    )
    parser.add_argument("--drafter", action="append", help="may be repeated; lookup and hierarchy need nothing")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt per line")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt")
    parser.add_argument("--rows", type=int, default=1, help="requests side by side")
    parser.add_argument("--limit", type=int, default=4, help="only so many prompts")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    texts = asked.prompts.read_text().splitlines() if asked.prompts else [one.prompt for one in suites.load()]
    texts = [text for text in texts if text.strip()][: asked.limit]
    params = forerun.SamplingParams(max_new_tokens=asked.tokens, ignore_eos=True)
    plain_ids, plain_rate, rates = None, 0.0, {}
    for drafter in ["none", *(asked.drafter or ["lookup", "hierarchy"])]:
        engine = forerun.load(asked.model, drafter=drafter, max_rows=asked.rows)
        room = max(1, engine.target.max_length - asked.tokens)
        prompts = [engine.encode(text)[:room] for text in texts]
        engine.generate(prompts[0], params)  # the first text warms everything up
        begun = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - begun
        ids = [output.token_ids for output in outputs]
        rate = sum(map(len, ids)) / seconds
        if plain_ids is None:
            plain_ids, plain_rate = ids, rate
        steps = sum(output.stats.steps for output in outputs)
        same = (
            "identical" if ids == plain_ids else "DIFFERENT: run examples/prove_exact.py, which tells ties from errors"
        )
        print(
            f"{drafter:24} {rate:8.1f} tokens/s {rate / plain_rate:6.2f}x"
            f" {sum(map(len, ids)) / steps:6.2f} tokens per step   {same}"
        )
        rates[drafter] = rate
    best = max(rates, key=lambda name: rates[name])
    print(f'\nfastest here: forerun.load("{asked.model}", drafter="{best}")')


if __name__ == "__main__":
    try:
        main()
    except forerun.ForerunError as error:
        sys.exit(str(error))
