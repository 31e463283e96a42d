"""Heads and what they have in common: architecture, trees, and decoding that says what the target
says, whatever the heads say.

Decoding is the same for all heads, so Hydra's kinds take part here too; what is Hydra's own is in test_hydra.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import forerun
from drafters.heading import (
    CONFIGS,
    HEADS,
    MEDUSA,
    PROMPTS,
    TREES,
    VOCAB,
    WIDTH,
    Say,
    Telling,
    ahead,
    all_knowing,
    cyclic,
    demand_cache_of_the_texts,
    drafter_of,
    engine_with,
    every_kernel,
    every_tree,
    future,
    greedy,
    heads_of,
    lively,
    needs_kernels,
    noise,
    on,
    pieces_of,
    slow_draft,
    slow_head,
    some_heads,
    telling,
)
from enumeration import Luck, distance, ideal_dice, law_of, one_law, plain_law
from fakes import TableNetwork, engine_of, plain
from forerun.chance import key_of
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa import network as medusa
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting import checkpoint
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context
from forerun.drafting.heads import HeadDrafter, HeadParts, LastState, TorchHeads, drafting, format_of
from forerun.drafting.trained import HeadSettings
from forerun.drafting.workshop import Workshop
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.nn.backends.native.transformer import pack
from forerun.nn.save import save_pretrained
from forerun.ranktree import PUBLISHED, RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree

every_kind = pytest.mark.parametrize("kind", CONFIGS)


# ---- architecture


@pytest.mark.parametrize("kind", MEDUSA)
def test_a_head_is_residual_blocks_and_a_projection(kind: str) -> None:
    """All at once, one alone, and as the plain matrices that the kernels get; what a Markov term adds is apart."""
    module, head, states = some_heads(kind), lively().head.weight, noise(7, WIDTH)
    if module.markov is not None:
        before = noise(7, HEADS, CONFIGS[kind].rank)
        more = torch.einsum("pkr,vr->kpv", before, module.markov.behind)
        torch.testing.assert_close(module.logits(states, before, head), module.unconditional(states, head) + more)
    logits = module.unconditional(states, head)
    for index, record in enumerate(module.weights(head)):
        nothing = [torch.zeros(CONFIGS[kind].rank)] * HEADS
        slow = torch.stack([slow_head(module, index, state, nothing, head) for state in states]).float()
        torch.testing.assert_close(logits[index], slow, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.head_logits(index, states.view(7, 1, -1), head)[:, 0], logits[index])
        assert record.through is None and record.vocabulary_bias is None
        u = states
        for weight, bias in ((record.first, record.first_bias), *record.blocks):
            u = u + F.silu(F.linear(u, weight, bias))
        torch.testing.assert_close(F.linear(u, record.vocabulary), logits[index])


def test_layers_are_independent_unless_tied() -> None:
    assert some_heads("medusa, deep").blocks.shape[0] == 3 and some_heads("medusa, tied").blocks.shape[0] == 1


@pytest.mark.parametrize(("width", "heads", "millions"), [(4096, 1, 147.85), (4096, 5, 739.26), (6656, 1, 257.3)])
def test_heads_have_as_many_parameters_as_the_published_ones(width: int, heads: int, millions: float) -> None:
    """The specification's table, for Vicuna 7B and 33B."""
    with torch.device("meta"):
        module = MedusaHeads(MedusaConfig(width, 32000, heads))
    count = sum(p.numel() for p in module.parameters())
    assert count == heads * (width * width + width + 32000 * width)
    assert count / 1e6 == pytest.approx(millions, rel=1e-4)


@pytest.mark.parametrize("places", [1, 5, 64])
@every_kind
def test_untrained_heads_say_what_the_target_says_bit_for_bit(kind: str, places: int) -> None:
    """Given the target's state; Hydra++'s have a random layer before them."""
    module, head = heads_of(CONFIGS[kind]), lively().head.weight
    module.initialise(head)
    states, embedded = noise(places, WIDTH), noise(places, HEADS, WIDTH)
    if module.markov is not None:
        embedded = torch.zeros(places, HEADS, CONFIGS[kind].rank)
    logits, said = module.logits(states, embedded, head), F.linear(states, head)
    if module.config.vocabulary == "shared":  # one product for all heads, whose rows are added up in another order
        torch.testing.assert_close(logits, said.expand(HEADS, -1, -1))
    else:
        assert (logits == said).all()


