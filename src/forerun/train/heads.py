"""Training draft heads on a frozen target: what they are taught on a batch, and how good they are.

Every answer token teaches: at place t the heads see the target's state there (and, if they see tokens, the true
tokens t + 1, t + 2, ... as teacher forcing has it), and head i learns token t + i + 2. States and laws of the target
are computed on the fly; losses are summed over chunks of places and computed again in the backward pass, so that no
[places, vocabulary] table of a whole batch ever exists.

The same places and tokens give the heads' *ranks*: which of its best tokens the true one was. Walking a tree along
the ranks of an answer is what the engine does when it generates that answer, so the projected tokens per step are the
measured ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import Weights
from forerun.errors import TrainingError
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer
from forerun.ranktree import RankTree
from forerun.train.distill import Sample

CHUNK_NUMBERS = 1 << 25
"""Logits of all heads that exist at a time."""
RANKS = 16
"""Ranks are told apart up to here; everything behind is `RANKS`."""
SHOWN_TOP = (1, 2, 3, 4, 5)
RIDGE = 1e-3
"""Damping of the least squares, as a share of the inputs' own size."""
POOL = 16
"""Batches whose samples are sorted by length together."""

Ranks = NDArray[np.int64]


class Teacher:
    """The frozen target: its states, its output projection and its input embeddings."""

    def __init__(self, network: Network):
        self.network = network
        head = network.output_head
        unpacked = head if isinstance(head, Tensor) else head.unpacked().to(network.dtype)
        self.head_VD, self.embedding_VD = unpacked.detach(), network.input_embedding.detach()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def precision(self) -> torch.autocast:
        """Products in bf16 where the target's own are; a target in fp32 is taught from in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.head_VD.dtype != torch.float32)

    @torch.no_grad()
    def states(self, tokens_BN: Tensor) -> Tensor:
        """What the output projection sees, [B, N, D], of whole sequences from position 0."""
        if isinstance(self.network, Transformer):
            return self.network.features(tokens_BN)
        rows, count = tokens_BN.shape
        layers = self.network.cache_shape.layers
        cache = Cache(self.network.cache_shape, self.network.dtype, self.device)
        cache.reserve(rows, count)
        feed = Feed(
            tokens_BN=tokens_BN,
            lengths_B=np.zeros(rows, np.int64),
            where_BN=np.tile(np.arange(count), (rows, 1)),
            last_B=np.full(rows, count - 1),
            dtype=self.network.dtype,
        )
        with torch.inference_mode():
            states = self.network.forward(feed, cache, (layers,)).hidden[layers]
        return states.clone()  # what inference mode made cannot take part in training


@dataclass(frozen=True)
class Answers:
    """Prompts and the target's answers, cut into batches of `rows` samples of at most `length` tokens.

    A sample that is longer loses the beginning of its prompt. Samples come in an order that depends on the seed
    alone, each at most once per pass, so a resumed run goes on where it stopped. Every `holdout`-th sample is never trained
    on."""

    samples: Sequence[Sample]
    rows: int = 16
    length: int = 512
    seed: int = 0
    holdout: int = 20
    _passes: dict[int, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.training:
            raise TrainingError(f"{len(self.samples)} answers are too few to train on: make more with forerun distill")

    @cached_property
    def training(self) -> list[Sample]:
        return [sample for place, sample in enumerate(self.samples, 1) if place % self.holdout]

    @cached_property
    def heldout(self) -> list[Sample]:
        return [sample for place, sample in enumerate(self.samples, 1) if place % self.holdout == 0]

    def batch(self, number: int) -> Batch:
        """Batch `number` of the training samples."""
        epoch, place = divmod(number, max(1, len(self.training) // self.rows))
        return Batch.of([self.training[pick] for pick in self._batches(epoch)[place]], self.length)

    def _batches(self, epoch: int) -> list[list[int]]:
        """A pass: samples of like lengths side by side, for padding teaches nothing; batches in any order."""
        if epoch not in self._passes:
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.training)).tolist()
            order = order[: max(1, len(order) // self.rows) * self.rows]
            pools = [order[at : at + POOL * self.rows] for at in range(0, len(order), POOL * self.rows)]
            ranked = [pick for pool in pools for pick in sorted(pool, key=lambda pick: self.training[pick].size)]
            cut = [ranked[at : at + self.rows] for at in range(0, len(ranked), self.rows)]
            self._passes.clear()
            self._passes[epoch] = [cut[place] for place in random.permutation(len(cut))]
        return self._passes[epoch]

    def batches_of(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        for first in range(0, len(samples), self.rows):
            yield Batch.of(samples[first : first + self.rows], self.length)

    @property
    def trained_share(self) -> float:
        """How many of the tokens that are read are trained on."""
        read = sum(min(self.length, len(s.prompt) + len(s.answer)) for s in self.training)
        return sum(min(self.length, len(s.answer)) for s in self.training) / max(1, read)


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


@dataclass(frozen=True)
class Lesson:
    """Everything the heads need to know of P places, gathered: contexts [P, D], the K + 1 tokens behind each place
    [P, K + 1] (root first), the target's states at the K places behind it [P, K, D] (where the laws of the tokens to
    learn come from), and which of the K tokens to learn are there [K, P]."""

    context_PD: Tensor
    tokens_PK: Tensor
    states_PKD: Tensor
    valid_KP: Tensor

    @staticmethod
    def of(module: HeadsModule, teacher: Teacher, batch: Batch) -> Lesson:
        tokens = batch.tokens_BN.to(teacher.device)
        states = teacher.states(tokens)
        context = module.contexts(states)
        rows, places = (index.to(teacher.device) for index in batch.places())
        behind = places[:, None] + torch.arange(1, module.count + 2, device=teacher.device)
        ends = torch.from_numpy(batch.ends).to(teacher.device)[rows, None]
        inside = behind.clamp(max=tokens.shape[1] - 1)
        return Lesson(
            context_PD=context[rows, places],
            tokens_PK=tokens[rows[:, None], inside],
            states_PKD=states[rows[:, None], inside[:, :-1]],
            valid_KP=(behind[:, 1:] < ends).T,
        )

    def chunks(self, size: int) -> Iterator[Lesson]:
        parts = (self.context_PD, self.tokens_PK, self.states_PKD, self.valid_KP.T)
        for context, tokens, states, valid in zip(*(torch.split(part, size) for part in parts), strict=True):
            yield Lesson(context, tokens, states, valid.T)

    @property
    def labels_KP(self) -> Tensor:
        return self.tokens_PK[:, 1:].T


def logits_of(module: HeadsModule, teacher: Teacher, lesson: Lesson) -> Tensor:
    """[K, P, V]."""
    embedded = F.embedding(lesson.tokens_PK[:, : module.count], teacher.embedding_VD)
    return module.logits(lesson.context_PD, embedded, teacher.head_VD)


@dataclass
class HeadsObjective:
    """The loss of heads on a frozen target (see `Objective` in train/loop.py), and their figures on held-out answers."""

    module: HeadsModule
    teacher: Teacher
    answers: Answers
    weights: Weights
    tree: RankTree
    most_validated: int = 64

    def loss(self, number: int) -> Tensor:
        """The weighted sum over heads, in nats: each head's mean over the places that have its token."""
        self.module.train()
        torch.manual_seed(self.answers.seed + number)  # the luck of dropout belongs to the batch, for runs that go on
        return self.loss_on(self.answers.batch(number))

    def loss_on(self, batch: Batch) -> Tensor:
        with self.teacher.precision():
            lesson = Lesson.of(self.module, self.teacher, batch)
            counts_K = lesson.valid_KP.sum(1).clamp(min=1)
            parts = list(lesson.chunks(_chunk(self.module, self.teacher)))
            if len(parts) == 1:  # nothing to save
                sums = [self._sums(lesson)]
            else:
                sums = [checkpoint(self._sums, part, use_reentrant=False) for part in parts]
        scale = self.weights.decay ** torch.arange(1, self.module.count + 1, device=counts_K.device)
        total: Tensor = (torch.stack(sums).sum(0) / counts_K * scale).sum()
        return total

    def _sums(self, lesson: Lesson) -> Tensor:
        """Per head, the loss summed over the places of a chunk, [K]."""
        log_probs = logits_of(self.module, self.teacher, lesson).float().log_softmax(-1)
        loss = log_probs.new_zeros(lesson.valid_KP.shape)
        if self.weights.text:
            loss = loss - self.weights.text * log_probs.gather(-1, lesson.labels_KP[..., None])[..., 0]
        if self.weights.teacher:
            with torch.no_grad():
                laws = F.linear(lesson.states_PKD, self.teacher.head_VD).float().softmax(-1)
            loss = loss - self.weights.teacher * (laws.transpose(0, 1) * log_probs).sum(-1)
        return (loss * lesson.valid_KP).sum(1)

    def validate(self) -> dict[str, float]:
        """`loss`, `head1_top1` .. `headK_top5` (shares of answer tokens), and `tokens_per_step` as projected for the
        tree."""
        samples = self.answers.heldout[: self.most_validated] or self.answers.training[: self.most_validated]
        self.module.eval()
        with torch.no_grad():
            batches = list(self.answers.batches_of(samples))
            loss = sum(self.loss_on(batch).item() for batch in batches) / len(batches)
        ranks = ranks_of(self.module, self.teacher, samples, self.answers)
        figures = {"loss": loss}
        for head in range(self.module.count):
            known = np.concatenate([table[table[:, head] >= 0, head] for table in ranks])
            figures |= {f"head{head + 1}_top{k}": float((known < k).mean()) if known.size else 0.0 for k in SHOWN_TOP}
        figures["tokens_per_step"] = projected(ranks, self.tree)
        return figures


