"""Every causal architecture of the installed transformers runs equal to transformers, or is refused with the reason."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter
from forerun.engine.engine import Engine
from forerun.errors import CheckpointError
from forerun.model import Scores
from forerun.nn.foreign import network as foreign
from forerun.nn.foreign import rehearsal
from forerun.nn.foreign.load import adopt
from forerun.nn.foreign.miniature import SIZES, miniature, windows_of
from forerun.nn.foreign.rehearsal import AFFORDABLE
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from nn.architectures import (
    KINDS,
    LAYERS,
    LONG,
    PUBLISHED,
    REFUSED,
    RUNS,
    UNBUILT,
    WINDOW,
    WINDOWED,
    built,
    expected,
    small_config,
)
from nn.feeding import some_tokens

PROMPT, NEW = some_tokens(3), 18
LATER = WINDOW + 5
"""The second row begins with this much of the first one's text: beyond the window from the start."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns about sizes that nobody would choose."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


class Foresight(Drafter):
    """Knows the answer, and hides it among wrong siblings: a tree in which paths of every length survive."""

    name, max_nodes = "foresight", 6

    def __init__(self, text: list[int]):
        self._text = text
        self.accepted = 0

    def propose(self, context: Context) -> TokenTree:
        rows = [self._draft(row.tokens, depth) for row, depth in zip(context.rows, context.depths, strict=True)]
        return TokenTree.of([row[0] for row in rows], [row[1] for row in rows], context.device)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        self.accepted += sum(verdict.accepted)

    def _draft(self, said: list[int], depth: int) -> tuple[list[int], list[int]]:
        tokens, parents, at = [said[-1]], [-1], 0
        right = len(said) % 3 + 1  # at most so many
        for level, token in enumerate(self._text[len(said) : len(said) + min(depth, self.max_nodes // 2)]):
            tokens += [(token + 1) % 61, token if level < right else (token + 2) % 61]
            parents += [at, at]
            at = len(tokens) - 1
        return tokens, parents


def plainly(model: Any) -> list[int]:
    """The prompt and what transformers says after it, greedily, by itself."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    text: list[int] = said[0].tolist()
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_equal_or_is_refused(kind: str) -> None:
    words = expected(kind)
    if words in UNBUILT:
        with pytest.raises(Exception, match=words):
            built(small_config(kind))
        return
    model = built(small_config(kind))
    if words is not None:
        with pytest.raises(CheckpointError) as caught:
            adopt(model, kind)
        assert words in str(caught.value)
        return
    network = adopt(model, kind)
    assert network.windows == ({WINDOW} if kind in WINDOWED else set())
    text = plainly(model)
    prompts, drafter = [PROMPT, text[:LATER]], Foresight(text)
    outputs = Engine(network, drafter, max_rows=2).generate(
        prompts, [SamplingParams(max_new_tokens=len(text) - len(prompt)) for prompt in prompts]
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert [*prompt, *output.token_ids] == text
    assert drafter.accepted > NEW // 2


def test_the_lists_know_no_architecture_twice() -> None:
    listed = [kind for kinds in (REFUSED | UNBUILT).values() for kind in kinds.split()]
    assert len(listed) == len(set(listed))
    assert not set(listed) & RUNS


def test_an_architecture_that_nobody_has_looked_at() -> None:
    with pytest.raises(AssertionError, match="transformers has learnt gpt6"):
        expected("gpt6")


# ---- windows


def refused(model: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        adopt(model, "model")
    return str(caught.value)


def test_a_window_that_only_the_cache_has_matters_where_texts_reach_beyond_it() -> None:
    assert "sliding_window of 8" in refused(built(small_config("moshi")))
    adopt(built(small_config("moshi", sliding_window=64)), "model")


def test_local_attention_by_the_order_of_the_cache() -> None:
    assert "window_size of 8" in refused(built(small_config("gpt_neo")))
    everywhere = {"attention_types": [[["global"], LAYERS]]}
    network = adopt(built(small_config("gpt_neo", **everywhere)), "model")
    assert network.windows == frozenset()


def test_a_masked_language_model_is_no_causal_one() -> None:
    assert "looks at later tokens" in refused(built(small_config("bert", is_decoder=False)))


@pytest.mark.parametrize("window", [WINDOW, 300])
def test_a_window_that_gets_lost_is_found_out(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(small_config("gemma2", sliding_window=window, max_position_embeddings=512))
    adopt(model, "model")
    made = foreign._additive
    monkeypatch.setattr(foreign, "_additive", lambda feed, window: made(feed, None))
    assert f"beyond its sliding_window of {window}, from token 9 on" in refused(model)


@pytest.mark.parametrize("kind", sorted(WINDOWED - {"phi4_multimodal"}))
def test_long_windows_are_tried_out_on_a_small_copy_of_the_published_config(kind: str) -> None:
    """Nothing of a miniature but its sizes differs, so each must be one that can be built and read."""
    config = CONFIG_MAPPING[kind](**PUBLISHED.get(kind, {}))
    longest = config.get_text_config(decoder=True).max_position_embeddings
    windows = windows_of(config, longest)
    assert windows
    copy = adopt(miniature(config, windows), kind)
    shortened = windows_of(copy.model.config, longest)
    assert shortened.keys() == windows.keys()
    assert max(shortened.values()) <= AFFORDABLE


def test_a_long_window_costs_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model reads a handful of short texts, and a copy of little width the long ones."""
    read = []
    forward = transformers.Gemma2ForCausalLM.forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **given: Any) -> Any:
        read.append((self.config.hidden_size, given["input_ids"].numel()))
        return forward(self, *args, **given)

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "forward", counted)
    adopt(built(small_config("gemma2", hidden_size=64, sliding_window=4096, max_position_embeddings=8192)), "model")
    assert sum(count for width, count in read if width == 64) < 80
    assert {width for width, _ in read} == {64, 32}


def test_a_window_that_cannot_be_tried_out_is_a_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "num_key_value_heads", 3)  # no copy can be built
    model = built(small_config("gemma2", sliding_window=300, max_position_embeddings=512))
    assert "cannot be tried out beyond its sliding_window of 300 on a small copy" in refused(model)


