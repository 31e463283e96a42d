"""Medusa (Cai et al. 2024, arXiv 2401.10774): independent heads on the target's last hidden state.
This is its entry, which imports nothing heavy; the heads are in `network.py`.

Presets: Medusa-1 after section 7 (lambda_k = 0.8^k, K = 5, peak rate 1e-3 of the released heads,
cosine, a tenth of warm-up). The fused one is ours: one projection for all heads, the target's, and
a Markov term, trained with DSpark's loss. Medusa-2 by what keeps the target: as the paper trained
Vicuna-33B and Zephyr (sections 3.2 and 7.4), and Vicuna-7B and 13B (section 7.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forerun.drafting.method import Method, later
from forerun.drafting.settings import option
from forerun.drafting.trained import (
    LARGEST,
    HeadsConfig,
    HeadSettings,
    Joint,
    JointMethod,
    Layout,
    Preset,
    Trained,
    Weights,
)
from forerun.errors import DrafterError


@dataclass(frozen=True)
class MedusaConfig(HeadsConfig):
    """As every method's; layers are residual blocks. rank: of a Markov term (drafting/markov.py), 0 without, as the
    paper has it."""

    rank: int = option(
        0,
        "Of a term that ties a token to the one before it; 0 leaves it out.",
        least=0,
        flag="--markov-rank",
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rank) is not int or not 0 <= self.rank <= LARGEST:
            raise DrafterError(f"a Markov term of rank {self.rank!r} makes no sense: give a whole number from 0")
        if self.rank and self.vocabulary != "shared":
            raise DrafterError("a Markov term goes with the target's projection for all heads: give vocabulary shared")


_FIVE: Mapping[str, object] = {"heads": 5, "layers": 1}
_SENSE = "Train Medusa heads: independent, each on the target's last state alone."
_DECAY = Weights(decay=0.8)
MERGED_PREFIX = "medusa_head."


def _is_vllm(config: Mapping[str, object]) -> bool:
    return config.get("model_type") == "medusa" or config.get("architectures") == ["MedusaModel"]


METHOD = Method(
    "medusa",
    "Independent heads on the target's last hidden state.",
    HeadSettings,
    later("forerun.drafters.medusa.network:build"),
    grows="ranks",
    trained=Trained(
        title="Medusa",
        paper="arXiv 2401.10774",
        config=MedusaConfig,
        network=later("forerun.drafters.medusa.network:MedusaHeads"),
        presets={
            "medusa": Preset(_SENSE, _FIVE, _DECAY),
            "medusa-fused": Preset(
                "Train Medusa heads that share the target's projection and know the token before theirs.",
                {"heads": 7, "layers": 1, "vocabulary": "shared", "rank": 64},
                Weights(text=0.0, teacher=0.1, distance=0.9, decay=0.7788),
                share=0.5,
            ),
        },
        joint=JointMethod(
            "medusa2",
            "Train Medusa heads and their target together: more tokens per step, and another target.",
            preset="medusa",
            presets={
                "original": Joint(Preset(_SENSE, _FIVE, _DECAY, rate=1e-4, warmup=20), "original", 0.01, "sine"),
                "text": Joint(Preset(_SENSE, _FIVE, _DECAY, rate=5e-4, warmup=40), "text", 0.2, "constant"),
            },
        ),
        layouts=(
            Layout(
                "fasterdecoding",
                "Medusa's code",
                later("forerun.drafters.medusa.layouts:read_fasterdecoding"),
                later("forerun.drafters.medusa.layouts:as_fasterdecoding"),
                stem="medusa_lm_head",
            ),
            Layout(
                "vllm",
                "vLLM",
                later("forerun.drafters.medusa.layouts:read_vllm"),
                later("forerun.drafters.medusa.layouts:as_vllm"),
                knows=_is_vllm,
            ),
            Layout(
                "merged",
                "merged models (Medusa-2)",
                later("forerun.drafters.medusa.layouts:read_merged"),
                knows=lambda config: "medusa_num_heads" in config,
                prefix=MERGED_PREFIX,
            ),
        ),
    ),
)
