"""What is read in training: prompts and a target's answers, cut into batches, and plain text between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import floor
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.errors import TrainingError
from forerun.train.distill import Sample

POOL = 16
"""Batches whose samples are sorted by length together."""


@dataclass(frozen=True)
class Answers:
    """Prompts and the target's answers, cut into batches of `rows` samples of at most `length` tokens.

    A sample that is longer loses the beginning of its prompt. Samples come in an order that depends
    on the seed alone, each at most once per pass, so a resumed run goes on where it stopped. Every
    `holdout`-th sample is never trained on. text: other samples that a share of the batches is taken from."""

    samples: Sequence[Sample]
    rows: int = 16
    length: int = 512
    seed: int = 0
    holdout: int = 20
    text: Answers | None = None
    text_share: float = 0.0
    _passes: dict[int, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.training:
            raise TrainingError(f"{len(self.samples)} answers are too few to train on: make more with forerun distill")

    @cached_property
    def training(self) -> Sequence[Sample]:
        return Some(self.samples, [place for place in range(len(self.samples)) if (place + 1) % self.holdout])

    @cached_property
    def heldout(self) -> Sequence[Sample]:
        return Some(self.samples, range(self.holdout - 1, len(self.samples), self.holdout))

    def batch(self, number: int) -> Batch:
        """Batch `number` of the training samples, or of the text's."""
        of_text = floor(number * self.text_share)
        if self.text is not None:
            if floor((number + 1) * self.text_share) > of_text:
                return self.text.batch(of_text)
            number -= of_text
        epoch, place = divmod(number, max(1, len(self.training) // self.rows))
        return Batch.of([self.training[pick] for pick in self._batches(epoch)[place]], self.length)

    def _batches(self, epoch: int) -> list[list[int]]:
        """A pass: samples of like lengths side by side, for padding teaches nothing; batches in any order."""
        if epoch not in self._passes:
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.training)).tolist()
            order = order[: max(1, len(order) // self.rows) * self.rows]
            pools = [order[at : at + POOL * self.rows] for at in range(0, len(order), POOL * self.rows)]
            ranked = [pick for pool in pools for pick in sorted(pool, key=self._sizes.__getitem__)]
            cut = [ranked[at : at + self.rows] for at in range(0, len(ranked), self.rows)]
            self._passes.clear()
            self._passes[epoch] = [cut[place] for place in random.permutation(len(cut))]
        return self._passes[epoch]

    @cached_property
    def _sizes(self) -> list[int]:
        if isinstance(self.samples, Windows):  # all alike, and many
            return [self.samples.length] * len(self.training)
        return [sample.size for sample in self.training]

    def batches_of(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        for first in range(0, len(samples), self.rows):
            yield Batch.of(samples[first : first + self.rows], self.length)

    @property
    def trained_share(self) -> float:
        """How many of the tokens that are read are trained on."""
        read = sum(min(self.length, len(s.prompt) + len(s.answer)) for s in self.training)
        return sum(min(self.length, len(s.answer)) for s in self.training) / max(1, read)


class Some(Sequence[Sample]):
    """Some of many samples, none of which is made before it is asked for."""

    def __init__(self, samples: Sequence[Sample], picks: Sequence[int]):
        self._samples, self._picks = samples, picks

    def __len__(self) -> int:
        return len(self._picks)

    @overload
    def __getitem__(self, which: int) -> Sample: ...

    @overload
    def __getitem__(self, which: slice) -> Some: ...

    def __getitem__(self, which: int | slice) -> Sample | Some:
        if isinstance(which, slice):
            return Some(self._samples, self._picks[which])
        return self._samples[self._picks[which]]


class Windows(Sequence[Sample]):
    """A stream of tokens (uint16, as `forerun train lm` cuts a corpus) in pieces of so many, each an answer to its
    first token."""

    def __init__(self, path: Path, length: int):
        """Raises TrainingError for a file that cannot be read or holds less than one window."""
        self.path, self.length = path, length
        try:
            self._tokens = np.memmap(path, dtype=np.uint16, mode="r")
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read ({error}): name the train.bin of a corpus") from None
        if not len(self):
            raise TrainingError(f"{path} holds {len(self._tokens)} tokens, too few for a batch of {length}")

    @property
    def largest(self) -> int:
        """The largest token."""
        return int(self._tokens.max())

    def __len__(self) -> int:
        return len(self._tokens) // self.length

    @overload
    def __getitem__(self, which: int) -> Sample: ...

    @overload
    def __getitem__(self, which: slice) -> Some: ...

    def __getitem__(self, which: int | slice) -> Sample | Some:
        if isinstance(which, slice):
            return Some(self, range(len(self))[which])
        if not -len(self) <= which < len(self):
            raise IndexError(which)
        begin = which % len(self) * self.length
        first, *rest = self._tokens[begin : begin + self.length].tolist()
        return Sample((first,), tuple(rest))


@dataclass(frozen=True)
class Batch:
    """tokens [B, N], padded with 0; begins, ends [B]: where each answer begins and ends."""

    tokens_BN: Tensor
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    @staticmethod
    def of(samples: Sequence[Sample], length: int) -> Batch:
        cut = [_cut(sample, length) for sample in samples]
        texts = [[*sample.prompt, *sample.answer] for sample in cut]
        longest = max(map(len, texts))
        tokens = torch.from_numpy(np.array([text + [0] * (longest - len(text)) for text in texts]))
        begins = np.array([len(sample.prompt) for sample in cut])
        return Batch(tokens, begins, np.array([len(text) for text in texts]))

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and index of every place whose first head has an answer token to learn: t + 2 lies in the answer."""
        spans = [(max(0, begin - 2), end - 2) for begin, end in zip(self.begins, self.ends, strict=True)]
        rows = [torch.full((max(0, last - first),), row) for row, (first, last) in enumerate(spans)]
        return torch.cat(rows), torch.cat([torch.arange(first, max(first, last)) for first, last in spans])


def _cut(sample: Sample, length: int) -> Sample:
    answer = sample.answer[: length - 2]
    prompt = sample.prompt[-(length - len(answer)) :]
    return Sample(prompt, answer, sample.temperature)
