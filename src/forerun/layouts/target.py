"""The target that heads belong to, as far as an exchange needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from forerun.errors import CheckpointError
from forerun.nn.transformer import TransformerConfig
from forerun.nn.translate import translate
from forerun.sources.folder import CONFIG, brief, opened, weight_files
from forerun.sources.source import Source


@dataclass(frozen=True)
class Base:
    """The target, as far as an exchange needs it. config: None where it is not of the Llama family."""

    name: str
    folder: Path
    width: int
    vocab_size: int
    config: TransformerConfig | None

    @staticmethod
    def of(path_or_hub_id: str) -> Base:
        source = Source.of(path_or_hub_id)
        folder, outside = source.folder, source.config
        text = outside.get_text_config(decoder=True)
        try:
            return Base(path_or_hub_id, folder, text.hidden_size, text.vocab_size, translate(outside, folder))
        except AttributeError as error:
            raise CheckpointError(f"{folder / CONFIG} does not describe a language model ({brief(error)})") from None

    @cached_property
    def embedding_VD(self) -> Tensor:
        return self._tensor("model.embed_tokens.weight")

    @cached_property
    def head_VD(self) -> Tensor:
        return self._tensor("lm_head.weight", "model.embed_tokens.weight")

    def _tensor(self, *names: str) -> Tensor:
        """The first of these that is stored."""
        files = weight_files(self.folder)
        for name in names:
            for path in files:
                with opened(path) as file:
                    if name in file.keys():  # noqa: SIM118 (not a dict)
                        found: Tensor = file.get_tensor(name)
                        return found
        raise CheckpointError(
            f"{self.name} has no tensor {names[0]}, which these heads share: give a model of the Llama family"
        )
