"""Drafters that are wrong on purpose: what an exactness check exists for. Registered by tests as `liar`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.workshop import Workshop
from forerun.tree import TokenTree


class Liar(Drafter):
    """Always proposes the same token, and claims to have drawn it from a law that hardly ever gives it."""

    name = "liar"
    max_nodes = 2

    def __init__(self, vocab_size: int, token: int):
        law = torch.full((vocab_size,), 1.0)
        law[token] = 1e-6
        self._law, self._token = law / law.sum(), token

    def propose(self, context: Context) -> TokenTree:
        sizes = [1 + max(0, min(depth, self.max_nodes)) for depth in context.depths]
        tokens = [
            [row.tokens[-1], self._token, self._token][:size] for row, size in zip(context.rows, sizes, strict=True)
        ]
        laws = self._law.expand(len(tokens), max(sizes), -1)
        return TokenTree.drawn_chain(tokens, laws.to(context.device))


@dataclass(frozen=True)
class Settings:
    token: int = 3


def build(workshop: Workshop, settings: Settings) -> Drafter:
    return Liar(workshop.target.vocab_size, settings.token)


METHOD = Method("liar", "Says that it drew what it never draws.", Settings, build, grows="drawn")
