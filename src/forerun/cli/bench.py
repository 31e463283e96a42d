"""`forerun bench serve`: what a server brings, and how long one waits, under load. For any of OpenAI's kind."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options
from forerun.cli.command import NAMES, Commands, add

if TYPE_CHECKING:
    from rich.table import Table

    from forerun.bench.traffic import Load, Seen, Server, Summary

log = logging.getLogger(__name__)

LOAD, PROMISE = "Load", "Promise"
MOST = 1e5
"""Of clients, or of requests a second."""
EXAMPLES = """
forerun bench serve http://127.0.0.1:8000 --clients 1,8,32
forerun bench serve ours=http://127.0.0.1:8000 other=http://127.0.0.1:8080 --rate 1,2,4,8 --plot load.png
"""

app = typer.Typer(
    cls=Commands,
    help="What a server brings under load.",
    context_settings=NAMES,
    add_completion=False,
    epilog=EXAMPLES.strip(),
)


@app.callback()
def _bench() -> None:
    """With one command alone typer would make it the group's own."""


Servers = Annotated[
    list[str], typer.Argument(metavar="[NAME=]URL...", help="Servers of OpenAI's kind; they take turns, load by load.")
]
Clients = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Each asks again once it is answered.", rich_help_panel=LOAD),
]
Rate = Annotated[
    str | None,
    typer.Option(metavar="X,X,...", help="Requests a second, by chance (Poisson).", rich_help_panel=LOAD),
]
Requests = Annotated[int, typer.Option(min=1, help="Of every load.", rich_help_panel=LOAD)]
Rounds = Annotated[int, typer.Option(min=1, help="Turns of every server at every load.", rich_help_panel=LOAD)]
Wait = Annotated[float, typer.Option(help="Milliseconds to the first text.", rich_help_panel=PROMISE)]
PerToken = Annotated[float, typer.Option("--pace", help="Milliseconds per token.", rich_help_panel=PROMISE)]
Body = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="More fields of every request.", rich_help_panel=options.ADVANCED),
]
Key = Annotated[
    str,
    typer.Option(
        "--api-key",
        envvar="OPENAI_API_KEY",
        show_envvar=False,
        help="Of the servers; else that of OPENAI_API_KEY.",
        rich_help_panel=options.ADVANCED,
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="A picture (.png).", rich_help_panel=options.OUTPUT)]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Every request, as JSON.", rich_help_panel=options.OUTPUT)
]


def serve(
    server: Servers,
    clients: Clients = None,
    rate: Rate = None,
    requests: Requests = 64,
    rounds: Rounds = 1,
    prompts: options.PromptFile = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Of the arrivals.", rich_help_panel=options.ADVANCED)] = 0,
    wait: Wait = 1000.0,
    pace: PerToken = 100.0,
    body: Body = None,
    api_key: Key = "",
    out: Out = None,
    plot: Plot = None,
    as_json: options.Json = False,
) -> None:
    """Send a server many requests and say what came back: tokens a second, waiting, goodput.

    Goodput counts the requests that kept the promise. Servers take turns at every load, so that a machine that becomes
    slower does so for all of them. Prompts are the built-in suite's, or a file's.
    """
    from forerun.bench.traffic import Ask, Promise, Server, demand_httpx, summary
    from forerun.cli.files import demand_place, print_json, write_whole
    from forerun.cli.narration import on_stdout
    from forerun.plots.style import demand_matplotlib

    demand_httpx()
    demand_place(out)
    demand_place(plot)
    if plot:
        demand_matplotlib()
    loads = _loads(clients, rate, seed)
    texts, more = _texts(prompts), _fields(body)
    servers = [Server.named(word, api_key) for word in server]
    asks = {
        one.name: Ask(texts, {"model": one.model(), "max_tokens": max_new_tokens, "temperature": temperature, **more})
        for one in servers
    }
    promise = Promise(wait / 1e3, pace / 1e3)
    turns = [Turn(one, load, [], []) for load in loads for one in servers]
    for number in range(rounds):
        for turn in _in_order(turns, len(servers), number):
            log.info(f"{turn.server.name}, {turn.load.name}, {requests} requests")
            found = turn.server.run(turn.load, asks[turn.server.name], requests)
            turn.seen.append(found)
            turn.summaries.append(summary(turn.load, found, promise))
    if out:
        write_whole(out, f"{json.dumps([one.as_dict() for one in turns], indent=1)}\n".encode())
    if plot:
        _picture(turns, f"{requests} requests a load, at most {max_new_tokens} tokens each", plot)
    if as_json:
        print_json([{"server": one.server.name, **asdict(one.middle)} for one in turns])
    else:
        on_stdout().print(_table(turns))
    _tell_failures(turns)


