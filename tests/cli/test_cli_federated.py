"""`forerun federated run`: presets and files, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from forerun.errors import TrainingError
from forerun.train.federated.networks import Towers
from forerun.train.federated.settings import PRESETS, read, settled

SMALL = {
    "rounds": 2,
    "clients_per_round": 2,
    "local_epochs": 1,
    "width": 8,
    "server_image": "conv:4",
    "server_text": "bag:4",
    "data": {"public": 16, "test": 10, "own": 20, "paired": 16},
    "clients": {"image": 1, "text": 1, "both": 1, "least": 2, "shards": 2, "alpha": 10},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_a_run_leaves_its_log_its_figures_and_towers(config, forerun, said, tmp_path):
    code, out, err = forerun("federated", "run", config)
    assert code == 0, err
    assert "R@1 sum of these four" in out and "image clients" in out and "MiB down" in out and "step 2/2" in err
    run = tmp_path / "small.run"
    figures = json.loads((run / "figures.json").read_text())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["r1_sum"] == pytest.approx(figures["r1_sum"], abs=1e-4)
    assert Towers.load(run / "towers").embed_texts(["a red circle"]).shape == (1, 8)
    again = said("federated", "run", config)
    assert again["figures"]["r1_sum"] == figures["r1_sum"], "it is finished, and is told again"


def test_another_method_is_another_run(config, forerun, refused):
    assert forerun("federated", "run", config, "--rounds", 1, "--method", "fedmd")[0] == 0
    assert "another configuration" in refused("federated", "run", config, "--rounds", 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rouns: 3", "nobody knows the setting rouns: did you mean rounds?"),
        ("data: {publik: 3}", "data.publik: did you mean public?"),
        ("rounds: many", "rounds is 'many': give a whole number"),
        ("rounds: true", "rounds is True: give a whole number"),
        ("tau: 0", "tau is 0.0: give a number above 0"),
        ("upload_noise: -1", "upload_noise is -1.0"),
        ("dropout: 1.5", "it is a share"),
        ("method: creamf", "did you mean creamfl?"),
        ("kd_loss: l1", "choose one of mse, l2"),
        ("data: shapes", "data is a list of settings"),
        ("clients: {image_architectures: conv:4}", "is a list of words"),
        ("preset: quick\nclients: {image_architectures: ['conv:x']}", "is no architecture"),
        ("preset: fast", "there is no preset 'fast'"),
        ("- rounds", "is no list of settings"),
        ("a: [", "cannot be read"),
        ("data: {kind: folders}", "data.pairs is not said"),
        ("preset: quick\nserver_image: 'conv:8'\nserver_text: 'gru:8'\nmethod: fedavg", "towers of its shape"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(text, sentence, tmp_path, refused):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert sentence in refused("federated", "run", path)
    assert not (tmp_path / "wrong.run").exists()


def test_a_file_that_is_not_there_names_the_presets(refused):
    assert "quick" in refused("federated", "run", "nowhere.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name):
    assert read(name, {"seed": 3}).seed == 3


def test_a_file_changes_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: quick\nrate: 1e-4\ndata: {public: 99}\n")
    settings = read(str(path))
    assert (settings.rate, settings.data.public, settings.data.test) == (
        1e-4,
        99,
        settled({"preset": "quick"}).data.test,
    )
    with pytest.raises(TrainingError, match="above 0"):
        settled({"rate": 0})


def test_tensorboard_hears_the_rounds(config, forerun, tmp_path):
    pytest.importorskip("tensorboardX")
    code, _, err = forerun("federated", "run", config, "--rounds", 1, "--tensorboard", tmp_path / "board")
    assert code == 0, err
    assert any((tmp_path / "board").iterdir())
