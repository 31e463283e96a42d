"""Hydra and Hydra++: heads that see the tokens before theirs, trees grown branch by branch, and the
layer over verified tokens.

How they decode is in test_medusa.py, together with all other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from drafters.heading import (
    CONFIGS,
    HEADS,
    HYDRA,
    PREFIX,
    PROMPTS,
    TREES,
    VOCAB,
    WIDTH,
    Telling,
    Told,
    Watching,
    ahead,
    cyclic,
    demand_cache_of_the_texts,
    drafter_of,
    engine_with,
    every_kernel,
    every_tree,
    filled,
    greedy,
    heads_of,
    lively,
    noise,
    on,
    pieces_of,
    relative,
    slow_draft,
    slow_head,
    some_heads,
)
from enumeration import distance, one_law, plain_law
from fakes import TableNetwork
from forerun.accept.exact import Verdict
from forerun.drafters.cascade import Cascade, Part
from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra.network import HydraHeads, reader
from forerun.drafters.maxgram import MaxGram, Successors
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafters.verified import Verified
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain
from forerun.drafting.heads import HeadChain, HeadParts, HeadsModule, LastState, PrefixState, TorchHeads, drafting
from forerun.drafting.stopping import Acceptance
from forerun.drafting.trained import LayerConfig
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import DrafterError, TrainingError
from forerun.model import Model, Scores
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.network import Network
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.train.answers import Batch
from forerun.train.distill import Sample
from forerun.train.objectives.acceptance import Drafts
from test_engine import engine_law

every_hydra = pytest.mark.parametrize("kind", HYDRA)


# ---- architecture


@every_hydra
def test_a_head_reads_the_context_and_the_tokens_before_its_own(kind: str) -> None:
    """All at once, one alone, and as the plain matrices that the kernels get."""
    module, head = some_heads(kind), lively().head.weight
    states, embedded = noise(7, WIDTH), noise(7, HEADS, WIDTH)
    logits = module.logits(states, embedded, head)
    for index, record in enumerate(module.weights(head)):
        z = torch.cat((states, embedded[:, : index + 1].flatten(1)), 1)
        assert record.first.shape == (WIDTH, (index + 2) * WIDTH) == record.through.shape
        slow = torch.stack([slow_head(module, index, s, list(e), head) for s, e in zip(states, embedded, strict=True)])
        torch.testing.assert_close(logits[index], slow.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.head_logits(index, z.view(7, 1, -1), head)[:, 0], logits[index])
        y = F.linear(z, record.through, record.through_bias) + F.silu(F.linear(z, record.first, record.first_bias))
        assert len(record.blocks) == CONFIGS[kind].layers - 1
        for weight, bias in record.blocks:
            y = y + F.silu(F.linear(y, weight, bias))
        torch.testing.assert_close(F.linear(y, record.vocabulary, record.vocabulary_bias), logits[index])
        if index < HEADS - 1:
            later = embedded.clone()
            later[:, index + 1 :] = 7.0
            assert (module.logits(states, later, head)[index] == logits[index]).all(), "it does not see its own token"


@pytest.mark.parametrize(
    ("width", "mlp", "heads", "blocks", "vocabularies", "prefix"),
    [
        (4096, 11008, 32, 536.9, 524.4, 202.4),
        (5120, 13824, 40, 838.9, 655.5, 317.2),
        (6656, 17920, 52, 1417.8, 852.1, 535.0),
    ],
    ids=["7B", "13B", "33B"],
)
def test_heads_have_as_many_parameters_as_the_published_ones(
    width: int, mlp: int, heads: int, blocks: float, vocabularies: float, prefix: float
) -> None:
    """Millions, from hydra.md section 2.4; untied, two more blocks of every head would be there."""
    layer = LayerConfig(heads, heads, width // heads, mlp, 2048)
    with torch.device("meta"):
        tied, untied = (
            HydraHeads(HydraConfig(width, 32000, 4, 4, tied_layers=tied, prefix=layer)) for tied in (True, False)
        )
    counts = dict.fromkeys(("blocks", "vocabularies", "prefix"), 0)
    for name, p in tied.named_parameters():
        part = "prefix" if name.startswith("prefix.") else "vocabularies" if "vocabulary" in name else "blocks"
        counts[part] += p.numel()
    assert [count / 1e6 for count in counts.values()] == pytest.approx([blocks, vocabularies, prefix], abs=0.06)
    more = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert more == 4 * 2 * (width * width + width)


def test_tied_blocks_are_one_block_and_untied_ones_are_not() -> None:
    module, head = some_heads("hydra++"), lively().head.weight
    assert module.blocks.shape[0] == 1 and some_heads("hydra, deep").blocks.shape[0] == 2
    first, second, third = module.weights(head)[2].blocks
    assert first[0].data_ptr() == second[0].data_ptr() == third[0].data_ptr()
    one, two = some_heads("hydra, deep").weights(head)[2].blocks
    assert not torch.equal(one[0], two[0])
    assert some_heads("hydra").blocks is None and not some_heads("hydra").weights(head)[0].blocks


def test_dropout_acts_in_training_alone() -> None:
    config = replace(CONFIGS["hydra"], dropout=0.5)
    module, head = filled(heads_of(config)), lively().head.weight
    states, embedded = noise(7, WIDTH), noise(7, HEADS, WIDTH)
    expected = some_heads("hydra").logits(states, embedded, head)
    assert (module.eval().logits(states, embedded, head) == expected).all()
    assert (module.train().logits(states, embedded, head) != expected).any()


def blind(module: HydraHeads) -> HydraHeads:
    """Zeros in every column that multiplies an embedding."""
    with torch.no_grad():
        for matrix in (*module.first, *module.through):
            matrix[:, WIDTH:] = 0
    return module


@every_tree
@every_kernel
def test_heads_without_embedding_columns_are_independent_heads(tree: RankTree, kernels: str) -> None:
    """The same tree as Medusa's way of drafting gives: one ranking per level, whatever the branch."""
    module, contexts, roots = blind(some_heads("hydra, deep")), noise(3, WIDTH), [5, 0, 7]

    class Independent(HeadsModule):
        def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
            return module.logits(context_PD, torch.zeros(len(context_PD), HEADS, WIDTH), head_VD)

    found = drafting(module, on(lively(), kernels), "auto").draft(contexts, roots, tree)
    expected = drafting(Independent(), lively(), "auto").draft(contexts, roots, tree)
    assert [list(row) for row in found] == expected


