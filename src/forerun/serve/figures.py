"""What is counted: for Prometheus under vLLM's names with our prefix, and for one request that asks for it.

A draft is a step in which something was proposed for a sample. Its length is how many tokens were proposed (the nodes
of a tree), and accepted are those of them that were kept.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forerun.engine.engine import Engine
from forerun.engine.requests import Output, Piece, Stats
from forerun.nn.cache import Cache

PREFIX, ENGINE = "forerun:", "0"
INSTANTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
"""Bounds in seconds."""
LENGTHS = tuple(2**power for power in range(18))
DEEPEST = 32
"""Positions of a draft that have a counter of their own; what is accepted behind them is counted at the last."""


class Figures:
    """The metrics of one server. model: its name, a label of every one."""

    def __init__(self, model: str, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_Load(engine, model))
        self._labels = {"model_name": model, "engine": ENGINE}
        self.drafts = self._counter("spec_decode_num_drafts", "Drafts.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Tokens of drafts that were kept.")
        self._by_position = Counter(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that were kept, by their position.",
            [*self._labels, "position"],
            registry=self.registry,
        )
        self._positions = [
            self._by_position.labels(**self._labels, position=str(position)) for position in range(DEEPEST)
        ]
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Tokens of prompts that need not be read.")
        self.generation_tokens = self._counter("generation_tokens", "New tokens.")
        self._ends = Counter(
            f"{PREFIX}request_success",
            "Samples that came to their end.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self.responses = Counter(
            f"{PREFIX}http_responses",
            "Answers by endpoint and status; 499: the client had gone.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.first = self._histogram("time_to_first_token_seconds", "From a request to its first token.", INSTANTS)
        self.between = self._histogram(
            "inter_token_latency_seconds", "Between tokens; those of one step share its time.", INSTANTS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of a token behind the first, by sample.", INSTANTS
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", INSTANTS)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Tokens of a prompt.", LENGTHS)
        self.lengths = self._histogram("request_generation_tokens", "New tokens of a sample.", LENGTHS)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def watch(self) -> Watch:
        """Of one request that begins now."""
        return Watch(self)

    def count(self, accepted: int, proposed: int) -> None:
        """A draft."""
        self.drafts.inc()
        self.drafted.inc(proposed)
        self.accepted.inc(accepted)
        for position in range(accepted):
            self._positions[min(position, DEEPEST - 1)].inc()

    def ended(self, reason: str) -> None:
        self._ends.labels(**self._labels, finished_reason=reason).inc()

    def _counter(self, name: str, sense: str) -> Counter:
        return Counter(PREFIX + name, sense, [*self._labels], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, sense: str, bounds: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, sense, [*self._labels], registry=self.registry, buckets=bounds)
        return made.labels(**self._labels)


@dataclass(eq=False)  # registries want a hash
class _Load(Collector):
    """What runs and waits, and how full the memory is, looked at when somebody asks."""

    engine: Engine
    model: str

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running, waiting = self.engine.load
        cache = self.engine.target.cache
        room = self.engine.max_rows * cache.capacity
        for name, sense, value in (
            ("num_requests_running", "Samples that run or whose prompt is being read.", running),
            ("num_requests_waiting", "Samples that wait for a row.", waiting),
            ("kv_cache_usage_perc", "Share of the memory for texts that is in use; 1 is all.", _share(cache, room)),
        ):
            family = GaugeMetricFamily(PREFIX + name, sense, labels=["model_name", "engine"])
            family.add_metric([self.model, ENGINE], value)
            yield family


def _share(cache: Cache, room: int) -> float:
    return sum(list(cache.lengths)) / room if room else 0.0


class Watch:
    """One request, from its arrival on: everything that is counted of its pieces is counted here."""

    def __init__(self, figures: Figures):
        self._figures = figures
        self._begun = time.perf_counter()
        self._last: dict[int, float] = {}
        self._firsts: dict[int, float] = {}
        self.speculation = Speculation()
        self.new_tokens = 0
        self.cached_tokens = 0

    @property
    def first_token_seconds(self) -> float | None:
        return min(self._firsts.values()) - self._begun if self._firsts else None

    def prompts(self, lengths: list[int]) -> None:
        """These are to be read."""
        self._figures.prompt_tokens.inc(sum(lengths))
        for length in lengths:
            self._figures.prompt_lengths.observe(length)

    def piece(self, piece: Piece) -> None:
        now, count = time.perf_counter(), len(piece.token_ids)
        if count:
            self._tokens(piece.request, count, now)
        if piece.proposed:
            accepted = sum(map(bool, piece.origins))
            self._figures.count(accepted, piece.proposed)
            self.speculation.add(accepted, piece.proposed)
        if piece.output:
            self._end(piece.output, piece.request, now)

    def _tokens(self, sample: int, count: int, now: float) -> None:
        self.new_tokens += count
        self._figures.generation_tokens.inc(count)
        if sample in self._last:
            each = (now - self._last[sample]) / count
            for _ in range(count):
                self._figures.between.observe(each)
        else:
            self._firsts[sample] = now
            self._figures.first.observe(now - self._begun)
        self._last[sample] = now

    def _end(self, output: Output, sample: int, now: float) -> None:
        figures, count = self._figures, len(output.token_ids)
        cached = output.stats.cached_tokens
        self.cached_tokens += cached
        figures.cached_tokens.inc(cached)
        figures.ended("abort" if output.finish_reason == "interrupted" else output.finish_reason)
        figures.whole.observe(now - self._begun)
        figures.lengths.observe(count)
        if count > 1:
            figures.per_token.observe((now - self._firsts[sample]) / (count - 1))


@dataclass
class Speculation:
    """What the drafts of one request came to. drafts[proposed, accepted]: how many there were of these."""

    drafts: Tally[tuple[int, int]] = field(default_factory=Tally)

    def add(self, accepted: int, proposed: int) -> None:
        self.drafts[proposed, accepted] += 1

    def as_dict(self, stats: Stats) -> dict[str, object]:
        """vLLM's names, and whether the output is exact. stats: of any of its samples."""
        count = self.drafts.total()
        drafted = sum(proposed * times for (proposed, _), times in self.drafts.items())
        accepted = sum(kept * times for (_, kept), times in self.drafts.items())
        return {
            "mean_acceptance_length": 1 + accepted / count if count else 1.0,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": self._histogram(),
            "acceptance_histogram_by_draft_length": {
                str(length): self._histogram(length) for length in sorted({proposed for proposed, _ in self.drafts})
            },
            "num_spec_steps": count,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": max((proposed for proposed, _ in self.drafts), default=0),
            "drafter": stats.drafter,
            "rule": stats.rule,
            "exact": stats.exact,
        }

    def _histogram(self, length: int | None = None) -> list[int]:
        """How many drafts (of this length) had 0, 1, 2, ... tokens kept."""
        kept = Tally[int]()
        for (proposed, accepted), times in self.drafts.items():
            if length in (None, proposed):
                kept[accepted] += times
        return [kept[count] for count in range(max(kept, default=-1) + 1)]
