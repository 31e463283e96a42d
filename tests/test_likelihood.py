"""Likelihoods of given texts are those of the law, whatever stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes import TableNetwork
from forerun.engine.likelihood import WIDTH, Text, likelihoods
from forerun.errors import RequestError
from forerun.model import CHUNK
from forerun.nn.load import load_network

TARGET = Path(__file__).parents[1] / "models" / "target"


def text(context: int, continuation: int, seed: int = 0, tokens: int = 4) -> Text:
    drawn = torch.randint(tokens, (context + continuation,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Text(drawn[:context], drawn[context:])


RAGGED = [text(1, 3, 1), text(CHUNK + 9, 2, 2), text(5, 2 * WIDTH + 1, 3), text(4, 0, 4), text(2, WIDTH, 5)]


def by_hand(network: TableNetwork, asked: Text) -> list[float]:
    found = []
    for place, token in enumerate(asked.continuation):
        prefix = [*asked.context, *asked.continuation[:place]]
        found.append(float(network.logits(prefix).log_softmax(-1)[token]))
    return found


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_they_are_those_of_the_law(rows: int) -> None:
    network = TableNetwork(seed=3)
    found = likelihoods(network, RAGGED, rows)
    for asked, one in zip(RAGGED, found, strict=True):
        assert one.logprobs == pytest.approx(by_hand(network, asked), abs=1e-5)
        assert one.total == pytest.approx(sum(by_hand(network, asked)), abs=1e-3)


def test_greedy_is_what_greedy_decoding_would_say() -> None:
    network = TableNetwork(seed=4)
    said = [0]
    for _ in range(2 * WIDTH):
        said.append(int(network.logits(said).argmax()))
    other = [*said[:-1], (said[-1] + 1) % 4]
    one, two, three = likelihoods(network, [Text(said[:1], said[1:]), Text(other[:1], other[1:]), text(4, 0)])
    assert (one.is_greedy, two.is_greedy, three.is_greedy) == (True, False, True)


def test_each_is_shown_as_it_is_known() -> None:
    shown = {}
    network = TableNetwork()
    found = likelihoods(network, RAGGED, 2, lambda index, one: shown.update({index: one}))
    assert [shown[index] for index in range(len(RAGGED))] == found


def test_real_rows_do_not_depend_on_their_company() -> None:
    network = load_network(str(TARGET), torch.float32, torch.device("cpu"))
    texts = [text(40, 9, 1, 4096), text(3, 150, 2, 4096), text(200, 1, 3, 4096)]
    together = likelihoods(network, texts)
    for asked, one in zip(texts, together, strict=True):
        (alone,) = likelihoods(network, [asked])
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Text([], [1]), "no context"),
        (Text([1], [4]), "token id 4 is outside"),
        (text(10, 8), "17 tokens is to be scored and the context holds 16"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: Text, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        likelihoods(TableNetwork(max_length=16), [asked])


def test_the_context_may_be_filled_to_its_end() -> None:
    (found,) = likelihoods(TableNetwork(max_length=16), [text(10, 7)])
    assert len(found.logprobs) == 7
