# ruff: noqa: PLR0917  kernels take positional arguments only
"""The searches of ggml-quants.c for the scale (and minimum) of one block, sixteen blocks at a time.

Arithmetic is the reference's: float32, sums in index order, no fused multiply-add; so the results are the same bits.
Tiles are float32 (entries, 16): row i holds entry i of sixteen blocks. A search reads `count` rows from `first` on.

Besides its result every search returns what gives its own codes back: code = nearest(factor * (x - base)), clamped.
A block of (near) zeros has no codes of its own; the reference stores 0 bits, the lowest code, for it: base = `ABOVE`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tightship.formats.jit import kernel
from tightship.formats.lanes import absolute, load, nearest, root, smaller, some, splat, store, where

ABOVE = np.float32(1e30)
TINY = np.float32(1e-15)


def affine_steps(low: float, step: float, count: int, top: int) -> np.ndarray:
    """Numerators of the candidate inverse scales of `affine`: top + low + step * i, i = 0..count."""
    i = np.arange(count + 1, dtype=np.float32)
    return np.float32(low) + np.float32(step) * i + np.float32(top)


def signed_steps(top: int) -> np.ndarray:
    """Numerators of the candidate inverse scales of `symmetric`, the first being its starting point."""
    i = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)
    return -(np.float32(top) + np.float32(0.1) * i)


def positive_steps(top: int) -> np.ndarray:
    """Numerators of the candidate inverse scales of `positive`, the first being its starting point."""
    i = np.array([0, *range(-4, 0), *range(1, 5)], np.float32)
    return np.float32(0.1) * i + np.float32(top)


@kernel
def clamp(v: Any, low: Any, high: Any) -> Any:
    """Nearest integers within [low, high]; NaN gives low."""
    return nearest(smaller(where(v > low, v, splat(low)), splat(high)))


@kernel
def peak(x: Any, first: int, count: int) -> Any:
    """(largest magnitude, the first value that has it)."""
    size, value = splat(0.0), splat(0.0)
    for i in range(first, first + count):
        v = load(x, i)
        grows = absolute(v) > size
        size = where(grows, absolute(v), size)
        value = where(grows, v, value)
    return size, value


@kernel
def affine(x: Any, w: Any, codes: Any, first: int, count: int, top: float, steps: Any, by_magnitude: bool) -> Any:
    """`make_qkx2_quants` and `make_qkx3_quants`: x ~ scale * code + low, codes 0..top, low <= 0.

    `by_magnitude` weighs absolute instead of squared errors; `codes` is scratch of `count` rows.
    Returns (scale, low, factor, base).
    """
    low = high = load(x, first)
    sum_w = load(w, first)
    sum_x = sum_w * low
    for i in range(first + 1, first + count):
        v, weight = load(x, i), load(w, i)
        low = smaller(v, low)
        high = where(v > high, v, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * v
    low = where(low > 0.0, splat(0.0), low)
    some_range = high > low
    factor = splat(top) / (high - low)
    scale, base = splat(1.0) / factor, low
    for i in range(count):
        store(codes, i, clamp(factor * (load(x, first + i) - low), 0.0, top))
    best = _affine_error(x, w, codes, first, count, scale, low, by_magnitude)
    for k in range(len(steps)):
        inverse = splat(steps[k]) / (high - low)
        sum_l, sum_l2, sum_xl = splat(0.0), splat(0.0), splat(0.0)
        for i in range(count):
            v, weight = load(x, first + i), load(w, first + i)
            code = clamp(inverse * (v - low), 0.0, top)
            store(codes, i, code)
            weighted = weight * code
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * code
            sum_xl = sum_xl + weighted * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0.0
        new_low = where(above, splat(0.0), new_low)
        new_scale = where(above, sum_xl / sum_l2, new_scale)
        error = _affine_error(x, w, codes, first, count, new_scale, new_low, by_magnitude)
        better = (determinant > 0.0) & (error < best)
        best = where(better, error, best)
        factor, base = where(better, inverse, factor), where(better, low, base)
        scale, low = where(better, new_scale, scale), where(better, new_low, low)
    zero = splat(0.0)
    return where(some_range, scale, zero), low, where(some_range, factor, zero), where(some_range, base, zero)


@kernel
def _affine_error(x: Any, w: Any, codes: Any, first: int, count: int, scale: Any, low: Any, by_magnitude: bool) -> Any:
    total = splat(0.0)
    for i in range(count):
        error = scale * load(codes, i) + low - load(x, first + i)
        total = total + load(w, first + i) * (absolute(error) if by_magnitude else error * error)
    return total


@kernel
def symmetric(x: Any, w: Any, first: int, count: int, top: float, steps: Any) -> Any:
    """`make_qx_quants` with squared errors: x ~ scale * code, codes -top..top - 1. Returns (scale, factor, base)."""
    size, extreme = peak(x, first, count)
    scale = best = factor = splat(0.0)
    for k in range(len(steps)):
        inverse = splat(steps[k]) / extreme
        sum_xl, sum_l2 = splat(0.0), splat(0.0)
        for i in range(first, first + count):
            v, weight = load(x, i), load(w, i)
            code = clamp(inverse * v, -top, top - 1.0)
            sum_xl = sum_xl + weight * v * code
            sum_l2 = sum_l2 + weight * code * code
        if k == 0:
            scale = where(sum_l2 != 0.0, sum_xl / sum_l2, splat(0.0))
            best, factor = scale * sum_xl, inverse
        else:
            better = (sum_l2 > 0.0) & (sum_xl * sum_xl > best * sum_l2)
            scale = where(better, sum_xl / sum_l2, scale)
            best = where(better, scale * sum_xl, best)
            factor = where(better, inverse, factor)
    empty = size < TINY
    zero = splat(0.0)
    return where(empty, zero, scale), where(empty, splat(1.0), factor), where(empty, splat(ABOVE), zero)


@kernel
def descents(x: Any, codes: Any, first: int, count: int, top: float) -> Any:
    """`make_q3_quants`: weights x^2, codes -top..top - 1 improved one at a time. Writes `codes`.

    Two blocks at once, at `first` and `first + count`, so that their chains of dependent steps overlap; two scales.
    """
    xl_a, l2_a = _descent_start(x, codes, first, count, 0, top)
    xl_b, l2_b = _descent_start(x, codes, first + count, count, count, top)
    for _ in range(5):
        changed = splat(0.0) > 0.0
        for i in range(count):
            xl_a, l2_a, better_a = _descent_step(x, codes, first + i, i, xl_a, l2_a, top)
            xl_b, l2_b, better_b = _descent_step(x, codes, first + count + i, count + i, xl_b, l2_b, top)
            changed = changed | better_a | better_b
        if not some(changed):
            break
    scale_a = _descent_end(x, codes, first, count, 0, xl_a, l2_a, top)
    scale_b = _descent_end(x, codes, first + count, count, count, xl_b, l2_b, top)
    return scale_a, scale_b


@kernel
def _descent_start(x: Any, codes: Any, first: int, count: int, at: int, top: float) -> Any:
    _, extreme = peak(x, first, count)
    inverse = splat(-top) / extreme
    sum_xl, sum_l2 = splat(0.0), splat(0.0)
    for i in range(count):
        v = load(x, first + i)
        code = clamp(inverse * v, -top, top - 1.0)
        store(codes, at + i, code)
        sum_xl = sum_xl + v * v * v * code
        sum_l2 = sum_l2 + v * v * code * code
    return sum_xl, sum_l2


@kernel
def _descent_step(x: Any, codes: Any, row: int, at: int, sum_xl: Any, sum_l2: Any, top: float) -> Any:
    v, code = load(x, row), load(codes, at)
    weight = v * v
    rest_xl, rest_l2 = sum_xl - weight * v * code, sum_l2 - weight * code * code
    new = clamp(v * rest_l2 / rest_xl, -top, top - 1.0)
    new_xl, new_l2 = rest_xl + weight * v * new, rest_l2 + weight * new * new
    better = (rest_xl > 0.0) & (new != code) & (new_l2 > 0.0)
    better = better & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
    store(codes, at, where(better, new, code))
    return where(better, new_xl, sum_xl), where(better, new_l2, sum_l2), better


@kernel
def _descent_end(x: Any, codes: Any, first: int, count: int, at: int, sum_xl: Any, sum_l2: Any, top: float) -> Any:
    size, _ = peak(x, first, count)
    empty = size < TINY
    for i in range(count):
        store(codes, at + i, where(empty, splat(-top), load(codes, at + i)))
    return where((sum_l2 > 0.0) & (size >= TINY), sum_xl / sum_l2, splat(0.0))


@kernel
def positive(x: Any, w: Any, codes: Any, count: int, top: float, steps: Any) -> Any:
    """`make_qp_quants`: x ~ scale * code, x >= 0, codes 0..top. Returns scale; writes `codes`."""
    high = splat(0.0)
    for i in range(count):
        high = where(load(x, i) > high, load(x, i), high)
    best = factor = splat(0.0)
    for k in range(len(steps)):
        inverse = splat(steps[k]) / high
        scale = splat(1.0) / inverse
        error = splat(0.0)
        for i in range(count):
            rest = load(x, i) - scale * clamp(inverse * load(x, i), 0.0, top)
            error = error + load(w, i) * rest * rest
        if k == 0:
            best, factor = error, inverse
        else:
            better = error < best
            best, factor = where(better, error, best), where(better, inverse, factor)
    sum_xl, sum_l2 = splat(0.0), splat(0.0)
    for i in range(count):
        v, weight = load(x, i), load(w, i)
        code = clamp(factor * v, 0.0, top)
        store(codes, i, code)
        sum_xl = sum_xl + weight * v * code
        sum_l2 = sum_l2 + weight * code * code
    for _ in range(5):
        changed = splat(0.0) > 0.0
        for i in range(count):
            v, weight, code = load(x, i), load(w, i), load(codes, i)
            rest_xl, rest_l2 = sum_xl - weight * v * code, sum_l2 - weight * code * code
            new = clamp(v * rest_l2 / rest_xl, 0.0, top)
            new_xl, new_l2 = rest_xl + weight * v * new, rest_l2 + weight * new * new
            better = (rest_xl > 0.0) & (rest_l2 > 0.0) & (new != code)
            better = better & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            store(codes, i, where(better, new, code))
            sum_xl, sum_l2 = where(better, new_xl, sum_xl), where(better, new_l2, sum_l2)
            changed = changed | better
        if not some(changed):
            break
    empty = high < TINY
    for i in range(count):
        store(codes, i, where(empty, splat(0.0), load(codes, i)))
    return where((sum_l2 > 0.0) & (high >= TINY), sum_xl / sum_l2, splat(0.0))


@kernel
def mean_square(x: Any, first: int, count: int, times: float) -> Any:
    """times * (sum of squares) / count."""
    squares = splat(0.0)
    for i in range(first, first + count):
        squares = squares + load(x, i) * load(x, i)
    return splat(times) * squares / splat(count)


@kernel
def weigh(x: Any, w: Any, count: int, variance: Any) -> Any:
    """In place: w = importance * sqrt(variance + x^2)."""
    for i in range(count):
        v = load(x, i)
        store(w, i, load(w, i) * root(variance + v * v))


@kernel
def total(w: Any, first: int, count: int) -> Any:
    """Sum of rows."""
    result = splat(0.0)
    for i in range(first, first + count):
        result = result + load(w, i)
    return result


@kernel
def gather(source: Any, block: int, last: int, width: int, period: int, tile: Any) -> None:
    """Rows of `tile` from sixteen blocks of `width` in flat `source`; block b lies at (b % period) * width.

    Blocks from `last` on repeat the last one.
    """
    for lane in range(16):
        start = (min(block + lane, last - 1) % period) * width
        for i in range(width):
            tile[i, lane] = source[start + i]
