"""Draft models that were trained: what they bring by replay, what they cost, and what they say about others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forerun.bench import suites
from forerun.engine.engine import Engine
from forerun.errors import DrafterError, ForerunError
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.nn.transformer import TransformerConfig
from forerun.plan.acceptance import Given, Replayed, Trained, fit, replayed
from forerun.plan.design import Believed, Latency, Pace, best_pace
from forerun.plan.measure import Transcript, texts_of
from forerun.sampling import SamplingParams
from forerun.train.distill import Sample
from forerun.train.small import PRUNING


@dataclass(frozen=True)
class Draft:
    """trained_on: tokens, None where nobody knows."""

    name: str
    config: TransformerConfig
    accepted: Replayed
    trained_on: float | None = None

    def pace(self, latency: Latency) -> Pace:
        return best_pace(self.accepted, latency.step(self.config), latency)

    def speed(self, latency: Latency) -> float:
        """Tokens per second, as far ahead as is best."""
        return self.pace(latency).throughput

    def as_dict(self, latency: Latency) -> dict[str, Any]:
        found = self.pace(latency)
        return {
            "name": self.name,
            "parameters": self.config.parameters,
            "step_seconds": latency.step(self.config),
            "rate": self.accepted.rate,
            "length": found.length,
            "tokens_per_step": found.tokens,
            "interval": list(self.accepted.interval(found.length)),
            "speedup": found.throughput * latency.verify(1),
            "trained_on": self.trained_on,
        }

    def row(self, latency: Latency) -> list[str]:
        """For a table: name, rate, milliseconds of a step, length, tokens per step, speed-up."""
        one = self.as_dict(latency)
        low, high = one["interval"]
        tokens = f"{one['tokens_per_step']:.2f} ({low:.2f} to {high:.2f})"
        step = f"{1e3 * one['step_seconds']:.3f}"
        return [self.name, f"{one['rate']:.2f}", step, str(one["length"]), tokens, f"{one['speedup']:.2f}x"]


def measure(path: str, target: Network, samples: Sequence[Sample]) -> Draft:
    """By replay. Raises DrafterError for what is no draft model of this target."""
    kernels = "auto" if target.backend.keeps_bits else "torch"
    network = load_network(path, target.dtype, target.device, kernels)
    config = getattr(network, "config", None)
    if network.vocab_size != target.vocab_size or not isinstance(config, TransformerConfig):
        raise DrafterError(f"{path} is no Llama, Mistral or Qwen of the target's vocabulary: leave this draft out")
    return Draft(Path(path).name, config, replayed(network, samples), trained_on(Path(path)))


def trained_on(folder: Path) -> float | None:
    """Tokens that were read in the training of a draft model of ours, None of any other one."""
    try:
        about = json.loads((folder / PRUNING).read_text())
        schedule = about["schedule"]
        return max(1.0, float(schedule["steps"] * schedule["parts"] * about["rows"] * about["length"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def believing(drafts: Sequence[Draft], others: Believed) -> Believed:
    """What was replayed of shapes that were trained; of others what is believed of them."""
    measured = {_bare(one.config): one.accepted for one in drafts}
    return lambda config: measured.get(_bare(config)) or others(config)


def predicted(drafts: Sequence[Draft], tokens: float | None = None) -> Believed:
    """What drafts of other shapes would bring, as a fit to these has it. tokens: that they would be trained on; None:
    as the best-trained of these. DrafterError where that is guesswork."""
    known = all(one.trained_on for one in drafts)
    seen = [one.trained_on if known and one.trained_on else 1.0 for one in drafts]
    points = [
        Trained(one.config.parameters_outside_vocabulary, one.config.layers, count, one.accepted.rate)
        for one, count in zip(drafts, seen, strict=True)
    ]
    law = fit(points)
    wanted = (tokens if known and tokens else None) or max(seen)
    return lambda config: Given((law.rate(config.parameters_outside_vocabulary, config.layers, wanted),))


def _bare(config: TransformerConfig) -> TransformerConfig:
    return replace(config, windows=(), tied=True)


def text_for(engine: Engine, params: SamplingParams) -> Transcript:
    """What stands in front of the steps that are timed: an answer to a built-in prompt, or without a tokenizer to
    numbers."""
    try:
        prompts = [engine.encode(one.prompt) for one in suites.spread(suites.load())[:1]]
    except ForerunError:
        prompts = [[3 + 7 * place % (engine.target.vocab_size - 3) for place in range(32)]]
    room = engine.target.max_length // 4  # timing moves the text on by hundreds of tokens
    (text,) = texts_of(engine, [prompt[:room] for prompt in prompts], params)
    return text