def test_the_vocabulary_is_copied_and_not_shared() -> None:
    module, head = MedusaHeads(CONFIGS["medusa"]).initialise(lively().head.weight), lively().head.weight.clone()
    with torch.no_grad():
        module.vocabulary[0] += 1
    assert (module.vocabulary[1] == head).all() and (lively().head.weight == head).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": 0}, "heads 0"),
        ({"layers": True}, "layers True"),
        ({"width": 2.0}, r"width 2\.0"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"vocabulary": "mine"}, "'mine'"),
        ({"dropout": 1.0}, "dropout of 1"),
    ],
    ids=str,
)
def test_a_shape_that_no_heads_can_have_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DrafterError, match=says):
        replace(CONFIGS["hydra"], **changes)
    if "dropout" not in changes:
        with pytest.raises(DrafterError, match=says):
            replace(CONFIGS["medusa"], **changes)


# ---- drafting


@pytest.mark.parametrize("kind", [kind for kind in MEDUSA if not CONFIGS[kind].rank])
@every_tree
@every_kernel
def test_a_node_is_the_token_of_its_rank_in_its_level(kind: str, tree: RankTree, kernels: str) -> None:
    module, network = some_heads(kind), on(lively(), kernels)
    contexts, roots = noise(3, WIDTH), [5, 0, VOCAB - 1]
    slow = [slow_draft(module, c, root, tree, lively()) for c, root in zip(contexts, roots, strict=True)]
    found = drafting(module, network, "auto").draft(contexts, roots, tree)
    assert [list(row) for row in found] == slow
    for row in found:
        by_rank: dict[tuple[int, int], int] = {}
        for path, token in zip(tree.nodes, row[1:], strict=True):
            assert by_rank.setdefault((len(path), path[-1]), token) == token, "the branch does not matter"


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_kernels)])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_among_equal_logits_the_lower_token_is_the_better(kind: str, kernels: str) -> None:
    """As the projection has it: or in bf16, where equals are common, it would promise something else."""
    found = drafting(heads_of(CONFIGS[kind]), on(lively(), kernels), "auto").draft(noise(1, WIDTH), [5], TREES["star"])
    assert [list(row) for row in found] == [[5, *range(9)]]


def proposing(tree: RankTree, limits: Sequence[int], prompts: Sequence[Sequence[int]]) -> TokenTree:
    """What a drafter proposes for rows that have so much room left, the first time."""
    model = Model(lively(), tree.size + 1)
    drafter = drafter_of(some_heads("medusa"), lively(), tree)
    rows = []
    for prompt, limit in zip(prompts, limits, strict=True):
        row = Row(list(prompt), len(prompt), SamplingParams(), 0, len(prompt) + limit)
        slot = model.admit(row.limit)
        rows.append(row)
        drafter.admit(row, model.prefill(row, slot, drafter.reads) or {})
    return drafter.propose(
        Context(rows, [drafter.max_nodes] * len(rows), [limit - 1 for limit in limits], torch.device("cpu"))
    )


@every_tree
def test_every_row_gets_as_much_of_the_tree_as_it_has_room_for(tree: RankTree) -> None:
    """One-token prompts, of which the target has read nothing, get nothing."""
    limits, prompts = [1, 2, 3, 4, 9, 9], [[1, 2], [1, 2], [3, 4, 5], [1, 2], [1, 2], [7]]
    found = proposing(tree, limits, prompts)
    (whole,) = proposing(tree, [9], [[1, 2]]).tokens
    for row, (limit, prompt) in enumerate(zip(limits, prompts, strict=True)):
        part = tree.within(limit - 1 if len(prompt) > 1 else 0, tree.size)
        assert found.sizes[row] == 1 + (part.size if part else 0)
        assert found.topology.depths_BN[row].max() <= limit - 1
        if part:
            assert found.topology.parents[row] == part.parents
        assert found.tokens[row][0] == prompt[-1]
        if prompt == [1, 2]:
            assert list(found.tokens[row]) == list(whole[: found.sizes[row]])
    assert found.is_deterministic


