"""What the command line offers. A new option is a decision: it is listed here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from forerun.cli import app

COMMON = "--quiet --verbose --help-all --trust-remote-code"
SAMPLING = "--max-new-tokens --max-tokens --temperature --top-k --top-p --min-p --seed"
PROMPTS = "--prompts --prompt-file"
CHAT = "--chat --system --chat-template --template"
MACHINE = "--dtype --device --kernels --weights --threads"
HEADS = (
    "--target --data --out --run --text --text-share --layers --text-weight --teacher-weight --distance-weight --lk"
    " --state-weight --pace --head-decay --adversarial --discriminator-sees"
    " --discriminator-warmup --steps --rows --batch-size --length --parts --rate --lr --validate-every"
    " --save-every --seed --init-from --dtype --device --kernels --floor --start-batches --threads --known"
    " --tensorboard"
)
OPTIONS = {
    "demo": f"{SAMPLING} {MACHINE} {PROMPTS} --acceptance --drafter --drafters --show --limit --rounds --json --plot"
    " --picture",
    "generate": f"{SAMPLING} {MACHINE} {PROMPTS} {CHAT} --acceptance --drafter --repetition-penalty"
    " --presence-penalty --frequency-penalty --n --stop --ignore-eos --max-rows --batch-size --logprobs --json --out"
    " --compare --prefix-cache --revision --num-speculative-tokens --speculative-config"
    " --json-schema --regex --choice --lark",
    "chat": f"{SAMPLING} {MACHINE} --system --chat-template --template --raw --compare --drafter --acceptance"
    " --prefix-cache --revision --num-speculative-tokens --speculative-config",
    "serve": f"{MACHINE} --host --port --served-model-name --api-key --api-keys --cors-origin --drafter"
    " --num-speculative-tokens --speculative-config --acceptance --chat-template --template --max-rows --batch-size"
    " --max-waiting --max-prompt-tokens --max-output-tokens --max-seconds --max-body-bytes --drain-seconds"
    " --revision --prefix-cache",
    "check": f"{SAMPLING} {MACHINE} {PROMPTS} {CHAT} --drafter --tokens --rows --batch-size --samples --json --revision"
    " --num-speculative-tokens --speculative-config",
    "index": "--tokenizer --out",
    "inspect": f"{MACHINE} --json --revision",
    "plan": f"{MACHINE} {PROMPTS} --drafter --all --batch --batch-size --seconds --costs --max-new-tokens --max-tokens"
    " --temperature --seed --out --plot --json --revision",
    "calibrate": f"{MACHINE} {PROMPTS} --drafter --out --data --answers --rows --batch-size --rounds --max-new-tokens"
    " --max-tokens --temperature --seed --revision",
    "design": "--draft --data --survival --answers --trained-on --max-parameters --max-memory --max-step-ms --context"
    " --rows --batch-size --tied --costs --out --top --json --dtype --device --kernels --revision --threads",
    "federated run": "--run --method --rounds --seed --json --threads --tensorboard",
    "bench serve": f"{PROMPTS} --clients --rate --requests --rounds --max-new-tokens --max-tokens --temperature --seed"
    " --wait --pace --body --api-key --out --plot --json",
    "convert": f"{PROMPTS} --to --out --target",
    "distill": f"{SAMPLING} {MACHINE} {PROMPTS} {CHAT} --out --builtin --corpus --prompt-length --limit"
    " --max-looping --drafter --rows --batch-size --revision --num-speculative-tokens --speculative-config",
    "train lm": "--corpus --run --out --build-corpus --vocabulary --width --layers --heads --kv-heads --head-dim"
    " --mlp-width --max-length --grow-from --init-from --init-layers --teacher --steps --rows --batch-size --length"
    " --first"
    " --warmup --decay --muon-rate --adam-rate --validate-every --save-every --seed --device --threads --compile"
    " --tensorboard",
    "train small": "--from --target --shape --data --out --run --calibration --pick --shear-steps --init-from --tied"
    " --text-weight --teacher-weight --distance-weight --steps --rows --batch-size --length --parts --rate --lr"
    " --validate-every --save-every --seed --dtype --device --threads --tensorboard",
    "train medusa": f"{HEADS} --heads --tied-layers --vocabulary --markov-rank",
    "train medusa-fused": f"{HEADS} --heads --tied-layers --vocabulary --markov-rank",
    "train block": f"{HEADS} --block --markov-rank --sources --mask-token --from-anchor",
    "train hydra": f"{HEADS} --heads --tied-layers --vocabulary --dropout",
    "train hydra++": f"{HEADS} --heads --tied-layers --vocabulary --dropout",
    "train eagle": f"{HEADS} --vocabulary --ahead --unrolled --noise",
    "train eagle3": f"{HEADS} --vocabulary --ahead --unrolled --noise",
    "train acceptance": "--target --drafter --data --out --run --depth --tie-blocks --rejection-weight --temperature"
    " --mix --steps --rows --batch-size --length --parts --rate --lr --validate-every --save-every --seed --dtype"
    " --device --kernels --threads --tensorboard",
    "train amphista": f"{HEADS} --heads --vocabulary --stages --sampled-token --auto-embedding",
    "train medusa2": "--target --data --out --run --init-from --heads --layers --tied-layers --vocabulary --keep"
    " --known --markov-rank --head-weight --ramp --head-decay --rank --alpha --steps --rows --batch-size --length"
    " --parts --rate --lr --head-rate --validate-every"
    " --save-every --seed --dtype --device --threads --tensorboard",
}


def offered() -> dict[str, list]:
    """Command -> its parameters, for all commands."""
    found, open_ = {}, [("", get_command(app))]
    while open_:
        name, command = open_.pop()
        if hasattr(command, "list_commands"):
            context = typer.Context(command)
            below = [(key, command.get_command(context, key)) for key in command.list_commands(context)]
            open_ += [(f"{name} {key}".strip(), one) for key, one in below]
        else:
            found[name] = command.params
    return found


def test_the_commands_are_those_of_the_contract():
    assert sorted(offered()) == sorted(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_deliberate(command):
    names = {name for parameter in offered()[command] for name in parameter.opts if name.startswith("--")}
    assert names == {*OPTIONS[command].split(), *COMMON.split()}


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
        known = getattr(parameter, "help", None) or getattr(parameter, "hidden", False)
        assert known or set(parameter.opts[:1]) <= mute, parameter.opts


def test_help_answers_without_torch():
    lines = [
        "import sys, forerun.cli",
        "code = forerun.cli.run(['--help'])",
        "heavy = [name for name in ('torch', 'transformers', 'numpy', 'forerun.drafting') if name in sys.modules]",
        "sys.exit(code or ' '.join(heavy) or None)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command.split()[0] in done.stdout for command in OPTIONS)


def test_version(forerun):
    code, out, _ = forerun("--version")
    assert code == 0 and out.startswith("forerun ")
    assert forerun("-V")[1] == out


def test_no_command_at_all_shows_what_there_is(forerun):
    code, out, _ = forerun()
    assert code == 0 and "generate" in out
