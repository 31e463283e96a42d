"""forerun inside transformers: `model.generate(**inputs, custom_generate=forerun.hf.generate)`."""

from forerun.hf.custom_generate import generate

__all__ = ["generate"]