@dataclass(frozen=True)
class Turn:
    """One server at one load: what came of every round."""

    server: Server
    load: Load
    summaries: list[Summary]
    seen: list[list[Seen]]

    @property
    def middle(self) -> Summary:
        """The round of median tokens per second."""
        ordered = sorted(self.summaries, key=lambda one: one.tokens_per_second)
        return ordered[(len(ordered) - 1) // 2]

    def as_dict(self) -> dict[str, Any]:
        rounds = [
            {**asdict(one), "requests": [asdict(each) for each in seen]}
            for one, seen in zip(self.summaries, self.seen, strict=True)
        ]
        return {"server": self.server.name, "base": self.server.base, "load": self.load.name, "rounds": rounds}


def _in_order(turns: Sequence[Turn], servers: int, number: int) -> list[Turn]:
    """Load by load; who begins changes from round to round."""
    shift = number % servers
    parts = [turns[at : at + servers] for at in range(0, len(turns), servers)]
    return [turn for part in parts for turn in [*part[shift:], *part[:shift]]]


def _loads(clients: str | None, rate: str | None, seed: int) -> list[Load]:
    from forerun.bench.traffic import Closed, Open
    from forerun.errors import RequestError

    if clients and rate:
        raise RequestError("--clients wait for their answers and --rate does not: give one of them")
    if rate:
        return [Open(value, seed) for value in _numbers(rate, "--rate")]
    counts = _numbers(clients or "1,8,32", "--clients")
    if any(value != int(value) for value in counts):
        raise RequestError(f"--clients is a list of whole numbers, not {clients!r}")
    return [Closed(int(value)) for value in counts]


def _numbers(given: str, option: str) -> list[float]:
    from forerun.errors import RequestError

    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < MOST for value in found):
        raise RequestError(f"{option} is a list of numbers above 0 such as 1,8,32, not {given!r}")
    return sorted(set(found))


def _texts(path: Path | None) -> list[str]:
    from forerun.bench import suites
    from forerun.cli import openings
    from forerun.errors import RequestError

    if path is None:
        return [one.prompt for one in suites.spread(suites.load())]
    found = [one.text for one in openings.read(path)]
    if not all(found):
        raise RequestError(f"{path} has rows without a text: a server is sent a prompt as it is")
    return found


def _fields(given: str | None) -> dict[str, Any]:
    from forerun.errors import RequestError

    try:
        found = json.loads(given) if given else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"--body is a JSON object such as '{{\"top_p\": 0.9}}', not {given!r}")
    return found


# ---- what it says


def _table(turns: Sequence[Turn]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Printed

    table = Printed(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("server", "load"):
        table.add_column(heading, no_wrap=True)
    for heading in ("answered", "tokens/s", "goodput\n/s", "first text\nms, 95 %", "per token\nms, 95 %", "cached"):
        table.add_column(heading, justify="right")
    for turn in turns:
        table.add_row(turn.server.name, turn.load.name, *_row(turn))
    return table


def _row(turn: Turn) -> list[str]:
    one = turn.middle
    speeds = [each.tokens_per_second for each in turn.summaries]
    ends = f" ({min(speeds):.0f}-{max(speeds):.0f})" if len(speeds) > 1 else ""
    return [
        f"{one.answered} of {one.answered + one.failed}",
        f"{one.tokens_per_second:.0f}{ends}",
        f"{one.goodput:.2f}",
        f"{1e3 * one.wait:.0f}, {1e3 * one.wait_95:.0f}",
        f"{1e3 * one.pace:.1f}, {1e3 * one.pace_95:.1f}",
        f"{one.cached:.0%}",
    ]


def _tell_failures(turns: Sequence[Turn]) -> None:
    """Every reason once, with how often it came."""
    reasons = Counter(
        (turn.server.name, one.error) for turn in turns for seen in turn.seen for one in seen if one.error
    )
    for (name, reason), count in reasons.most_common():
        log.warning(f"{name}: {count} request{'s' if count > 1 else ''} failed: {reason}")


def _picture(turns: Sequence[Turn], under: str, path: Path) -> None:
    from forerun.plots.style import write
    from forerun.plots.traffic import drawing

    rows: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for turn in turns:
        rows.setdefault(turn.server.name, []).append((turn.load.size, asdict(turn.middle)))
    kind = "clients side by side" if turns[0].load.name.endswith(("client", "clients")) else "requests a second"
    light, dark = write(drawing(rows, f"Servers by {kind}", under), path)
    log.info(f"{light}: a picture; {dark.name} beside it is for dark ground")


add(app, "serve", serve, EXAMPLES)
