"""What a target says about a batch: its states, its output projection and its input embeddings."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from forerun.model import Inputs, Model
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer


class Teacher:
    """The frozen target. Layers are numbered as `Network.forward` numbers hidden states; `top` is
    what its output projection sees."""

    def __init__(self, network: Network):
        self.network = network
        self.head_VD, self.embedding_VD = network.head_matrix().detach(), network.input_embedding.detach()
        self.top = network.cache_shape.layers

    @property
    def device(self) -> torch.device:
        return self.network.device

    def precision(self) -> torch.autocast:
        """Products in bf16 where the target's own are; a target in fp32 is taught from in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.head_VD.dtype != torch.float32)

    @torch.no_grad()
    def states(self, tokens_BN: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """By layer, its states [B, N, D] over whole sequences from position 0."""
        if isinstance(self.network, Transformer) and set(layers) == {self.top}:
            return {self.top: self.network.features(tokens_BN)}
        return self._read(tokens_BN, layers)

    def _read(self, tokens_BN: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        with torch.inference_mode():
            hidden = Model(self.network, 0).read(Inputs.whole(tokens_BN), layers)
        # What inference mode made cannot take part in training.
        return {layer: hidden[layer].clone() for layer in layers}


class Pupil(Teacher):
    """The target as it stands: its last states and its output projection carry gradients to what moves it."""

    def states(self, tokens_BN: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        assert isinstance(self.network, Transformer)
        assert set(layers) == {self.top}, "nobody has asked a pupil for more yet"
        self.head_VD = self.network.output_head
        return {self.top: self.network.features(tokens_BN)}
