"""Ids beyond the tokenizer are no tokens: never said, drafted or not, whatever runs the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import forerun
from enumeration import distance, plain_law
from fakes import Near, TableNetwork, engine_of
from forerun import Engine, SamplingParams
from nn.feeding import small_model
from test_engine import DRAFTERS, SHORT, engine_law, processed

NOWHERE = {2: float("-inf")}


def tables(size: int, order: int = 2) -> dict[str, TableNetwork]:
    """Of whose ids 2 is no token."""
    target = TableNetwork(size, 3, order, 1.0)
    found = {
        "target": target,
        **{name: Near(target, 0.5, seed) for seed, name in enumerate(("middle", "low", "small"))},
    }
    for network in found.values():
        network.no_tokens = torch.tensor([2])
    return found


@pytest.mark.parametrize("name", [name for name in SHORT if name != "three models"])
def test_the_law_is_that_of_the_tokens_alone(name: str) -> None:
    networks, prompt = tables(3), [1, 0, 1]
    wishes = SamplingParams(temperature=1.3, max_new_tokens=2)
    law = engine_law(lambda: SHORT[name], networks, prompt, wishes)
    forbidden = SamplingParams(temperature=1.3, max_new_tokens=2, logit_bias=NOWHERE)
    assert all(2 not in text for text in law)
    assert distance(law, plain_law(processed(forbidden, networks["target"], prompt), 2)) < 1e-6


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_texts_hold_tokens_alone(name: str) -> None:
    networks, prompts = tables(4, 12), [[0], [1, 3, 1], [3] * 5]
    outputs = engine_of(networks["target"], DRAFTERS[name], networks).generate(prompts, max_new_tokens=60)
    for network in networks.values():
        network.no_tokens = None
    forbidden = SamplingParams(max_new_tokens=60, logit_bias=NOWHERE)
    expected = engine_of(networks["target"]).generate(prompts, forbidden)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert any(2 in output.token_ids for output in engine_of(networks["target"]).generate(prompts, max_new_tokens=60))


# ---- a model in its folder, whose matrices have more rows than the tokenizer has words


@pytest.fixture(scope="module")
def theirs() -> Any:
    """It likes the ids that are no tokens best."""
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight[TOKENS:] *= 4
    return model


TOKENS = 50
ENDS = 57  # beyond the tokenizer, but it ends texts


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("padded")
    theirs.save_pretrained(place)
    words = {f"w{number}": number for number in range(TOKENS) if number != 7}  # 7 is a gap
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    ).save_pretrained(place)
    (place / "generation_config.json").write_text(f'{{"eos_token_id": {ENDS}}}')
    return place


def loaded(folder: Path, kernels: str, drafter: str = "none") -> Engine:
    if kernels == "native":
        pytest.importorskip("forerun.native.library").is_there() or pytest.skip("there are no native kernels here")
    return forerun.load(folder, drafter.replace("MODEL", str(folder)), dtype="fp32", kernels=kernels)


@pytest.mark.parametrize("drafter", ["none", "lookup", "small:MODEL", "verified:MODEL(lookup)"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_a_padded_model_says_tokens_alone(folder: Path, theirs: Any, kernels: str, drafter: str) -> None:
    engine, prompt = loaded(folder, kernels, drafter), [3, 4, 5, 3, 4]
    assert engine.target.network.no_tokens is not None
    nowhere = [7, *(token for token in range(TOKENS, engine.target.vocab_size) if token != ENDS)]
    assert engine.target.network.no_tokens.tolist() == nowhere
    (greedy,) = engine.generate(prompt, max_new_tokens=40, ignore_eos=True)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, suppress_tokens=nowhere, eos_token_id=None
    )
    assert greedy.token_ids == expected[0, len(prompt) :].tolist()
    warm = engine.generate(prompt, max_new_tokens=40, temperature=1.5, n=8, seed=1, ignore_eos=True, logprobs=3)
    assert not {token for output in warm for token in output.token_ids} & set(nowhere)
    assert not {token for o in warm for one in o.logprobs or () for token in one.alternatives} & set(nowhere)


def test_without_the_mask_it_would_say_others(folder: Path) -> None:
    """Else the test above could not fail."""
    engine = loaded(folder, "torch")
    engine.target.network.no_tokens = None
    outputs = engine.generate([3, 4, 5], max_new_tokens=40, temperature=1.5, n=8, seed=1, ignore_eos=True)
    assert any(token >= TOKENS for output in outputs for token in output.token_ids)


def test_without_a_tokenizer_nothing_is_masked(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    assert loaded(tmp_path, "torch").target.network.no_tokens is None


def test_a_draft_model_proposes_tokens_alone(folder: Path) -> None:
    """The same model as the target: whatever it drafts is accepted, if both know the same tokens."""
    (output,) = loaded(folder, "torch", "small:MODEL").generate([3, 4, 5], max_new_tokens=20, ignore_eos=True)
    stats = output.stats
    assert stats.drafted_tokens > 0 and stats.accepted_tokens == stats.drafted_tokens
