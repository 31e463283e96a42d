"""forerun, through its Python API. Arguments: a model folder and, optionally, --kernels (or instructions)."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from worker_protocol import WARM_UP, run, token_ids

import forerun
from forerun.native import library
from forerun.row import Row
from forerun.tree import TokenTree


class Forerun:
    """`forward` is `Model.score` of a chain: building the tensors of a feed is in it, drafting and judging are not.

    The engine's tokenizer is taken away: no other engine here turns its ids into text.
    """

    def __init__(self, given: argparse.Namespace):
        torch.set_num_threads(given.threads)
        instructions = given.kernels in library.ISAS
        if instructions and not library.use_isa(given.kernels):
            raise SystemExit(f"this processor has no {given.kernels}")
        options: dict[str, Any] = {} if given.kernels is None or instructions else {"kernels": given.kernels}
        self._engine = forerun.load(given.model, dtype="bf16", device="cpu", prefix_cache=0, **options)
        self._engine.tokenizer = None
        self._params = forerun.SamplingParams(temperature=0.0, ignore_eos=True)
        self.about = {
            "forerun": forerun.__version__,
            "torch": torch.__version__,
            "kernels": given.kernels or "default",
            "instructions": library.active_isa() if library.is_there() else None,
            "network": type(self._engine.target.network).__name__,
        }

    def forward(self, tokens: int, context: int, repeats: int) -> list[float]:
        model = self._engine.target
        row = Row(token_ids(context + 1), context + 1, self._params, key=0, limit=context + tokens + 1)
        slot = model.admit(row.limit)
        try:
            while model.prefill(row, slot) is not None:
                pass
            tree = TokenTree.chain([token_ids(tokens, start=context)], model.device)
            return [self._timed(tree, row) for _ in range(WARM_UP + repeats)][WARM_UP:]
        finally:
            model.release(slot)

    def _timed(self, tree: TokenTree, row: Row) -> float:
        begun = time.perf_counter()
        self._engine.target.score(tree, [row])
        milliseconds = 1e3 * (time.perf_counter() - begun)
        self._engine.target.keep([[]])
        return milliseconds

    def plain(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        params = forerun.SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=new)
        begun = time.perf_counter()
        outputs = self._engine.generate(prompts, params)
        return time.perf_counter() - begun, [output.token_ids for output in outputs]


if __name__ == "__main__":
    run(Forerun)
