"""The engine: rows come and go, and one loop serves them all.

    tree    = drafter.propose(context)
    scores  = target.score(tree)
    verdict = judge(tree, scores)
    target.keep(verdict); drafter.observe(verdict)
    emit

Plain decoding is the drafter that proposes nothing. A request waits, is read in chunks while the others go on, joins the
rows, and leaves when a stop rule holds, in the middle of an accepted block if need be.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.accept.judge import is_exact, judge, rule_of
from forerun.accept.lossy import Lossy
from forerun.chance import key_of
from forerun.drafting.drafter import Context, Drafter
from forerun.engine.text import TextStream
from forerun.errors import DrafterError, RequestError
from forerun.model import Model, Scores
from forerun.row import Row, final_chance
from forerun.sampling import SamplingParams
from forerun.sources.tokenizer import HuggingFaceTokenizer
from forerun.tree import TokenTree

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own law at one token: its own, and those of the most probable alternatives."""

    token_id: int
    logprob: float
    alternatives: dict[int, float]


@dataclass
class Stats:
    """What a request cost. Seconds count from its admission; a step is shared by the rows that make it together.

    accepted: mean surviving draft tokens per step. tokens_per_step: new tokens per step, what a user feels.
    """

    drafter: str
    rule: str = ""
    exact: bool = True
    steps: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def accepted(self) -> float:
        return self.accepted_tokens / self.steps if self.steps else 0.0

    @property
    def other_seconds(self) -> float:
        return max(0.0, self.seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding (reading the prompt is not in it)."""
        decoding = self.seconds - self.prefill_seconds
        return self.new_tokens / decoding if decoding > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        names = (
            "steps new_tokens tokens_per_step accepted seconds prefill_seconds draft_seconds verify_seconds other_seconds"
            " tokens_per_second drafted_tokens accepted_tokens drafter rule exact"
        )
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class Output:
    """One finished sample. token_ids: the new tokens, the ending one included. text: None without a tokenizer.

    finish_reason: "stop" (end of sequence, stop token or stop string), "length", or "interrupted".
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    stats: Stats
    prompt_index: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Piece:
    """What one step added to one sample. drafted[i]: token i came from the drafter (and the target agreed)."""

    request: int
    prompt_index: int
    sample: int
    token_ids: list[int]
    drafted: list[bool]
    texts: list[str]
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass
class _Request:
    """A row and everything the engine alone needs to know about it."""

    number: int
    prompt_index: int
    sample: int
    row: Row
    stream: TextStream | None
    stats: Stats
    started: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    hidden: dict[int, list[Tensor]] = field(default_factory=dict)
    finish_reason: str | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.row.tokens[self.row.prompt_length :]


class Engine:
    """A target, a drafter and the rows that are running.

    max_rows: how many requests run side by side; others wait. eos: token ids that end a text unless a request ignores
    them. lossy: judge requests by this rule; the statistics of those that it touches then say that they are not exact. Use
    `forerun.load` to make one from a model folder.
    """

    def __init__(
        self,
        target: Model,
        drafter: Drafter,
        tokenizer: HuggingFaceTokenizer | None = None,
        eos: Iterable[int] = (),
        max_rows: int = 16,
        lossy: Lossy | None = None,
    ):
        self.target, self.drafter, self.tokenizer, self.lossy = target, drafter, tokenizer, lossy
        self.eos = frozenset(eos)
        self.max_rows = max_rows
        target.scratch = max(target.scratch, drafter.max_nodes + 1)
        self._waiting: deque[_Request] = deque()
        self._reading: _Request | None = None
        self._running: list[_Request] = []
        self._finished: dict[int, _Request] = {}
        self._count = 0

    # ---- requests

    def add(self, prompt: Prompt, params: SamplingParams | None = None, prompt_index: int = 0) -> list[int]:
        """Queue a prompt; returns one request number per sample. RequestError if it cannot be served."""
        params = params or SamplingParams()
        tokens = self.encode(prompt)
        limit = self._limit(tokens, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        for sample in range(params.n):
            row = Row(list(tokens), len(tokens), params, key_of(seed, sample), limit, ends=ends)
            stats = Stats(self.drafter.name, exact=is_exact(self.lossy, row))
            request = _Request(self._count, prompt_index, sample, row, self._text_stream(tokens, params), stats)
            self._waiting.append(request)
            self._count += 1
        return list(range(self._count - params.n, self._count))

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt: text through the tokenizer, ids as they are (checked)."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give the prompt as token ids")
            prompt = self.tokenizer(prompt)["input_ids"]
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        outside = next((token for token in tokens if not 0 <= token < self.target.vocab_size), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary of {self.target.vocab_size}")
        return tokens

    def _limit(self, tokens: Sequence[int], params: SamplingParams) -> int:
        context = self.target.max_length
        if len(tokens) >= context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens and the context holds {context}: shorten the prompt"
            )
        outside = [token for token in params.logit_bias if not 0 <= token < self.target.vocab_size]
        if outside:
            raise RequestError(
                f"logit_bias names token {outside[0]}, outside the vocabulary of {self.target.vocab_size}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none: use stop_token_ids")
        return min(context, len(tokens) + params.max_new_tokens) if params.max_new_tokens else context

    def _text_stream(self, tokens: Sequence[int], params: SamplingParams) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer.backend_tokenizer, tokens, tuple(params.stop))

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._reading or self._running)

    def abort(self) -> None:
        """Drop every request; those that run end as "interrupted"."""
        self._waiting.clear()
        for request in self._running + ([self._reading] if self._reading else []):
            request.finish_reason = "interrupted"
            self._close(request)
        while self.target.cache.rows:
            self.target.release(self.target.cache.rows - 1)
        for slot in reversed(range(len(self._running))):
            self.drafter.release(slot)
        self._running, self._reading = [], None

    # ---- the loop

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Read a chunk of a waiting prompt, then make one step with every row that is ready."""
        self._read()
        return self._decode() if self._running else []

    def _decode(self) -> list[Piece]:
        rows = [request.row for request in self._running]
        context = Context(
            rows=rows,
            budget=self.drafter.max_nodes,
            depths=[row.remaining - 1 for row in rows],
            device=self.target.device,
        )
        begun = time.perf_counter()
        tree = self.drafter.propose(context)
        drafted = time.perf_counter()
        scores = self.target.score(tree, rows, self.drafter.reads)
        scored = time.perf_counter()
        judgement = judge(tree, scores.logits_BNV, rows, final_chance(rows), scores.best_BN, self.lossy)
        self.target.keep(judgement.verdict.kept)
        observing = time.perf_counter()
        self.drafter.observe(context, tree, judgement.verdict, scores)
        learned = time.perf_counter() - observing
        for request in self._running:
            if tree.nodes > 1 or not request.stats.rule:
                request.stats.rule = rule_of(judgement, request.row)
            request.stats.draft_seconds += drafted - begun + learned
            request.stats.verify_seconds += scored - drafted
        return self._emit(tree, scores, judgement.verdict)

    def _emit(self, tree: TokenTree, scores: Scores, verdict: Verdict) -> list[Piece]:
        pieces = []
        for index, request in enumerate(self._running):
            path = verdict.kept[index]
            said = [*(tree.tokens[index][node] for node in path[1:]), verdict.next_tokens[index]]
            request.stats.steps += 1
            request.stats.drafted_tokens += tree.sizes[index] - 1
            request.row.step += 1
            piece = self._append(request, said, len(path) - 1)
            self._note_logprobs(request, scores, index, path[: len(piece.token_ids)], piece.token_ids)
            pieces.append(piece)
        self._dismiss()
        return pieces

    def _append(self, request: _Request, said: Sequence[int], accepted: int) -> Piece:
        """Commit what was said up to the first token that ends the text."""
        row, texts = request.row, []
        for token in said:
            row.tokens.append(token)
            texts.append(request.stream.feed(token) if request.stream else "")
            request.finish_reason = self._ending(request, token)
            if request.finish_reason:
                break
        if request.finish_reason and request.stream:
            texts[-1] += request.stream.finish()
        stats, count = request.stats, len(texts)
        stats.new_tokens += count
        stats.accepted_tokens += min(accepted, count)
        stats.seconds = time.perf_counter() - request.started
        return Piece(
            request=request.number,
            prompt_index=request.prompt_index,
            sample=request.sample,
            token_ids=list(said[:count]),
            drafted=[place < accepted for place in range(count)],
            texts=texts,
            finish_reason=request.finish_reason,
        )

    def _ending(self, request: _Request, token: int) -> str | None:
        if token in request.row.ends:
            return "stop"
        if request.stream and request.stream.stopped:
            return "stop"
        return "length" if request.row.remaining <= 0 else None

    @staticmethod
    def _note_logprobs(
        request: _Request, scores: Scores, index: int, path: Sequence[int], tokens: Sequence[int]
    ) -> None:
        count = request.row.params.logprobs
        if count is None:
            return
        logprobs = scores.logits_BNV[index, list(path)].float().log_softmax(-1)
        for token, law in zip(tokens, logprobs, strict=True):
            best = law.topk(min(count, law.shape[-1]))
            alternatives = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            request.logprobs.append(TokenLogprob(token, float(law[token]), alternatives))

    def _dismiss(self) -> None:
        """Release the rows that have ended; the last row takes the place of one that leaves, in every part alike."""
        for slot in reversed(range(len(self._running))):
            request = self._running[slot]
            if request.finish_reason is None:
                continue
            self._close(request)
            self.target.release(slot, len(self._running))
            self.drafter.release(slot)
            last = self._running.pop()
            if slot < len(self._running):
                self._running[slot] = last

    def _close(self, request: _Request) -> None:
        if request.started:
            request.stats.seconds = time.perf_counter() - request.started
        self._finished[request.number] = request

    def _read(self) -> None:
        """Read prompts: one chunk if rows are waiting for their next token, else until no more rows can join."""
        busy = bool(self._running)
        while self._reading or (self._waiting and len(self._running) < self.max_rows):
            self._reading = self._reading or self._start(self._waiting.popleft())
            begun = time.perf_counter()
            ready = self._read_chunk(self._reading)
            spent = time.perf_counter() - begun
            for request in [self._reading, *self._running]:
                request.stats.prefill_seconds += spent
            if ready:
                self._join(self._reading)
                self._reading = None
            if busy:
                return

    def _start(self, request: _Request) -> _Request:
        request.started = time.perf_counter()
        self.target.admit(request.row.limit)
        return request

    def _read_chunk(self, request: _Request) -> bool:
        """One chunk of a prompt into the slot behind the ready rows; True when all but the newest token is read."""
        states = self.target.prefill(request.row, len(self._running), self.drafter.reads)
        for layer, part in (states or {}).items():
            request.hidden.setdefault(layer, []).append(part)
        return self.target.cache.lengths[len(self._running)] >= len(request.row.tokens) - 1

    def _join(self, request: _Request) -> None:
        self._running.append(request)
        self.drafter.admit(request.row, {layer: torch.cat(parts, 1) for layer, parts in request.hidden.items()})
        request.hidden.clear()

    # ---- for callers

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Piece]:
        """Generate and yield pieces as they are accepted. Closing the iterator drops what is still running."""
        self._queue(prompts, params)
        return self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        try:
            while not self.is_idle:
                yield from self.step()
        finally:
            self.abort()
            self._finished.clear()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Generate to the end. One output per prompt and sample, in that order. Interrupted (Ctrl-C), it returns what it has,
        with the finish reason "interrupted"."""
        numbers = self._queue(prompts, params)
        try:
            while not self.is_idle:
                self.step()
        except KeyboardInterrupt:
            self.abort()
        except BaseException:
            self.abort()
            self._finished.clear()
            raise
        return [self._output(self._finished.pop(number)) for number in numbers if number in self._finished]

    def _queue(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[int]:
        batch = _as_batch(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} sampling parameters for {len(batch)} prompts: give one, or one for each")
        planned = [
            (prompt, self.encode(prompt), one or SamplingParams()) for prompt, one in zip(batch, each, strict=True)
        ]
        limits = [self._limit(tokens, one) for _, tokens, one in planned]
        self.reserve(min(self.max_rows, sum(one.n for *_, one in planned)), max(limits, default=1))
        return [n for index, (_, tokens, one) in enumerate(planned) for n in self.add(tokens, one, index)]

    def reserve(self, rows: int, length: int) -> None:
        """Allocate the target's cache once instead of with every admission."""
        self.target.reserve(rows, length)

    @staticmethod
    def _output(request: _Request) -> Output:
        return Output(
            text=request.stream.text if request.stream else None,
            token_ids=request.new_tokens,
            finish_reason=request.finish_reason or "interrupted",
            logprobs=request.logprobs if request.row.params.logprobs is not None else None,
            stats=request.stats,
            prompt_index=request.prompt_index,
            sample=request.sample,
        )


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def check_fit(target: Model, drafter: Drafter) -> None:
    """DrafterError if the drafter wants hidden states that the target does not have."""
    layers = target.network.cache_shape.layers
    outside = [layer for layer in drafter.reads if not 0 <= layer <= layers]
    if outside:
        raise DrafterError(f"the drafter {drafter.name} reads layer {outside[0]}, and the target has {layers}")
