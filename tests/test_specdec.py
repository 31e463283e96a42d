"""SpecDec++ (arXiv 2405.19715): when a learnt head ends a chain, that this is exact, and what a threshold is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enumeration import distance, plain_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.chance import Ints
from forerun.cost import Lately, Step, Table
from forerun.drafters.small import DraftModel, Settings
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead, corrected
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain, Expander, Grown
from forerun.drafting.spec import describe
from forerun.drafting.stopping import LAST, UNMEASURED, Acceptance, Drafted, fair_threshold
from forerun.errors import CheckpointError, DrafterError
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from test_engine import engine_law, processed

VOCAB = 4
EXACT = 1e-6


class Told(nn.Module):
    """A head that is handed its probabilities as states, [B, 1]."""

    config = AcceptanceConfig(1, 0, weight=1.0)

    def probability(self, states: Tensor) -> Tensor:
        return states[:, 0]


def some_head(width: int = VOCAB, seed: int = 0, **fields: Any) -> AcceptanceHead:
    torch.manual_seed(seed)
    return AcceptanceHead(AcceptanceConfig(width, **{"depth": 2, **fields})).requires_grad_(False)


def row(**wishes: Any) -> Row:
    return Row([0], 1, SamplingParams(**wishes), key=0, limit=99)


def length(rule: Acceptance, probabilities: Sequence[float]) -> int:
    """How many tokens are drafted where the head says this of the first, the second, ..."""
    notes: dict[str, Tensor] = {}
    for depth in range(1, 99):
        said = torch.tensor([[probabilities[depth - 2] if depth > 1 else 0.0]])
        if not rule.goes_on(Drafted(depth, [row()], None, {LAST: said}, notes)).item():
            return depth
    raise AssertionError("no end")


# ---- the head


@pytest.mark.parametrize(("tie", "count"), [(True, 16_789_506), (False, 50_352_130)])
def test_a_head_has_so_many_numbers(tie: bool, count: int) -> None:
    with torch.device("meta"):
        head = AcceptanceHead(AcceptanceConfig(4096, 3, tie))
    assert sum(one.numel() for one in head.parameters()) == count


@pytest.mark.parametrize("tie", [True, False])
def test_blocks_are_residual(tie: bool) -> None:
    """Both ways with W = 1, b = 0: 1, then 1 + silu(1), then that and its silu."""
    head = AcceptanceHead(AcceptanceConfig(1, 2, tie))
    with torch.no_grad():
        for block in head.blocks:
            block.weight.fill_(1), block.bias.fill_(0)
        head.last.weight.copy_(torch.tensor([[0.0], [1.0]])), head.last.bias.fill_(0)
        once = 1 + F.silu(torch.tensor(1.0))
        assert once.item() == pytest.approx(1.7310586)
        assert head(torch.ones(1))[1].item() == pytest.approx((once + F.silu(once)).item())
        head.blocks[-1].weight.fill_(0.5)
        other = once + F.silu(once / 2)
        tied = 1 + F.silu(torch.tensor(0.5)) + F.silu((1 + F.silu(torch.tensor(0.5))) / 2)
        assert head(torch.ones(1))[1].item() == pytest.approx((tied if tie else other).item())
        assert tied.item() != pytest.approx(other.item())


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (1, [0.5, 0.8, 0.9, 0.95, 0.99]),
        (3, [0.25, 0.5714, 0.75, 0.8636, 0.9706]),
        (6, [0.1429, 0.4, 0.6, 0.76, 0.9429]),
        (12, [0.0769, 0.25, 0.4286, 0.6129, 0.8919]),
    ],
)
def test_what_a_head_says_is_set_right_again(weight: float, said: list[float]) -> None:
    assert corrected(torch.tensor(said), weight).tolist() == pytest.approx([0.5, 0.8, 0.9, 0.95, 0.99], abs=2e-4)


@pytest.mark.parametrize(
    "fields",
    [{"width": 0}, {"width": 4, "depth": -1}, {"width": 4, "tie_blocks": "yes"}, {"width": 4, "weight": 0.0}],
)
def test_a_head_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DrafterError, match="makes no sense"):
        AcceptanceConfig(**fields)


# ---- when it ends a chain


@pytest.mark.parametrize(("threshold", "submitted"), [(0.3, 4), (0.5, 5), (0.1, 3), (0.04, 2)])
def test_the_token_behind_the_one_that_ends_it_is_drafted_too(threshold: float, submitted: int) -> None:
    assert length(Acceptance(Told(), threshold), [0.95, 0.9, 0.8, 0.5, 0.9, *[0.0] * 20]) == submitted


def test_a_chain_has_at_least_and_at_most_so_many_tokens() -> None:
    for threshold in (0.0, 0.5, 0.99):
        assert length(Acceptance(Told(), threshold), [0.0] * 30) == 2
        assert length(Acceptance(Told(), threshold), [1.0] * 30) == 20
    assert length(Acceptance(Told(), 0.5, least=1, most=7), [0.0] * 30) == 2  # nothing is known after the first
    assert length(Acceptance(Told(), 1.0), [0.0] * 30) == 20


def test_a_higher_threshold_never_shortens_a_chain() -> None:
    for seed in range(5):
        luck = np.random.default_rng(seed).uniform(0.6, 1, 20).tolist()
        sizes = [length(Acceptance(Told(), threshold), luck) for threshold in np.linspace(0, 1, 21)]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_rows_end_alone() -> None:
    rule, notes = Acceptance(Told(), 0.5, least=1), dict[str, Tensor]()
    rule.goes_on(Drafted(1, [row()] * 2, None, {LAST: torch.zeros(2, 1)}, notes))
    told = Drafted(2, [row()] * 2, None, {LAST: torch.tensor([[0.9], [0.2]])}, notes)
    assert rule.goes_on(told).tolist() == [True, False]


# ---- exactness


def drafter_of(target: TableNetwork, rule: Acceptance, noise: float = 0.7) -> DraftModel:
    return DraftModel.on(Near(target, noise), Chain(rule))


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_greedy_text_is_the_targets_and_no_forward_is_made_for_the_head(noise: float) -> None:
    """A round's first forward also reads what the draft model has missed, so there is one for every token drafted."""
    target = TableNetwork(VOCAB, 3)
    drafter = drafter_of(target, Acceptance(some_head(), 0.8, most=9), noise)
    one = engine_of(target, drafter, max_rows=3)
    prompts = [[1, 2], [3], [0, 1, 2, 3, 1], [2, 2]]
    wishes = SamplingParams(max_new_tokens=60)
    assert [output.token_ids for output in one.generate(prompts, wishes)] == [plain(target, p, 60) for p in prompts]
    drafter.model.passes = 0
    (output,) = one.generate(prompts[:1], wishes)
    assert drafter.model.passes == output.stats.drafted_tokens > output.stats.steps
    assert noise or output.stats.accepted == output.stats.drafted_tokens / output.stats.steps


