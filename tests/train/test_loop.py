"""A run: which batches it sees and at what rates, what an interruption leaves, and what else can be an objective."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from forerun.errors import TrainingError
from forerun.train import run as running
from forerun.train.objectives.alternating import Alternating
from forerun.train.objectives.descent import Descent, Group, moved
from forerun.train.run import START, STATE, Objective, Record, Run, Watch, read_log, unwatched
from forerun.train.schedule import Schedule


class Counting(Descent):
    """An objective that notes the batches it was asked for."""

    def __init__(self, schedule: Schedule) -> None:
        torch.manual_seed(0)
        self.module, self.schedule = nn.Linear(2, 2), schedule
        self.numbers: list[int] = []

    def loss(self, number: int) -> Tensor:
        self.numbers.append(number)
        return self.module(torch.ones(2)).square().sum()

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        return {"loss": 0.0}


def fit(objective: Descent, folder: Path) -> dict[str, float]:
    return Run(objective, objective.schedule, folder).finish("run")


def test_accumulated_parts_see_every_batch_once(tmp_path: Path) -> None:
    objective = Counting(Schedule(steps=3, parts=2))
    fit(objective, tmp_path)
    assert objective.numbers == [0, 1, 2, 3, 4, 5]


def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    schedule = Schedule(steps=4, save_every=1)

    class Interrupted(Counting):
        def loss(self, number: int) -> Tensor:
            if number == 2:
                raise KeyboardInterrupt
            return super().loss(number)

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(schedule), tmp_path)
    resumed = Counting(schedule)
    fit(resumed, tmp_path)
    assert resumed.numbers == [2, 3]


def test_a_finished_run_has_figures_and_takes_no_step(tmp_path: Path) -> None:
    fit(Counting(Schedule(steps=2)), tmp_path)
    again = Counting(Schedule(steps=2))
    assert fit(again, tmp_path) == {"loss": 0.0} and again.numbers == []


# ---- Ctrl-C


class Curved(Descent):
    """A loss that every step of the optimiser changes. pressed: how often Ctrl-C is pressed within a batch."""

    def __init__(
        self, seed: int = 0, pressed: Mapping[int, int] | None = None, schedule: Schedule | None = None
    ) -> None:
        self.module = nn.Linear(3, 3, bias=False)
        self.schedule = schedule or Schedule(steps=6, adam_rate=0.01, save_every=100, validate_every=100)
        self.pressed, self.numbers = pressed or {}, list[int]()
        with torch.no_grad():
            self.module.weight.copy_(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))

    def loss(self, number: int) -> Tensor:
        self.numbers.append(number)
        for _ in range(self.pressed.get(number, 0)):
            os.kill(os.getpid(), signal.SIGINT)
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        return (self.module(inputs) - inputs.sin()).square().mean()

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(self.module.weight.square().sum())}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As Python handles it, whatever the tests run in does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "it is handled as before"


def step_of(folder: Path) -> int:
    return int(running.read_run(folder / STATE)[0]["step"])


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_step_keeps_it_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = Curved(), Curved()
    fit(whole, tmp_path / "whole")
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        fit(Curved(pressed={2: 1}), tmp_path / "parts")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("waiting for the end of this step") and said[1].startswith("the same command goes on")
    assert step_of(tmp_path / "parts") == 3
    fit(parts, tmp_path / "parts")
    assert parts.numbers == [3, 4, 5] and torch.equal(parts.module.weight, whole.module.weight)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_does_not_wait_and_keeps_nothing_that_is_half_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(Curved(pressed={1: 2}), tmp_path)
    assert "goes on" not in capsys.readouterr().err and not (tmp_path / STATE).exists()
    often = replace(Curved().schedule, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Curved(pressed={1: 2}, schedule=often), tmp_path)
    assert "goes on from the last checkpoint" in capsys.readouterr().err and step_of(tmp_path) == 1


@pytest.mark.usefixtures("ctrl_c")
def test_who_handles_ctrl_c_in_another_way_is_left_alone(tmp_path: Path) -> None:
    heard: list[int] = []
    ours = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    fit(Curved(pressed={1: 1, 2: 2}), tmp_path)
    assert heard == [signal.SIGINT] * 3
    signal.signal(signal.SIGINT, ours)


def test_an_interrupted_validation_keeps_its_step(tmp_path: Path) -> None:
    class Impatient(Curved):
        def validate(self, watch: Watch = unwatched) -> dict[str, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Impatient(schedule=replace(Curved().schedule, validate_every=2)), tmp_path)
    assert step_of(tmp_path) == 2


def test_where_nothing_can_be_kept_nobody_is_told_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "save_file", full)

    class Impatient(Curved):
        def validate(self, watch: Watch = unwatched) -> dict[str, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Impatient(), tmp_path)
    said = capsys.readouterr().err
    assert "make room there" in said and "goes on" not in said
    assert not list(tmp_path.iterdir())


# ---- what comes before the first step


class Sum:
    """A start in three steps, whose sum becomes every weight. pressed: how often Ctrl-C is pressed within a step."""

    steps = 3

    def __init__(self, objective: Curved, pressed: Mapping[int, int] | None = None):
        self.objective, self.pressed, self.taken = objective, pressed or {}, list[int]()
        self.sum = torch.zeros(1)

    def update(self, step: int) -> None:
        self.taken.append(step)
        for _ in range(self.pressed.get(step, 0)):
            os.kill(os.getpid(), signal.SIGINT)
        self.sum += 0.1 / (1 + step)

    def finish(self) -> None:
        with torch.no_grad():
            self.objective.module.weight.fill_(self.sum.item())

    def state(self) -> dict[str, Tensor]:
        return {"sum": self.sum}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if "sum" not in state:
            raise ValueError("no sum")
        self.sum = state["sum"]


def run_of(folder: Path, pressed: Mapping[int, int] | None = None, during: Mapping[int, int] | None = None) -> Sum:
    """Ctrl-C is pressed within these steps, and during these of the start."""
    objective = Curved(pressed=pressed)
    start = Sum(objective, during)
    try:
        Run(objective, objective.schedule, folder).finish("run", start)
    except KeyboardInterrupt:
        assert pressed or during
    return start


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_interrupted_start_goes_on_where_it_was(
    step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_of(tmp_path / "whole")
    assert whole.taken == [0, 1, 2]
    parts, folder = run_of(tmp_path / "parts", during={step: 1}), tmp_path / "parts"
    assert parts.taken == list(range(step + 1))
    assert [path.name for path in folder.iterdir()] == [START]
    assert f"goes on from the last checkpoint in {folder}" in capsys.readouterr().err
    again = run_of(folder)
    assert again.taken == list(range(step + 1, 3)) and torch.equal(again.sum, whole.sum)
    assert torch.equal(again.objective.module.weight, whole.objective.module.weight)
    assert not (folder / START).exists(), "the checkpoint has taken its place"


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_in_the_start_keeps_nothing_that_is_half_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, during={1: 2})
    said = capsys.readouterr().err
    assert "goes on" not in said and f"nothing is kept in {tmp_path}: the same command begins anew" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ctrl_c")
def test_a_start_is_made_once(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole")
    assert run_of(tmp_path / "parts", pressed={0: 1}).taken == [0, 1, 2]
    again = run_of(tmp_path / "parts")
    assert again.taken == [] and torch.equal(again.objective.module.weight, whole.objective.module.weight)


def test_after_a_start_there_is_a_checkpoint(tmp_path: Path) -> None:
    class Broken(Curved):
        def loss(self, number: int) -> Tensor:
            raise MemoryError

    one = Broken()
    with pytest.raises(MemoryError):
        Run(one, one.schedule, tmp_path).finish("run", Sum(one))
    assert step_of(tmp_path) == 0 and run_of(tmp_path).taken == []


def test_the_start_of_something_else(tmp_path: Path) -> None:
    running.save_file({"other": torch.zeros(1)}, tmp_path / START, {"run": '{"step": 1}'})
    with pytest.raises(TrainingError, match="another start: remove it"):
        run_of(tmp_path)


# ---- the log


def interrupted(watch: Watch = unwatched) -> dict[str, float]:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("ctrl_c")
def test_the_log_is_one_of_a_run_without_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule(steps=6, adam_rate=0.01, save_every=100, validate_every=2)
    presses: list[Mapping[int, int]] = [{1: 1}, {2: 1}, {}, {4: 1}, {5: 1}, {}]  # step 1 is the second, and validated
    for folder, each in (("whole", [{}]), ("parts", presses)):
        for number, pressed in enumerate(each):
            one = Curved(pressed=pressed, schedule=schedule)
            if number == 2:
                one.validate = interrupted  # type: ignore[method-assign]
            with contextlib.suppress(KeyboardInterrupt):
                Run(one, schedule, tmp_path / folder).finish("run")
    whole, parts = ([row | {"seconds": 0.0} for row in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert [row["step"] for row in whole] == [2, 4, 6] and parts == whole
    assert "run: step 4/6  loss " in capsys.readouterr().err
    with (tmp_path / "whole" / running.LOG).open("a") as file:
        file.write('{"step": 4, "train_loss": 9.5}\n{"step": 5, "tr')
    assert [row["train_loss"] for row in read_log(tmp_path / "whole")][1] == 9.5
    assert read_log(tmp_path / "nowhere") == []


# ---- what a run is made of


def test_a_run_goes_on_with_what_it_was_made_of_alone(tmp_path: Path) -> None:
    made = Record({"data": "a", "sizes": (1, 2), "none": None})
    for _ in range(2):
        made.demand_same(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.json"]
    for other in ({"data": "b"}, {"sizes": (1, 3)}, {"none": 0}, {"more": 1}):
        with pytest.raises(TrainingError, match=f"another {next(iter(other))}: remove it"):
            Record({**made.fields, **other}).demand_same(tmp_path / "run")
    with pytest.raises(TrainingError, match="another shape"):
        Record({"data": "b"}, name="shape").demand_same(tmp_path / "run")
    Record({"data": "a", "younger": [1]}, older={"younger": (1,)}).demand_same(tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        made.demand_same(tmp_path / "run")


# ---- who learns how


def test_groups_of_one_kind_share_an_optimiser_and_keep_their_rates(tmp_path: Path) -> None:
    class Grouped(Counting):
        def groups(self) -> list[Group]:
            (_, weight), (_, bias) = moved(self.module)
            return [Group([weight], 0.1, optimiser="muon"), Group([bias], 0.2, scale=0.5)]

    objective = Grouped(Schedule(1, warmup=0, decay=0))
    before = [parameter.detach().clone() for parameter in objective.module.parameters()]
    fit(objective, tmp_path)
    assert [type(one).__name__ for one in objective.optimisers] == ["Muon", "AdamW"]
    assert [one.param_groups[0]["lr"] for one in objective.optimisers] == [0.1, 0.1]
    weight, bias = (
        float((p - b).detach().abs().max()) for p, b in zip(objective.module.parameters(), before, strict=True)
    )
    assert bias == pytest.approx(0.1, rel=1e-3) and 0 < weight < 0.1
    names = {name for name in load_file(tmp_path / STATE) if name.startswith("optimiser.")}
    assert {name.split(".")[1] for name in names} == {"0", "1"}


# ---- objectives made of objectives


class Averaged:
    """Clients who each take a step with data of their own, and then all get the mean of their parameters."""

    def __init__(self, clients: Sequence[Descent]):
        self.clients = clients

    def update(self, step: int) -> float:
        losses = [client.update(step) for client in self.clients]
        with torch.no_grad():
            for alike in zip(*(client.module.parameters() for client in self.clients), strict=True):
                mean = torch.stack(alike).mean(0)
                for parameter in alike:
                    parameter.copy_(mean)
        return sum(losses) / len(losses)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        return self.clients[0].validate()

    def state(self) -> dict[str, Tensor]:
        each = enumerate(client.state() for client in self.clients)
        return {f"{number}.{key}": tensor for number, own in each for key, tensor in own.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for number, client in enumerate(self.clients):
            prefix = f"{number}."
            client.load_state({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})


class Against(Curved):
    """Learns what another has become, as a discriminator does."""

    def __init__(self, other: Curved):
        super().__init__(seed=9)
        self.other = other

    def loss(self, number: int) -> Tensor:
        self.numbers.append(number)
        return (self.module.weight - self.other.module.weight.detach()).square().sum()


def alternating(pressed: Mapping[int, int]) -> Alternating:
    generator = Curved(pressed=pressed)
    return Alternating(discriminator=Against(generator), generator=generator)


def averaged(pressed: Mapping[int, int]) -> Averaged:
    return Averaged([Curved(seed=1), Curved(seed=2, pressed=pressed)])


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("make", [alternating, averaged])
def test_what_is_made_of_objectives_is_one_and_resumes_to_the_same_bits(
    make: Callable[[Mapping[int, int]], Objective], tmp_path: Path
) -> None:
    schedule = replace(Curved().schedule, steps=9)
    whole, parts = make({}), make({})
    figures = Run(whole, schedule, tmp_path / "whole").finish("whole")
    with pytest.raises(KeyboardInterrupt):
        Run(make({2: 1}), schedule, tmp_path / "parts").finish("parts")
    assert 0 < step_of(tmp_path / "parts") < 9
    assert Run(parts, schedule, tmp_path / "parts").finish("parts") == figures
    ours, theirs = parts.state(), whole.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other = make({})
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state({})


def test_they_take_turns_in_every_step() -> None:
    """In their order: the last one sees what the first has become, and is what all is done for."""
    both, turns = alternating({}), list[str]()
    for name, objective in both.objectives.items():
        rightly = objective.update

        def update(step: int, name: str = name, rightly: Callable[[int], float] = rightly) -> float:
            turns.append(f"{name} {step}")
            return rightly(step)

        objective.update = update  # type: ignore[method-assign]
    losses = [both.update(step) for step in range(2)]
    assert turns == [f"{name} {step}" for step in range(2) for name in ("discriminator", "generator")]
    alone = Curved()
    assert losses == [alone.update(step) for step in range(2)]
    assert both.validate() == alone.validate() | {
        "discriminator_loss": both.objectives["discriminator"].validate()["loss"]
    }


def test_clients_agree_after_every_step() -> None:
    clients = averaged({})
    for step in range(2):
        clients.update(step)
        one, other = (client.module.weight for client in clients.clients)
        assert torch.equal(one, other)
    assert clients.clients[0].optimisers != clients.clients[1].optimisers


# ---- rates


@pytest.mark.parametrize(("warmup", "steps", "floor"), [(100, 1000, 0.33), (10, 11, 0.5), (1, 2, 0.0), (7, 300, 0.0)])
def test_a_cosine_begins_at_zero_is_whole_after_warming_up_and_ends_at_its_floor(
    warmup: int, steps: int, floor: float
) -> None:
    """Hydra++'s schedule: 0 at step 0, 1 at the end of 100 steps, 0.33 at the last one."""
    schedule = Schedule(steps, warmup=warmup, shape="cosine", floor=floor)
    rates = [schedule.rate(step) for step in range(steps)]
    assert rates[0] == 0 and rates[warmup] == 1
    assert rates[:warmup] == pytest.approx([step / warmup for step in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > warmup + 1:
        assert rates[-1] == pytest.approx(floor)
        middle = (rates[warmup + (steps - 1 - warmup) // 2] + rates[steps - 1 - (steps - 1 - warmup) // 2]) / 2
        assert middle == pytest.approx((1 + floor) / 2), "halfway down at half the way"


def test_a_cosine_without_warm_up_begins_whole() -> None:
    schedule = Schedule(5, warmup=0, shape="cosine", floor=0.2)
    assert [schedule.rate(0), schedule.rate(4)] == pytest.approx([1, 0.2])
    assert Schedule(1, warmup=0, shape="cosine").rate(0) == 1


def test_the_rate_of_a_step_is_the_share_of_the_full_one(tmp_path: Path) -> None:
    """With a muon rate of zero, AdamW moves everything; steps of Adam are as long as its rate."""
    schedule = Schedule(
        6, warmup=2, shape="cosine", floor=0.5, muon_rate=0.0, adam_rate=0.01, weight_decay=0.0, validate_every=1
    )
    objective = Counting(schedule)
    weights = [objective.module.weight.detach().clone()]
    objective.validate = lambda watch: weights.append(objective.module.weight.detach().clone()) or {"loss": 0.0}  # type: ignore
    fit(objective, tmp_path)
    moved = [float((after - before).abs().max()) for before, after in pairwise(weights)]
    assert moved == pytest.approx([0.01 * schedule.rate(step) for step in range(6)], rel=0.05)


# ---- one run in one folder


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    class Twice(Counting):
        def loss(self, number: int) -> Tensor:
            with pytest.raises(TrainingError, match="in use by another run"):
                fit(Counting(self.schedule), tmp_path)
            return super().loss(number)

    objective = Twice(Schedule(steps=3, save_every=1))
    fit(objective, tmp_path)
    assert objective.numbers == [0, 1, 2]
    fit(Counting(objective.schedule), tmp_path)


def test_a_log_that_cannot_be_written_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / running.LOG).mkdir()
    with pytest.raises(TrainingError, match="mend its permissions, and the same command goes on"):
        fit(Counting(Schedule(steps=2)), tmp_path)
