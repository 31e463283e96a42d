"""Several drafters on one target: the target's weights are read once."""

from __future__ import annotations

from forerun.drafters import Workshop, build
from forerun.engine import Engine, check_fit
from forerun.nn.load import load_network


def beside(engine: Engine, spec: str) -> Engine:
    """An engine with the same target and another drafter. Of all the engines on one target only one may have work.

    Raises DrafterError or CheckpointError as `forerun.load` does.
    """
    target = engine.target
    network = target.network
    workshop = Workshop(target, lambda checkpoint: load_network(checkpoint, network.dtype, network.device))
    drafter = build(spec, workshop)
    check_fit(target, drafter)
    return Engine(target, drafter, engine.tokenizer, engine.eos, engine.max_rows)
