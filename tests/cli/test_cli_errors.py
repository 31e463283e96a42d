"""Bad input: one sentence on stderr, exit code 2, nothing on stdout, no traceback."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.cli.complaint import sentence_of
from forerun.errors import CheckpointError, ForerunError


@pytest.fixture
def copy(family, tmp_path) -> Path:
    """A copy of the target that a test may damage."""
    return Path(shutil.copytree(family / "target", tmp_path / "copy"))


def test_a_missing_checkpoint(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused("generate", tmp_path / "nowhere", "x")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("generate", tmp_path / "empty", "x")


def test_a_truncated_checkpoint(refused, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "model.safetensors" in refused("generate", copy, "x")


def test_weights_that_do_not_fit_their_config(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "missing" in refused("generate", copy, "x")


def test_an_unsupported_architecture(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    for kind in ("mamba", "t5", "no-such-model"):
        (copy / "config.json").write_text(json.dumps({**config, "model_type": kind, "architectures": ["X"]}))
        assert str(copy) in refused("generate", copy, "x")


def test_a_damaged_tokenizer(refused, copy):
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused("generate", copy, "x")


def test_a_vocabulary_that_differs(refused, family):
    sentence = refused("generate", family / "target", "x", "--drafter", f"small:{family / 'other'}")
    assert "600" in sentence and "608" in sentence


def test_a_prompt_longer_than_the_context(refused, family):
    assert "1024" in refused("generate", family / "target", "x = 1\n" * 1000)


def test_an_unknown_drafter_with_the_nearest_names(refused, family):
    assert "lookup" in refused("generate", family / "target", "x", "--drafter", "lokup")
    assert "lookup" in refused("check", family / "target", "--drafter", "lokup")
    assert "lookup" in refused("demo", family / "target", "--drafters", "none,lokup")


def test_what_names_no_drafter(refused, family):
    base = ("generate", family / "target", "x", "--drafter")
    folder = family / "small"
    assert f"write small:{folder} for a draft model" in refused(*base, folder)
    for spec in ("", "lookup |", "| lookup"):
        assert "on both sides of a bar" in refused(*base, spec)


def test_streams_that_are_closed(family):
    command = ["generate", family / "target", "x", "-", "-n", "3"]
    done = with_closed("0<&- 1>&-", *command)  # the second prompt is empty
    assert done.returncode == 2 and b"empty" in done.stderr and b"Traceback" not in done.stderr


def test_nobody_to_complain_to():
    assert with_closed("0<&- 1>&- 2>&-", "bench", "serve", "nowhere").returncode == 2


def with_closed(streams, *command):
    words = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "forerun", *command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def test_a_drafter_without_its_checkpoint_or_with_a_strange_setting(refused, family, tmp_path):
    assert "small:PATH" in refused("generate", family / "target", "x", "--drafter", "small")
    assert str(tmp_path / "no.yaml") in refused("generate", family / "target", "x", "--drafter", tmp_path / "no.yaml")
    spec = json.dumps({"drafter": "small", "checkpoint": str(family / "small"), "lenght": 3})
    assert "lenght" in refused("generate", family / "target", "x", "--drafter", spec)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--top-k", 5), "top_k"),
        (("--top-p", 0.5), "top_p"),
        (("--n", 2), "n=2"),
        (("--temperature", -1), "temperature"),
        (("--temperature", 1, "--top-p", 0), "top_p"),
        (("--temperature", 1, "--min-p", 2), "min_p"),
        (("--max-new-tokens", 0), "max_new_tokens"),
        (("--stop", ""), "stop"),
        (("--logprobs", 1), "--json"),
        (("--max-rows", 0), "--max-rows"),
    ],
)
def test_contradictory_sampling_parameters(refused, family, options, named):
    assert named in refused("generate", family / "target", "x", *options)


def test_unknown_options_and_commands(refused, family):
    assert "--temprature" in refused("generate", family / "target", "x", "--temprature", 1)
    assert "generat" in refused("generat", family / "target")
    assert "MODEL" in refused("generate")
    assert "--drafter" in refused("check", family / "target")
    assert "--max-new-tokens" in refused("generate", family / "target", "x", "--max-new-tokens", "many")
    refused("train")


def test_devices_and_dtypes_that_are_not_there(refused, family):
    assert "cuda" in refused("generate", family / "target", "x", "--device", "tpu")
    assert "fp8" in refused("inspect", "--dtype", "fp8")


def test_prompts_that_are_not_there(refused, family, tmp_path):
    assert "--prompts FILE" in refused("generate", family / "target")
    assert "nothing.txt" in refused("generate", family / "target", "--prompt-file", tmp_path / "nothing.txt")
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1}\n')
    assert "line 1" in refused("generate", family / "target", "--prompt-file", tmp_path / "rows.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert "UTF-8" in refused("generate", family / "target", "--prompt-file", tmp_path / "latin.txt")


def test_a_check_without_content(refused, family):
    options = ("check", family / "target", "--drafter", "lookup")
    assert "nothing to check" in refused(*options, "--tokens", 0, "--samples", 0)
    assert "1,8" in refused(*options, "--rows", "one")
    assert "rows" in refused(*options, "--rows", "0")
    assert "temperature" in refused(*options, "--temperature", 0)


# ---- no room


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_that_finds_no_room(family):
    command = [sys.executable, "-c", "import forerun.cli; forerun.cli.main()", "generate", str(family / "target"), "x"]
    command += ["--max-new-tokens", "3", "--threads", "1"]  # one thread is not warned of a busy machine
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    sentence = done.stderr.splitlines()
    assert done.returncode == 2 and len(sentence) == 1 and "No space left" in sentence[0]


def test_a_result_file_that_finds_no_room(family, forerun, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    result = tmp_path / "result.json"
    result.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    options = ("--drafters", "none", "--limit", 1, "--rounds", 1, "--max-new-tokens", 2, "--json", result)
    code, _, err = forerun("demo", family / "target", *options)
    assert (
        code == 2
        and err == f"forerun: cannot write {result} (No space left on device): make room, or name another place\n"
    )
    assert result.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_result_file_without_a_folder_is_refused_before_the_work(refused, family, tmp_path):
    path = tmp_path / "missing" / "result.json"
    assert str(path) in refused("demo", family / "target", "--json", path)
    assert str(path) in refused("demo", family / "target", "--plot", path)


# ---- the boundary itself


def test_sentences():
    assert sentence_of(ForerunError("x is wrong: mend it")) == "x is wrong: mend it"
    assert sentence_of(CheckpointError("these differ:\n  a\n  b")) == "these differ: (a; b)"
    assert sentence_of(PermissionError(errno.EACCES, "Permission denied", "out.json")) == (
        "out.json: Permission denied: change its permissions, or name another place"
    )
    assert "make room" in sentence_of(OSError(errno.ENOSPC, "No space left on device"))
    assert "memory" in sentence_of(MemoryError())
    assert "memory" in sentence_of(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))


def test_a_mistake_of_our_own_keeps_its_traceback(forerun, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("forerun.nn.dtype.device_of", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        forerun("inspect")


@pytest.mark.parametrize("package", ["typer", "transformers"])
def test_ctrl_c_while_packages_are_imported_is_no_mistake(package, family):
    """The second one makes an ImportError of it, as importers do that load a module when it is first used."""
    lines = [
        "import runpy, signal, sys",
        "class Pressed:",
        "    def find_spec(self, name, path=None, target=None):",
        f"        if name == {package!r}:",
        "            sys.meta_path.remove(self)",
        "            try:",
        "                signal.raise_signal(signal.SIGINT)",
        "            except KeyboardInterrupt as error:",
        "                if name == 'typer':",
        "                    raise",
        "                raise ModuleNotFoundError(name) from error",
        "sys.meta_path.insert(0, Pressed())",
        "runpy.run_module('forerun', run_name='__main__')",
    ]
    command = [sys.executable, "-c", "\n".join(lines), "generate", str(family / "target"), "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "forerun: interrupted\n")


def test_what_the_system_refuses_says_how_to_mend_it():
    for number, words in (
        (errno.ENOENT, "check the path"),
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "name another place"),
        (errno.EIO, "can be given again"),
    ):
        assert words in sentence_of(OSError(number, "no", "file"))


def test_a_run_that_cannot_be_kept(tmp_path):
    from forerun.errors import TrainingError
    from forerun.train.run import Record

    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="name another --run"):
        Record({"a": 1}).demand_same(tmp_path / "file" / "run")
