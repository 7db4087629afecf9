"""The least sum of harms within a budget of bytes: which candidate each of several things gets.

Dynamic programming over bytes in units of the sizes' greatest common divisor; for more than `_STEPS` units in that
many, each size rounded up, so that the budget holds all the same. Ties go to the smaller. Same inputs, same choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightship.errors import UsageError

_STEPS = 1 << 16


@dataclass(frozen=True)
class Choice:
    """One candidate: its word (a layout, a rank), its size in bytes or elements, and how much it is thought to hurt."""

    word: str
    size: int
    harm: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice a matrix, with at most `budget` bytes in all and the least sum of harms.

    Raises:
        UsageError: even the smallest do not fit.
    """
    least = sum(min(c.size for c in options) for options in choices.values())
    if least > budget:
        raise UsageError(f"{budget} bytes are less than the smallest candidates take, {least} bytes")
    divisor = math.gcd(*(c.size for options in choices.values() for c in options))
    unit = max(divisor, -(-budget // _STEPS))
    room = budget // unit
    best = np.zeros(room + 1)
    taken: list[np.ndarray] = []
    for options in choices.values():
        now = np.full(room + 1, np.inf)
        picked = np.zeros(room + 1, np.int64)
        for index, choice in enumerate(options):
            cost = -(-choice.size // unit)
            moved = np.full(room + 1, np.inf)
            moved[cost:] = best[: room + 1 - cost] + choice.harm
            better = moved < now
            now[better], picked[better] = moved[better], index
        best = now
        taken.append(picked)
    if not np.isfinite(best[room]):
        raise UsageError(f"{budget} bytes leave no room to round sizes to units of {unit}; give a little more")
    found: dict[str, Choice] = {}
    for (name, options), picked in zip(reversed(list(choices.items())), reversed(taken), strict=True):
        found[name] = options[picked[room]]
        room -= -(-found[name].size // unit)
    return {name: found[name] for name in choices}