def test_a_copy_that_would_not_be_small() -> None:
    """Its ears and eyes are part of the language model's config."""
    config = transformers.Phi4MultimodalConfig(**LONG)
    with pytest.raises(ValueError, match="it would have 870 million weights"):
        miniature(config, {"sliding_window": 4096})


def test_what_differs_in_half_precision_only_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture may route a token elsewhere. Its copy in fp32 tells whether it was that."""
    model = built(small_config("mixtral")).to(torch.bfloat16)
    monkeypatch.setattr(rehearsal, "HALF_TOLERANCE", 0.0)
    adopt(model, "model")
    made = foreign._additive
    monkeypatch.setattr(foreign, "_additive", lambda feed, window: made(feed, None))
    assert "does not honour given masks" in refused(model)


def test_numbers_that_are_none() -> None:
    model = built(small_config("gpt2"))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    assert "gives no numbers in torch.float32: choose another dtype" in refused(model)


def test_the_luck_of_others_is_left_alone() -> None:
    model = built(small_config("gemma2", sliding_window=300, max_position_embeddings=512))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    adopt(model, "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_are_found_whatever_their_name_and_place() -> None:
    config = transformers.LlamaConfig(max_position_embeddings=100)
    config.attention_chunk_size, config.local_attn_window_length = 16, 20
    config.nested = {"deep": [{"window_size": 24}], "per_layer_config": {3: {"sliding_window": 28}}}
    config.vision_config = {"window_size": 32}  # another model's
    config.block_size, config.use_sliding_window, config.num_local_experts = 100, True, 8  # never reached; no lengths
    assert windows_of(config, 100) == {
        "attention_chunk_size": 16,
        "local_attn_window_length": 20,
        "window_size": 24,
        "sliding_window": 28,
    }
