"""`forerun generate`: text from a model, streamed, or as one JSON object."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options

if TYPE_CHECKING:
    from forerun.engine.engine import Engine
    from forerun.engine.requests import Output
    from forerun.sampling import SamplingParams

Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue; - is stdin.")]
PromptFiles = Annotated[
    list[Path] | None,
    typer.Option(help='A text file, or a .jsonl file with a "prompt" per row; may be repeated.'),
]
N = Annotated[int, typer.Option("--n", help="Samples per prompt.", rich_help_panel=options.SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="A string that ends the text and is not part of it; may be repeated.", rich_help_panel=options.SAMPLING
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.", rich_help_panel=options.SAMPLING)]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With --json: log-probabilities, with so many alternatives each.", rich_help_panel=options.OUTPUT
    ),
]
Repetition = Annotated[float, typer.Option(help="Over prompt and output; 1 is off.", rich_help_panel=options.SAMPLING)]
Penalty = Annotated[float, typer.Option(help="Over the output; 0 is off.", rich_help_panel=options.SAMPLING)]
MaxRows = Annotated[int, typer.Option(min=1, help="Requests that run side by side.", rich_help_panel=options.MACHINE)]


def generate(
    model: options.Model,
    prompts: Prompts = None,
    prompt_file: PromptFiles = None,
    drafter: options.Drafter = "none",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Penalty = 0.0,
    frequency_penalty: Penalty = 0.0,
    seed: options.Seed = None,
    acceptance: options.Acceptance = "exact",
    n: N = 1,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    max_rows: MaxRows = 16,
    logprobs: Logprobs = None,
    as_json: options.Json = False,
) -> None:
    """Continue prompts. Text streams as it is accepted, drafted tokens marked; the cost follows on stderr.

    Ctrl-C ends the generation, not the command: what was generated so far is printed, and the exit code is 130.
    """
    from forerun.cli import engines
    from forerun.errors import RequestError
    from forerun.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs has no place in streamed text: add --json")
    texts = _texts(prompts or [], prompt_file or [])
    engine = engines.load(
        model, drafter, engines.Machine(dtype, device, kernels, weights, threads), max_rows, acceptance
    )
    outputs = _as_json(engine, texts, params) if as_json else _as_text(engine, texts, params)
    if len(outputs) < len(texts) * n or any(output.finish_reason == "interrupted" for output in outputs):
        raise typer.Exit(130)


def _texts(prompts: list[str], files: list[Path]) -> list[str]:
    from forerun.cli.files import prompts_in, text_of
    from forerun.errors import RequestError

    texts = [text_of(prompt) for prompt in prompts] + [text for path in files for text in prompts_in(path)]
    if not texts:
        raise RequestError("there is no prompt: give one as an argument, - for standard input, or --prompt-file")
    return texts


def _as_json(engine: Engine, texts: list[str], params: SamplingParams) -> list[Output]:
    """Print the only output as it is, several under "outputs"; beside them, what the drafter's parts did."""
    from forerun.cli.files import print_json

    outputs = engine.generate(texts, params)
    tallies = [tally.as_dict() for tally in engine.drafter.tallies()]
    parts = {"parts": tallies} if tallies else {}
    if len(texts) * params.n == 1 and outputs:
        print_json(record(outputs[0]) | parts)
    else:
        places = [{"prompt_index": output.prompt_index, "sample": output.sample} for output in outputs]
        print_json({"outputs": [place | record(output) for place, output in zip(places, outputs, strict=True)]} | parts)
    return outputs


def record(output: Output) -> dict[str, Any]:
    """An output as `--json` prints it."""
    fields: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        fields["logprobs"] = [
            {"token_id": one.token_id, "logprob": one.logprob, "alternatives": one.alternatives}
            for one in output.logprobs
        ]
    return fields | {"stats": output.stats.as_dict()}


def _as_text(engine: Engine, texts: list[str], params: SamplingParams) -> list[Output]:
    from forerun.cli.narration import Scribe, on_stdout, parts, summary

    scribe = Scribe(on_stdout(), _titles(len(texts), params.n), params.n, as_ids=engine.tokenizer is None)
    started = time.perf_counter()
    outputs = engine.stream(texts, params).outputs(scribe.show)
    seconds = time.perf_counter() - started
    scribe.close()
    if outputs:
        print(summary(outputs, seconds), file=sys.stderr)
        for line in parts(engine.drafter.tallies()):
            print(line, file=sys.stderr)
    return outputs


def _titles(prompts: int, samples: int) -> list[str]:
    if prompts * samples == 1:
        return []
    sample = [f", sample {number + 1}" for number in range(samples)] if samples > 1 else [""]
    return [f"prompt {number + 1}{which}" for number in range(prompts) for which in sample]
