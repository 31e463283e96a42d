"""Rounds: their order, whoever fails in them, and that a run goes on with the same bits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parties import Listening, federation, local, same, tiny, world
from safetensors.torch import load_file

from forerun.errors import TrainingError
from forerun.train.federated.averaging import mean
from forerun.train.federated.federation import Federation
from forerun.train.federated.methods import METHODS
from forerun.train.federated.public import Message
from forerun.train.federated.server import Gathering, aggregate
from forerun.train.run import STATE, Run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_rounds_and_tells_its_figures(method: str) -> None:
    found = federation(method=method)
    before = found.server.state()
    for step in range(2):
        assert np.isfinite(found.update(step))
    figures = found.validate()
    assert ("r1_sum" in figures) == METHODS[method].server != same(before, found.server.state())
    assert {"client_image_accuracy", "client_text_accuracy", "client_both_r1_sum", "loss"} <= figures.keys()
    assert (figures["up_bytes"] > 0) == (METHODS[method].averages or METHODS[method].way is not None)


def test_a_round_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found, order = federation(), list[str]()
    steps = {"train_public": found.server, "message": found.server, "distill": found.server}
    for name, owner in (*steps.items(), ("ask", found.engine)):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, own=own, name=name: (order.append(name), own(*given))[1])
    found.update(0)
    assert order == ["train_public", "message", "ask", "distill"]


@pytest.mark.parametrize("given", [{"clients_per_round": 2, "rows_per_round": 10}, {}])
def test_whoever_is_sampled_speaks_of_the_same_items(given: dict[str, int]) -> None:
    engine = Listening(tiny())
    found = federation(engine, **given)
    for step in range(2):
        found.update(step)
        heard, *answers = engine.messages
        assert len(answers) == given.get("clients_per_round", 4) and len(heard.ids) == given.get("rows_per_round", 24)
        assert all(np.array_equal(answer.ids, heard.ids) for answer in answers)
        engine.messages.clear()


def test_shuffled_rows_and_a_shuffled_public_set_change_nothing() -> None:
    plain, shuffled = federation(), federation()
    client = shuffled.engine.clients["both0"]
    order, public = np.random.default_rng(0).permutation(24), world().public
    client.public = replace(public, ids=public.ids[order], images=public.images[order])
    client.public = replace(client.public, texts=[public.texts[place] for place in order])
    client.__post_init__()
    for one in (plain, shuffled):
        one.update(0)
    assert all(torch.equal(plain.aggregate.rows[name], shuffled.aggregate.rows[name]) for name in ("image", "text"))


# ---- whoever fails


class Broken(Listening):
    """What clients answer is spoilt."""

    def __init__(self, changes: dict[str, Any], **given: Any) -> None:
        super().__init__(tiny(**given))
        self.changes = changes

    def changed(self, answers: dict[str, Message]) -> dict[str, Message]:
        return {name: replace(answer, **self.changes.get(name, {})) for name, answer in answers.items()}


def test_a_round_without_texts_leaves_the_text_tower_alone() -> None:
    clients = {"image": 2, "text": 0, "both": 0, "alpha": 10.0, "least": 2}
    found = federation(clients=clients)
    opening = found.open(0)
    before = {name: value.clone() for name, value in found.server.towers.encoders["text"].state_dict().items()}
    found.close(opening, found.engine.ask(opening.names, opening.message, found.plan.lesson, 0, 1.0))
    assert found.aggregate is not None and found.aggregate.rows.keys() == {"image"}
    assert same(before, found.server.towers.encoders["text"].state_dict())
    losses = found.server.distill(found.aggregate, np.random.default_rng(0))
    assert losses["text"] == 0 < losses["image"]


def test_a_client_that_fails_is_as_before_and_the_round_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = federation()
    client = found.engine.clients["both0"]
    before = client.state()

    def fails(ids: np.ndarray) -> None:
        raise RuntimeError("no memory")

    calls = iter([client.represent, fails])
    monkeypatch.setattr(client, "represent", lambda ids: next(calls)(ids))
    with caplog.at_level(logging.WARNING):
        found.update(0)
    assert same(before, client.state()) and "both0 gave no answer in round 1: RuntimeError: no memory" in caplog.text
    figures = found.validate()
    assert (figures["answered"], figures["failed"]) == (3, 1) and "weight_both0" not in figures


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"version": "other"}, "public set other"), ({"rows": {"image": np.ones((24, 3))}}, "of width 8")],
)
def test_an_answer_about_something_else_counts_for_nothing(
    change: dict[str, Any], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = federation(Broken({"both0": change}))
    with caplog.at_level(logging.WARNING):
        found.update(0)
    assert sentence in caplog.text and found.validate()["failed"] == 1
    assert found.aggregate is not None and "both0" not in found.aggregate.trust()


def test_when_nobody_answers_the_server_learns_alone() -> None:
    found, alone = federation(dropout=1.0), federation(method="server-only")
    for one in (found, alone):
        one.update(0)
    assert found.aggregate is None and found.validate()["failed"] == 4
    assert same(found.server.state(), alone.server.state())


def test_who_is_late_counts_a_round_later() -> None:
    found = federation(late=1.0)
    found.update(0)
    assert found.aggregate is None and found.validate()["late"] == 4
    found.update(1)
    assert found.aggregate is not None and len(found.aggregate.trust()) == 4


def test_noise_and_swapped_rows_are_trusted_less() -> None:
    """Once there is a server that knows anything: here its other tower says the truth."""
    truth = np.eye(24, dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
    rows = {"a": truth, "b": truth, "noise": noise, "swapped": np.roll(truth, 1, 0)}
    ids = np.arange(24)
    answers = {name: Message("v", ids, {"image": one}) for name, one in rows.items()}
    trust = aggregate(answers, Message("v", ids, {"text": truth}), Gathering(tau=0.1)).trust()
    assert trust["a"] == trust["b"] > 0.4 and trust["noise"] < 0.1 > trust["swapped"]


# ---- averages of weights


def test_a_mean_of_weights_by_hand() -> None:
    found = mean([(1, {"w": torch.tensor([0.0, 4.0])}), (3, {"w": torch.tensor([4.0, 0.0])})])
    assert torch.equal(found["w"], torch.tensor([3.0, 1.0]))


def test_averages_are_of_equal_towers_and_become_the_servers() -> None:
    found = federation(method="fedavg")
    found.update(0)
    equal = [found.engine.clients["both1"].towers.encoders["text"]]  # gru:8; the others read with bag:4
    assert same(found.server.towers.encoders["text"].state_dict(), equal[0].state_dict())
    bags = found._means["bag:4"]
    assert bags.keys() == found.engine.clients["text0"].towers.encoders["text"].state_dict().keys()


def test_clients_of_both_modalities_count_more_in_fediot() -> None:
    def distance(method: str) -> float:
        found = federation(method=method)
        found.update(0)
        mine = found.engine.clients["both0"].towers.encoders["text"].state_dict()
        return float(sum((found._means["bag:4"][name] - mine[name]).abs().sum() for name in mine))

    assert distance("fediot") < 0.1 * distance("fedavg")


def test_towers_that_fit_nowhere_cannot_be_averaged() -> None:
    with pytest.raises(TrainingError, match="towers of its shape"):
        federation(method="fedavg", server_image="conv:16", server_text="gru:9")


# ---- a run


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("creamfl", {"late": 0.5, "half": True}),
        ("creamfl", {"shared_adam": True}),
        ("fedmd", {"rows_per_round": 10}),
        ("fedavg", {"dropout": 0.3}),
    ],
)
def test_a_run_goes_on_with_the_same_bits(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    def begun() -> Federation:
        return federation(method=method, rounds=3, seed=5, **given)

    def stops(step: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return Federation.update(parts, step) if method != "fedavg" else type(parts).update(parts, step)

    whole = begun()
    Run(whole, whole.plan.schedule, tmp_path / "whole").finish("whole")
    parts = begun()
    parts.update = stops  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Run(parts, parts.plan.schedule, tmp_path / "parts").finish("parts")
    again = begun()
    figures = Run(again, again.plan.schedule, tmp_path / "parts").finish("parts")
    assert same(load_file(tmp_path / "whole" / STATE), load_file(tmp_path / "parts" / STATE))
    assert figures == whole.validate()


def test_other_clients_do_not_fit_a_checkpoint(tmp_path: Path) -> None:
    found = federation(rounds=1)
    Run(found, found.plan.schedule, tmp_path).finish("run")
    other = federation(rounds=1, width=4)
    with pytest.raises(TrainingError, match="another shape"):
        Run(other, other.plan.schedule, tmp_path)


def test_a_loss_that_is_no_number_is_said() -> None:
    found = federation()
    with torch.no_grad():
        found.server.towers.encoders["image"].out.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="loss of the server became nan"):
        found.update(0)


def test_engines_are_the_same_every_time() -> None:
    states = []
    for _ in range(2):
        found = federation(local(tiny()))
        found.update(0)
        states.append(found.state())
    assert same(*states)