@every_tree
def test_no_more_is_proposed_than_the_budget_allows(tree: RankTree) -> None:
    drafter, model = drafter_of(some_heads("medusa"), lively(), tree), Model(lively(), 80)
    row = Row([1, 2, 3], 3, SamplingParams(), 0, 50)
    drafter.admit(row, model.prefill(row, model.admit(50), drafter.reads) or {})
    for budget in (0, 1, 5, 63, 99):
        found = drafter.propose(Context([row], [budget], [20], torch.device("cpu")))
        assert found.sizes == (1 + min(budget, tree.size),)


# ---- the tree in the target


@every_tree
@every_kernel
def test_a_tree_is_scored_as_each_of_its_paths_would_be_as_a_text(tree: RankTree, kernels: str) -> None:
    """Logits and states of every node, and the keys and values that keeping any path leaves behind."""
    network, text = on(lively(), kernels), [3, 1, 4, 1, 5]
    tokens = [5, *torch.randint(VOCAB, (tree.size,), generator=torch.Generator().manual_seed(2)).tolist()]
    proposal = TokenTree([tokens], tree.topology(1), torch.device("cpu"))
    row = Row(list(text), len(text), SamplingParams(), 0, 100)
    with torch.inference_mode():
        for leaf in sorted(set(range(tree.size + 1)) - set(tree.parents)):
            model = Model(network, tree.size + 1)
            model.prefill(row, model.admit(100))
            scores = model.score(proposal, [row], {2})
            path = proposal.topology.path(0, leaf)
            said = [*text, *(tokens[node] for node in path[1:])]
            states = lively().features(torch.tensor([said]))[0, len(text) - 1 :]
            torch.testing.assert_close(scores.hidden[2][0, path], states, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(scores.logits_BNV[0, path], lively().head(states), rtol=1e-4, atol=1e-4)
            model.keep([path])
            fresh = Model(network, 1)
            fresh.prefill(Row([*said, 0], len(said), SamplingParams(), 0, 100), fresh.admit(100))
            torch.testing.assert_close(model.cache.entries(0), fresh.cache.entries(0), rtol=1e-4, atol=1e-4)


# ---- decoding: heads of all kinds on a transformer


@every_kind
@every_tree
@every_kernel
def test_greedy_text_is_that_of_plain_decoding(kind: str, tree: RankTree, kernels: str) -> None:
    """Random heads; five rows, of which one has a prompt of one token, and which end at different times."""
    counts = [24, 30, 1, 7, 18]
    one = engine_with(some_heads(kind), on(lively(), kernels), tree, max_rows=4)
    outputs = one.generate(PROMPTS, [SamplingParams(max_new_tokens=count) for count in counts])
    for prompt, count, output in zip(PROMPTS, counts, outputs, strict=True):
        assert output.token_ids == greedy(lively(), prompt, count)
        assert output.stats.exact and output.stats.rule == "greedy match"


@every_kind
@every_kernel
def test_a_row_of_a_batch_is_what_it_is_alone(kind: str, kernels: str) -> None:
    """Greedy and sampled; together, coming one after another, and the only one."""
    network, tree = on(lively(), kernels), TREES["gaps"]
    wishes = [
        SamplingParams(max_new_tokens=20),
        SamplingParams(temperature=0.9, seed=1, max_new_tokens=14),
        SamplingParams(temperature=1.2, top_p=0.8, seed=2, max_new_tokens=9),
        SamplingParams(max_new_tokens=3),
        SamplingParams(temperature=1.0, top_k=4, repetition_penalty=1.2, seed=3, max_new_tokens=17),
    ]
    alone = [
        engine_with(some_heads(kind), network, tree).generate([prompt], wish)[0].token_ids
        for prompt, wish in zip(PROMPTS, wishes, strict=True)
    ]
    nothing = [
        Engine(network, plain_drafter()).generate([prompt], wish)[0].token_ids
        for prompt, wish in zip(PROMPTS, wishes, strict=True)
    ]
    assert alone == nothing, "a seed gives the same text with heads and without"
    for rows in (5, 2):
        one = engine_with(some_heads(kind), network, tree, max_rows=rows)
        assert [output.token_ids for output in one.generate(PROMPTS, wishes)] == alone


def plain_drafter() -> Any:
    from forerun.drafters.none import Nothing

    return Nothing()


@every_kind
@every_kernel
def test_rows_may_come_while_others_run_and_the_cache_is_that_of_the_text(kind: str, kernels: str) -> None:
    one = engine_with(some_heads(kind), on(lively(), kernels), TREES["gaps"], max_rows=3)
    outputs: dict[int, list[int]] = {}
    for pieces in pieces_of(one, PROMPTS, SamplingParams(max_new_tokens=12)):
        demand_cache_of_the_texts(one)
        outputs |= {piece.request: piece.output.token_ids for piece in pieces if piece.output}
    assert [outputs[number] for number in range(len(PROMPTS))] == [greedy(lively(), prompt, 12) for prompt in PROMPTS]


@every_kind
def test_rows_at_the_end_of_the_context_are_served(kind: str) -> None:
    """Two rows fill it, one goes on beside them with long steps; the tree is far larger than what is left."""
    network = lively()
    prompts = [[1] * 250, [2] * 254, [3] * 255, [1, 2, 3] * 60]
    outputs = engine_with(some_heads(kind), network, TREES["mc_sim"]).generate(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(network, prompt, 256 - len(prompt)) and output.finish_reason == "length"


@every_kind
def test_untrained_and_empty_heads_change_nothing(kind: str) -> None:
    """Untrained heads repeat the target, and all logits of empty ones are equal."""
    for module in (heads_of(CONFIGS[kind]).initialise(lively().head.weight), heads_of(CONFIGS[kind])):
        outputs = engine_with(module, lively(), TREES["dense"]).generate(PROMPTS, SamplingParams(max_new_tokens=20))
        assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 20) for prompt in PROMPTS]


