"""llama.cpp, through the low-level functions of llama-cpp-python. Argument: a GGUF file."""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from worker_protocol import WARM_UP, run, token_ids

BATCH = 512
"""Tokens of one llama_decode, llama.cpp's own default."""
LENGTH = 2048
"""Tokens a sequence may have."""


class Sequences:
    """A llama context for `rows` sequences, each with a cache of its own, and one batch that is
    filled again and again."""

    def __init__(self, model: Any, rows: int, threads: int):
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * LENGTH
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, shape=(BATCH,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, shape=(BATCH,))
        self._scored = np.ctypeslib.as_array(self._batch.logits, shape=(BATCH,))
        self._counts = np.ctypeslib.as_array(self._batch.n_seq_id, shape=(BATCH,))
        self._counts[:] = 1

    def truncate(self, length: int) -> None:
        """Forget every sequence from this position on."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, length, -1)

    def arrange(self, rows: list[int], positions: list[int], scored: list[bool]) -> None:
        """Say for the next batches which sequence and position every token belongs to, and which of them get logits."""
        count = len(rows)
        for place, row in enumerate(rows):
            self._batch.seq_id[place][0] = row
        self._positions[:count] = positions
        self._scored[:count] = scored
        self._batch.n_tokens = count

    def advance(self) -> None:
        """The next batch stands one position later."""
        self._positions[: self._batch.n_tokens] += 1

    def decode(self, tokens: list[int] | np.ndarray) -> np.ndarray:
        """Run the batch; returns the logits asked for, [scored tokens, vocabulary] (valid until the next call)."""
        count = self._batch.n_tokens
        self._tokens[:count] = tokens
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")
        pointer = llama_cpp.llama_get_logits(self._context)
        numbers = int(self._scored[:count].sum()) * self._vocabulary
        memory = (ctypes.c_float * numbers).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memory, np.float32).reshape(-1, self._vocabulary)


class Llama:
    """`plain` decodes all prompts side by side, one llama_decode per step, and takes numpy's argmax of the logits."""

    def __init__(self, given: argparse.Namespace):
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(given.model.encode(), settings)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot read {given.model}")
        self._threads = given.threads
        self._sequences: dict[int, Sequences] = {}
        self.about = {
            "llama-cpp-python": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "cache": "f16, flash attention auto (llama.cpp's defaults)",
        }

    def forward(self, tokens: int, context: int, repeats: int) -> list[float]:
        sequences = self._of(1)
        self._read(sequences, [token_ids(context)])
        sequences.arrange([0] * tokens, list(range(context, context + tokens)), [True] * tokens)
        ids = token_ids(tokens, start=context)
        return [self._timed(sequences, ids, context) for _ in range(WARM_UP + repeats)][WARM_UP:]

    def _timed(self, sequences: Sequences, ids: list[int], context: int) -> float:
        begun = time.perf_counter()
        sequences.decode(ids)
        milliseconds = 1e3 * (time.perf_counter() - begun)
        sequences.truncate(context)
        return milliseconds

    def plain(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        sequences = self._of(len(prompts))
        begun = time.perf_counter()
        said = [self._read(sequences, prompts).argmax(-1)]
        sequences.arrange(list(range(len(prompts))), [len(prompt) for prompt in prompts], [True] * len(prompts))
        for _ in range(new - 1):
            said.append(sequences.decode(said[-1]).argmax(-1))
            sequences.advance()
        return time.perf_counter() - begun, np.stack(said, 1).tolist()

    def _of(self, rows: int) -> Sequences:
        if rows not in self._sequences:
            self._sequences[rows] = Sequences(self._model, rows, self._threads)
        return self._sequences[rows]

    @staticmethod
    def _read(sequences: Sequences, prompts: list[list[int]]) -> np.ndarray:
        """Read prompts (together at most a batch) from an empty cache; logits after the last token of each."""
        places = [(row, place) for row, prompt in enumerate(prompts) for place in range(len(prompt))]
        last = [place == len(prompts[row]) - 1 for row, place in places]
        sequences.truncate(0)
        sequences.arrange([row for row, _ in places], [place for _, place in places], last)
        return sequences.decode([token for prompt in prompts for token in prompt])


if __name__ == "__main__":
    run(Llama)
