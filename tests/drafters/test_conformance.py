"""What every registered method owes, whoever wrote it: none is named here, and none is exempt.

A small drafter is made of each entry from what it states: the kinds of its settings, its presets,
its example. Whatever it proposes, the text is that of plain decoding.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drafters.heading import PROMPTS, every_kernel, filled, greedy, lively, on, relative
from enumeration import distance, plain_law
from fakes import Near, TableNetwork
from forerun.accept.exact import Verdict
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.spec import describe
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from test_engine import engine_law, processed

SOURCE = Path(__file__).parents[2] / "src"
MODEL = "MODEL"
"""What an example calls a model."""
METHODS = {name: registry.method(name) for name in registry.names()}
CASES = [(name, preset) for name, one in METHODS.items() for preset in (one.trained.presets if one.trained else [""])]

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_case = pytest.mark.parametrize(("name", "preset"), CASES, ids=[preset or name for name, preset in CASES])


# ---- a working drafter of every entry


def example(method: Method, heads: str = "HEADS") -> dict[str, Any]:
    """The description of a small one."""
    known = {"model": MODEL, "heads": heads, "spec": "lookup"}
    own = {} if method.example else {name: known[kind] for name, kind in method.kinds.items() if kind in known}
    return {"drafter": method.name, **own, **method.example}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """The folder of random heads of a preset's shape, for the lively target; they say what it says, more or less."""

    @cache
    def folder(name: str, preset: str) -> str:
        trained, network = METHODS[name].trained, lively()
        assert trained is not None
        vocab_size, width = network.embedding.weight.shape
        shape = {**trained.presets[preset].architecture, "width": width, "vocab_size": vocab_size}
        config = trained.config(**trained.fitted(shape, network))
        module = trained.network(config).initialise(network.head.weight)
        knocked = filled(trained.network(config), 0.3)
        with torch.no_grad():
            for weight, knock in zip(module.parameters(), knocked.parameters(), strict=True):
                weight += knock
        path = tmp_path_factory.mktemp("heads") / "heads"
        checkpoints.write(module, config, Checkpoint(path, name, {}, "lively", {}), torch.float32)
        return str(path)

    return folder


@pytest.fixture
def made(name: str, preset: str, heads: Callable[[str, str], str]) -> Drafter:
    description = example(METHODS[name], heads(name, preset) if preset else "")
    return build(description, Workshop(Model(lively(), 1), {MODEL: relative()}.__getitem__))


def engine(drafter: Drafter, max_rows: int = 8) -> Engine:
    return Engine(lively(), drafter, max_rows=max_rows)


def said(one: Engine, prompts: Sequence[list[int]], wishes: SamplingParams | Sequence[SamplingParams]) -> Any:
    return [output.token_ids for output in one.generate(prompts, wishes)]


class Around(Drafter):
    """Stands between the engine and a drafter."""

    def __init__(self, inner: Drafter):
        self.inner, self.name = inner, inner.name
        self.reads, self.max_nodes, self.models = inner.reads, inner.max_nodes, inner.models
        self.admit, self.release = inner.admit, inner.release  # type: ignore[method-assign]
        self.steps = count()

    def propose(self, context: Context) -> TokenTree:
        return self.inner.propose(context)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        self.inner.observe(context, tree, verdict, scores)

    def reset(self) -> None:
        self.inner.reset()


# ---- the text


@every_case
def test_greedy_text_is_that_of_plain_decoding(name: str, preset: str, made: Drafter) -> None:
    """Alone, and beside others of other lengths."""
    wishes = SamplingParams(max_new_tokens=60)
    assert said(engine(made), PROMPTS[:1], wishes) == [greedy(lively(), PROMPTS[0], 60)]
    assert said(engine(made), PROMPTS[1:4], wishes) == [greedy(lively(), prompt, 60) for prompt in PROMPTS[1:4]]


@every_case
def test_rows_come_and_go_in_any_order(name: str, preset: str, made: Drafter) -> None:
    counts = [30, 3, 41, 1, 12]
    wishes = [SamplingParams(max_new_tokens=most) for most in counts]
    expected = [greedy(lively(), prompt, most) for prompt, most in zip(PROMPTS, counts, strict=True)]
    for max_rows in (2, 3):
        assert said(engine(made, max_rows), PROMPTS, wishes) == expected


@every_case
def test_a_row_that_wants_no_drafts_decodes_plainly_beside_those_that_do(name: str, preset: str, made: Drafter) -> None:
    wishes = [replace(one, drafts=row % 2 == 1) for row, one in enumerate(SAMPLED)]
    outputs = engine(made, 3).generate(PROMPTS, wishes)
    assert [output.token_ids for output in outputs][::2] == plainly_sampled()[::2]
    assert [output.stats.drafted_tokens for output in outputs][::2] == [0, 0, 0]
    assert name == "none" or any(output.stats.drafted_tokens for output in outputs[1::2])