def cycle(first: int, length: int = 2) -> list[int]:
    """The beginning of a cyclic text."""
    return [int(ahead(torch.tensor(first), steps, 16)) for steps in range(length)]


@every_kernel
@pytest.mark.parametrize(("name", "deep"), [("chain", 4), ("one", 1), ("dense", 3), ("mc_sim", 4)])
def test_heads_that_know_the_future_are_accepted_whole_at_every_step(kernels: str, name: str, deep: int) -> None:
    """Four of them give exactly five tokens per step."""
    one = engine_with(all_knowing(), on(cyclic(), kernels), TREES[name])
    prompts = [cycle(1), [9, *cycle(5)]]
    pieces = list(one.stream(prompts, SamplingParams(max_new_tokens=8 * (deep + 1))))
    assert [len(piece.token_ids) for piece in pieces] == [deep + 1] * 16
    for index, prompt in enumerate(prompts):
        said = [token for piece in pieces if piece.prompt_index == index for token in piece.token_ids]
        assert said == greedy(cyclic(), prompt, 8 * (deep + 1))


@every_kernel
@every_tree
def test_heads_that_are_always_wrong_cost_nothing_but_time(kernels: str, tree: RankTree) -> None:
    one = engine_with(all_knowing(wrong=1), on(cyclic(), kernels), tree)
    prompts = [cycle(1), [5]]
    outputs = one.generate(prompts, SamplingParams(max_new_tokens=20))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(cyclic(), prompt, 20)
        assert output.stats.accepted_tokens == 0 and output.stats.steps == 20


# ---- decoding: drafts that are told, on tables


def told_engine(target: TableNetwork, say: Say, tree: RankTree, **options: Any) -> Engine:
    return engine_of(target, telling(say, tree), **options)


def right_at(target: TableNetwork, right: int) -> Say:
    """The rank that is right at every level; all other ranks carry other tokens, each its own."""

    def say(row: Row, tree: RankTree) -> list[int]:
        said = future(target, row, tree.depth)
        return [(said[len(path) - 1] + path[-1] - right) % target.vocab_size for path in tree.nodes]

    return say


TABLE = TableNetwork(12, seed=3, order=12)


