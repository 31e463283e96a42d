"""OpenVINO in bf16. Argument: a folder that optimum-cli exported."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker_protocol import WARM_UP, run, token_ids

GROWTH = 128
"""Tokens by which the context may grow before it is read anew."""


class OpenVino:
    """`forward` runs the exported stateful model; its cache cannot be cut back, so the context
    grows by at most GROWTH tokens and is then read again (not timed). `plain` is
    `openvino_genai.LLMPipeline` with a scheduler (paged attention, continuous batching). Prefix
    caching is off: it would remember the prompts of earlier rounds.
    """

    def __init__(self, given: argparse.Namespace):
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": given.threads}
        model = openvino.Core().compile_model(Path(given.model) / "openvino_model.xml", "CPU", settings)
        self._request = model.create_infer_request()
        self._pipeline = openvino_genai.LLMPipeline(given.model, "CPU", scheduler_config=_scheduler(), **settings)
        self._length = 0
        self.about = {
            "openvino": openvino.__version__,
            "openvino_genai": openvino_genai.__version__,
            "precision": str(model.get_property("INFERENCE_PRECISION_HINT")),
            "cache": str(model.get_property("KV_CACHE_PRECISION")),
            "plain": "LLMPipeline, scheduler, no prefix caching",
        }

    def forward(self, tokens: int, context: int, repeats: int) -> list[float]:
        times: list[float] = []
        self._restart(tokens, context)
        while len(times) < repeats:
            if self._length + tokens > context + GROWTH:
                self._restart(tokens, context)
            times.append(self._feed(tokens))
        return times

    def _restart(self, tokens: int, context: int) -> None:
        """Read the context from the start, and warm up."""
        self._request.reset_state()
        self._length = 0
        self._feed(context)
        for _ in range(min(WARM_UP, GROWTH // tokens - 1)):
            self._feed(tokens)

    def _feed(self, tokens: int) -> float:
        """Milliseconds of reading so many further tokens."""
        start, stop = self._length, self._length + tokens
        inputs: dict[str, Any] = {
            "input_ids": np.asarray([token_ids(tokens, start)], dtype=np.int64),
            "attention_mask": np.ones((1, stop), dtype=np.int64),
            "position_ids": np.arange(start, stop, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        begun = time.perf_counter()
        self._request.infer(inputs, share_inputs=True, share_outputs=True)
        milliseconds = 1e3 * (time.perf_counter() - begun)
        self._length = stop
        return milliseconds

    def plain(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        ids = np.asarray(prompts, dtype=np.int64)  # the driver's prompts are equally long
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        begun = time.perf_counter()
        results = self._pipeline.generate(inputs, max_new_tokens=new, ignore_eos=True, do_sample=False)
        return time.perf_counter() - begun, [list(ids) for ids in results.tokens]


def _scheduler() -> openvino_genai.SchedulerConfig:
    """One gigabyte of cache, and no memory of earlier prompts."""
    config = openvino_genai.SchedulerConfig()
    config.cache_size = 1
    config.enable_prefix_caching = False
    return config


if __name__ == "__main__":
    run(OpenVino)