SAMPLED = [SamplingParams(temperature=0.5 + row / 4, seed=row, max_new_tokens=40) for row in range(len(PROMPTS))]


@every_case
def test_where_no_luck_is_involved_a_seed_says_what_plain_decoding_says(name: str, preset: str, made: Drafter) -> None:
    """Others say the same again, whatever else runs."""
    if METHODS[name].grows == "drawn":
        alone = [said(engine(made), [prompt], [wish])[0] for prompt, wish in zip(PROMPTS, SAMPLED, strict=True)]
        assert said(engine(made, 3), PROMPTS, SAMPLED) == alone
    else:
        assert said(engine(made, 3), PROMPTS, SAMPLED) == plainly_sampled()


@cache
def plainly_sampled() -> Any:
    none = build("none", Workshop(Model(lively(), 1), {}.__getitem__))
    return said(engine(none, 3), PROMPTS, SAMPLED)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.trained is None])
def test_the_law_is_that_of_plain_sampling(name: str) -> None:
    """By enumeration, on tables, which have no states for heads to read."""
    target = TableNetwork(2, 3, 2, 1.0)
    networks = {"target": target, MODEL: Near(target, 0.7)}
    wishes = SamplingParams(temperature=0.9, max_new_tokens=3)
    law = engine_law(lambda: example(METHODS[name]), networks, [1, 0, 1, 0], wishes)
    assert distance(law, plain_law(processed(wishes, target, [1, 0, 1, 0]), 3)) < 1e-6


# ---- the seam


class Narrow(Around):
    """Allows now no node, now few, and rows no depth in turn."""

    def propose(self, context: Context) -> TokenTree:
        step = next(self.steps)
        wishes = [(0, 1, 2, budget)[(step + row) % 4] for row, budget in enumerate(context.budgets)]
        budgets = [min(pair) for pair in zip(wishes, context.budgets, strict=True)]
        depths = [0 if (step + row) % 3 == 0 else min(depth, 1 + step % 5) for row, depth in enumerate(context.depths)]
        tree = super().propose(replace(context, budgets=budgets, depths=depths))
        for row, (size, budget, most) in enumerate(zip(tree.sizes, budgets, depths, strict=True)):
            assert size <= 1 + (budget if most else 0)
            assert deepest(tree.topology.parents[row]) <= most
        return tree


def deepest(parents: Sequence[int]) -> int:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return max(depths)


@every_case
def test_budgets_and_depths_are_kept(name: str, preset: str, made: Drafter) -> None:
    expected = [greedy(lively(), prompt, 60) for prompt in PROMPTS[:3]]
    assert said(engine(Narrow(made)), PROMPTS[:3], SamplingParams(max_new_tokens=60)) == expected


class Interrupted(Around):
    """Ctrl-C between a proposal and what becomes of it, once."""

    def propose(self, context: Context) -> TokenTree:
        tree = super().propose(context)
        if next(self.steps) == 5:
            raise KeyboardInterrupt
        return tree


@every_case
def test_an_interrupted_step_leaves_no_trace(name: str, preset: str, made: Drafter) -> None:
    one = engine(Interrupted(made))
    ended = one.generate(PROMPTS[:3], SamplingParams(max_new_tokens=60))
    assert {output.finish_reason for output in ended} == {"interrupted"}
    for output, prompt in zip(ended, PROMPTS, strict=False):
        assert output.token_ids == greedy(lively(), prompt, 60)[: len(output.token_ids)]
    expected = [greedy(lively(), prompt, 60) for prompt in PROMPTS[2:]]
    assert said(one, PROMPTS[2:], SamplingParams(max_new_tokens=60)) == expected


class Recorded(Around):
    def __init__(self, inner: Drafter):
        super().__init__(inner)
        self.trees: list[Any] = []

    def propose(self, context: Context) -> TokenTree:
        tree = super().propose(context)
        self.trees.append((tree.tokens, tree.topology.parents))
        return tree