@pytest.mark.parametrize("right", [0, 1, 2, 3, 5, 11])
@every_tree
def test_every_step_goes_as_deep_as_the_tree_follows_the_text(tree: RankTree, right: int) -> None:
    """The right token may be at any rank; where the tree does not have it, one token is said."""
    deep = tree.followed([right] * tree.depth)
    one = told_engine(TABLE, right_at(TABLE, right), tree)
    pieces = list(one.stream([[1, 2], [3, 4, 5]], SamplingParams(max_new_tokens=6 * (deep + 1))))
    assert [len(piece.token_ids) for piece in pieces] == [deep + 1] * 12
    for index, prompt in enumerate(([1, 2], [3, 4, 5])):
        said = [token for piece in pieces if piece.prompt_index == index for token in piece.token_ids]
        assert said == plain(TABLE, prompt, 6 * (deep + 1))


class Favoured(TableNetwork):
    """Says token 0 most of the time."""

    def logits(self, prefix: Sequence[int]) -> Tensor:
        logits = super().logits(prefix).clone()
        logits[0] += 2.5
        return logits


@pytest.mark.parametrize("right", range(3))
@every_tree
def test_a_frequent_token_0_is_never_taken_for_padding(tree: RankTree, right: int) -> None:
    target = Favoured(12, seed=3, order=12)
    text = plain(target, [1, 2], 60)
    assert text.count(0) > 30
    prompts = [[1, 2], [4], [0, 0, 0]]
    outputs = told_engine(target, right_at(target, right), tree).generate(prompts, SamplingParams(max_new_tokens=60))
    assert [output.token_ids for output in outputs] == [plain(target, prompt, 60) for prompt in prompts]
    zeros = told_engine(target, lambda row, tree: [0] * tree.size, tree)
    assert zeros.generate([[1, 2]], SamplingParams(max_new_tokens=60))[0].token_ids == text


@pytest.mark.parametrize("name", ["mc_sim", "gaps", "lucky"])
def test_what_would_fit_after_a_shallow_leaf_is_not_accepted_unless_it_hangs_there(name: str) -> None:
    """The reference pads short rows with its last node (or with token 0) and may take that for an accepted token."""
    tree = RankTree([(0,), (1,), (0, 0), (0, 0, 0)]) if name == "lucky" else TREES[name]
    leaf = next(path for path in tree.nodes if all(other[: len(path)] != path for other in tree.nodes if other != path))
    deep = len(leaf)
    assert deep < tree.depth

    def say(row: Row, tree: RankTree) -> list[int]:
        """Right down to the leaf, wrong beside it, and below: everywhere the token that comes after the leaf."""
        text = future(TABLE, row, deep + 1)
        return [
            text[deep] if len(path) > deep else (text[len(path) - 1] + (path != leaf[: len(path)])) % 12
            for path in tree.nodes
        ]

    prompts, count = [[1, 2], [4, 4]], 12 * (deep + 1)
    one = told_engine(TABLE, say, tree)
    for piece in one.stream(prompts, SamplingParams(max_new_tokens=count)):
        assert piece.drafted == [True] * deep + [False]
    outputs = one.generate(prompts, SamplingParams(max_new_tokens=count))
    assert [output.token_ids for output in outputs] == [plain(TABLE, prompt, count) for prompt in prompts]


def test_the_context_is_the_state_at_the_last_token_that_the_target_has_read() -> None:
    """A table's state is its logits: greedily, the newest token is the best one of the row's own context."""
    seen = 0

    class Looking(LastState):
        def contexts(self) -> list[Tensor | None]:
            nonlocal seen
            for row, state in zip(one._running, super().contexts(), strict=True):
                if row.stats.new_tokens:
                    assert state is not None and int(state.argmax()) == row.row.tokens[-1]
                    seen += 1
                else:
                    assert (state is None) == (len(row.row.tokens) == 1)
            return super().contexts()

    drafter = telling(right_at(TABLE, 1), TREES["gaps"])
    one = engine_of(TABLE, Telling("told", replace(drafter.head, reader=Looking())), max_rows=3)
    prompts = [[1, 2, 3], [4], [7, 7, 7], [9, 3, 2, 2], [2], [1, 3]]
    for _ in pieces_of(one, prompts, SamplingParams(max_new_tokens=11)):
        pass
    assert seen > 20


