"""What the command line offers. A new option is a decision: it is listed here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_command

from forerun.cli import app

SAMPLING = "--max-new-tokens --temperature --top-k --top-p --min-p --seed"
MACHINE = "--dtype --device --kernels --weights"
HEADS = (
    "--target --data --out --run --heads --layers --tied-layers --vocabulary --dropout --text-weight --teacher-weight"
    " --head-decay --steps --rows --length --parts --rate --validate-every --save-every --seed --init-from --dtype"
    " --device"
    " --kernels --floor --start-batches"
)
OPTIONS = {
    "demo": f"{SAMPLING} {MACHINE} --acceptance --drafter --drafters --show --prompts --limit"
    " --rounds --json --plot --picture",
    "generate": f"{SAMPLING} {MACHINE} --acceptance --drafter --prompt-file --repetition-penalty --presence-penalty"
    " --frequency-penalty --n --stop --ignore-eos --max-rows --logprobs --json",
    "check": f"{SAMPLING} {MACHINE} --drafter --tokens --rows --samples --prompt-file --json",
    "index": "--tokenizer --out",
    "inspect": f"{MACHINE} --json",
    "calibrate": f"{MACHINE} --drafter --out --data --answers --rows --rounds --max-new-tokens --temperature --seed",
    "convert": "--to --out --target --prompts",
    "distill": f"{SAMPLING} {MACHINE} --out --prompts --builtin --corpus --prompt-length --limit --chat --template"
    " --drafter --rows",
    "train lm": "--corpus --run --out --build-corpus --vocabulary --width --layers --heads --kv-heads --head-dim"
    " --mlp-width --max-length --grow-from --init-from --init-layers --teacher --steps --rows --length --first"
    " --warmup --decay --muon-rate --adam-rate --validate-every --save-every --seed --device --compile",
    "train medusa": HEADS,
    "train hydra": HEADS,
    "train hydra++": HEADS,
    "train medusa2": "--target --data --out --run --init-from --heads --layers --tied-layers --vocabulary --keep"
    " --head-weight --ramp --head-decay --rank --alpha --steps --rows --length --parts --rate --head-rate"
    " --validate-every"
    " --save-every --seed --dtype --device",
}


def offered() -> dict[str, list]:
    """Command -> its parameters, for all commands."""
    found, open_ = {}, [("", get_command(app))]
    while open_:
        name, command = open_.pop()
        if hasattr(command, "commands"):
            open_ += [(f"{name} {key}".strip(), below) for key, below in command.commands.items()]
        else:
            found[name] = command.params
    return found


def test_the_commands_are_those_of_the_contract():
    assert sorted(offered()) == sorted(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_deliberate(command):
    names = {name for parameter in offered()[command] for name in parameter.opts if name.startswith("--")}
    assert names == set(OPTIONS[command].split())


@pytest.mark.parametrize("command", OPTIONS)
def test_options_with_one_name_have_one_help_text_and_every_option_but_a_size_has_one(command):
    mute = {"--width", "--layers", "--heads", "--kv-heads", "--mlp-width", "--max-length"}
    mute |= {
        "--steps",
        "--rows",
        "--length",
        "--warmup",
        "--muon-rate",
        "--adam-rate",
        "--validate-every",
        "--save-every",
    }
    for parameter in offered()[command]:
        assert getattr(parameter, "help", None) or set(parameter.opts) <= mute, parameter.opts


def test_help_answers_without_torch():
    lines = [
        "import sys, forerun.cli",
        "code = forerun.cli.run(['--help'])",
        "heavy = [name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules]",
        "sys.exit(code or ' '.join(heavy) or None)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command.split()[0] in done.stdout for command in OPTIONS)


def test_version(forerun):
    code, out, _ = forerun("--version")
    assert code == 0 and out.startswith("forerun ")


def test_no_command_at_all_shows_what_there_is(forerun):
    code, out, _ = forerun()
    assert code == 0 and "generate" in out
