"""`forerun check`: is the output of a drafter really the model's own?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forerun.cli import options

Tokens = Annotated[int, typer.Option(help="Greedy tokens to compare, for every batch size; 0: none.")]
Rows = Annotated[str, typer.Option(metavar="1,8", help="Batch sizes for the greedy comparison.")]
Samples = Annotated[int, typer.Option(help="Samples per prompt and arm, for the law; 0: none.")]
PromptFile = Annotated[
    Path | None, typer.Option(help='Prompts of your own: a text file, or .jsonl with a "prompt" per row.')
]


def check(
    model: options.Model,
    drafter: options.Drafter,
    tokens: Tokens = 1000,
    rows: Rows = "1,8",
    samples: Samples = 400,
    prompt_file: PromptFile = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Prove a drafter exact on a model, as far as this many tokens and samples can; exit code 1 if it is not.

    Greedy: token ids equal plain decoding's, alone and in a batch. A difference is called a tie
    only where the gap between the two logits is within the rounding that was measured here; in fp32
    that is next to nothing. Law: sampled tokens (--temperature and so on) follow plain sampling's
    law, by a permutation test. A drafter that calls itself lossy fails.
    """
    from forerun.check import Amount
    from forerun.check import check as examine
    from forerun.cli import engines
    from forerun.cli.files import print_json
    from forerun.drafting.spec import describe
    from forerun.sampling import SamplingParams

    law = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    plan = Amount(tokens=tokens, rows=_sizes(rows), length=max_new_tokens, samples=samples, params=law, seed=seed or 0)
    describe(drafter)  # a wrong name is cheaper to find before the model is read
    prompts = _prompts(prompt_file)
    machine = engines.Machine(dtype, device, kernels, weights, threads)
    plain = engines.load(model, "none", machine)
    report = examine(plain, engines.beside(plain, drafter, machine), prompts, plan)
    if as_json:
        print_json(report.as_dict())
    else:
        print("\n".join(report.verdicts()))
    if not report.passed:
        raise typer.Exit(1)


def _sizes(text: str) -> tuple[int, ...]:
    from forerun.errors import RequestError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--rows {text!r} is not a list of batch sizes: write 1,8") from None


def _prompts(path: Path | None) -> list[str]:
    from forerun.bench import suites
    from forerun.cli.files import prompts_in

    return prompts_in(path) if path else [prompt.prompt for prompt in suites.load()]
