"""`forerun serve`: a model behind the endpoints that OpenAI's clients ask."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import openings, options, speculation
from forerun.errors import ForerunError, RequestError

if TYPE_CHECKING:
    from forerun.serve.keys import Keys

log = logging.getLogger(__name__)

SERVER, LIMITS = "Server", "Limits"
PACKAGES = "fastapi", "uvicorn", "prometheus_client"

Host = Annotated[str, typer.Option(help="0.0.0.0: other machines too.", rich_help_panel=SERVER)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.", rich_help_panel=SERVER)]
Name = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What clients call the model.",
        rich_help_panel=SERVER,
        show_default="its folder's name, or its hub id",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="FORERUN_API_KEY", metavar="KEY", help="What clients must know.", rich_help_panel=SERVER
    ),
]
ApiKeys = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        metavar="FILE",
        help="KEY TENANT per line; tenants share nothing.",
        rich_help_panel=SERVER,
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="URL",
        help="A web page that may ask; may be repeated.",
        rich_help_panel=options.ADVANCED,
    ),
]
MaxRows = Annotated[
    int,
    typer.Option("--max-rows", "--batch-size", min=1, help="Requests that run side by side.", rich_help_panel=LIMITS),
]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=0, help="Requests that wait; more get 429.", rich_help_panel=LIMITS)
]
MaxPrompt = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-tokens",
        metavar="N",
        min=1,
        help="Of a request.",
        rich_help_panel=LIMITS,
        show_default="as the context has it",
    ),
]
MaxOutput = Annotated[
    int | None,
    typer.Option(
        "--max-output-tokens",
        metavar="N",
        min=1,
        help="Of a sample.",
        rich_help_panel=LIMITS,
        show_default="as the context has it",
    ),
]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", min=0.001, help="For an answer.", rich_help_panel=LIMITS)]
MaxBody = Annotated[
    int, typer.Option("--max-body-bytes", min=1, help="Of a request.", rich_help_panel=options.ADVANCED)
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        "--drain-seconds",
        min=0,
        help="After SIGTERM, for answers that have begun.",
        rich_help_panel=LIMITS,
    ),
]

EXAMPLES = """
forerun serve MODEL
forerun serve MODEL --host 0.0.0.0 --api-keys keys.txt --max-rows 32
"""


def serve(
    model: options.Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Name = None,
    api_key: ApiKey = None,
    api_keys: ApiKeys = None,
    cors_origin: Origins = None,
    drafter: options.Drafter = "auto",
    num_speculative_tokens: options.SpeculativeTokens = None,
    speculative_config: options.SpeculativeConfig = None,
    acceptance: options.Acceptance = "exact",
    chat_template: options.Template = None,
    max_rows: MaxRows = 16,
    max_waiting: MaxWaiting = 256,
    max_prompt_tokens: MaxPrompt = None,
    max_output_tokens: MaxOutput = None,
    max_seconds: MaxSeconds = 600.0,
    max_body_bytes: MaxBody = 4 << 20,
    drain_seconds: DrainSeconds = 30.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    prefix_cache: options.PrefixCache = None,
) -> None:
    """Serve a model to OpenAI's clients: /v1/completions, /v1/chat/completions, /metrics and others.

    Ctrl-C and SIGTERM let the answers that have begun come to their end.
    """
    demand_packages()
    from forerun.cli import engines
    from forerun.serve.app import Service, app_of
    from forerun.serve.desk import Limits
    from forerun.serve.keys import Keys
    from forerun.serve.run import Server, bound

    limits = Limits(max_waiting, max_prompt_tokens, max_output_tokens, max_body_bytes, max_seconds, drain_seconds)
    keys = Keys.of(api_key, api_keys)
    spec = speculation.chosen(drafter, speculative_config, num_speculative_tokens, "auto")
    template = openings.text_of(chat_template, "chat template") if chat_template else None
    with bound(host, port) as listening:  # a port that is taken is found out before a model is read
        machine = engines.Machine(dtype, device, kernels, weights, threads)
        room = options.bytes_of(prefix_cache)
        engine = engines.load(options.at(model, revision), spec, machine, max_rows, acceptance, room)
        if engine.tokenizer is None:
            raise RequestError(f"{model} has no tokenizer, and clients send text: put its tokenizer.json there")
        name = served_model_name or _called(model)
        app = app_of(Service(engine, name, limits, keys, template, tuple(cors_origin or ())))
        _announce(name, listening, keys, engine.drafter.name)
        Server(app).run(sockets=[listening])


def demand_packages() -> None:
    """ForerunError without those of the extra."""
    try:
        for name in PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        raise ForerunError(f"serving needs {error.name}: install it with pip install 'forerun[serve]'") from None


def _called(model: str) -> str:
    """A folder by its last name, a model of the hub by all of it."""
    return Path(model).resolve().name if Path(model).exists() else model


def _announce(name: str, listening: socket.socket, keys: Keys, drafter: str) -> None:
    host, port, *_ = listening.getsockname()
    shown = f"[{host}]" if ":" in host else host
    log.info(f"{name} is at http://{shown}:{port}/v1, drafter {drafter}; Ctrl-C ends it")
    if not keys.are_needed and not ipaddress.ip_address(host).is_loopback:
        log.warning("whoever reaches this port may ask, and shares what is remembered: give --api-key or --api-keys")