# ---- how a text ends


@pytest.mark.parametrize("right", [0, 2])
@pytest.mark.parametrize("end", range(12))
def test_a_text_ends_at_its_end_token_wherever_in_a_step_that_is(right: int, end: int) -> None:
    prompts = [[1, 2], [4], [0, 0, 0], [5, 6]]
    outputs = told_engine(TABLE, right_at(TABLE, right), TREES["gaps"], eos=[end]).generate(
        prompts, SamplingParams(max_new_tokens=20)
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        text = plain(TABLE, prompt, 20)
        assert output.token_ids == (text[: text.index(end) + 1] if end in text else text)
        assert output.finish_reason == ("stop" if end in text else "length")


@pytest.mark.parametrize("count", range(1, 12))
def test_a_text_has_exactly_as_many_tokens_as_asked_for(count: int) -> None:
    one = told_engine(TABLE, right_at(TABLE, 0), TREES["chain"])
    (output,) = one.generate([[1, 2]], SamplingParams(max_new_tokens=count))
    assert output.token_ids == plain(TABLE, [1, 2], count) and output.stats.steps == math.ceil(count / 5)
    assert output.stats.accepted_tokens == count - output.stats.steps, "nothing is drafted that has no room"


@pytest.mark.parametrize("name", ["chain", "mc_sim"])
def test_a_context_may_be_filled_exactly(name: str) -> None:
    target = TableNetwork(12, seed=3, order=12, max_length=20)
    prompts = [[1] * length for length in (1, 2, 13, 16, 17, 18, 19)]
    outputs = told_engine(target, right_at(target, 0), TREES[name]).generate(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == plain(target, prompt, 20 - len(prompt)) and output.finish_reason == "length"


# ---- sampling


class Fixed(TableNetwork):
    """The same law everywhere; the last token has probability 0."""

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()


def engine_law(drafter: Callable[[], Any], target: TableNetwork, prompt: list[int], wishes: SamplingParams) -> Any:
    """The law of the engine's output: every row of a batch is another way for the dice to fall."""

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        one = engine_of(target, drafter(), max_rows=len(lucks))
        each = [replace(wishes, seed=seed) for seed in range(len(lucks))]
        with ideal_dice({key_of(seed): luck for seed, luck in enumerate(lucks)}):
            return [tuple(output.token_ids) for output in one.generate([prompt] * len(lucks), each)]

    return law_of(program, at_once=128)


def demand_law(drafter: Callable[[], Any], target: TableNetwork, prompt: list[int], wishes: SamplingParams) -> None:
    law = engine_law(drafter, target, prompt, wishes)
    right = plain_law(lambda said: one_law(target.logits([*prompt, *said]), wishes), wishes.max_new_tokens or 0)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9) and distance(law, right) < 1e-9


TOYS = {
    "two children": (RankTree([[0], [1], [0, 0], [0, 1], [0, 2]]), [0, 1, 3, 3, 3]),
    "one child": (RankTree([[0]]), [0]),
}
SAMPLED = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.7), SamplingParams(temperature=0.6)]
every_wish = pytest.mark.parametrize("wishes", SAMPLED, ids=["T=1", "top-p", "T=0.6"])


@pytest.mark.parametrize("toy", TOYS)
@every_wish
def test_the_toy_trees_that_the_references_sampling_gets_wrong(toy: str, wishes: SamplingParams) -> None:
    """It would say the first token with probability .92 and .75 instead of .5 (medusa.md, section 4.3)."""
    tree, tokens = TOYS[toy]
    for count in (2, 3):
        wish = replace(wishes, max_new_tokens=count)
        demand_law(lambda: telling(lambda row, part: tokens[: part.size], tree), Fixed(4), [1, 0], wish)