def bigrams(newest: bool = True) -> tuple[HydraHeads, Tensor]:
    """Heads whose R selects one embedding alone, and the table of logits by token."""
    config = HydraConfig(WIDTH, VOCAB, HEADS)
    module, table = HydraHeads(config), torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        for index, matrix in enumerate(module.through):
            place = index + 1 if newest else 1
            matrix[:, place * WIDTH : (place + 1) * WIDTH] = torch.eye(WIDTH)
        module.vocabulary.copy_(table.expand_as(module.vocabulary))
    return module, lively().embedding.weight @ table.T


@every_tree
@every_kernel
def test_heads_that_select_the_newest_embedding_follow_bigrams(tree: RankTree, kernels: str) -> None:
    """The columns are the context's, then those of the embeddings, the newest last."""
    module, table = bigrams()
    found = drafting(module, on(lively(), kernels), "auto").draft(noise(2, WIDTH), [5, 11], tree)
    order = table.argsort(-1, descending=True)
    for tokens in found:
        for node, path in enumerate(tree.nodes, 1):
            assert tokens[node] == order[tokens[tree.parents[node]], path[-1]]


def test_heads_that_select_the_root_do_not_see_the_branch() -> None:
    module, table = bigrams(newest=False)
    (tokens,) = drafting(module, lively(), "auto").draft(noise(1, WIDTH), [5], TREES["dense"])
    order = table.argsort(-1, descending=True)[5]
    assert tokens[1:] == [int(order[path[-1]]) for path in TREES["dense"].nodes]


def test_the_order_of_the_embeddings_matters() -> None:
    module, z = some_heads("hydra"), noise(1, 4 * WIDTH)
    swapped = torch.cat((z[:, :WIDTH], z[:, 2 * WIDTH : 3 * WIDTH], z[:, WIDTH : 2 * WIDTH], z[:, 3 * WIDTH :]), 1)
    head = lively().head.weight
    assert (module.head_logits(2, z, head) - module.head_logits(2, swapped, head)).abs().max() > 0.1


