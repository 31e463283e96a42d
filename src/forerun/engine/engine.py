"""The engine: rows come and go, and one loop serves them all.

    tree    = drafter.propose(context)
    scores  = target.score(tree)
    verdict = judge(tree, scores)
    target.keep(verdict); drafter.observe(verdict)
    emit

Plain decoding is the drafter that proposes nothing. A request waits, is read in chunks while the
others go on, joins the rows, and leaves when a stop rule holds, in the middle of an accepted block
if need be, or when it is cancelled.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Self

import torch

from forerun.accept.judge import Judgement, is_exact, judge, rule_of
from forerun.accept.lossy import Lossy
from forerun.chance import key_of
from forerun.constraint import Constraint, Matcher
from forerun.cost import NodePrice, Step, Table
from forerun.drafting.drafter import Context, Drafter
from forerun.engine.prompts import Prompt, Prompts, conversations, tokens_of
from forerun.engine.requests import Output, Piece, Request, Stats, TokenLogprob
from forerun.engine.session import Session, Wish, Wishes, wanted
from forerun.engine.text import TextStream
from forerun.errors import RequestError
from forerun.grammar import Grammars
from forerun.model import Model, Scores
from forerun.nn.network import Network
from forerun.nn.prefixes import Prefixes
from forerun.row import Row, final_chance
from forerun.sampling import SamplingParams
from forerun.slots import Slots
from forerun.sources.tokenizer import HuggingFaceTokenizer
from forerun.tree import TokenTree

WAKE_SECONDS = 0.1
"""Who waits for a turn looks after this time, in case nobody could say that it has come."""


class Engine:
    """A target, a drafter and the rows that are running.

    network: of the target; engines may share it, each has a cache of its own. drafter: this
    engine's alone, because it knows the rows. max_rows: how many requests run side by side; others
    wait; it may be changed while the engine is idle. eos: token ids that end a text unless a
    request ignores them. lossy: judge requests by this rule; the statistics of those that it
    touches then say that they are not exact. prefix_cache: bytes for what has been read already,
    so that prompts that begin alike are read once, by the target and by draft models (0: all is
    read anew); texts are the same, bit for bit. Use `forerun.load` to make one from a model folder.

    Who may call it: any thread may call `generate`, `stream`, `chat`, `add`, `cancel`, `clear`,
    `close`, `drive` and `step` at any time, but not from within a step (a logits processor cannot
    ask its own engine). There is no thread behind them: whoever waits for pieces drives the loop,
    one caller at a time, for everybody; pieces go to whoever asked for them, and the requests of
    all callers run in one batch. What interrupts the driver (Ctrl-C) costs the others a step, which
    is made again; any other error in a step ends the requests that were in it ("interrupted") and
    is raised to the callers of these. Everything else (`drafter.reset`, `max_rows`) is for one who
    knows that the engine is idle. Of several engines on one network one may be driven at a time.
    For asyncio there is `AsyncEngine`.
    """

    def __init__(
        self,
        network: Network,
        drafter: Drafter,
        tokenizer: HuggingFaceTokenizer | None = None,
        eos: Iterable[int] = (),
        max_rows: int = 16,
        lossy: Lossy | None = None,
        prefix_cache: int = 0,
    ):
        self.target = Model(network, drafter.max_nodes + 1)
        self.prefix_cache = prefix_cache
        self.drafter, self.tokenizer, self.lossy = drafter, tokenizer, lossy
        self.eos = frozenset(eos)
        self._grammars = Grammars(tokenizer.backend_tokenizer, network.vocab_size, self.eos) if tokenizer else None
        self.max_rows = max_rows
        self._share_memory()
        self.costs = Table()
        self.costs.know(drafter.known_costs)
        self._price = NodePrice(self.costs)
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._reading: Request | None = None
        self._running: Slots[Request] = Slots()
        self._numbers = count()
        self._room = (0, 0)  # rows and length to allocate before the next step
        self._inbox: deque[Piece] = deque()  # of requests that were added by hand
        self._turn = threading.Condition()  # held for moments only, never during a step
        self._driver: int | None = None  # the thread that makes a step
        self._is_whole = True  # no step has broken off
        self._cancelled: deque[int | None] = deque()  # None: whatever was added by hand is forgotten
        self._is_sweeping = False
        self._is_closed = False
        self._spelling = threading.Lock()

    def beside(self, drafter: Drafter, max_rows: int | None = None) -> Engine:
        """An engine on the same network with a cache and a drafter of its own. max_rows: as here, if not given."""
        rows = self.max_rows if max_rows is None else max_rows
        other = Engine(self.target.network, drafter, self.tokenizer, self.eos, rows, self.lossy, self.prefix_cache)
        other._grammars = self._grammars
        return other

    def _share_memory(self) -> None:
        """Every model remembers about as many tokens."""
        models = [self.target, *self.drafter.models]
        whole = sum(model.cache.token_bytes for model in models)
        for model in models:
            model.remember(self.prefix_cache * model.cache.token_bytes // whole)
        self.target.remember(self.target.prefixes.bound, self.drafter.reads)

    @property
    def prefixes(self) -> Prefixes:
        """What the target has read and may be asked to read again."""
        return self.target.prefixes

    # ---- for callers

    def generate(self, prompts: Prompts, params: Wishes = None, **wishes: Any) -> list[Output]:
        """Generate to the end. One output per prompt and sample, in that order. Interrupted
        (Ctrl-C), it returns what it has, with the finish reason "interrupted".

        prompts: one or several, as text, token ids, messages, or what a tokenizer returns
        (`forerun.engine.prompts`). params: SamplingParams or a mapping, for all or one for each.
        wishes: single sampling parameters (max_new_tokens=64), which hold for all. RequestError,
        before anything is generated, for what cannot be served.
        """
        return self.stream(prompts, params, **wishes).outputs()

    def stream(self, prompts: Prompts, params: Wishes = None, text: bool = True, **wishes: Any) -> Session:
        """As `generate`, but yields pieces as they are accepted. Closing the iterator drops what is
        still running of it.

        text: without it only token ids come out, and nothing is spent on spelling them.
        """
        return Session(self, prompts, wanted(params, wishes), text)

    def chat(
        self, messages: str | Prompts, params: Wishes = None, *, system: str | None = None, **wishes: Any
    ) -> list[Output]:
        """Answer a conversation, or several, through the model's chat template; otherwise as `generate`.

        messages: [{"role": "user", "content": "Hi"}, ...]; text alone is what the user says. An
        assistant's message at the end is gone on with. system: a system message to begin with. To see
        an answer while it comes, give the messages to `stream`.
        RequestError if the model has no template, or the template refuses the messages.
        """
        return self.generate(conversations(messages, system), params, **wishes)

    def add(
        self,
        prompt: Prompt,
        params: Wish | None = None,
        prompt_index: int = 0,
        text: bool = True,
        inbox: deque[Piece] | None = None,
    ) -> list[int]:
        """Queue a prompt; returns one request number per sample. RequestError if it cannot be served.

        inbox: where the pieces go; without one, `step` returns them. text: as for `stream`.
        """
        params = SamplingParams.of(params)
        tokens = self.encode(prompt)
        limit = self.limit_of(tokens, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        spell = None
        if self.tokenizer is not None and (text or params.stop):
            spell = partial(TextStream, self.tokenizer.backend_tokenizer, tokens, tuple(params.stop))
        box = self._inbox if inbox is None else inbox
        requests = []
        for sample in range(params.n):
            matcher = self._matcher(params, ends)
            row = Row(list(tokens), len(tokens), params, key_of(seed, sample), limit, ends=ends, matcher=matcher)
            stats = Stats(self.drafter.name, exact=is_exact(self.lossy, row))
            requests.append(Request(next(self._numbers), prompt_index, sample, row, stats, box, spell))
        with self._turn:
            self._demand_open()
            self._waiting.update((request.number, request) for request in requests)
        return [request.number for request in requests]

    def encode(self, prompt: Prompt, template: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids of a prompt of any form. RequestError for what is none, or is outside the vocabulary.

        template: what else a chat template is told (tools, for instance); "chat_template": one to use instead of the
        model's own.
        """
        with self._spelling:
            tokens = tokens_of(prompt, self.tokenizer, template)
        outside = next((token for token in tokens if not 0 <= token < self.target.vocab_size), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is outside the vocabulary of {self.target.vocab_size}")
        return tokens

    def limit_of(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """The total length at which a prompt's text must end. RequestError if it cannot be served."""
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
        self._matcher(params, ())
        return min(context, len(tokens) + params.max_new_tokens) if params.max_new_tokens else context

    def _matcher(self, params: SamplingParams, ends: Collection[int]) -> Matcher | None:
        """For a row with these ends. RequestError for a constraint that cannot be followed."""
        if params.constraint is None:
            return None
        if self._grammars is None:
            raise RequestError("a constraint needs a tokenizer, and this model has none: use processors")
        return self._grammars.matcher(Constraint.of(params.constraint), ends)

    def reserve(self, rows: int, length: int) -> None:
        """Allocate the target's cache once, before the next step, instead of with every admission."""
        with self._turn:
            self._room = max(self._room[0], rows), max(self._room[1], length)

    def cancel(self, *numbers: int) -> None:
        """End these requests, whether they wait, are being read or run; those that have ended already are left alone.

        Their last pieces say "interrupted" and carry what they have, and come where all their
        pieces came: at once, or, while another caller makes a step, when that is done. Nothing
        changes for the other requests.
        """
        with self._turn:
            self._cancelled.extend(numbers)
            if self._driver is None:
                self._sweep()

    def abandon(self, inbox: deque[Piece]) -> None:
        """Cancel every request whose pieces go there."""
        with self._turn:
            self.cancel(*(request.number for request in self._requests() if request.inbox is inbox))

    def clear(self) -> None:
        """Cancel every request, and forget the pieces of those that were added by hand."""
        with self._turn:
            self._cancelled.extend(request.number for request in self._requests())
            self._cancelled.append(None)
            self.cancel()

    def close(self) -> None:
        """Cancel every request, and refuse all that come later. Memory goes with the last reference to the engine."""
        with self._turn:
            self._is_closed = True
            self.clear()

    def _demand_open(self) -> None:
        if self._is_closed:
            raise RequestError("this engine is closed: load another one, or close this one later")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_idle(self) -> bool:
        """No request is left, and no piece that `step` would return."""
        return not (self._waiting or self._reading or self._running or self._inbox)

    @property
    def is_busy(self) -> bool:
        """Some request is left."""
        with self._turn:
            return bool(self._requests())

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run or are being read, and how many wait."""
        with self._turn:
            return len(self._running) + bool(self._reading), len(self._waiting)

    def _requests(self) -> list[Request]:
        return [*self._waiting.values(), *([self._reading] if self._reading else []), *self._running]

    def step(self) -> list[Piece]:
        """Read a chunk of a waiting prompt, then make one step with every row that is ready.
        Returns what has been said since the last call by the requests that were added by hand."""
        self._demand_open()
        self._drive(None)
        with self._turn:
            return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def await_piece(self, inbox: deque[Piece]) -> None:
        """Return when there is a piece in this inbox: drive the loop, or wait for the one who does."""
        while not inbox:
            self._drive(inbox)
            with self._turn:
                if not inbox and not self._requests():
                    raise RuntimeError("a piece is awaited of requests that are gone: this is a mistake of the engine")

    def drive(self) -> bool:
        """Make one step for whoever has asked for something; False where nobody has. An error is
        raised only if no request could be told of it."""
        if self.is_busy:
            self._drive(())
            return True
        return False

    # ---- the loop

    def _drive(self, inbox: Sequence[Piece] | None) -> None:
        """When the turn has come, make one step, unless there is something in this inbox by then. An error is
        told to those whom it concerns with their last pieces, and raised where there is no inbox to find it in.

        Ctrl-C may come between any two lines. So whatever it breaks off is left to be mended by the next
        step (`_is_whole`), and the turn is given back in the innermost `finally`.
        """
        me = threading.get_ident()
        if self._driver == me:
            raise RequestError("an engine cannot be asked from within its own step: use another engine there")
        try:
            with self._turn:
                while self._driver is not None and not inbox:
                    self._turn.wait(WAKE_SECONDS)
                if inbox:
                    return
                self._driver = me
            if not self._is_whole:
                self._recover(None)
            self._is_whole = False
            self._step()
            self._is_whole = True
        except Exception as error:
            is_told = self._recover(error)
            if inbox is None or not is_told:
                raise
        finally:
            self._give_back(me)

    def _give_back(self, me: int) -> None:
        try:
            if self._driver == me:
                with self._turn:
                    self._sweep()
        finally:
            if self._driver == me:
                self._driver = None
                with self._turn:
                    self._turn.notify_all()

    @torch.inference_mode()
    def _step(self) -> None:
        self._read()
        if self._running:
            self._decode()

    def _decode(self) -> None:
        rows = [request.row for request in self._running]
        context = self._context(rows)
        begun = time.perf_counter()
        tree = self.drafter.propose(context)
        drafted = time.perf_counter()
        scores = self.target.score(tree, rows, self.drafter.reads)
        scored = time.perf_counter()
        judgement = judge(
            tree, scores.logits_BNV, rows, final_chance(rows), scores.best_BN, self.lossy, tells_laws=False
        )
        kept = judgement.verdict.kept
        self.target.keep(kept)
        judged = time.perf_counter()
        origins = [self.drafter.origins(slot, path) if len(path) > 1 else [] for slot, path in enumerate(kept)]
        self.drafter.observe(context, tree, judgement.verdict, scores)
        step = Step(
            rows=len(rows),
            nodes=sum(tree.sizes),
            context=sum(len(row.tokens) for row in rows),
            tokens=sum(map(len, kept)),
            draft_seconds=drafted - begun + time.perf_counter() - judged,
            verify_seconds=scored - drafted,
            other_seconds=judged - scored,
            rejected=judgement.verdict.bonus.count(False),
        )
        self.costs.learn(step)
        self._price.learn(step)
        for request in self._running:
            request.stats.add(step)
            if tree.nodes > 1 or not request.stats.rule:
                request.stats.rule = rule_of(judgement, request.row)
        if self._remembers_answers:
            for index, request in enumerate(self._running):
                request.seen.append(
                    {layer: part[index : index + 1, kept[index]] for layer, part in scores.hidden.items()}
                )
        self._emit(tree, scores, judgement, origins)

    def _context(self, rows: Sequence[Row]) -> Context:
        """A lossy rule lets proposals show in the text, so there the clock has no say in them."""
        price = self._price.value if self.lossy is None else None
        return Context(
            rows=rows,
            budgets=[self.drafter.max_nodes] * len(rows),
            depths=[row.remaining - 1 if row.params.drafts else 0 for row in rows],
            device=self.target.device,
            prices=None if price is None else [price] * len(rows),
            costs=self.costs if self.lossy is None else None,
        )

    def _emit(self, tree: TokenTree, scores: Scores, judgement: Judgement, origins: Sequence[Sequence[str]]) -> None:
        verdict, is_over = judgement.verdict, judgement.is_over
        for index, request in enumerate(self._running):
            if is_over and is_over[index]:
                request.interrupt(_nothing_left(request.row))
                continue
            path = verdict.kept[index]
            said = [*(tree.tokens[index][node] for node in path[1:]), verdict.next_tokens[index]]
            texts = request.commit(said)
            del said[len(texts) :]
            self._note_logprobs(request, scores, index, path[: len(said)], said)
            request.tell(said, texts, tree.sizes[index] - 1, origins[index])
        for slot in reversed(range(len(self._running))):
            if self._running[slot].is_over:
                self._release(slot)

    @staticmethod
    def _note_logprobs(
        request: Request, scores: Scores, index: int, path: Sequence[int], tokens: Sequence[int]
    ) -> None:
        most = request.row.params.logprobs
        if most is None:
            return
        logprobs = scores.logits_BNV[index, list(path)].float().log_softmax(-1)
        for token, law in zip(tokens, logprobs, strict=True):
            best = law.topk(min(most, law.shape[-1]))
            alternatives = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            request.logprobs.append(TokenLogprob(token, float(law[token]), alternatives))

    def _release(self, slot: int) -> None:
        """Close a slot; the last row takes its place, in every part alike."""
        if self._remembers_answers:
            self._remember(slot)
        self.target.release(slot, len(self._running))
        self.drafter.release(slot)
        self._running.release(slot)

    # ---- those who come

    def _read(self) -> None:
        """Read prompts: one chunk if rows are waiting for their next token, else until no more rows can join."""
        rows, length = self._room
        if rows:
            self._room = (0, 0)
            self.target.reserve(min(self.max_rows, rows), length)
        busy = bool(self._running)
        while request := self._reading or self._next():
            begun = time.perf_counter()
            ready = self._read_chunk(request)
            spent = time.perf_counter() - begun
            for one in [request, *self._running]:
                one.stats.prefill_seconds += spent
            if ready:
                self._join(request)
            if busy:
                return

    def _next(self) -> Request | None:
        with self._turn:
            if not self._waiting or len(self._running) >= self.max_rows:
                return None
            self._reading = next(iter(self._waiting.values()))
            del self._waiting[self._reading.number]
        self._reading.begin()
        self.target.admit(self._reading.row.limit)
        return self._reading

    def _read_chunk(self, request: Request) -> bool:
        """One chunk of a prompt into the slot behind the ready rows; True when all but the newest token is read."""
        row, slot, lengths = request.row, len(self._running), self.target.cache.lengths
        if not lengths[slot]:
            request.seen.append(self.prefixes.recall(row.params.tenant, row.tokens[:-1], slot))
            if not request.stats.prefill_seconds:  # else a step has broken off, and it begins again
                request.stats.cached_tokens = lengths[slot]
        request.seen.append(self.target.prefill(row, slot, self.drafter.reads) or {})
        return lengths[slot] >= len(row.tokens) - 1

    def _join(self, request: Request) -> None:
        self._running.append(request)
        self._reading = None
        self.drafter.admit(request.row, request.seen.joined())
        self._remember(len(self._running) - 1)
        if self._remembers_answers:
            request.seen.forget(self.prefixes.whole(len(request.row.tokens) - 1))
        else:
            request.seen.clear()

    def _remember(self, slot: int) -> None:
        """Keep what the target has read of a row's text for others that begin alike."""
        row, seen = self._running[slot].row, self._running[slot].seen
        states = {layer: part[0] for layer, part in seen.joined().items()}
        self.prefixes.remember(row.params.tenant, row.tokens, slot, states, seen.since)

    @property
    def _remembers_answers(self) -> bool:
        """What was read a few tokens at a time is as good as prompts, which are read in chunks."""
        return self.prefixes.bound > 0 and self.target.grain == 1

    # ---- those who leave before their end

    def _sweep(self) -> None:
        """Drop the requests that were cancelled. Nobody is making a step."""
        if self._is_sweeping:  # a session that was forgotten cancels wherever it is collected
            return
        self._is_sweeping = True
        try:
            if not self._is_whole:
                self._recover(None)
            while self._cancelled:
                number = self._cancelled[0]
                if number is None:
                    self._inbox.clear()
                else:
                    self._drop(number)
                self._cancelled.popleft()
        finally:
            self._is_sweeping = False
            self._turn.notify_all()

    def _drop(self, number: int) -> None:
        """Tell first, then let go: broken off in between, the rest is left to `_recover`."""
        request = next((one for one in self._requests() if one.number == number), None)
        if request is None:
            return
        request.interrupt()
        if self._waiting.pop(number, None):
            return
        self._is_whole = False
        if request is self._reading:
            self._reading = None
            self.target.release(len(self._running))
        else:
            self._release(next(slot for slot, one in enumerate(self._running) if one is request))
        self._is_whole = True

    def _recover(self, error: Exception | None) -> bool:
        """After a step that broke off anywhere: nothing is believed of what the target and the drafter
        hold of these rows. They go back to the head of the queue, to begin again behind what was told of
        them; an error ends them. Breaking off here too does no harm: all of it can be done again. True if
        somebody was told of the error."""
        held = {one.number: one for one in [*self._running, *([self._reading] if self._reading else [])]}
        with self._turn:
            for request in reversed([one for one in held.values() if not one.is_over]):
                request.is_told = False
                self._waiting[request.number] = request
                self._waiting.move_to_end(request.number, last=False)
        while self.target.cache.rows:
            self.target.release(self.target.cache.rows - 1)
        for slot in reversed(range(len(self._running))):
            self.drafter.release(slot)
        self._running, self._reading, self._is_whole = Slots(), None, True
        for number, request in held.items() if error else ():
            with self._turn:
                if self._waiting.pop(number, None):
                    request.interrupt(error)
        return bool(held)


def _nothing_left(row: Row) -> RequestError:
    """Why no token may follow a row's text."""
    if row.matcher and row.matcher.problem:
        return RequestError(
            f"the constraint cannot be followed any further ({row.matcher.problem}): give a simpler one"
        )
    constraint = "the constraint, " if row.matcher else ""
    return RequestError(
        f"{constraint}the processors and the bias forbid every token at once: leave one, such as the end of the text"
    )