def test_after_a_rejection_both_caches_hold_the_verified_text() -> None:
    """The target but for its newest token; the draft model has at most what it read of this and never more."""
    target = TableNetwork(VOCAB, 3)
    drafter = drafter_of(target, Acceptance(some_head(), 0.8), 1.5)
    one = engine_of(target, drafter)
    one.add([1, 2], SamplingParams(max_new_tokens=80))
    rejected = 0
    while not one.is_idle:
        one.step()
        if one.costs.last is not None and one._running:
            text = len(one._running[0].row.tokens)
            assert one.target.cache.lengths[0] == text - 1
            assert drafter.model.cache.lengths[0] == text - (1 if one.costs.last.rejected else 2)
            rejected += one.costs.last.rejected
    assert rejected > 5


DESCRIPTION = {"drafter": "small", "checkpoint": "small", "stopping": {"rule": "acceptance", "checkpoint": "HEAD"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A head for a table of two tokens."""
    head = some_head(2, 5)
    with torch.no_grad():
        head.last.bias += torch.tensor([-1.5, 1.5])
    path = tmp_path_factory.mktemp("head") / "head"
    checkpoints.write(head, head.config, Checkpoint(path, "acceptance", {}, "target", {}), torch.float32)
    return str(path)


def described(folder: str, **rule: Any) -> dict[str, Any]:
    return {**DESCRIPTION, "stopping": {**DESCRIPTION["stopping"], "checkpoint": folder, "least": 1, "most": 2, **rule}}


def law_off(description: Any, wishes: SamplingParams) -> float:
    target = TableNetwork(2, 3, 2, 1.0)
    networks = {"target": target, "small": Near(target, 1.0, 1), "middle": Near(target, 0.5, 2)}
    law = engine_law(lambda: description() if callable(description) else description, networks, [1, 0], wishes)
    return distance(law, plain_law(processed(wishes, target, [1, 0]), 3))


THREE = SamplingParams(temperature=0.9, max_new_tokens=3)


def verified(inner: Any) -> dict[str, Any]:
    return {"drafter": "verified", "checkpoint": "middle", "inner": inner, "length": 2}


PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda rule: rule,
    "below": verified,
    "behind a store": lambda rule: {"drafter": "fallback", "sources": ["lookup", rule]},
    "behind a store, below": lambda rule: verified({"drafter": "fallback", "sources": ["lookup", rule]}),
    "by choice, below": lambda rule: verified({"drafter": "switch", "parts": [rule, "lookup"]}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_law_is_the_targets(folder: str, place: str) -> None:
    assert law_off(PLACES[place](described(folder, threshold=0.3)), THREE) < EXACT


def test_a_seeded_text_does_not_depend_on_the_rows_beside_it(folder: str) -> None:
    target = TableNetwork(2, 3)
    networks = {"small": Near(target, 0.5)}
    prompts, each = (
        [[1], [0, 1], [1, 1, 0]] * 3,
        [SamplingParams(temperature=0.9, seed=n, max_new_tokens=20) for n in range(9)],
    )
    description = described(folder, most=6, threshold="auto")
    texts = [
        [one.token_ids for one in engine_of(target, description, networks, max_rows=rows).generate(prompts, each)]
        for rows in (1, 8)
    ]
    assert texts[0] == texts[1]


def test_at_the_bottom_of_a_cascade(folder: str) -> None:
    target = TableNetwork(2, 3)
    networks = {"small": Near(target, 0.5), "middle": Near(target, 0.3, 2)}
    for last in (described(folder, most=4), described(folder, most=4, threshold="auto")):
        description = {"drafter": "cascade", "models": ["middle"], "k": [[3, 3], [0, 3]], "last": last}
        one = engine_of(target, description, networks, max_rows=2)
        outputs = one.generate([[1], [0, 1, 1]], SamplingParams(max_new_tokens=40))
        assert [output.token_ids for output in outputs] == [plain(target, [1], 40), plain(target, [0, 1, 1], 40)]
        assert outputs[0].stats.accepted > 0.5


class Past(Acceptance):
    """A threshold that depends on what was accepted before, as an automatic one does."""

    def _thresholds(self, drafted: Drafted) -> Tensor:
        accepted = [len(row.tokens) - row.prompt_length - row.step for row in drafted.rows]
        return torch.tensor([0.9 if one % 2 else 0.1 for one in accepted])


def test_a_threshold_that_depends_on_the_past_changes_no_law() -> None:
    rule = Past(some_head(2, 5), None, least=1, most=2)
    draft = Near(TableNetwork(2, 3, 2, 1.0), 1.0, 1)
    assert law_off(lambda: DraftModel.on(draft, Chain(rule)), THREE) < EXACT


class Trimming(Chain):
    """What must not be: a token is drawn, seen, and not submitted."""

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        tree = super().grow(expander, context, depths).tree
        tokens = [row if row[-1] == 0 or len(row) == 1 else row[:-1] for row in tree.tokens]
        assert tree.laws_BNV is not None
        laws_BNV = tree.laws_BNV[:, : max(map(len, tokens))]
        return Grown(TokenTree.drawn_chain(tokens, laws_BNV), [[-1, *range(len(row) - 1)] for row in tokens])


class Coin(TableNetwork):
    """The same law, whatever came before."""

    def __init__(self, *law: float):
        super().__init__(len(law))
        self.law = torch.tensor(law, dtype=torch.float64).log()

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self.law


@pytest.mark.parametrize(("form", "zero"), [(Chain, 0.5), (Trimming, 0.55)])
def test_to_leave_out_a_token_after_seeing_it_changes_the_law(form: type[Chain], zero: float) -> None:
    """p = (0.5, 0.5), q = (0.9, 0.1), submitted only if it is 0: 0.9 * (0.5 / 0.9) + 0.1 * 0.5."""
    rule = Acceptance(some_head(2), 0.5, least=1, most=1)
    networks = {"target": Coin(0.5, 0.5)}
    wishes = SamplingParams(temperature=1.0, max_new_tokens=2)  # with one left, nothing is drafted
    law = engine_law(lambda: DraftModel.on(Coin(0.9, 0.1), form(rule)), networks, [1], wishes)
    assert sum(share for text, share in law.items() if text[0] == 0) == pytest.approx(zero, abs=1e-7)


# ---- names and files


def test_a_rule_is_named_with_its_folder(folder: str) -> None:
    short = Settings(checkpoint="small", stopping=f"acceptance:{folder}")
    assert short.rule == Settings(checkpoint="small", stopping={"rule": "acceptance", "checkpoint": folder}).rule
    target = TableNetwork(2, 3)
    one = engine_of(target, {**DESCRIPTION, "stopping": f"acceptance:{folder}"}, {"small": Near(target, 0.5)})
    assert one.generate([[1, 0]], SamplingParams(max_new_tokens=9))[0].token_ids == plain(target, [1, 0], 9)


@pytest.mark.parametrize("stopping", ["acceptance:mine", {"rule": "acceptance", "checkpoint": "mine"}])
def test_a_file_names_a_head_as_it_lies_beside_it(stopping: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "it.json").write_text(json.dumps({"drafter": "small", "checkpoint": "x", "stopping": stopping}))
    assert str(tmp_path / "mine") in json.dumps(describe(str(tmp_path / "it.json"))["stopping"])


def test_a_head_of_another_model_or_kind_is_refused(folder: str, tmp_path: Path) -> None:
    target = TableNetwork(5)
    with pytest.raises(DrafterError, match="for states of width 2, and this drafter's have 5"):
        engine_of(target, described(folder), {"small": Near(target, 0.5)})
    other = json.loads((Path(folder) / "config.json").read_text()) | {"drafter": "lookalike"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="kind lookalike, and no acceptance head"):
        engine_of(target, described(str(tmp_path)), {"small": Near(target, 0.5)})


# ---- what a threshold is worth


def cost_of(a: float, draft: float, verify: float, length: int) -> float:
    """Per token, of always drafting so many where each is accepted with probability a (specs, section 3)."""
    kept = sum(a**k for k in range(1, length + 1))
    return (draft * (length - kept) + verify) / (1 + kept)


@pytest.mark.parametrize(
    ("a", "draft", "verify", "best", "cost", "threshold"),
    [
        (0.9, 1, 4, 7, 1.1070, 0.5254),
        (0.8, 1, 4, 4, 1.6773, 0.6265),
        (0.6, 1, 4, 2, 2.5714, 0.7200),
        (0.5, 1, 1, 0, 1.0000, 0.5000),
    ],
)
def test_where_every_token_survives_alike_the_threshold_is_known(
    a: float, draft: float, verify: float, best: int, cost: float, threshold: float
) -> None:
    """Brute force over the lengths; the longest chain below the threshold is the best, and the threshold is what
    `fair_threshold` makes of such steps' seconds, but for its square of the acceptance."""
    costs = [cost_of(a, draft, verify, length) for length in range(40)]
    assert min(range(40), key=costs.__getitem__) == best and costs[best] == pytest.approx(cost, abs=5e-5)
    assert costs[best] / (draft + costs[best]) == pytest.approx(threshold, abs=5e-5)
    assert max(length for length in range(40) if 1 - a**length < threshold) == best
    if best:
        kept = sum(a**k for k in range(1, best + 1))
        steps = Lately(
            drafted=best,
            accepted=kept,
            rejected=kept * (1 - a) / a,
            tokens=1 + kept,
            draft_seconds=best * draft,
            seconds=best * draft + verify + draft,  # verify is what a verification takes beyond a drafted token
        )
        assert steps.acceptance == pytest.approx(a)
        assert 1 - (1 - fair_threshold(steps)) * a**2 == pytest.approx(threshold, abs=5e-5)


def test_seconds_per_token_follow_from_the_two_rates() -> None:
    """T / N = draft (1 + d) + v (target - draft), on a run with steps of known seconds."""
    target, draft, verify = TableNetwork(VOCAB, 3), 0.02, 0.1
    drafter = drafter_of(target, Acceptance(some_head(), 0.8))
    (output,) = engine_of(target, drafter).generate([[1, 2]], SamplingParams(max_new_tokens=80))
    stats = output.stats
    seconds = stats.drafted_tokens * draft + stats.steps * verify
    discarded, verified = stats.discard_rate, stats.verification_rate
    assert seconds / stats.new_tokens == pytest.approx(draft * (1 + discarded) + verified * (verify - draft), abs=1e-9)
    assert (discarded + 1 - verified) / verified == pytest.approx(stats.drafted_tokens / stats.steps)


class World:
    """Texts whose tokens are easy or hard to draft, in spells; the head knows the probability, and says it with the
    pessimism of a weight (specs, section 10)."""

    draft, target, most = 0.02, 0.1, 20

    def __init__(self, rows: int = 1000, rounds: int = 40, seed: int = 0, draft: float = 0.02):
        luck = np.random.default_rng(seed)
        self.rows, self.rounds, self.luck, self.draft = rows, rounds, luck, draft
        count, is_easy = rounds * 21 + 21, luck.random(rows) < 0.5
        spells = np.empty((rows, count))
        for place in range(count):
            fresh = luck.random(rows) > 0.75
            is_easy = np.where(fresh, luck.random(rows) < 0.5, is_easy)
            spells[:, place] = np.where(is_easy, 0.97, 0.45)
        self.accepts = spells
        self.coins = luck.random((rows, count))

    def run(self, sizes_of: Any) -> float:
        """Tokens per second. sizes_of: (probabilities of the next tokens [B, 20], coins) to lengths [B]."""
        places, every = np.zeros(self.rows, np.int64), np.arange(self.rows)[:, None]
        seconds = 0.0
        for _ in range(self.rounds):
            ahead = places[:, None] + np.arange(self.most)
            accepts, coins = self.accepts[every, ahead], self.coins[every, ahead]
            survive = (coins < accepts).cumprod(1)
            sizes = sizes_of(accepts, survive)
            kept = np.minimum(survive.sum(1), sizes)
            self.told(sizes, kept)
            places += kept + 1
            seconds += sizes.sum() * self.draft + self.rows * self.target
        return float(places.sum() / seconds)

    def told(self, sizes: Ints, kept: Ints) -> None: ...

    def learnt(self, rule: Acceptance, weight: float = 1.0) -> float:
        """Under a rule; its own steps are what an automatic threshold learns from."""
        rows, costs = [row() for _ in range(self.rows)], Table()

        def sizes_of(accepts: np.ndarray, _: Ints) -> Ints:
            said = torch.from_numpy(accepts / (accepts + weight * (1 - accepts))).float()
            notes, sizes = dict[str, Tensor](), np.zeros(self.rows, np.int64)
            for depth in range(1, self.most + 1):
                states = {LAST: said[:, max(0, depth - 2), None]}
                goes_on = rule.goes_on(Drafted(depth, rows, None, states, notes, costs)).numpy()
                sizes[(sizes == 0) & ~goes_on] = depth
                if sizes.all():
                    return sizes
            raise AssertionError("a chain without an end")

        def told(sizes: Ints, kept: Ints) -> None:
            step = Step(self.rows, int((sizes + 1).sum()), 0, int((kept + 1).sum()), 0.0, 0.0, 0.0)
            drafting, whole = float(sizes.sum()) * self.draft, self.rows * self.target
            costs.learn(step._replace(draft_seconds=drafting, verify_seconds=whole, rejected=int((kept < sizes).sum())))

        self.told = told  # type: ignore[method-assign]
        return self.run(sizes_of)


@pytest.mark.parametrize(
    ("weight", "speeds"),
    [(1.0, {0.1: 16.7, 0.5: 17.3, 0.9: 13.9}), (6.0, {0.3: 16.4, 0.8: 17.3, 0.9: 16.4})],
)
def test_a_pessimistic_head_wants_a_higher_threshold(weight: float, speeds: dict[float, float]) -> None:
    """The specs' simulation: nothing, the best length and an oracle give 10.0, 15.2 and 23.2 tokens per second."""
    world = World()
    for threshold, speed in speeds.items():
        rule = Acceptance(Told(), threshold, least=1)
        assert world.learnt(rule, weight) == pytest.approx(speed, rel=0.025), threshold
    if weight == 1:
        fixed = [world.run(lambda accepts, _, size=size: np.full(len(accepts), size)) for size in (1, 2, 3)]
        assert max(fixed) == pytest.approx(15.2, rel=0.025)
        assert world.run(lambda _, survive: survive.sum(1)) == pytest.approx(23.2, rel=0.025)


@pytest.mark.parametrize("draft", [0.005, 0.02, 0.05])
def test_the_automatic_threshold_is_nearly_the_best(draft: float) -> None:
    """Whatever a draft costs."""
    world = World(300, 60, draft=draft)
    fixed = [world.learnt(Acceptance(Told(), one, least=1)) for one in (0.1, 0.4, 0.7)]
    assert world.learnt(Acceptance(Told(), None, least=1)) > 0.96 * max(fixed)


def test_the_clock_has_no_say_where_a_text_must_come_again() -> None:
    """A sampled request that names its seed, and a draft that no costs are known of, have the threshold of nobody."""
    rule, costs = Acceptance(Told(), None, least=1), Table()
    for _ in range(9):
        costs.learn(Step(1, 4, 9, 2, 0.9, 0.1, 0.0, rejected=1))
    assert fair_threshold(costs.lately) < 0.1 < UNMEASURED
    rows = [row(temperature=1.0, seed=3), row(seed=3), row(temperature=1.0)]
    notes = {"survival": torch.ones(3)}
    told = Drafted(2, rows, None, {LAST: torch.full((3, 1), 0.8)}, notes, costs)
    assert rule.goes_on(told).tolist() == [True, False, False]
    assert rule.goes_on(replace(told, costs=None, notes={"survival": torch.ones(3)})).all()