# ---- drafting


def faint(rows: int, seed: int = 0) -> Tensor:
    """Contexts as small as embeddings: branches differ."""
    return noise(rows, WIDTH, seed=seed) * 0.3


@every_hydra
@every_tree
@every_kernel
def test_growing_level_by_level_is_walking_every_path_by_itself(kind: str, tree: RankTree, kernels: str) -> None:
    """Trees with gaps in their ranks too, which the reference cannot grow: it takes the first n of every parent."""
    module, contexts, roots = some_heads(kind), faint(3), [5, 0, VOCAB - 1]
    found = drafting(module, on(lively(), kernels), "auto").draft(contexts, roots, tree)
    slow = [slow_draft(module, c, root, tree, lively()) for c, root in zip(contexts, roots, strict=True)]
    assert [list(row) for row in found] == slow


@st.composite
def some_trees(draw: st.DrawFn) -> RankTree:
    paths: list[tuple[int, ...]] = [(draw(st.integers(0, 5)),)]
    for _ in range(draw(st.integers(0, 14))):
        path = (*draw(st.sampled_from([(), *paths])), draw(st.integers(0, 5)))
        if path not in paths and len(path) <= HEADS:
            paths.append(path)
    return RankTree(paths)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(some_trees(), st.sampled_from(sorted(CONFIGS)), st.integers(0, 100))
def test_any_tree_is_grown_as_its_paths_are_walked(tree: RankTree, kind: str, seed: int) -> None:
    module, contexts = some_heads(kind, seed), faint(2, seed)
    found = drafting(module, lively(), "auto").draft(contexts, [seed % VOCAB, 3], tree)
    slow = [slow_draft(module, c, r, tree, lively()) for c, r in zip(contexts, (seed % VOCAB, 3), strict=True)]
    assert found == slow


def test_equal_ranks_of_different_branches_are_different_tokens() -> None:
    (tokens,) = drafting(some_heads("hydra"), lively(), "auto").draft(faint(1), [5], TREES["mc_sim"])
    second = {path: tokens[node] for node, path in enumerate(TREES["mc_sim"].nodes, 1) if len(path) == 2}
    assert len({token for path, token in second.items() if path[1] == 0}) > 2


# ---- decoding


def knowing(vocab: int = 16) -> HydraHeads:
    """Heads that are right about a cyclic text from the newest embedding alone."""
    module = HydraHeads(HydraConfig(vocab, vocab, HEADS))
    with torch.no_grad():
        for index, matrix in enumerate(module.through):
            matrix[:, (index + 1) * vocab :] = torch.eye(vocab)
        following = torch.eye(vocab)[ahead(torch.arange(vocab), 1, vocab)].T
        module.vocabulary.copy_(following.expand_as(module.vocabulary))
    return module


@every_kernel
@pytest.mark.parametrize(("name", "deep"), [("chain", 4), ("one", 1), ("dense", 3), ("mc_sim", 4)])
def test_heads_that_know_the_future_are_accepted_whole_at_every_step(kernels: str, name: str, deep: int) -> None:
    """Four of them give exactly five tokens per step; the prompt need not be cyclic, for they see the root."""
    one = engine_with(knowing(), on(cyclic(), kernels), TREES[name])
    outputs = one.generate([[1, 2], [5, 9, 3]], SamplingParams(max_new_tokens=8 * (deep + 1)))
    for prompt, output in zip(([1, 2], [5, 9, 3]), outputs, strict=True):
        assert output.token_ids == greedy(cyclic(), prompt, 8 * (deep + 1))
        assert output.stats.steps == 8 and output.stats.accepted == deep


# ---- the layer over verified tokens