def test_real_dice_on_a_toy_tree_follow_the_law() -> None:
    """The seed is fixed, and so is the outcome: the first tokens of 2,000 samples."""
    tree, tokens = TOYS["two children"]
    one = engine_of(Fixed(4), telling(lambda row, part: tokens[: part.size], tree), max_rows=200)
    outputs = one.generate([[1, 0]], SamplingParams(temperature=1.0, max_new_tokens=3, n=2000, seed=5))
    for place in range(3):
        counts = Counter(output.token_ids[place] for output in outputs)
        assert counts[3] == 0
        assert stats.chisquare([counts[t] for t in range(3)], [1000, 600, 400]).pvalue > 1e-3


def table_heads(kind: str, tree: RankTree, vocab: int = 3) -> HeadDrafter:
    """Random heads whose context is a table's state: the logits after the last token read."""
    changes = {"width": vocab, "vocab_size": vocab, "heads": 3}
    module = heads_of(replace(CONFIGS[kind], **changes)).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    weights = torch.randn(2, vocab, vocab, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return HeadDrafter("heads", HeadParts(TorchHeads(module, *weights), LastState(), tree, 1))


LEARNT = ["medusa", "medusa, deep", "medusa, shared", "hydra", "hydra, deep"]
AT_ONE, FILTERED, COLD = SAMPLED


@pytest.mark.parametrize(
    ("kind", "wishes"),
    [*((kind, wish) for kind in LEARNT for wish in (AT_ONE, FILTERED)), ("medusa", COLD), ("hydra", COLD)],
)
def test_the_law_of_the_output_is_that_of_plain_sampling(kind: str, wishes: SamplingParams) -> None:
    """Heads of a vocabulary of three, whose drafts depend on the text through the state; every
    outcome is enumerated."""
    target, tree = TableNetwork(3, seed=3, order=2, sharpness=1.0), RankTree([[0], [1], [0, 0], [1, 2], [1, 2, 0]])
    demand_law(lambda: table_heads(kind, tree), target, [1, 0, 1], replace(wishes, max_new_tokens=4))


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_new_tokens=30)
    texts = [
        engine_with(some_heads("medusa"), lively(), TREES["mc_sim"]).generate([[1, 2]], wish)[0].token_ids
        for wish in (params, params, replace(params, seed=8))
    ]
    assert texts[0] == texts[1] != texts[2]


# ---- interruptions


