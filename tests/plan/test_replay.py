"""A replay is the engine's run without the target: step for step, node for node."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from drafters.heading import drafter_of, lively, some_heads
from fakes import Near, TableNetwork, engine_of
from forerun.cost import Table
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.model import Model
from forerun.plan import measure, replay
from forerun.plan.costs import Costs, Point
from forerun.plan.measure import Transcript
from forerun.plan.replay import IsDrawnError, Live, Record, Replay, Spent
from forerun.ranktree import RankTree
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree

TARGET = TableNetwork(vocab_size=5, seed=3, order=3)
MODELS = {"small": Near(TARGET, 0.8, seed=1), "middle": Near(TARGET, 0.4, seed=2)}
PROMPTS = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4, 0]]
GREEDY = SamplingParams(max_new_tokens=60, seed=0)
WARM = SamplingParams(max_new_tokens=60, temperature=0.9, seed=3)
CHEAP = Costs((Point(1, 1, 1, 1e-3), Point(1, 1, 9, 2e-3)))
STORE = {"drafter": "lookup", "cost": 0.02}  # what a node must promise does not depend on a clock
SMALL = {"drafter": "small", "checkpoint": "small", "length": 3}
DRAFTERS = {
    "none": "none",
    "store": STORE,
    "chain": SMALL,
    "tree": {"drafter": "small", "checkpoint": "small", "tree": {"width": 2, "depth": 3, "nodes": 6}},
    "stopping": {"drafter": "small", "checkpoint": "small", "stopping": {"rule": "confidence", "threshold": 0.6}},
    "in front": {"drafter": "fallback", "sources": [STORE, SMALL]},
    "hierarchy": {"drafter": "verified", "checkpoint": "middle", "inner": SMALL, "length": 4},
    "cascade": {"drafter": "cascade", "models": ["middle", "small"]},
}


def drafter(spec: object) -> Drafter:
    return build(spec, Workshop(Model(TARGET, 0), MODELS.__getitem__))  # type: ignore[arg-type]


def record_of(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Record:
    return Record(engine, measure.texts_of(engine, prompts, params), params)


def told(spent: Sequence[Spent]) -> list[tuple[int, int]]:
    return [(one.tokens, one.steps) for one in spent]


def of_outputs(outputs: Sequence[Output]) -> list[tuple[int, int]]:
    return [(one.stats.new_tokens, one.stats.steps) for one in outputs]


@pytest.mark.parametrize("spec", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_it_is_the_engines_run(spec: object, rows: int) -> None:
    """Levels of a hierarchy are not independent: here nothing is assumed of them."""
    record = record_of(engine_of(TARGET), PROMPTS, GREEDY)
    player = Replay(drafter(spec), record, CHEAP)
    spent = [one for begin in range(0, 3, rows) for one in player.play(range(begin, begin + rows))]
    engine = engine_of(TARGET, drafter(spec), max_rows=rows)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert told(spent) == of_outputs(outputs)
    assert [one.nodes - one.steps for one in spent] == [one.stats.drafted_tokens for one in outputs]
    assert spec == "none" or sum(one.steps for one in spent) < 170
    assert TARGET.forwards and all(one.seconds > 0 for one in spent)


@pytest.mark.parametrize("name", ["none", "store", "tree"])
def test_what_involves_no_luck_is_matched_with_what_the_target_drew(name: str) -> None:
    record = record_of(engine_of(TARGET), PROMPTS, WARM)
    spent = Replay(drafter(DRAFTERS[name]), record, CHEAP).play(range(3))
    assert told(spent) == of_outputs(engine_of(TARGET, drafter(DRAFTERS[name])).generate(PROMPTS, WARM))


def test_what_is_drawn_is_not_replayed_and_leaves_no_row_behind() -> None:
    record, some = record_of(engine_of(TARGET), PROMPTS, WARM), drafter(SMALL)
    with pytest.raises(IsDrawnError):
        Replay(some, record, CHEAP).play(range(3))
    spent = Live(some, record).play(range(3))
    assert told(spent) == of_outputs(engine_of(TARGET, drafter(SMALL)).generate(PROMPTS, WARM))


def test_heads_see_the_states_that_the_target_would_have_shown_them() -> None:
    network, tree = lively(), RankTree([(0,), (1,), (0, 0), (1, 0), (0, 0, 1)])
    engine = Engine(network, drafter_of(some_heads("hydra++"), network, tree), max_rows=2)
    prompts, params = [[1, 2, 3], [9, 30, 2, 2, 11]], SamplingParams(max_new_tokens=40, seed=0)
    outputs = engine.generate(prompts, params)
    record = record_of(engine, prompts, params)
    spent = Replay(drafter_of(some_heads("hydra++"), network, tree), record, CHEAP).play([0, 1])
    assert told(spent) == of_outputs(outputs)


@pytest.mark.parametrize("name", ["store", "chain", "tree"])
def test_an_answer_that_ends_inside_a_draft_ends_there(name: str) -> None:
    """And nothing is drafted behind what ends a text."""
    record = record_of(engine_of(TARGET, eos=(2,)), PROMPTS, GREEDY)
    assert min(text.answer_length for text in record.texts) < 60
    spent = Replay(drafter(DRAFTERS[name]), record, CHEAP).play(range(3))
    outputs = engine_of(TARGET, drafter(DRAFTERS[name]), eos=(2,)).generate(PROMPTS, GREEDY)
    assert told(spent) == of_outputs(outputs)
    assert [one.nodes - one.steps for one in spent] == [one.stats.drafted_tokens for one in outputs]


class AllButOne(Drafter):
    """Chains of three right tokens, but one place of the text is wrong (draft_design, section 9, check 3)."""

    def __init__(self, truth: Sequence[int], wrong: int):
        self.truth = [9 if place == wrong else token for place, token in enumerate(truth)]
        self.max_nodes = 3
        self.seen: list[int] = []

    def propose(self, context: Context) -> TokenTree:
        (row,) = context.rows
        at = len(row.tokens)
        return TokenTree.chain([[row.tokens[-1], *self.truth[at : at + min(3, *context.depths)]]], context.device)

    def observe(self, context: Context, tree: TokenTree, verdict: object, scores: object) -> None:
        self.seen.append(len(verdict.kept[0]))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("wrong", "expected"), [("d", [4, 4]), ("c", [3, 4, 1])])
def test_the_example_of_the_papers_replay(wrong: str, expected: list[int]) -> None:
    """ "abcdefgh" behind a prompt of one token."""
    text = [10 + ord(letter) - ord("a") for letter in "Xabcdefgh".lower().replace("x", "z")]
    network = TableNetwork(vocab_size=40, order=1)
    record = Record(engine_of(network), [Transcript(tuple(text), 1, 9)], GREEDY)
    some = AllButOne(text, "abcdefgh".index(wrong) + 1)
    (spent,) = Replay(some, record, CHEAP).play([0])
    assert some.seen == expected and (spent.tokens, spent.steps) == (8, len(expected))


def test_steps_behind_the_target_say_how_dear_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs three times as fast behind a forward of the target, and a first step of its own."""
    now, record = [0.0], record_of(engine_of(TARGET), PROMPTS[:1], GREEDY)

    class Slow(Drafter):
        max_nodes = 0
        calls, swept = 0, False

        def propose(self, context: Context) -> TokenTree:
            now[0] += 50 if self.calls == 0 else 3 if self.swept else 1
            self.calls, self.swept = self.calls + 1, False
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)

    some = Slow()
    player = Replay(some, record, CHEAP)
    monkeypatch.setattr(player, "_sweep", lambda: setattr(some, "swept", True))
    monkeypatch.setattr(replay.time, "perf_counter", lambda: now[0])
    (spent,) = player.play([0])
    assert spent.steps == 60 and spent.draft_seconds == pytest.approx(50 + 3 * 59)


def test_costs_price_every_step_by_its_rows_nodes_and_context() -> None:
    costs = Costs(tuple(Point(r, c, n, r * n + c / 100) for r in (1, 3) for c in (1, 500) for n in (1, 4)))
    record = record_of(engine_of(TARGET), PROMPTS[:1], SamplingParams(max_new_tokens=3, seed=0))
    (spent,) = Replay(drafter("none"), record, costs).play([0])
    assert spent.verify_seconds == pytest.approx(sum(1 + context / 100 for context in (3, 4, 5)))
    assert isinstance(costs.table(1), Table)
