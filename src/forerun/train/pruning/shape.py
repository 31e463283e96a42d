"""The shape of a draft model, as people write it: LAYERSxWIDTH[xMLP[xHEADS]], sizes that are left out are the target's.

    1x320            one layer of width 320, with all of the target's heads and the whole of its perceptron
    4x192x576        ... and a perceptron of 576 units
    2x256x768x4      ... and four heads; the key heads stay if they divide them
    2x256x768x4/2    ... which share two key heads

To leave the target's layers or width as they are, write its own numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from forerun.errors import TrainingError
from forerun.nn.save import is_readable
from forerun.nn.transformer import TransformerConfig

WRITTEN = re.compile(r"(\d+)(?:x(\d+))?(?:x(\d+))?(?:x(\d+)(?:/(\d+))?)?")


@dataclass(frozen=True)
class Shape:
    """Sizes; None: the target's."""

    layers: int
    width: int | None = None
    mlp_width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    @staticmethod
    def read(text: str) -> Shape:
        """Raises TrainingError for what is no shape."""
        found = WRITTEN.fullmatch(text.strip().lower())
        if found is None:
            raise TrainingError(f"{text!r} is no shape: write LAYERSxWIDTH, such as 2x256, or LAYERSxWIDTHxMLPxHEADS")
        return Shape(*(None if part is None else int(part) for part in found.groups()))  # type: ignore[arg-type]

    @staticmethod
    def of(config: TransformerConfig) -> Shape:
        return Shape(config.layers, config.width, config.mlp_width, config.heads, config.kv_heads)

    def __str__(self) -> str:
        written = "x".join(
            str(part) for part in (self.layers, self.width, self.mlp_width, self.heads) if part is not None
        )
        return f"{written}/{self.kv_heads}" if self.kv_heads is not None else written

    def within(self, target: TransformerConfig) -> TransformerConfig:
        """The config of such a part of a target, windows of its layers left to whoever picks them. TrainingError where
        the target has less, or where the sizes do not fit together."""
        heads = target.heads if self.heads is None else self.heads
        sizes: dict[str, Any] = {
            "layers": self.layers,
            "width": target.width if self.width is None else self.width,
            "mlp_width": target.mlp_width if self.mlp_width is None else self.mlp_width,
            "heads": heads,
            "kv_heads": self._key_heads(target, heads),
        }
        for name, size in sizes.items():
            most = getattr(target, name)
            if not 1 <= size <= most:
                raise TrainingError(f"the shape {self} has {name} {size} and the target {most}: give 1 to {most}")
        if heads % sizes["kv_heads"] or heads // sizes["kv_heads"] > target.heads // target.kv_heads:
            raise TrainingError(
                f"the shape {self} has {heads} heads on {sizes['kv_heads']} key heads: key heads must divide the heads,"
                f" and no more than {target.heads // target.kv_heads} of the target's share one"
            )
        made = replace(target, **sizes)
        if not is_readable(replace(made, windows=())):
            raise TrainingError(
                f"the shape {self} has width {made.width} and {heads} heads, and transformers would refuse to read it:"
                " choose a width that its heads divide"
            )
        return made

    def _key_heads(self, target: TransformerConfig, heads: int) -> int:
        """All of the target's if so many heads can be dealt to them, else as many whole groups as there are."""
        if self.kv_heads is not None:
            return self.kv_heads
        return target.kv_heads if heads % target.kv_heads == 0 else max(1, heads * target.kv_heads // target.heads)
