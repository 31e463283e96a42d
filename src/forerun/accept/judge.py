"""From a model's logits to a verdict: the law each row asked for, and the exact rule that fits the tree.

tree                        rows        rule
deterministic               greedy      greedy match
deterministic               sampled     sample and match
chain with drawn tokens     any         block verification
tree with drawn tokens      any         traversal verification

The last two are one function, and in it rows without drawn tokens are matched: what else is in its
batch changes nothing for a row.

A caller may ask for a lossy rule instead: typical acceptance, by which rows that sample are then
judged and greedy ones as always, or leniency, which is for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forerun.accept.exact import Verdict, match, sample_and_match, sample_choices, traversal_verification
from forerun.accept.lossy import Lenient, Lossy, Typical, lenient, typical
from forerun.chance import Chance, Dice
from forerun.native import sampling as native
from forerun.row import Row
from forerun.sampling import edits_of, laws
from forerun.tree import TokenTree

TYPICAL = "typical acceptance (lossy)"
LENIENT = "lenient review (lossy)"


def rule_for(tree: TokenTree, greedy: bool) -> str:
    """The name of the rule that `judge` will use; `greedy`: every row is."""
    if tree.is_deterministic:
        return "greedy match" if greedy else "sample and match"
    return "block verification" if tree.topology.is_chain else "traversal verification"


@dataclass(frozen=True)
class Judgement:
    """The verdict, the rule that gave it, and the model's laws [B, N, V] of the nodes kept and perhaps of others (None
    where nobody needed any).

    is_over: per row, whether its processors and its constraint forbid every next token of the text so far; the verdict
    then means nothing. Empty: of no row.
    """

    verdict: Verdict
    rule: str
    laws_BNV: Tensor | None
    is_over: Sequence[bool] = ()


def is_exact(lossy: Lossy | None, row: Row) -> bool:
    """Whether a row's text stays the target's own under this rule."""
    return lossy is None or (isinstance(lossy, Typical) and row.params.is_greedy)


def rule_of(judgement: Judgement, row: Row) -> str:
    """The rule by which one of the rows was judged: typical acceptance finds in a greedy one what greedy match does."""
    return "greedy match" if judgement.rule == TYPICAL and row.params.is_greedy else judgement.rule


def judge(
    tree: TokenTree,
    logits_BNV: Tensor,
    rows: Sequence[Row],
    chance: Chance,
    best_BN: Tensor | None = None,
    lossy: Lossy | None = None,
    tells_laws: bool = True,
) -> Judgement:
    """Accept what fits the model's law under each row's own sampling parameters. Exact, unless
    `lossy` asks for something else.

    best_BN: the best token of `logits_BNV` at every node, if the network has found it already.
    tells_laws: somebody will look at the laws of what is kept.
    """
    scores, ends = _edits(tree, logits_BNV, rows)
    known_BN = best_BN if scores is logits_BNV else None
    found = _judged(tree, scores, rows, chance, known_BN, lossy, tells_laws)
    if not any(ends):
        return found
    return replace(found, verdict=_short_of(found.verdict, tree, ends), is_over=[0 in nodes for nodes in ends])


def _short_of(verdict: Verdict, tree: TokenTree, ends: Sequence[frozenset[int]]) -> Verdict:
    """Drafts up to the first node behind which nothing may be said. It is the next token: the text
    may be over with it, and otherwise the next step finds out what plain decoding does."""
    kept, following, bonus = [list(path) for path in verdict.kept], list(verdict.next_tokens), list(verdict.bonus)
    for row, path in enumerate(verdict.kept):
        place = next((place for place, node in enumerate(path) if place and node in ends[row]), None)
        if place is not None:
            kept[row], following[row], bonus[row] = path[:place], int(tree.tokens[row][path[place]]), False
    return Verdict(kept, following, bonus)


def _judged(
    tree: TokenTree,
    scores: Tensor,
    rows: Sequence[Row],
    chance: Chance,
    best_BN: Tensor | None,
    lossy: Lossy | None,
    tells_laws: bool,
) -> Judgement:
    if isinstance(lossy, Lenient):
        return _leniently(tree, scores, rows, chance, lossy)
    rule = rule_for(tree, all(row.params.is_greedy for row in rows))
    if rule == "greedy match":
        return Judgement(match(tree, scores.argmax(-1) if best_BN is None else best_BN), rule, None)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if rule == "sample and match" and lossy is None and isinstance(chance, Dice) and native.fits(scores):
        verdict, law = sample_and_match(tree, scores, [row.params.filter for row in rows], chance, tells_laws)
        return Judgement(verdict, rule, law)
    law = laws(scores, [row.params for row in rows])
    if lossy is not None:
        return Judgement(typical(tree, law, lossy), TYPICAL, law)
    if rule == "sample and match":
        return Judgement(match(tree, sample_choices(law, tree, chance)), rule, law)
    return Judgement(traversal_verification(tree, law, chance), rule, law)


def _leniently(tree: TokenTree, scores_BNV: Tensor, rows: Sequence[Row], chance: Chance, rule: Lenient) -> Judgement:
    """Greedy rows have one-hot laws, in which nothing is nearly as probable as the best: theirs are
    taken at temperature 1."""
    greedy = [row.params.is_greedy for row in rows]
    params = [replace(row.params, temperature=1.0) if row.params.is_greedy else row.params for row in rows]
    law = laws(scores_BNV, params)
    return Judgement(lenient(tree, law, rule, greedy, chance), LENIENT, law)


def node_scores(tree: TokenTree, logits_BNV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with each row's edits (`edits_of`) made at every node with that node's own prefix."""
    return _edits(tree, logits_BNV, rows)[0]


def _edits(tree: TokenTree, logits_BNV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[frozenset[int]]]:
    """The edited scores, and per row the nodes behind which nothing may be said."""
    ends: list[frozenset[int]] = [frozenset()] * len(rows)
    if not any(row.params.edits_scores for row in rows):
        return logits_BNV, ends
    scores = logits_BNV.to(torch.promote_types(logits_BNV.dtype, torch.float32), copy=True)  # the model's own stay
    for index, row in enumerate(rows):
        if row.params.edits_scores:
            parents = tree.topology.parents[index]
            size = len(parents)
            edits = edits_of(scores[index, :size], row.params, row.prefixes(tree, index), parents, row.matcher)
            scores[index, :size], ends[index] = edits.scores_NV, edits.ends
    return scores, ends