@every_case
def test_reset_is_as_just_built(name: str, preset: str, made: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clock says the same; the engine is a new one, whose table of costs knows nothing."""
    recorded = Recorded(made)
    seen = []
    for _ in range(2):
        monkeypatch.setattr("time.perf_counter", partial(next, count()))
        said(engine(recorded), PROMPTS[:3], SamplingParams(max_new_tokens=40))
        seen.append(recorded.trees)
        recorded.trees = []
        recorded.reset()
        assert not any(tally.asked or tally.drafted or tally.passes for tally in made.tallies())
    assert seen[0] == seen[1]


@every_case
@every_kernel
def test_a_beginning_that_is_known_changes_nothing(
    name: str, preset: str, kernels: str, heads: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is said nor what is drafted, where the clock says the same: a conversation that
    goes on, the same again with luck, and another one that begins alike."""
    monkeypatch.setattr("forerun.model.CHUNK", 8)
    monkeypatch.setattr("forerun.nn.prefixes.BLOCK", 4)
    network, seen = on(lively(), kernels), []
    for memory in (0, 1 << 20):
        workshop = Workshop(Model(network, 1), {MODEL: on(relative(), kernels)}.__getitem__)
        recorded = Recorded(build(example(METHODS[name], heads(name, preset) if preset else ""), workshop))
        one = Engine(network, recorded, prefix_cache=memory)
        monkeypatch.setattr("time.perf_counter", partial(next, count()))
        text, said, cached = PROMPTS[3] * 2, [], []
        for luck, more in ((0.0, [5, 6]), (0.0, [7, 8]), (0.9, []), (0.9, [])):
            (output,) = one.generate([text], SamplingParams(max_new_tokens=15, temperature=luck, seed=3))
            said.append(output.token_ids)
            cached.append(output.stats.cached_tokens)
            text = [*text, *output.token_ids, *more] if more else [*text[:21], 1, 2, 3]
        seen.append((said, recorded.trees))
        known = [0, 32, 48, 20] if kernels == "native" else [0, 16, 32, 16]
        assert cached == (known if memory else [0] * 4)
    assert seen[0] == seen[1]


# ---- the entry


@every_method
def test_an_entry_says_what_it_is(method: Method) -> None:
    assert METHODS[method.name] is method and method.sense
    assert is_dataclass(method.settings) and all(one.metadata["sense"] for one in fields(method.settings))
    trained = method.trained
    if trained is None:
        return
    assert trained.title and trained.paper and trained.presets
    assert all(preset.sense for preset in trained.presets.values())
    for layout in trained.layouts:
        assert layout.sense and (layout.stem or layout.knows is not type(layout).knows)


@every_method
def test_its_variations_are_settings_of_its_own_and_give_way_to_what_is_settled(method: Method) -> None:
    bare = {"drafter": method.name}
    found = method.varied(bare)
    assert len(found) == max(1, len(method.variations)) and all(one["drafter"] == method.name for one in found)
    for settled in method.variations:
        method.checked(settled)
        assert method.varied({**bare, **settled}) == [{**bare, **settled}]


@every_method
def test_a_setting_that_there_is_not_is_refused(method: Method) -> None:
    with pytest.raises(DrafterError, match=f"the drafter {method.name} has no setting 'no such thing'"):
        build({"drafter": method.name, "no such thing": 1}, Workshop(Model(lively(), 1), {}.__getitem__))


@every_method
def test_settings_survive_a_file_and_places_are_anchored_beside_it(method: Method, tmp_path: Path) -> None:
    for place in (MODEL, "HEADS"):
        (tmp_path / place).mkdir()
    description = example(method)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(description))
    found = describe(str(tmp_path / "mine.yaml"))
    anchored = json.loads(re.sub(rf"\b({MODEL}|HEADS)\b", rf"{tmp_path}/\1", json.dumps(description)))
    assert found == anchored
    settings = {name: value for name, value in found.items() if name != "drafter"}
    checked = method.checked(settings)
    assert {name: getattr(checked, name) for name in settings} == settings


@pytest.mark.parametrize("name", registry.PACKAGES)
def test_entries_of_packages_are_read_without_their_networks(name: str) -> None:
    """Nothing of theirs is imported at their top that needs torch."""
    entry = importlib.import_module(registry.REGISTRY[name])
    imported = {
        node.module
        for node in ast.parse(Path(str(entry.__file__)).read_text()).body
        if isinstance(node, ast.ImportFrom)
    }
    assert "torch" not in imported
    for module in imported - {None}:
        assert "torch" not in vars(sys.modules[str(module)]), module


# ---- nobody else spells it


@cache
def spelt(path: Path) -> set[str]:
    """A file's identifiers in small letters, and its strings as they are; documentation aside. A
    string with a capital in it is about a paper."""
    tree, words = ast.parse(path.read_text()), set()
    prose = {
        id(node.value)
        for body in ast.walk(tree)
        if isinstance(body, ast.Module | ast.ClassDef | ast.FunctionDef)
        for node in body.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.add(node.value)
        names = (getattr(node, key, None) for key in ("id", "name", "attr", "arg", "module"))
        words |= {str(name).lower() for name in names if name}
    return words


COMMON = {"block"}
"""Names that are words for other things too: a layer of a transformer, a piece of a file."""


def names(word: str, method: str) -> bool:
    """Whether a word of the code means this method."""
    return f"drafters.{method}" in word or word == f"{method}:" if method in COMMON else method in word


@pytest.mark.parametrize("name", registry.PACKAGES)
def test_no_other_file_spells_a_method(name: str) -> None:
    """A method that is a package: the names of the others are words too (small, none)."""
    own = Path(*registry.REGISTRY[name].split("."))
    strangers = [path for path in SOURCE.rglob("*.py") if not path.is_relative_to(SOURCE / own)]
    assert not {
        str(path): found for path in strangers if (found := [word for word in spelt(path) if names(word, name)])
    }