def whole(module: HydraHeads, network: Network, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the layer says of a text read at once, [S, D], and the keys and values that it leaves."""
    states = lively().features(torch.tensor([list(tokens)]))
    cache = Cache(module.prefix.cache_shape, torch.float32, torch.device("cpu"))
    cache.reserve(1, len(tokens))
    cache.admit()
    where = np.arange(len(tokens))[None]
    feed = Feed(torch.zeros(1, len(tokens), dtype=torch.int64), np.zeros(1, np.int64), where, states_BND=states)
    with torch.inference_mode():
        read = module.prefix.forward(feed, cache, (1,)).hidden[1]
    cache.lengths[0] = len(tokens)
    torch.testing.assert_close(read[0], module.contexts(states)[0], rtol=1e-4, atol=1e-4)
    return read[0], cache.entries(0)


def demand_contexts_of_the_texts(one: Engine, module: HydraHeads) -> None:
    """Every running row's context is what the layer says of its whole verified text, and its cache
    holds that text alone."""
    found = one.drafter.head.reader
    assert isinstance(found, PrefixState)
    contexts = found.contexts()
    assert len(contexts) == found.model.cache.rows == len(one._running)
    for slot, request in enumerate(one._running):
        verified = request.row.tokens[:-1]
        assert found.model.cache.lengths[slot] == len(verified)
        if not verified:
            assert contexts[slot] is None
            continue
        read, entries = whole(module, lively(), verified)
        torch.testing.assert_close(contexts[slot], read[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.model.cache.entries(slot), entries, rtol=1e-4, atol=1e-4)


def known(prompt: Sequence[int], count: int) -> list[int]:
    """What the target will say, and something behind the end of the context."""
    return [*greedy(lively(), prompt, min(count, 256 - len(prompt))), *[0] * HEADS]


def partly_right(tokens: Sequence[int], tree: RankTree, prompts: Sequence[Sequence[int]], count: int) -> list[int]:
    """Right down to a depth that changes from step to step, then wrong."""
    prompt = next(p for p in prompts if list(tokens[: len(p)]) == list(p))
    text = known(prompt, count)[len(tokens) - len(prompt) :]
    deep = (len(tokens) * 7 + len(prompt)) % (tree.depth + 1)
    return [(text[len(p) - 1] + (p[-1] or len(p) > deep) + p[-1]) % VOCAB for p in tree.nodes]


def prefix_engine(module: HydraHeads, kernels: str, prompts: Sequence[Sequence[int]], count: int, rows: int) -> Engine:
    """The real layer, and drafts of which now more, now less is accepted."""
    network = on(lively(), kernels)
    told = Told(lambda row, tree: partly_right(row.tokens, tree, prompts, count))
    parts = HeadParts(told, reader(module, network), RankTree([[0], [1], [0, 0], [0, 0, 0], [0, 0, 0, 0]]), 2)
    return Engine(network, Telling("told", parts), max_rows=rows)


@every_kernel
def test_the_layer_read_piece_by_piece_says_what_it_says_of_the_whole_text(kernels: str) -> None:
    """Rows come and go, and every step accepts another number of tokens."""
    module, prompts, count = some_heads("hydra++"), [*PROMPTS, [8, 8], [20, 21]], 30
    one = prefix_engine(module, kernels, prompts, count, rows=3)
    grown: set[int] = set()
    before: dict[int, int] = {}
    texts: dict[int, list[int]] = {}
    for pieces in pieces_of(one, prompts, SamplingParams(max_new_tokens=count)):
        texts |= {piece.request: piece.output.token_ids for piece in pieces if piece.output}
        demand_contexts_of_the_texts(one, module)
        demand_cache_of_the_texts(one)
        lengths = {request.number: len(request.row.tokens) for request in one._running}
        grown |= {length - before[number] for number, length in lengths.items() if number in before}
        before = lengths
    assert grown == {1, 2, 3, 4, 5}
    assert [texts[number] for number in range(len(prompts))] == [greedy(lively(), prompt, count) for prompt in prompts]


@every_kernel
def test_a_long_prompt_is_read_by_the_layer_in_chunks(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forerun.drafting.heads.CHUNK", 7)
    module, prompts = some_heads("hydra++"), [[3, 1, 4, 1, 5] * 8, [2, 7] * 7]
    one = prefix_engine(module, kernels, prompts, 12, rows=3)
    for _ in pieces_of(one, prompts, SamplingParams(max_new_tokens=12)):
        demand_contexts_of_the_texts(one, module)


@every_kernel
@pytest.mark.parametrize("count", [30, None], ids=["limit", "context"])
def test_a_row_near_its_end_is_read_beside_one_that_takes_long_steps(kernels: str, count: int | None) -> None:
    """Rows are padded to the longest of the batch, and the last row has no room for that."""
    module = some_heads("hydra++")
    prompts = [[1, 2, 3], [12, 3] * 15, [5]] if count else [[9, 9] * 110, [7, 3] * 123, [11, 1] * 124]
    most = count or 256 - min(map(len, prompts))
    one = prefix_engine(module, kernels, prompts, most, rows=3)
    told = one.drafter.head.drafting

    def right_for_all_but_one(row: Row, tree: RankTree) -> list[int]:
        prompt = next(p for p in prompts if row.tokens[: len(p)] == p)
        text = known(prompt, most)[len(row.tokens) - len(prompt) :]
        wrong = prompt is prompts[1]
        return [(text[len(p) - 1] + wrong + p[-1]) % VOCAB for p in tree.nodes]

    told._say = right_for_all_but_one
    wishes = [SamplingParams(max_new_tokens=count and count - at) for at in (0, 27, 3)]
    outputs = one.generate(prompts, wishes)
    for prompt, wish, output in zip(prompts, wishes, outputs, strict=True):
        room = min(256 - len(prompt), wish.max_new_tokens or 256)
        assert output.token_ids == known(prompt, most)[:room]


@pytest.mark.parametrize("at", range(8))
def test_an_engine_that_is_interrupted_within_the_layer_goes_on(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine_with(some_heads("hydra++"), lively(), TREES["gaps"], max_rows=3)
    found = one.drafter.head.reader
    assert isinstance(found, PrefixState)
    forward, left = found.model.network.forward, at

    def interrupted(*args: object) -> object:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(found.model.network, "forward", interrupted)
    for output in one.generate(PROMPTS, SamplingParams(max_new_tokens=20)):
        assert output.token_ids == greedy(lively(), PROMPTS[output.prompt_index], 20)[: len(output.token_ids)]
    assert one.is_idle and one.target.cache.rows == 0 == found.model.cache.rows
    again = one.generate(PROMPTS[:3], SamplingParams(max_new_tokens=12))
    assert [output.token_ids for output in again] == [greedy(lively(), prompt, 12) for prompt in PROMPTS[:3]]


def test_the_layer_is_shaped_as_its_config_says_and_reads_states_alone() -> None:
    config = PREFIX.transformer(WIDTH)
    assert (config.vocab_size, config.layers, config.width) == (0, 1, WIDTH)
    assert HydraConfig(WIDTH, VOCAB, prefix=dict(vars(PREFIX))).prefix == PREFIX  # type: ignore[arg-type]
    assert not any("embedding" in name for name, _ in some_heads("hydra++").named_parameters())
    assert isinstance(heads_of(MedusaConfig(WIDTH, VOCAB)), MedusaHeads)


# ---- below a verified model

CROWD = [[1, 2, 3], [4], [7, 7, 7, 7, 7], [9, 30, 2, 2, 11, 25, 0, 6, 19, 5, 5, 5, 8], [12, 3], [20]]
every_reader = pytest.mark.parametrize("kind", ["hydra", "hydra++"])


def crowded(inner: Watching, over: Drafter, temperature: float = 0.0) -> Engine:
    """Rows of different lengths come and go beside one another; the texts are right, and the heads
    both spoke and waited."""
    one = Engine(lively(), over, max_rows=3)
    wishes = [SamplingParams(temperature=temperature, seed=n, max_new_tokens=4 + 7 * n) for n in range(len(CROWD))]
    outputs = one.generate(CROWD, wishes)
    if not temperature:
        for prompt, wish, output in zip(CROWD, wishes, outputs, strict=True):
            assert output.token_ids == greedy(lively(), prompt, wish.max_new_tokens)
    assert inner.spoken > 30
    assert one.target.cache.rows == inner.model.cache.rows == len(inner.head.reader.contexts()) == 0
    return one


@every_kernel
@every_reader
@pytest.mark.parametrize(("length", "strength"), [(1, 0.1), (4, 0.1), (4, 0.0), (9, 3.0)])
def test_heads_below_a_verified_model_draft_as_if_they_had_read_the_text_at_once(
    kind: str, kernels: str, length: int, strength: float
) -> None:
    """Also where the level above accepts everything, so that the last token's state is not known
    until the next pass, and where it accepts next to nothing, so that states are taken back at
    every step."""
    inner = Watching(some_heads(kind), relative(0, strength), kernels)
    over = Verified(inner.model, inner, length)
    crowded(inner, over)
    accepted, tally = sum(over.tallies()[0].accepted), over.tallies()[0]
    assert inner.silent > 0
    if strength == 0:
        assert accepted == tally.drafted
    elif strength == 3:
        assert accepted < 0.1 * tally.drafted
    else:
        assert 0.1 * tally.drafted < accepted < tally.drafted


@every_reader
def test_heads_below_a_verified_model_know_the_prompt_from_the_first_step_on(kind: str) -> None:
    inner = Watching(some_heads(kind), relative(0, 0.1), "torch")
    over = Verified(inner.model, inner, 3)
    row = Row([1, 2, 3] * 8, 24, SamplingParams(), key=0, limit=90)
    over.admit(row, {})
    assert inner.head.reader.known(0) == 23
    over.propose(Context([row], [9], [9], torch.device("cpu")))
    assert inner.silent == 0


@every_reader
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_heads_at_the_bottom_of_three_models(kind: str, temperature: float) -> None:
    inner = Watching(some_heads(kind), relative(0, 0.3), "torch")
    lower = Verified(inner.model, inner, 2)
    over = Verified(Model(relative(1, 0.1), lower.max_nodes + 1), lower, 5)
    assert not over.reads and not lower.reads and inner.reads == {2}
    crowded(inner, over, temperature)


@every_reader
def test_a_verified_model_that_is_asked_again_and_again_reads_no_token_twice(kind: str) -> None:
    """In a cascade it is asked anew without a word from above, and rows that have said enough stand
    still beside others."""
    inner = Watching(some_heads(kind), relative(0, 0.2), "torch")
    over = Cascade([Part(Verified(inner.model, inner, 3), 8), Part(MaxGram(4, Successors()), 10)])
    crowded(inner, over)


@every_kernel
def test_rows_that_stand_still_for_long_do_not_fill_the_layers_memory(kernels: str) -> None:
    """A row with no room left waits while another makes forty rounds: its newest token is not read again each time."""
    inner = Watching(some_heads("hydra++"), relative(0, 0.0), kernels)
    over = Verified(inner.model, inner, 150)
    reader = inner.head.reader
    assert isinstance(reader, PrefixState)
    one = Engine(lively(), over)
    wishes = [SamplingParams(max_new_tokens=count) for count in (3, 180)]
    outputs = one.generate([[5, 6, 7] * 60, [1, 2]], wishes)
    for prompt, wish, output in zip([[5, 6, 7] * 60, [1, 2]], wishes, outputs, strict=True):
        assert output.token_ids == greedy(lively(), prompt, wish.max_new_tokens)
    assert over.tallies()[0].asked > 40


@every_reader
def test_heads_whose_memory_was_taken_back_whole_wait_for_the_next_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level above takes back more than is remembered: nothing is known then, and nothing is drafted."""
    monkeypatch.setattr("forerun.drafting.heads.REMEMBERED", 2)
    module = some_heads(kind)
    heads = drafter_of(module, relative(0, 3.0), TREES["chain"])
    over = Verified(Model(relative(0, 3.0), heads.max_nodes + 1), heads, 12)
    one = Engine(lively(), over)
    (output,) = one.generate([[1, 2, 3]], SamplingParams(max_new_tokens=40))
    assert output.token_ids == greedy(lively(), [1, 2, 3], 40)


@every_reader
@pytest.mark.parametrize("slots", [(0, 1), (2, 0), (1, 1), (0, 0)], ids=str)
def test_rows_that_leave_take_their_states_along(kind: str, slots: tuple[int, int]) -> None:
    """Three rows at different places in their texts; two leave, one comes, and all go on."""
    inner = Watching(some_heads(kind), relative(0, 0.2), "torch")
    over = Verified(inner.model, inner, 3)
    rows = [Row(list(prompt), len(prompt), SamplingParams(), key=n, limit=200) for n, prompt in enumerate(CROWD[2:])]
    for row in rows[:3]:
        over.admit(row, {})
    live = rows[:3]

    def go_on() -> None:
        """The level above keeps another number of tokens of every row, and adds one of its own."""
        for step in range(4):
            context = Context(live, [99] * len(live), [20 - len(row.tokens) % 3 for row in live], torch.device("cpu"))
            tree = over.propose(context)
            kept = [list(range(1 + (step + n) % size)) for n, size in enumerate(tree.sizes)]
            verdict = Verdict(kept, [step] * len(live), [False] * len(live))
            over.observe(context, tree, verdict, Scores(torch.zeros(0)))
            for row, path, tokens in zip(live, kept, tree.tokens, strict=True):
                row.tokens += [*(tokens[node] for node in path[1:]), step]
                row.step += 1

    go_on()
    for slot in slots:
        over.release(slot)
        last = live.pop()
        if slot < len(live):
            live[slot] = last
    over.admit(rows[3], {})
    live.append(rows[3])
    go_on()
    assert inner.spoken > 20


# ---- chains that end themselves


def chain_of(kind: str, network: Network, form: Chain) -> HeadChain:
    module = some_heads(kind)
    heads = TorchHeads(module, network.input_embedding, network.head_matrix())
    return HeadChain("hydra", heads, reader(module, network), form, network.cache_shape.layers)


def ending(width: int, most: int) -> Chain:
    torch.manual_seed(1)
    return Chain(Acceptance(AcceptanceHead(AcceptanceConfig(width, 1)), 0.5, 1, most))


@every_hydra
def test_chains_end_where_a_rule_says(kind: str) -> None:
    """The rule sees what a head's projection sees; no chain is longer than there are heads."""
    rule, states = ending(WIDTH, 9), list[Tensor]()
    seen = rule.stopping.head.register_forward_pre_hook(lambda _, given: states.append(given[0]))  # type: ignore[attr-defined]
    drafter = chain_of(kind, lively(), rule)
    assert drafter.max_nodes == HEADS
    outputs = Engine(lively(), drafter, max_rows=3).generate(PROMPTS, SamplingParams(max_new_tokens=40))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 40) for prompt in PROMPTS]
    steps, drafted = sum(one.stats.steps for one in outputs), sum(one.stats.drafted_tokens for one in outputs)
    assert steps < drafted < HEADS * steps and {one.shape[-1] for one in states} == {WIDTH}
    seen.remove()


