"""`forerun generate`: text from a model, streamed, as one JSON object, or row by row into a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import constraining, openings, options, speculation
from forerun.cli.openings import Opening

if TYPE_CHECKING:
    from forerun.cli.engines import Machine
    from forerun.engine.engine import Engine
    from forerun.engine.requests import Output
    from forerun.sampling import SamplingParams

log = logging.getLogger(__name__)

Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to continue; - is standard input.")
]
PromptFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompts",
        "--prompt-file",
        metavar="FILE",
        help="A prompt per line (.txt), row (.jsonl) or file.",
        rich_help_panel=options.PROMPTS,
    ),
]
N = Annotated[int, typer.Option("--n", help="Samples per prompt.", rich_help_panel=options.ADVANCED)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text; may be repeated.", rich_help_panel=options.SAMPLING),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.", rich_help_panel=options.ADVANCED)]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With --json: log-probabilities, with so many alternatives each.", rich_help_panel=options.ADVANCED
    ),
]
Repetition = Annotated[float, typer.Option(help="Over prompt and output; 1 is off.", rich_help_panel=options.ADVANCED)]
Penalty = Annotated[float, typer.Option(help="Over the output; 0 is off.", rich_help_panel=options.ADVANCED)]
MaxRows = Annotated[
    int,
    typer.Option(
        "--max-rows", "--batch-size", min=1, help="Requests that run side by side.", rich_help_panel=options.MACHINE
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="A row per text, as it ends; the same command goes on.",
        rich_help_panel=options.OUTPUT,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Plain decoding beside it: both speeds, and whether the texts are identical.",
        rich_help_panel=options.OUTPUT,
    ),
]

EXAMPLES = """
forerun generate MODEL "def main():" --drafter lookup --compare
forerun generate MODEL "Why is the sky blue?" --chat --temperature 0.8 --drafter small:DRAFT_MODEL
forerun generate MODEL --prompts questions.jsonl --drafter hierarchy --out answers.jsonl
"""


def generate(
    model: options.Model,
    prompts: Prompts = None,
    prompt_file: PromptFiles = None,
    chat: options.Chat = False,
    system: options.System = None,
    chat_template: options.Template = None,
    drafter: options.Drafter = "auto",
    num_speculative_tokens: options.SpeculativeTokens = None,
    speculative_config: options.SpeculativeConfig = None,
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
    json_schema: constraining.JsonSchema = None,
    regex: constraining.Regex = None,
    choice: constraining.Choice = None,
    lark: constraining.Lark = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    max_rows: MaxRows = 16,
    prefix_cache: options.PrefixCache = None,
    revision: options.Revision = None,
    logprobs: Logprobs = None,
    out: Out = None,
    compare: Compare = False,
    as_json: options.Json = False,
) -> None:
    """Continue prompts. Text streams as it is accepted, drafted tokens marked; the cost follows on stderr.

    Ctrl-C ends the generation, not the command: what was generated so far is printed, and the exit code is 130.
    """
    from forerun.cli import engines
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
        constraint=constraining.chosen(json_schema, regex, choice, lark),
    )
    _demand_sense(out, compare, as_json, logprobs)
    spec = speculation.chosen(drafter, speculative_config, num_speculative_tokens, "auto")
    asked, manner = _asked(prompts or [], prompt_file or []), openings.Manner.of(chat, system, chat_template)
    machine, model = engines.Machine(dtype, device, kernels, weights, threads), options.at(model, revision)
    engine = engines.load(model, spec, machine, max_rows, acceptance, options.bytes_of(prefix_cache))
    reader = openings.Reader(engine, manner)
    job = Job(engine, asked, reader.all_ids(asked), params)
    if out:
        is_whole = _to_file(job, out, _settings(model, engine, machine, params, spec, acceptance, reader))
    else:
        is_whole = job.is_whole(_as_json(job) if as_json else _compared(job, machine) if compare else _as_text(job))
    if not is_whole:
        raise typer.Exit(130)


@dataclass(frozen=True)
class Job:
    """Who is asked what: openings, and their token ids."""

    engine: Engine
    openings: Sequence[Opening]
    ids: Sequence[list[int]]
    params: SamplingParams

    def is_whole(self, outputs: Sequence[Output]) -> bool:
        """Everything was answered to its end."""
        return len(outputs) == len(self.ids) * self.params.n and all(
            one.finish_reason != "interrupted" for one in outputs
        )


def _demand_sense(out: Path | None, compare: bool, as_json: bool, logprobs: int | None) -> None:
    from forerun.cli.files import demand_place
    from forerun.errors import RequestError

    if sum((out is not None, compare, as_json)) > 1:
        raise RequestError("--out, --compare and --json exclude one another: give one of them")
    if logprobs is not None and not (as_json or out):
        raise RequestError("--logprobs has no place in streamed text: add --json, or --out FILE.jsonl")
    demand_place(out)


def _asked(prompts: list[str], files: list[Path]) -> list[Opening]:
    from forerun.errors import RequestError

    given = [Opening(f"prompt {number}", _argument(text)) for number, text in enumerate(prompts, start=1)]
    asked = given + [one for path in files for one in openings.read(path)]
    if not asked:
        raise RequestError("there is no prompt: give one as an argument, - for standard input, or --prompts FILE")
    return asked


def _argument(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


# ---- one object


def _as_json(job: Job) -> list[Output]:
    """Print the only output as it is, several under "outputs"; beside them, what the drafter's parts did."""
    from forerun.cli.files import print_json

    outputs = job.engine.generate(job.ids, job.params)
    tallies = [tally.as_dict() for tally in job.engine.drafter.tallies()]
    parts = {"parts": tallies} if tallies else {}
    if len(job.ids) * job.params.n == 1 and outputs:
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


