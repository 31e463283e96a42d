"""No drafter: plain decoding, the baseline, on the same loop as everything else."""

from __future__ import annotations

from dataclasses import dataclass

from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.workshop import Workshop
from forerun.tree import TokenTree


class Nothing(Drafter):
    """Proposes nothing: one node per row."""

    name = "none"

    def propose(self, context: Context) -> TokenTree:
        return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)


@dataclass(frozen=True)
class Settings:
    """{"drafter": "none"}"""


def build(workshop: Workshop, settings: Settings) -> Drafter:
    return Nothing()


METHOD = Method("none", "Plain decoding, the baseline.", Settings, build, grows="nothing")