@torch.no_grad()
def least_squares(module: HeadsModule, teacher: Teacher, answers: Answers, batches: int) -> list[Tensor]:
    """Per head, [D, M]: the linear map from what it sees (the context, and the embeddings behind it if heads see tokens)
    to the target's state one token before the one that it proposes, fitted over so many batches (ridge regression).

    A head that starts there is a fair predictor at once. One that starts as a copy of the target's output projection
    first has to unlearn a sharp opinion about another token (our addition; the papers start from the copy).
    """
    module.eval()
    width = teacher.head_VD.shape[1]
    sizes = [width * (head + 2 if module.sees_tokens else 1) for head in range(module.count)]
    squares = [torch.zeros(size, size, device=teacher.device) for size in sizes]
    products = [torch.zeros(size, width, device=teacher.device) for size in sizes]
    for number in range(batches):
        with teacher.precision():
            lesson = Lesson.of(module, teacher, answers.batch(number))
        embedded = F.embedding(lesson.tokens_PK[:, : module.count], teacher.embedding_VD)
        inputs = torch.cat((lesson.context_PD[:, None], embedded), 1).flatten(1).float()
        for head, size in enumerate(sizes):
            there = lesson.valid_KP[head]
            seen = inputs[there, :size]
            squares[head] += seen.T @ seen
            products[head] += seen.T @ lesson.states_PKD[there, head].float()
    return [_ridge(square, product) for square, product in zip(squares, products, strict=True)]