def test_the_law_of_chains_that_end_themselves() -> None:
    target = TableNetwork(2, 3, 2, 1.0)
    embedding, head = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def made() -> Drafter:
        module = filled(HydraHeads(HydraConfig(2, 2, 3)), 1.5, seed=4).double().eval().requires_grad_(False)
        return HeadChain("hydra", TorchHeads(module, embedding, head), LastState(), ending(2, 2), 1)

    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(made, {"target": target}, [1, 0, 1], wishes)
    assert distance(law, plain_law(lambda said: one_law(target.logits([1, 0, 1, *said]), wishes), 3)) < 1e-6


def test_a_rule_makes_it_a_chain(tmp_path: Path) -> None:
    module = some_heads("hydra++")
    checkpoints.write(module, CONFIGS["hydra++"], Checkpoint(tmp_path / "it", "hydra", {}, "lively", {}), torch.float32)
    heads, shop = {"drafter": "hydra", "checkpoint": str(tmp_path / "it")}, Workshop(Model(lively(), 1), {}.__getitem__)
    made = build({**heads, "stopping": {"rule": "confidence", "most": 3}}, shop)
    assert isinstance(made, HeadChain) and made.max_nodes == 3 and made.name == "hydra++"
    (output,) = Engine(lively(), made).generate(PROMPTS[:1], SamplingParams(max_new_tokens=30))
    assert output.token_ids == greedy(lively(), PROMPTS[0], 30)
    made = build({**heads, "stopping": {"rule": "fixed", "most": 20}}, shop)
    assert isinstance(made, HeadChain)
    lesson = Drafts(lively(), made, 1.0).lesson(Batch.of([Sample((1, 2), (3, 4, 5, 6))], 64))
    assert lesson.states_PD.shape == (HEADS - 2, WIDTH) and 0 < Drafts(lively(), made).draft_share < 3
    made.max_nodes = 2
    with pytest.raises(TrainingError, match="nothing is left to decide"):
        Drafts(lively(), made).chains([Sample((1, 2), (3, 4, 5, 6))], 1)
    with pytest.raises(DrafterError, match="without a tree"):
        build({**heads, "tree": [[0]], "stopping": "fixed"}, shop)
