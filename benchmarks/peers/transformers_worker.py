"""transformers, in bf16 with its dynamic cache. Argument: a model folder."""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from worker_protocol import WARM_UP, run, token_ids


class Transformers:
    """`forward` calls the model on a cache that is cropped after every call; `plain` is `generate`."""

    def __init__(self, given: argparse.Namespace):
        torch.set_num_threads(given.threads)
        self._model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None
        self.about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": self._model.config._attn_implementation,
        }

    @torch.inference_mode()
    def forward(self, tokens: int, context: int, repeats: int) -> list[float]:
        cache = DynamicCache(config=self._model.config)
        self._model(torch.tensor([token_ids(context)]), past_key_values=cache, logits_to_keep=1)
        ids = torch.tensor([token_ids(tokens, start=context)])
        return [self._timed(ids, cache) for _ in range(WARM_UP + repeats)][WARM_UP:]

    def _timed(self, ids: torch.Tensor, cache: DynamicCache) -> float:
        begun = time.perf_counter()
        self._model(ids, past_key_values=cache)
        milliseconds = 1e3 * (time.perf_counter() - begun)
        cache.crop(-ids.shape[1])
        return milliseconds

    @torch.inference_mode()
    def plain(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts)  # the driver's prompts are equally long
        begun = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - begun, output[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    run(Transformers)
