"""The target that heads belong to, as far as an exchange needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from forerun.errors import CheckpointError
from forerun.nn.transformer import TransformerConfig
from forerun.nn.translate import translate
from forerun.sources.folder import CONFIG, brief
from forerun.sources.source import Source
from forerun.sources.weights import whole


@dataclass(frozen=True)
class Base:
    """The target, as far as an exchange needs it. config: None where it is not of the Llama family."""

    name: str
    source: Source
    width: int
    vocab_size: int
    config: TransformerConfig | None

    @staticmethod
    def of(path_or_hub_id: str) -> Base:
        source = Source.of(path_or_hub_id)
        outside = source.config
        text = outside.get_text_config(decoder=True)
        try:
            config = translate(outside, source.path)
            return Base(path_or_hub_id, source, text.hidden_size, text.vocab_size, config)
        except AttributeError as error:
            raise CheckpointError(
                f"{source.path / CONFIG} does not describe a language model ({brief(error)})"
            ) from None

    @property
    def folder(self) -> Path:
        """Where it lies; of a GGUF, the file."""
        return self.source.path

    @cached_property
    def embedding_VD(self) -> Tensor:
        return self._tensor("model.embed_tokens.weight")

    @cached_property
    def head_VD(self) -> Tensor:
        return self._tensor("lm_head.weight", "model.embed_tokens.weight")

    def _tensor(self, *names: str) -> Tensor:
        """The first of these that is stored."""
        held = self.source.weights.stored()
        for name in names:
            if name in held:
                return whole(self.source.weights, name)
        raise CheckpointError(
            f"{self.name} has no tensor {names[0]}, which these heads share: give a model of the Llama family"
        )
