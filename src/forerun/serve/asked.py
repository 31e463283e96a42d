"""What clients ask, as OpenAI's clients write it: the bodies of requests, and the sampling parameters in them.

Unknown fields are refused, as OpenAI does. Fields that cannot change an answer here (`user`, `metadata`, ...) are taken
and mean nothing; those that would change it and are not here are refused with a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from forerun.constraint import of_response_format
from forerun.errors import RequestError
from forerun.sampling import SamplingParams
from forerun.serve.refusal import RefusalError

MOST_STOPS, LONGEST_STOP, MOST_BIASES, MOST_LOGPROBS = 16, 256, 1024, 20
"""Each is looked at with every token: more would be work for the server and not for the model."""
SHORT = 16
"""What a completion has if nobody says how long it may be: OpenAI's default."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """continuous_usage_stats: usage with every chunk, for one chunk may hold several tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class Ours(Body):
    """What is told beside OpenAI's fields. metrics: what speculation did. steps: each event of a stream is one step,
    and says who proposed its tokens. drafts: False decodes plainly."""

    metrics: bool = False
    steps: bool = False
    drafts: bool = True


class Asked(Body):
    """What both endpoints take. The second part is ours: parameters of forerun that OpenAI does not have."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None

    constraint: dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    forerun: Ours = Field(default_factory=Ours)

    OURS: ClassVar[str] = (
        "n seed presence_penalty frequency_penalty repetition_penalty stop_token_ids ignore_eos top_p top_k min_p stop"
    )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            raise RefusalError(
                400, f"give at most {MOST_STOPS} stop strings of at most {LONGEST_STOP} characters", "stop"
            )
        if len(self.logit_bias or ()) > MOST_BIASES:
            raise RefusalError(400, f"give logit_bias at most {MOST_BIASES} tokens", "logit_bias")
        if self.response_format is not None and self.constraint is not None:
            raise RefusalError(400, "response_format and constraint say the same: give one of them", "constraint")
        if self.stream_options is not None and not self.stream:
            raise RefusalError(
                400, "stream_options are for streams: leave them out, or set stream to true", "stream_options"
            )
        if self.forerun.steps and not self.stream:
            raise RefusalError(400, "steps are told in streams: leave them out, or set stream to true", "forerun")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    usual: ClassVar[int | None] = None
    """New tokens at most, if nothing is said about it; None: as many as there is room for."""

    @property
    def longest(self) -> int | None:
        """New tokens at most, if anything is said about it."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities: how many beside each token; None: none."""
        raise NotImplementedError

    def params(self, tenant: str, most: int | None) -> SamplingParams:
        """Sampling parameters. What is not said is as OpenAI has it: temperature 1. most: new tokens that the server
        allows. RefusalError for what makes no sense."""
        given = {name: getattr(self, name) for name in self.OURS.split() if getattr(self, name) is not None}
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:  # filters that leave the best token leave greedy decoding as it is
            for name in ("top_p", "top_k", "min_p"):
                given.pop(name, None)
        if self.logit_bias:
            given["logit_bias"] = _biases(self.logit_bias)
        longest = self.longest
        if longest is None:
            longest = most if self.usual is None or most is None else min(self.usual, most)
        elif most is not None and longest > most:
            raise RefusalError(
                400, f"{longest} new tokens are asked for, and this server gives {most} at most", "max_tokens"
            )
        try:
            return SamplingParams(
                max_new_tokens=longest,
                temperature=temperature,
                logprobs=self.alternatives,
                tenant=tenant,
                drafts=self.forerun.drafts,
                constraint=self.constraint or of_response_format(self.response_format),
                **given,
            )
        except RequestError as error:
            raise RefusalError.of(error) from None


class Completion(Asked):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    usual: ClassVar[int | None] = SHORT

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.prompt == []:
            raise RefusalError(400, "the prompt is empty: give at least one token", "prompt")
        if self.best_of not in (None, 1):
            raise RefusalError(400, "best_of is not here, it would hide what n shows: ask for n and choose", "best_of")
        if self.suffix:
            raise RefusalError(400, "suffix is not here: the model continues texts, it fills no gaps", "suffix")
        if self.echo and self.logprobs is not None:
            raise RefusalError(400, "echo with logprobs is not here: ask for one of them", "echo")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise RefusalError(400, f"logprobs are 0 to {MOST_LOGPROBS}", "logprobs")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


class Part(Body):
    """A part of a message's content; kinds other than text are refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class Message(Body):
    """What a template takes of a message is the template's affair, so unknown fields go there."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Chat(Asked):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="What the chat template is told beside.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusalError(400, "max_tokens and max_completion_tokens are the same: give one of them", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusalError(400, "top_logprobs go with logprobs: set logprobs to true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MOST_LOGPROBS:
            raise RefusalError(400, f"top_logprobs are 0 to {MOST_LOGPROBS}", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise RefusalError(
                400, 'tool_choice is "auto" or "none" here: the model cannot be made to call a tool yet', "tool_choice"
            )
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def talk(self) -> list[dict[str, Any]]:
        """The messages as chat templates want them."""
        return [_spoken(message) for message in self.messages]

    @property
    def told(self) -> dict[str, Any]:
        """What the template is told beside the messages."""
        tools = self.tools if self.tools and self.tool_choice != "none" else None
        return dict(self.chat_template_kwargs or {}) | ({"tools": tools} if tools else {})


class Tokenize(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise RefusalError(400, "give a prompt or messages", "prompt")
        return self

    @property
    def words(self) -> Any:
        return self.prompt if self.messages is None else [_spoken(message) for message in self.messages]


class Detokenize(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RefusalError(400, "logit_bias makes no sense: its names are token ids", "logit_bias") from None


def _spoken(message: Message) -> dict[str, Any]:
    """Parts become one text, arguments of tool calls an object, and developers are those who set the system up."""
    said = {name: value for name, value in message.model_dump().items() if value is not None}
    if message.role == "developer":
        said["role"] = "system"
    if isinstance(message.content, list):
        strange = next((part.type for part in message.content if part.text is None or part.type != "text"), None)
        if strange is not None:
            raise RefusalError(400, f"content of type {strange!r} is not supported: this model reads text", "messages")
        said["content"] = "".join(part.text or "" for part in message.content)
    if message.tool_calls:
        said["tool_calls"] = [_called(call) for call in message.tool_calls]
    return said


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except ValueError:
        raise RefusalError(
            400, "the arguments of a tool call are not JSON: send them as the model gave them", "messages"
        ) from None
