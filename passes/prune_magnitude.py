"""Prune the smallest absolute values. Data-free; one tensor at a time, except for `scope: global`.

The global threshold is found exactly in two readings of the weights: the bits of a non-negative float32 sort like
the number, so a histogram of their high halves finds the bucket and one of its low halves the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Needs, Run
from tightship.passes.masks import finite, lowest, lowest_in_groups, lowest_in_rows
from tightship.passes.prune import Prune, PruneMethod
from tightship.weights import Dense, Quantized, Stored


class Magnitude(PruneMethod):
    """Score |w|."""

    needs: ClassVar[Needs] = "nothing"

    def per_tensor(self, spec: Prune) -> bool:
        return spec.compared != "global"

    def prune(self, spec: Prune, checkpoint: Checkpoint, run: Run) -> Mapping[str, Stored]:
        tensors = spec.tensors(checkpoint)
        if spec.compared != "global":
            return {name: _masked(name, weight, spec) for name, weight in tensors.items()}
        cut = _global_cut(tensors, spec.sparsity or 0.0, run)
        return {name: _cut(name, weight, cut.threshold, cut.ties[name]) for name, weight in tensors.items()}


METHOD = Magnitude()


def mask(scores: np.ndarray, spec: Prune) -> np.ndarray:
    """Boolean (rows, cols) of what goes, for every scope but `global`."""
    if spec.groups:
        return lowest_in_groups(scores, *spec.groups)
    share = spec.sparsity or 0.0
    if spec.compared == "row":
        return lowest_in_rows(scores, round(share * scores.shape[1]))
    return lowest(scores, round(share * scores.size))


def _masked(name: str, weight: Dense | Quantized, spec: Prune) -> Dense:
    def read() -> np.ndarray:
        values = _values(weight)
        values[mask(_magnitude(name, values), spec)] = 0
        return values

    return Dense(weight.shape, weight.dtype, read)


def _cut(name: str, weight: Dense | Quantized, threshold: float, ties: int) -> Dense:
    """Zero everything below the threshold, and the first `ties` weights that equal it."""

    def read() -> np.ndarray:
        values = _values(weight)
        scores = _magnitude(name, values)
        equal = scores == threshold
        values[(scores < threshold) | (equal & (np.cumsum(equal).reshape(equal.shape) <= ties))] = 0
        return values

    return Dense(weight.shape, weight.dtype, read)


def _values(weight: Dense | Quantized) -> np.ndarray:
    """A copy in the weight's own dtype; grids are decoded to float32."""
    return np.array(weight.read() if isinstance(weight, Dense) else weight.value())


def _magnitude(name: str, values: np.ndarray) -> np.ndarray:
    return np.abs(finite(name, values.astype(np.float32, copy=False)))


@dataclass(frozen=True)
class _Cut:
    """The global threshold, and how many weights equal to it go in each tensor (in name order)."""

    threshold: float
    ties: Mapping[str, int]


def _global_cut(tensors: Mapping[str, Dense | Quantized], sparsity: float, run: Run) -> _Cut:
    total = sum(int(np.prod(w.shape)) for w in tensors.values())
    wanted = round(sparsity * total)
    names = sorted(tensors)
    highs = np.zeros(1 << 16, np.int64)
    for done, name in enumerate(names):
        run.progress("global threshold", done, 2 * len(names))
        highs += np.bincount(_bits(name, tensors[name]) >> 16, minlength=1 << 16)
    bucket = int(np.searchsorted(np.cumsum(highs), max(wanted, 1)))
    before = int(highs[:bucket].sum())
    lows: dict[str, np.ndarray] = {}
    for done, name in enumerate(names):
        run.progress("global threshold", len(names) + done, 2 * len(names))
        bits = _bits(name, tensors[name])
        lows[name] = np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    together = np.sum(list(lows.values()), axis=0)
    low = int(np.searchsorted(np.cumsum(together), max(wanted - before, 1)))
    left = wanted - before - int(together[:low].sum())
    ties = {}
    for name in names:
        ties[name] = min(left, int(lows[name][low]))
        left -= ties[name]
    threshold = np.array(bucket << 16 | low, np.uint32).view(np.float32)
    return _Cut(float(threshold), ties)


def _bits(name: str, weight: Dense | Quantized) -> np.ndarray:
    """Flat uint32 bit patterns of |w|."""
    return np.ascontiguousarray(_magnitude(name, _values(weight))).reshape(-1).view(np.uint32)
