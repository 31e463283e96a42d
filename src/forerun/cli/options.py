"""The options that several commands share: one spelling, one help text. Values are judged by the library, not here."""

from __future__ import annotations

from typing import Annotated

import typer

SAMPLING, MACHINE, OUTPUT = "Sampling", "Machine", "Output"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder in Hugging Face format, or a hub id.")]
Drafter = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="SPEC",
        help="none, lookup, small:MODEL, ... or a JSON or YAML file that composes several; none is the baseline.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="At most so many new tokens.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(help="Only the best K tokens; 0 is off.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Only the best tokens of this total share; 1 is off.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(help="Only tokens of at least this share of the best one's; 0 is off.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option(help="Equal seeds give equal texts; none draws one.", rich_help_panel=SAMPLING)
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|bf16|fp32|fp16",
        help="Number format of every network; auto is bf16 where the processor multiplies it itself, else fp32.",
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
        rich_help_panel=MACHINE,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="auto|int8",
        help="int8 rounds the weights of every network; output is then exact for the rounded model.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Processor threads; without it FORERUN_THREADS, or one per core. On a busy machine 1 is fastest.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Acceptance = Annotated[
    str,
    typer.Option(
        metavar="exact|typical|lenient",
        help="Lossy rules: typical[:EPSILON,DELTA], Medusa's at temperatures above 0; lenient[:FACTOR], CS Drafting's.",
        rich_help_panel=SAMPLING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT)]
