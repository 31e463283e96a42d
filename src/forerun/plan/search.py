"""Which candidate is the fastest: a race over the answers, in which those that cannot win fall out.

Every candidate plays the same waves of answers, so candidates are compared in pairs, answer by
answer, and what one text is easier than another does not count between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forerun.cost import Floats
from forerun.plan.replay import Player, Spent

RESAMPLES = 400
DOUBT = 0.02
"""A candidate falls out that beats the leader in fewer resamples of the answers than this share."""
FEW = 4
"""Answers from which on resampling says something."""
KEPT = 4
"""So many stay in the race whatever happens, for some of them will be measured."""


@dataclass(frozen=True)
class Worth:
    """Tokens per second, with a standard error from resampling the answers: that of luck, and of texts."""

    tokens_per_second: float
    error: float

    @staticmethod
    def of(spent: Sequence[Spent], costs: float = 0.0) -> Worth:
        """costs: the relative standard error of the seconds, which all answers share."""
        own, speeds = speed(spent), _resampled(_table(spent))
        relative = float(np.hypot(speeds.std() / own, costs))
        return Worth(own, relative * own)


def race(
    players: Mapping[str, Player],
    waves: Sequence[Sequence[int]],
    is_late: Callable[[], bool] = lambda: False,
    yardstick: str = "",
    begun: Mapping[str, Sequence[Spent]] | None = None,
) -> dict[str, list[Spent]]:
    """What every candidate spent, in the order of the waves; candidates that were seen all through have spent most.

    is_late: time is up. It ends the race behind a wave that all have played, or, during the first, leaves out those
    whose turn has not come. yardstick: stays in the race whatever it is worth. begun: what some have spent on the
    first waves, in an earlier race.
    """
    spent = {name: list((begun or {}).get(name, ())) for name in players}
    running, due = list(players), 0
    for wave in waves:
        due += len(wave)
        for seen, name in enumerate(running):
            if seen >= KEPT and not spent[name] and is_late():
                break
            if len(spent[name]) < due:
                spent[name] += players[name].play(wave)
        running = [name for name in running if spent[name]]
        staying = {yardstick, *survivors({name: spent[name][:due] for name in running})}
        for name in running:
            if name not in staying:
                players[name].close()
        running = [name for name in running if name in staying]
        if is_late():
            break
    return {name: own for name, own in spent.items() if own}


def ranked(spent: Mapping[str, Sequence[Spent]]) -> list[str]:
    """Those that were in the race to its end first, the fastest of them first."""
    return sorted(spent, key=lambda name: (-len(spent[name]), -speed(spent[name])))


def survivors(spent: Mapping[str, Sequence[Spent]]) -> list[str]:
    """Who may still be the fastest. All have played the same answers."""
    ordered = sorted(spent, key=lambda name: -speed(spent[name]))
    leader, safe = spent[ordered[0]], set(ordered[:KEPT])
    return [name for name, own in spent.items() if name in safe or not _hopeless(own, leader)]


def _hopeless(own: Sequence[Spent], leader: Sequence[Spent]) -> bool:
    if len(own) < FEW:
        return False
    wins = _resampled(_table(own)) >= _resampled(_table(leader))
    return bool(wins.mean() < DOUBT)


def promising(spent: Mapping[str, Sequence[Spent]], share: float) -> list[str]:
    """Those that are at least so fast, as a share of the fastest."""
    best = max(map(speed, spent.values()))
    return [name for name, own in spent.items() if speed(own) >= share * best]


def speed(spent: Sequence[Spent]) -> float:
    return sum(one.tokens for one in spent) / max(sum(one.seconds for one in spent), 1e-12)


def _table(spent: Sequence[Spent]) -> Floats:
    """[2, answers]: tokens and seconds."""
    return np.array([[one.tokens for one in spent], [one.seconds for one in spent]], dtype=np.float64)


def _resampled(table: Floats) -> Floats:
    """Speeds of so many drawings of as many answers, the same ones for every table of that size."""
    count = table.shape[1]
    drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    tokens, seconds = table @ drawn.T
    speeds: Floats = tokens / np.maximum(seconds, 1e-12)
    return speeds