def interrupting(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The same, but the user gets impatient when it has been called so often."""
    left = at

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        found, left = function(*args, **kwargs), left - 1
        if left == -1:
            raise KeyboardInterrupt
        return found

    return called


@pytest.mark.parametrize("place", ["draft", "admit", "observe"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("kind", ["medusa", "hydra++"])
def test_an_interrupted_engine_returns_what_the_target_said_and_goes_on(
    kind: str, place: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine_with(some_heads(kind), lively(), TREES["gaps"], max_rows=3)
    assert isinstance(one.drafter, HeadDrafter)
    part = one.drafter.head.drafting if place == "draft" else one.drafter.head.reader
    monkeypatch.setattr(part, place, interrupting(getattr(part, place), at))
    for output in one.generate(PROMPTS, SamplingParams(max_new_tokens=20)):
        assert output.token_ids == greedy(lively(), PROMPTS[output.prompt_index], 20)[: len(output.token_ids)]
    assert one.is_idle and one.target.cache.rows == 0
    again = one.generate(PROMPTS[:3], SamplingParams(max_new_tokens=12))
    assert [output.token_ids for output in again] == [greedy(lively(), prompt, 12) for prompt in PROMPTS[:3]]


def test_a_row_that_cannot_be_admitted_leaves_an_engine_that_goes_on() -> None:
    """Out of memory, say, within the drafter or before it has begun."""
    for kind in ("medusa", "hydra++"):
        one = engine_with(some_heads(kind), lively(), TREES["gaps"], max_rows=3)
        assert isinstance(one.drafter, HeadDrafter)
        reader, admit = one.drafter.head.reader, one.drafter.head.reader.admit

        def failing(*args: Any) -> None:
            raise MemoryError("no room")

        reader.admit = failing  # type: ignore[method-assign]
        with pytest.raises(MemoryError, match="no room"):
            one.generate(PROMPTS[:2], SamplingParams(max_new_tokens=5))
        reader.admit = admit  # type: ignore[method-assign]
        assert one.is_idle and one.target.cache.rows == 0
        outputs = one.generate(PROMPTS[:3], SamplingParams(max_new_tokens=12))
        assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 12) for prompt in PROMPTS[:3]]


# ---- from a checkpoint


def written(folder: Path, kind: str, **architecture: Any) -> str:
    config = replace(CONFIGS[kind], **architecture)
    module = some_heads(kind) if not architecture else heads_of(config)
    checkpoint.write(
        module, config, Checkpoint(folder, kind.split("+")[0].split(",")[0], {}, "lively", {}), torch.float32
    )
    return str(folder)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_pretrained(lively(), folder, dtype=torch.float32)
    return folder


@every_kind
@every_kernel
def test_heads_decode_from_their_folder(kind: str, kernels: str, tmp_path: Path, target_folder: Path) -> None:
    name = kind.split("+")[0].split(",")[0]
    description = {"drafter": name, "checkpoint": written(tmp_path / "heads", kind), "tree": "mc_sim_7b_63"}
    engine = forerun.load(target_folder, description, dtype="fp32", kernels=kernels)
    wishes = SamplingParams(max_new_tokens=20)
    outputs = engine.generate(PROMPTS, wishes)
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 20) for prompt in PROMPTS]
    assert engine.drafter.name == ("hydra++" if kind == "hydra++" else name)
    straight = engine_with(some_heads(kind), on(lively(), kernels), TREES["mc_sim"]).generate(PROMPTS, wishes)
    assert [output.stats.steps for output in outputs] == [output.stats.steps for output in straight]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]], "5 deep .* has 4 heads"),
        ([[0, 0]], "without"),
        ([], "no paths"),
        ("mc_sim", "no tree mc_sim"),
        (7, "holds no tree"),
        ([0, 1], "holds no tree"),
        ([[0], [VOCAB]], "rank"),
    ],
    ids=str,
)
def test_a_tree_that_cannot_be_grown_is_refused_before_anything_runs(tree: Any, says: str, tmp_path: Path) -> None:
    workshop = Workshop(Model(lively(), 1), {}.__getitem__)
    with pytest.raises(DrafterError, match=says) as caught:
        medusa.build(workshop, HeadSettings(written(tmp_path / "heads", "medusa"), tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tree_can_be_asked_for_by_name(name: str, tmp_path: Path) -> None:
    workshop = Workshop(Model(lively(), 1), {}.__getitem__)
    drafter = medusa.build(workshop, HeadSettings(written(tmp_path / "heads", "medusa"), name))
    assert drafter.max_nodes == 63
    outputs = Engine(lively(), drafter).generate(PROMPTS, SamplingParams(max_new_tokens=10))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 10) for prompt in PROMPTS]


@needs_kernels
def test_heads_are_int8_beside_a_target_in_bf16_and_nowhere_else_unless_asked() -> None:
    half, full = pack(deepcopy(lively()).bfloat16()), pack(lively())
    expected = {("auto", half): torch.int8, ("auto", full): torch.float32, ("target", half): torch.bfloat16}
    expected |= {("int8", full): torch.int8, ("auto", lively()): torch.float32}
    for (weights, network), kind in expected.items():
        assert format_of(network, weights) == kind
    with pytest.raises(DrafterError, match="native kernels"):
        format_of(lively(), "int8")


def test_weights_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    workshop = Workshop(Model(lively(), 1), {}.__getitem__)
    with pytest.raises(DrafterError, match="int4"):
        medusa.build(workshop, HeadSettings(written(tmp_path / "heads", "medusa"), weights="int4"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(sorted(CONFIGS)), st.sampled_from(sorted(TREES)))
def test_any_heads_on_any_target_change_nothing(seed: int, kind: str, tree: str) -> None:
    network = lively(seed % 7)
    one = engine_with(some_heads(kind, seed), network, TREES[tree], max_rows=3)
    outputs = one.generate(PROMPTS, SamplingParams(max_new_tokens=8 + seed % 5))
    assert [output.token_ids for output in outputs] == [greedy(network, p, 8 + seed % 5) for p in PROMPTS]
