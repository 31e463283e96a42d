"""A tiny chat model with a tokenizer, and what tests ask of its server."""

from __future__ import annotations

import asyncio
import json
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from forerun.drafters.none import Nothing
from forerun.drafting.drafter import Context
from forerun.serve.app import Service
from forerun.serve.desk import Desk
from forerun.tree import TokenTree

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | items | list }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT, WORDS, WIDTH, HEAD, INNER = 512, 400, 32, 8, 48
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
SHAPES = {
    "self_attn.q_proj": (4 * HEAD, WIDTH),
    "self_attn.k_proj": (2 * HEAD, WIDTH),
    "self_attn.v_proj": (2 * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, 4 * HEAD),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}


def words() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([Path(textwrap.__file__).read_text(encoding="utf-8")], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)


def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of a Llama, written by hand: what transformers builds models of takes seconds to import."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    found = {"model.embed_tokens.weight": drawn(WORDS, WIDTH), "lm_head.weight": drawn(WORDS, WIDTH)}
    found["model.norm.weight"] = torch.ones(WIDTH)
    for layer in (f"model.layers.{number}" for number in range(2)):
        for name, shape in SHAPES.items():
            found[f"{layer}.{name}.weight"] = drawn(*shape) if len(shape) > 1 else torch.ones(shape)
    return found


@dataclass
class Serving:
    """A service, its clients and its desk."""

    service: Service
    desk: Desk
    client: httpx.AsyncClient
    app: Any = field(repr=False)

    async def post(self, path: str, body: Any, status: int = 200, **headers: str) -> Any:
        """What an endpoint says; the error's own part, if the status is one."""
        response = await self.client.post(path, json=body, headers=headers)
        assert response.status_code == status, response.text
        return response.json() if status == 200 else response.json()["error"]

    async def complete(self, prompt: Any = "def main", status: int = 200, **asked: Any) -> Any:
        return await self.post("/v1/completions", {"model": "tiny", "prompt": prompt, **asked}, status)

    async def chat(self, messages: Any = "Hi", status: int = 200, **asked: Any) -> Any:
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return await self.post("/v1/chat/completions", {"model": "tiny", "messages": said, **asked}, status)

    async def events(self, path: str, **asked: Any) -> list[Any]:
        """The chunks of a stream, whose form is checked."""
        response = await self.client.post(path, json={"model": "tiny", "stream": True, **asked})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("\n\n")
        frames = response.text.removesuffix("\n\n").split("\n\n")
        assert all(frame.startswith("data: ") for frame in frames) and frames.pop() == "data: [DONE]"
        return [json.loads(frame[6:]) for frame in frames]


class Steps(Nothing):
    """Plain decoding whose steps are let through one by one."""

    def __init__(self) -> None:
        self._open = threading.Semaphore(0)
        self.made = 0

    def let(self, count: int = 1) -> None:
        self._open.release(count)

    def propose(self, context: Context) -> TokenTree:
        assert self._open.acquire(timeout=20), "nobody lets a step through"
        self.made += 1
        return super().propose(context)


class Client:
    """One request by hand, whose client may go away, and may not read before it likes to; what it was sent."""

    def __init__(self, app: Any, path: str, reads: asyncio.Event | None = None, **asked: Any):
        self._reads = reads
        self._body: bytes | None = json.dumps({"model": "tiny", **asked}).encode()
        self.went, self.sent = asyncio.Event(), bytearray()
        self.arrived = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "root_path": ""}
        scope |= {"scheme": "http", "server": ("test", 80), "client": ("test", 1)}
        self.answer = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self.went.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._reads:
            await self._reads.wait()
        self.sent += message.get("body", b"")
        if self.sent:
            self.arrived.set()