def _ridge(square: Tensor, product: Tensor) -> Tensor:
    scale = square.diagonal().mean()
    damped = square + torch.diag(RIDGE * (square.diagonal() + scale))
    solved: Tensor = torch.linalg.solve(damped, product)
    return solved.T.contiguous()


@torch.no_grad()
def ranks_of(module: HeadsModule, teacher: Teacher, samples: Sequence[Sample], answers: Answers) -> list[Ranks]:
    """Per sample, [A, K]: at place a of its A places (a = 0: before the first answer token), which best token of
    every head the true one is; -1 beyond the answer's end. Equal logits: the lower token id is the better."""
    module.eval()
    tables: list[Ranks] = []
    for batch in answers.batches_of(samples):
        with teacher.precision():
            lesson = Lesson.of(module, teacher, batch)
            parts = lesson.chunks(_chunk(module, teacher))
            found = torch.cat([_ranks(logits_of(module, teacher, part), part) for part in parts], 1)
        counts = [max(0, end - max(2, begin)) for begin, end in zip(batch.begins, batch.ends, strict=True)]
        found_here = [table.T.cpu().numpy() for table in torch.split(found, counts, 1)]
        tables += [_from_the_first(table, begin) for table, begin in zip(found_here, batch.begins, strict=True)]
    return tables


def _from_the_first(table: Ranks, begin: int) -> Ranks:
    """A prompt of one token leaves the heads nothing to see before the first answer token."""
    return np.concatenate((np.full((max(0, 2 - begin), table.shape[1]), -1), table))


def _chunk(module: HeadsModule, teacher: Teacher) -> int:
    """Places whose logits exist at a time."""
    return max(1, CHUNK_NUMBERS // (module.count * len(teacher.head_VD)))


def _ranks(logits_KPV: Tensor, lesson: Lesson) -> Tensor:
    labels = lesson.labels_KP[..., None]
    own = logits_KPV.gather(-1, labels)
    ids = torch.arange(logits_KPV.shape[-1], device=labels.device)
    better = (logits_KPV > own) | ((logits_KPV == own) & (ids < labels))
    return torch.where(lesson.valid_KP, better.sum(-1).clamp(max=RANKS), -1)


def steps_of(ranks: Ranks, tree: RankTree) -> int:
    """Steps the engine needs for an answer whose places have these ranks: each goes as deep as the tree follows, and
    one more."""
    place = steps = 0
    while place < len(ranks):
        row = ranks[place]
        known = row[: int((row >= 0).sum())].tolist()
        place += 1 + tree.followed(known)
        steps += 1
    return steps


def projected(ranks: Sequence[Ranks], tree: RankTree) -> float:
    """Tokens per step that this tree gives on these answers."""
    return sum(map(len, ranks)) / max(1, sum(steps_of(table, tree) for table in ranks))
