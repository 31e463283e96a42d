"""The options that several commands share: one spelling, one help text. Values are judged by the library, not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROMPTS, DRAFTING, SAMPLING, MACHINE, OUTPUT = "Prompts", "Drafting", "Sampling", "Machine", "Output"
ADVANCED, ALWAYS = "Advanced", "Always"
"""Groups that the help page treats in ways of their own (`cli/page.py`)."""

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder in Hugging Face format, a GGUF file, or a hub id.")
]
Drafter = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="SPEC",
        help="auto, lookup, small:MODEL, KIND:HEADS, ... or a file; none: the baseline.",
        rich_help_panel=DRAFTING,
    ),
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        metavar="JSON",
        help="vLLM's words instead of --drafter.",
        rich_help_panel=ADVANCED,
    ),
]
SpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "--num-speculative-tokens",
        help="How far the drafter runs ahead.",
        rich_help_panel=DRAFTING,
        show_default="its own choice",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "--prompt-file",
        metavar="FILE",
        help="A prompt per line (.txt), row (.jsonl) or file.",
        rich_help_panel=PROMPTS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="A prompt is what a user says: use the chat template.", rich_help_panel=PROMPTS),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With a system message first (as --chat).", rich_help_panel=PROMPTS)
]
Template = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        "--template",
        metavar="FILE",
        help="A chat template (Jinja) instead of the model's own.",
        rich_help_panel=ADVANCED,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "--max-tokens", "-n", help="At most so many new tokens.", rich_help_panel=SAMPLING
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(help="Only the best K tokens; 0 is off.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Only the best tokens of this total share; 1 is off.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(help="Only tokens of at least this share of the best one's; 0 is off.", rich_help_panel=ADVANCED),
]
Seed = Annotated[
    int | None, typer.Option(help="Equal seeds give equal texts; none draws one.", rich_help_panel=SAMPLING)
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|bf16|fp32|fp16",
        help="auto is bf16 where the processor multiplies it itself.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="auto is cuda where there is one.", rich_help_panel=MACHINE)
]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|native|torch",
        help="auto is our own CPU kernels where they fit; see forerun inspect.",
        rich_help_panel=ADVANCED,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="auto|int8",
        help="int8 rounds weights; output is exact for the rounded model.",
        rich_help_panel=MACHINE,
    ),
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="DIR",
        help="Tell TensorBoard the figures, too, in this folder.",
        rich_help_panel=ADVANCED,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Processor threads; 1 on a busy machine.",
        rich_help_panel=MACHINE,
        show_default="one per core",
    ),
]
Acceptance = Annotated[
    str,
    typer.Option(
        metavar="exact|typical|lenient",
        help="Lossy rules: typical[:EPSILON,DELTA], Medusa's at temperatures above 0; lenient[:FACTOR], CS Drafting's.",
        rich_help_panel=ADVANCED,
    ),
]
PrefixCache = Annotated[
    float | None,
    typer.Option(
        metavar="MB",
        min=0,
        help="Memory for what was read already, so that prompts that begin alike are read once; 0: none.",
        rich_help_panel=ADVANCED,
        show_default="a sixteenth of all",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a hub id: a branch, tag or commit.", rich_help_panel=ADVANCED),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT)]


def bytes_of(megabytes: float | None) -> int | None:
    """None stays what it is: the library's own choice."""
    return None if megabytes is None else int(megabytes * 1e6)


def at(model: str, revision: str | None) -> str:
    """A hub's model at a revision, as `forerun.load` takes it."""
    return f"{model}@{revision}" if revision else model