# ---- streamed text


def _as_text(job: Job) -> list[Output]:
    from forerun.cli.narration import parts, summary

    outputs, seconds = _streamed(job)
    if outputs:
        log.info(summary(outputs, seconds))
        for line in parts(job.engine.drafter.tallies()):
            log.info(line)
    return outputs


def _streamed(job: Job) -> tuple[list[Output], float]:
    from forerun.cli.narration import Scribe, on_stdout

    titles = _titles(len(job.ids), job.params.n)
    scribe = Scribe(on_stdout(), titles, job.params.n, as_ids=job.engine.tokenizer is None)
    started = time.perf_counter()
    outputs = job.engine.stream(job.ids, job.params).outputs(scribe.show)
    seconds = time.perf_counter() - started
    scribe.close()
    return outputs, seconds


def _titles(prompts: int, samples: int) -> list[str]:
    if prompts * samples == 1:
        return []
    sample = [f", sample {number + 1}" for number in range(samples)] if samples > 1 else [""]
    return [f"prompt {number + 1}{which}" for number in range(prompts) for which in sample]


# ---- beside plain decoding


def _compared(job: Job, machine: Machine) -> list[Output]:
    """The drafted text as always, then plain decoding's, and one line about both."""
    from dataclasses import replace

    from forerun.cli import comparison, engines

    params = job.params if job.params.seed is not None else replace(job.params, seed=0)
    plain = engines.beside(job.engine, "none", machine)
    comparison.warm(plain, job.engine, job.ids[0])
    drafted, drafted_seconds = _streamed(replace(job, params=params))
    if any(one.finish_reason == "interrupted" for one in drafted):
        return drafted
    started = time.perf_counter()
    alone = plain.generate(job.ids, params)
    seconds = time.perf_counter() - started
    if any(one.finish_reason == "interrupted" for one in alone):
        return alone
    print(comparison.verdict(comparison.Side(alone, seconds), comparison.Side(drafted, drafted_seconds), plain))
    return drafted


# ---- a row per text


def _settings(
    model: str,
    engine: Engine,
    machine: Machine,
    params: SamplingParams,
    spec: Any,
    acceptance: str,
    reader: openings.Reader,
) -> dict[str, Any]:
    """All that a row depends on; the drafter and the machine too, on which its statistics depend."""
    from dataclasses import fields

    from forerun.constraint import Constraint
    from forerun.sampling import SamplingParams
    from forerun.sources.fingerprint import digest
    from forerun.sources.source import Source

    source, usual = Source.of(model), SamplingParams()
    network = engine.target.network
    sampling = {one.name: getattr(params, one.name) for one in fields(params)}
    sampling["constraint"] = Constraint.of(params.constraint).as_dict() if params.constraint else None
    changed = {name: value for name, value in sampling.items() if value != getattr(usual, name)}
    return {
        "model": source.name,
        "fingerprint": source.fingerprint[:16],
        "drafter": spec,
        "dtype": str(network.dtype).removeprefix("torch."),
        "weights": machine.weights,
        "backend": network.backend.name,
        "acceptance": acceptance,
        "template": digest(reader.used.text)[:16] if reader.used else None,
        "max_new_tokens": params.max_new_tokens,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()},
    }


def _to_file(job: Job, path: Path, settings: dict[str, Any]) -> bool:
    """Every text as a row, those that are there already not again. True: none is missing."""
    from forerun.cli.narration import bar, summary
    from forerun.cli.rows import Rows

    rows = Rows(path, settings, job)
    left, known = rows.left(), rows.known
    outputs: list[Output] = []
    started = time.perf_counter()
    try:
        with bar("texts") as watch:
            done, total = known, len(job.ids) * job.params.n
            for piece in job.engine.stream([job.ids[index] for index in left], job.params) if left else ():
                if piece.output and piece.output.finish_reason != "interrupted":
                    outputs.append(piece.output)
                    if rows.enter(left[piece.prompt_index], piece.output, record(piece.output)):
                        done += 1
                        watch(done, total)
    except KeyboardInterrupt:
        log.warning("%s holds %s; the same command goes on", path, _texts(known + len(outputs)))
        raise
    print(f"{path}: {_texts(len(outputs), 'new ')}, {known} from before")
    if outputs:
        log.info(summary(outputs, time.perf_counter() - started))
    return not rows.left()


def _texts(count: int, which: str = "") -> str:
    return f"{count} {which}{'text' if count == 1 else 'texts'}"
