# ruff: noqa: PLR0917  kernels take positional arguments only
"""Kernels of IQ4_NL and IQ4_XS: sixteen blocks at a time for the search, one after the other for the codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from tightship.formats.jit import kernel
from tightship.formats.lanes import load, splat, store, where
from tightship.formats.layouts.ggml_search import TINY, clamp, gather, mean_square, peak, weigh

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# Twice the midpoint of neighbours: from it on, 2 x belongs to the upper one. Integers, so nothing is rounded.
TURNS = LEVELS[:-1] + LEVELS[1:]
TRIES = 7


@kernel
def level(v: Any) -> Any:
    """The level nearest to each lane, ties to the upper one."""
    twice = v + v
    result = splat(LEVELS[0])
    for i in range(15):
        result = where(twice >= TURNS[i], splat(LEVELS[i + 1]), result)
    return result


@kernel
def _sums(x: Any, w: Any, first: int, factor: Any) -> Any:
    """Sums of w q x and w q^2 for q the level nearest to factor * x."""
    sum_qx, sum_q2 = splat(0.0), splat(0.0)
    for i in range(first, first + 32):
        v, weight = load(x, i), load(w, i)
        weighted = weight * level(factor * v)
        sum_qx = sum_qx + weighted * v
        sum_q2 = sum_q2 + weighted * level(factor * v)
    return sum_qx, sum_q2


@kernel
def group_scale(x: Any, w: Any, first: int) -> Any:
    """x ~ scale * level over 32 rows, by trying sixteen scales around the one that puts the peak at the end."""
    size, extreme = peak(x, first, 32)
    sum_qx, sum_q2 = _sums(x, w, first, splat(1.0) / (extreme / -LEVELS[0]))
    scale = where(sum_q2 > 0.0, sum_qx / sum_q2, splat(0.0))
    best = scale * sum_qx
    for k in range(-TRIES, TRIES + 1):
        sum_qx, sum_q2 = _sums(x, w, first, splat(k + LEVELS[0]) / extreme)
        better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
        scale = where(better, sum_qx / sum_q2, scale)
        best = where(better, scale * sum_qx, best)
    return where(size < TINY, splat(0.0), scale)


@kernel
def search(
    first: int, last: int, w: Any, importance: Any, period: int, parts: int, d: Any, scales: Any, factor: Any
) -> None:
    """Blocks of `parts` groups of 32, `w` flat: `d` (blocks,) not yet rounded, `scales`, `factor` (blocks, parts).

    `factor` maps a weight to the scale of `LEVELS`; it comes from the unrounded `d`, as the reference's.
    """
    width = parts * 32
    x, weights = np.empty((width, 16), np.float32), np.empty((width, 16), np.float32)
    rows = np.empty((3, parts, 16), np.float32)
    found, codes, inverse = rows[0], rows[1], rows[2]
    end = np.empty((1, 16), np.float32)
    plain = len(importance) == 0
    for block in range(first, last, 16):
        gather(w, block, last, width, last, x)
        if plain:
            for i in range(width):
                store(weights, i, load(x, i) * load(x, i))
        else:
            gather(importance, block, last, width, period, weights)
            weigh(x, weights, width, mean_square(x, 0, width, 2.0))
        for j in range(parts):
            store(found, j, group_scale(x, weights, j * 32))
        store(end, 0, _integer_scales(found, codes, inverse) if parts > 1 else _own_scale(found, inverse))
        for lane in range(min(16, last - block)):
            d[block + lane] = end[0, lane]
            for j in range(parts):
                scales[block + lane, j] = codes[j, lane] if parts > 1 else 1
                factor[block + lane, j] = inverse[j, lane]


@kernel
def _reciprocal(v: Any) -> Any:
    return where(v != 0.0, splat(1.0) / v, splat(0.0))


@kernel
def _own_scale(found: Any, inverse: Any) -> Any:
    store(inverse, 0, _reciprocal(load(found, 0)))
    return load(found, 0)


@kernel
def _integer_scales(found: Any, codes: Any, inverse: Any) -> Any:
    """The signed largest scale becomes -32; returns the step."""
    _, extreme = peak(found, 0, len(found))
    step = extreme / -32.0
    factor = _reciprocal(step)
    for j in range(len(found)):
        code = clamp(factor * load(found, j), -32.0, 31.0)
        store(codes, j, code)
        store(inverse, j, _reciprocal(step * code))
    return step


@kernel
def nearest_levels(first: int, last: int, w: Any, factor: Any, codes: Any) -> None:
    """Indices of the levels nearest to factor * w, ties to the upper one; `w`, `codes` are (groups, 32)."""
    for group in range(first, last):
        x, scale = w[group], factor[group]
        for i in range(len(x)):
            twice = x[i] * scale
            twice += twice
            code = np.int32(0)
            for k in range(15):
                code += np.int32(twice >= TURNS[k])
            codes[group, i] = code
