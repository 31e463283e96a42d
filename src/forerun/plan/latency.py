"""What draft models of shapes that nobody has trained would cost here: stacks with random weights are timed as draft
models run, after the target has read a token, as it does between two proposals.

Stacks of one and of four layers tell the fixed part of a step and that of a layer. They have a vocabulary of hardly any
tokens; what the target's own adds is timed once for every width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import torch

from forerun.cost import Table
from forerun.engine.engine import Engine
from forerun.nn.machine import described
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.plan.calibrate import machine_of
from forerun.plan.design import LayerKind, Measured, kind_of, line
from forerun.plan.measure import Transcript, target_cost, writer_cost
from forerun.sampling import SamplingParams
from forerun.train.run import Watch, unwatched

FEW, MANY = 1, 4
"""Layers of the stacks that are timed."""
NO_VOCABULARY = 64
"""Tokens of a vocabulary that costs next to nothing."""
ROUNDS = 8


def measured(
    engine: Engine,
    shapes: Iterable[TransformerConfig],
    text: Transcript,
    params: SamplingParams,
    rounds: int | None = None,
    watch: Watch = unwatched,
) -> Measured:
    """Costs of these shapes beside this target, whatever their depth. text: what stands in front of a step."""
    network, rounds = engine.target.network, rounds or ROUNDS
    kinds = {kind_of(config): config for config in shapes}
    work = len(kinds) + len({config.width for config in kinds.values()})
    layers, heads, overheads = dict[LayerKind, tuple[float, float]](), dict[int, float](), list[float]()
    for kind, config in kinds.items():
        watch(len(layers) + len(heads), work)
        config = replace(config, windows=(), max_length=network.max_length)  # that of a draft may be shorter
        small = replace(config, vocab_size=NO_VOCABULARY, tied=True)
        steps = {}
        for depth in (FEW, MANY):
            overhead, steps[depth] = _step(network, replace(small, layers=depth), text, params, rounds)
            overheads.append(overhead)
        layers[kind] = _sensible(*line(steps))
        if config.width not in heads:
            _, whole = _step(network, replace(config, layers=FEW, tied=True), text, params, rounds)
            heads[config.width] = max(0.0, whole - steps[FEW])
    verifying = [(int(tokens), seconds) for tokens, seconds in target_cost(engine, text, params).points]
    about = machine_of(engine) | {
        "described": described(network.device),
        "context": len(text.tokens),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
    }
    return Measured(layers, heads, verifying, max(0.0, median(overheads)), about)


def _sensible(fixed: float, each: float) -> tuple[float, float]:
    """Noise must not make a layer free, or a step without layers cheaper than nothing."""
    return max(0.0, fixed), max(0.0, each)


def _step(
    target: Network, config: TransformerConfig, text: Transcript, params: SamplingParams, rounds: int
) -> tuple[float, float]:
    """Of a draft model of this shape: seconds of a proposal beside its steps, and of a step."""
    torch.manual_seed(0)
    module = Transformer(config).initialise().to(target.device, target.dtype)
    network = target.backend.pack(module, target.weights)
    short = replace(text, tokens=tuple(token % config.vocab_size for token in text.tokens))
    return step_of(writer_cost(network, short, params, target, rounds))


def step_of(writing: Table) -> tuple[float, float]:
    """Of what so many tokens take: the part beside the tokens, and that of a token."""
    return line({int(tokens): seconds for tokens, seconds in writing.points})
