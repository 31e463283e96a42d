"""The designer of draft models: its arithmetic by hand, and what must hold whatever a machine costs."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, log, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import DrafterError
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.nn.translate import places
from forerun.plan.acceptance import Given, Replayed, Trained, fit
from forerun.plan.design import (
    Bandwidth,
    Constraints,
    Measured,
    best_pace,
    break_even_rate,
    break_even_ratio,
    configs,
    design,
    kind_of,
    line,
    pace,
)
from forerun.train.pruning.shape import Shape

TARGET = TransformerConfig(
    vocab_size=256, width=256, layers=4, heads=4, kv_heads=2, head_dim=32, mlp_width=512, max_length=512
)
FLAT = Measured({}, {}, [(1, 0.1), (17, 0.1)])
"""Verifying takes 100 ms, however much."""


def sized(layers: int, width: int, heads: int = 32, head_dim: int = 128, mlp_width: int = 11008) -> TransformerConfig:
    return TransformerConfig(32000, width, layers, heads, heads, head_dim, mlp_width, 2048)


# ---- arithmetic


def test_tokens_of_independent_acceptance() -> None:
    assert Given((0.8,)).tokens(3) == pytest.approx(1 + 0.8 + 0.64 + 0.512) == pytest.approx(2.952)
    assert Given((0.8, 0.7)).tokens(3) == pytest.approx(1 + 0.8 + 0.7 + 0.7 * 0.875)
    assert Given((0.5,)).tokens(0) == 1


@pytest.mark.parametrize(
    ("step", "rate", "length", "tokens", "throughput"),
    [(0.024, 0.80, 3, 2.952, 17.16), (0.0065, 0.74, 6, 3.379, 24.31), (0.002, 0.55, 5, 2.161, 19.64)],
    ids=["deep", "wide", "tiny"],
)
def test_the_worked_example(step: float, rate: float, length: int, tokens: float, throughput: float) -> None:
    found = best_pace(Given((rate,)), step, FLAT)
    assert found.length == length
    assert (found.tokens, found.throughput) == (pytest.approx(tokens, abs=5e-4), pytest.approx(throughput, abs=5e-3))


def test_what_a_faster_draft_may_lose() -> None:
    deep = best_pace(Given((0.8,)), 0.024, FLAT).throughput
    assert break_even_rate(deep, 0.0065, FLAT) == pytest.approx(0.5606, abs=1e-4)
    assert break_even_ratio(4, 0.024, 0.0065, 0.1) == pytest.approx(0.643, abs=5e-4)
    assert break_even_ratio(7, 0.024, 0.0065, 0.1) == pytest.approx(0.543, abs=5e-4)
    assert break_even_rate(1e6, 0.0065, FLAT) is None
    assert break_even_rate(10, 0.05, FLAT) == pytest.approx(0.5, abs=1e-4), "against plain decoding: 1 + rate = 1.5"


def test_a_dear_draft_is_not_asked() -> None:
    assert best_pace(Given((0.3,)), 0.05, FLAT).length == 0
    assert pace(Given((0.3,)), 0.05, FLAT, 1).throughput * 0.1 == pytest.approx(1.3 / 1.5)


def test_a_curve_with_two_hills_is_searched_to_its_end() -> None:
    bumpy = Measured({}, {}, [(1, 0.1), (2, 0.3), (3, 0.3), (17, 0.3)])
    found = best_pace(Given((0.95,)), 1e-4, bumpy)
    assert pace(Given((0.95,)), 1e-4, bumpy, 1).throughput < 10 < found.throughput and found.length == 16


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (sized(24, 2048, 16, 128, 5504), 1345.4),
        (sized(5, 2560), 796.3),
        (sized(3, 2560), 543.3),
        (sized(1, 2560), 290.3),
    ],
    ids=["1.3B", "796M", "543M", "290M"],
)
def test_the_published_shapes_have_the_published_sizes(config: TransformerConfig, millions: float) -> None:
    assert config.parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert sum(prod(place.shape) for place in places(config).values()) == config.parameters, "as it is written down"


@pytest.mark.parametrize("extra", [{}, {"tied": True}, {"qkv_bias": True}, {"mlp_bias": True, "out_bias": True}])
def test_parameters_are_those_of_the_module(extra: dict[str, bool]) -> None:
    config = replace(TARGET, **extra, qk_norm=not extra)
    assert sum(p.numel() for p in Transformer(config).parameters()) == config.parameters


def test_depth_is_dear_where_layers_are() -> None:
    """Section 4 of our specification: 1.6 TB/s, a quarter of a millisecond per layer, half precision."""
    gpu = Bandwidth(1.6e12, 0.25e-3, 0.3e-3, [(1, 0.02)])
    deep, wide = sized(24, 2048, 16, 128, 5504), sized(5, 2560)
    assert gpu.step(deep) == pytest.approx(7.9e-3, abs=5e-5) and gpu.step(wide) == pytest.approx(2.4e-3, abs=5e-5)
    bare = replace(gpu, layer_seconds=0.0, fixed_seconds=0.0)
    assert bare.step(deep) / bare.step(wide) == pytest.approx(deep.layer_parameters * 24 / 1e6 / 714.4, rel=0.1)


def test_the_line_through_two_depths_and_through_more() -> None:
    times = {layers: 0.3 + 0.25 * layers for layers in (1, 4)}
    assert line(times) == (pytest.approx(0.3, abs=1e-9), pytest.approx(0.25, abs=1e-9))
    assert line(times | {8: 0.3 + 0.25 * 8}) == (pytest.approx(0.3, abs=1e-9), pytest.approx(0.25, abs=1e-9))
    with pytest.raises(DrafterError, match="two different depths"):
        line({2: 1.0})


# ---- acceptance


def test_replayed_answers_give_their_own_tokens_and_survival() -> None:
    """Right, right, wrong, over and over: drafts of three survive up to two."""
    replayed = Replayed((np.array([True, True, False] * 20),))
    assert replayed.tokens(3) == 3 and replayed.tokens(1) == 60 / 40
    assert replayed.survival(3) == (1, 1, 0)
    assert replayed.rate == pytest.approx(2 / 3)
    assert replayed.interval(3) == (3, 3)
    assert Replayed((np.ones(40, np.bool_),)).rate == 1, "a draft that ends is no miss"
    seventeen = Replayed((np.array([*[True] * 17, False]),))
    assert seventeen.rate == pytest.approx(16 / 17), "the target's own token behind a whole draft was not drafted"


def test_intervals_hold_the_mean_and_shrink_with_more_answers() -> None:
    random = np.random.default_rng(0)
    few, many = (Replayed(tuple(random.random(50) < 0.7 for _ in range(count))) for count in (8, 200))
    widths = []
    for one in (few, many):
        low, high = one.interval(4)
        assert low < one.tokens(4) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert many.rate == pytest.approx(0.7, abs=0.02)


def test_a_fit_finds_the_law_that_made_its_points() -> None:
    def rate(parameters: float, layers: int, tokens: float) -> float:
        return 1 / (1 + np.exp(9 - 0.5 * log(parameters) - 0.2 * log(layers) - 0.05 * log(tokens)))

    shapes = [(1e6, 1, 1e6), (1e6, 8, 2e6), (4e6, 2, 1e6), (4e6, 8, 4e6), (2e6, 4, 8e6), (8e6, 1, 2e6)]
    found = fit([Trained(*shape, rate(*shape)) for shape in shapes])
    assert found.slopes == pytest.approx((0.5, 0.2, 0.05), abs=0.01) and found.error < 0.01
    assert found.rate(3e6, 3, 3e6) == pytest.approx(rate(3e6, 3, 3e6), abs=0.01)


def test_more_never_predicts_less() -> None:
    """Points that say that deeper is worse leave no slope for depth."""
    points = [
        Trained(p, layers, 1e6, 0.6 + 0.02 * log(p / 1e6) - 0.01 * layers) for p in (1e6, 4e6) for layers in (1, 4)
    ]
    found = fit(points)
    assert found.slopes[0] > 0 and found.slopes[1] == 0


def test_guesswork_is_refused() -> None:
    good = [Trained(p, 2, 1e6, 0.5) for p in (1e6, 2e6, 4e6)]
    with pytest.raises(DrafterError, match="too few"):
        fit(good)
    with pytest.raises(DrafterError, match="missed by"):
        fit([*good, Trained(3e6, 2, 1e6, 0.95)])
    with pytest.raises(DrafterError, match="survival"):
        Given((0.5, 0.6))


# ---- the designer


def costs(layer: float = 0.05e-3, byte: float = 1e-10, fixed: float = 0.1e-3, verify: float = 10e-3) -> Bandwidth:
    return Bandwidth(1 / byte, layer, fixed, [(1, verify), (17, 1.2 * verify)])


def believed(config: TransformerConfig) -> Given:
    """Larger is better, and deeper a little."""
    odds = 0.25 * log(config.parameters_outside_vocabulary) + 0.1 * log(config.layers) - 2.5
    return Given((1 / (1 + np.exp(-odds)),))


def test_every_shape_can_be_made_and_is_a_part_of_the_target() -> None:
    tried = configs(TARGET)
    assert {one.layers for one in tried} == {1, 2, 3, 4} and max(one.width for one in tried) == 256
    family = [one for one in tried if (one.heads, one.mlp_width) == (4, 512)]
    assert {one.width for one in family} == {64, 128, 192, 256}, "the paper's family: all heads, the whole perceptron"
    for one in tried:
        assert Shape.read(str(Shape.of(one))).within(TARGET) == one and one.width % 64 == 0


def test_no_shape_is_proposed_that_transformers_would_refuse() -> None:
    """Its Llama wants heads to divide the width; 12 of them do not divide 256."""
    target = replace(TARGET, width=768, heads=12, kv_heads=12, head_dim=64)
    assert 256 in {one.width for one in configs(target)}
    assert all(one.width % one.heads == 0 for one in configs(target))


def test_plans_are_ranked_priced_and_written_down() -> None:
    found = design(TARGET, costs(), believed)
    speeds = [plan.throughput for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True) and found.best is found.plans[0]
    for plan in found.plans:
        assert plan.speedup == pytest.approx(plan.throughput / found.plain_throughput)
        assert plan.worst_speedup < plan.speedup
        assert plan.rate_needed is not None and 0.02 < plan.rate_needed < plan.rate and plan.speedup > 1
    pareto = [plan.parameters for plan in found.plans if plan.is_pareto]
    assert pareto == sorted(pareto, reverse=True) and found.plans[0].is_pareto
    assert json.loads(json.dumps(found.as_dict()))["best"] == found.plans[0].shape


def test_the_fastest_of_all_shapes_is_never_dropped() -> None:
    """Against every shape on its own."""
    speeds = [best_pace(believed(one), costs().step(one), costs()).throughput for one in configs(TARGET)]
    assert design(TARGET, costs(), believed).plans[0].throughput == max(speeds)


def test_constraints_are_kept() -> None:
    limits = Constraints(parameters=4e5, memory=1.5e6, step_seconds=1e-3, context=128)
    found = design(TARGET, costs(), believed, limits)
    assert found.plans
    for plan in found.plans:
        assert plan.parameters <= 4e5 and plan.memory <= 1.5e6 and plan.step_seconds <= 1e-3
    assert design(TARGET, costs(), believed, Constraints(parameters=10)).best is None


def test_no_speculation_is_an_answer() -> None:
    """A draft that costs nearly what its target does."""
    found = design(TARGET, costs(fixed=9e-3), lambda _: Given((0.4,)))
    assert found.best is None and all(plan.length == 0 for plan in found.plans)
    assert design(TARGET, costs(), lambda _: Given((0.0,))).best is None


positive = st.floats(1e-5, 1e-2)


@settings(max_examples=10, deadline=None)
@given(layer=positive, fixed=positive, faster=st.floats(0.1, 1), scale=st.floats(0.01, 100), budget=st.floats(2e5, 2e6))
def test_what_holds_on_every_machine(layer: float, fixed: float, faster: float, scale: float, budget: float) -> None:
    """Faster drafts and more room never slow the best plan down; slower clocks change no rank."""

    def best(latency: Bandwidth, most: float = inf) -> float:
        found = design(TARGET, latency, believed, Constraints(parameters=most), shapes)
        return max((plan.throughput for plan in found.plans), default=found.plain_throughput)

    shapes = configs(TARGET)[::17]
    here = costs(layer, fixed=fixed)
    quick = replace(here, layer_seconds=layer * faster, fixed_seconds=fixed * faster)
    assert best(quick) >= best(here) * (1 - 1e-12)
    assert best(here, budget) <= best(here, 1.3 * budget) * (1 + 1e-12) <= best(here) * (1 + 1e-9)
    slow = Bandwidth(
        here.bytes_per_second / scale, layer * scale, fixed * scale, [(t, s * scale) for t, s in here.verifying]
    )
    one, other = (design(TARGET, latency, believed, shapes=shapes) for latency in (here, slow))
    assert other.plans[0].throughput * scale == pytest.approx(one.plans[0].throughput)
    assert [plan.throughput * scale for plan in other.plans] == pytest.approx([plan.throughput for plan in one.plans])


def test_a_wide_vocabulary_is_priced_apart() -> None:
    large = replace(TARGET, vocab_size=64_000)
    (plan,) = design(large, costs(layer=0, fixed=0), believed, shapes=[Shape(1, 64).within(large)]).plans
    assert plan.head_share == pytest.approx(64_000 * 64 / (64_000 * 64 + Shape(1, 64).within(large).layer_parameters))
    assert any("frequent tokens" in note for note in plan.notes) and any("--tied" in note for note in plan.notes)
    tied = design(large, costs(), believed, Constraints(tied=True)).plans
    assert all("--tied" not in note for plan in tied for note in plan.notes)


def test_measured_costs_come_back_from_a_file() -> None:
    config = Shape(2, 64).within(TARGET)
    here = Measured({kind_of(config): (1.0, 0.5)}, {64: 0.25}, [(1, 10.0), (5, 11.0)], 0.1, {"machine": "this"})
    again = Measured.of(json.loads(json.dumps(here.as_dict())))
    assert again.step(config) == here.step(config) == 1 + 2 * 0.5 + 0.25 and again.verify(3) == 10.5
    assert here.times(2).step(config) == 2 * here.step(config) and here.times(2).verify(1) == 20
    with pytest.raises(DrafterError, match="measure them anew"):
        Measured.of({"layers": {"a": 1}})
    with pytest.raises(DrafterError, match="no layers of the shape 128x512x4x2"):
        here.step(Shape(2, 128).within(TARGET))


@pytest.mark.parametrize(
    "odd", [{"verifying": []}, {"verifying": [[1, 0.0]]}, {"overhead": -1}, {"heads": {"64": float("nan")}}]
)
def test_costs_that_make_no_sense_are_refused(odd: dict[str, object]) -> None:
    fields = {"layers": {"64x64x4x2": [0.0, 1.0]}, "heads": {}, "verifying": [[1, 1.0]], "overhead": 0, "about": {}}
    Measured.of(fields)
    with pytest.raises(DrafterError, match="numbers above 0"):
        Measured.of(fields | odd)
    for costs_of_layer in ([0.0, 0.0], [2.0, -1.0], [0.0, inf]):
        with pytest.raises(DrafterError, match="numbers above 0"):
            Measured.of(fields | {"layers": {"64x64x4x2": costs_of_layer}})


def test_a_rank_that_hangs_on_a_rate_is_not_stable() -> None:
    """A fast poor draft and a slow good one, nearly as fast as each other; one that is far behind."""
    shapes = [Shape(1, 64).within(TARGET), Shape(4, 256).within(TARGET), Shape(4, 64, 64).within(TARGET)]
    steps = dict(zip(map(kind_of, shapes), [(1e-3, 0.0), (2.5e-3, 0.0), (12e-3, 0.0)], strict=True))
    rates = dict(zip(map(kind_of, shapes), [0.7, 0.8, 0.85], strict=True))
    here = Measured(steps, {64: 0.0, 256: 0.0}, [(1, 0.02), (17, 0.02)])
    found = design(TARGET, here, lambda config: Given((rates[kind_of(config)],)), shapes=shapes)
    stable = {plan.shape: plan.is_stable for plan in found.plans}
    assert stable == {str(Shape.of(shapes[0])): False, str(Shape.of(shapes[1])): False, str(Shape.of(shapes[2])): True}
