"""`forerun check`: is the output of a drafter really the model's own?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forerun.cli import openings, options, speculation

AMOUNT = "How much"

Tokens = Annotated[
    int, typer.Option(rich_help_panel=AMOUNT, help="Greedy tokens to compare, for every batch size; 0: none.")
]
Rows = Annotated[
    str,
    typer.Option(
        "--rows", "--batch-size", metavar="1,8", rich_help_panel=AMOUNT, help="Batch sizes for the greedy comparison."
    ),
]
Samples = Annotated[int, typer.Option(rich_help_panel=AMOUNT, help="Samples per prompt and arm, for the law; 0: none.")]

EXAMPLES = """
forerun check MODEL --drafter lookup
forerun check MODEL --drafter small:DRAFT_MODEL --prompts mine.jsonl --tokens 2000
"""


def check(
    model: options.Model,
    drafter: options.Drafter = "none",
    num_speculative_tokens: options.SpeculativeTokens = None,
    speculative_config: options.SpeculativeConfig = None,
    tokens: Tokens = 1000,
    rows: Rows = "1,8",
    samples: Samples = 400,
    prompts: options.PromptFile = None,
    chat: options.Chat = False,
    system: options.System = None,
    chat_template: options.Template = None,
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
    revision: options.Revision = None,
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
    from forerun.errors import RequestError
    from forerun.sampling import SamplingParams

    law = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    plan = Amount(tokens=tokens, rows=_sizes(rows), length=max_new_tokens, samples=samples, params=law, seed=seed or 0)
    # A wrong name is cheaper to find before the model is read.
    spec = speculation.chosen(drafter, speculative_config, num_speculative_tokens)
    if spec == {"drafter": "none"}:
        raise RequestError("there is nothing to check: name a --drafter")
    asked, manner = _prompts(prompts), openings.Manner.of(chat, system, chat_template)
    machine = engines.Machine(dtype, device, kernels, weights, threads)
    plain = engines.load(options.at(model, revision), "none", machine)
    reader = openings.Reader(plain, manner)
    report = examine(plain, engines.beside(plain, spec, machine), reader.all_ids(asked), plan)
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


def _prompts(path: Path | None) -> list[openings.Opening]:
    from forerun.bench import suites

    return openings.read(path) if path else [openings.Opening(one.id, one.prompt) for one in suites.load()]
