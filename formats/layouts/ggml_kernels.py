# ruff: noqa: PLR0917  kernels take positional arguments only
"""Kernels of the GGML blocks without a search, and of the 32-weight blocks searched with importance.

`w` is float32 (blocks, width) and `bits` the same memory as int32: magnitudes compare as integers, whose maximum LLVM
may vectorise where a float's it may not. `codes` is (blocks, width), parameters are (blocks,). The searches take a
flat `w`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tightship.formats.jit import kernel
from tightship.formats.lanes import load, store
from tightship.formats.layouts.ggml_search import affine, gather, symmetric, weigh

MAGNITUDE = np.int32(0x7FFFFFFF)


@kernel
def as_float(bits: Any) -> Any:
    """The float32 of these bits."""
    whole = np.int32(bits)
    return whole.view(np.float32)


@kernel
def magnitude(bits: Any) -> Any:
    """Largest magnitude of a block."""
    top = np.int32(0)
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] & MAGNITUDE))
    return as_float(top)


@kernel
def flip(bits: Any) -> Any:
    """Order float bits as integers: negative floats count down. Its own inverse."""
    return np.int32(bits ^ ((bits >> 31) & MAGNITUDE))


@kernel
def extremes(bits: Any) -> Any:
    """(least, largest) of a block, -0.0 below 0.0."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for i in range(len(bits)):
        key = flip(bits[i])
        low = min(low, key)
        high = max(high, key)
    return as_float(flip(low)), as_float(flip(high))


@kernel
def first_of(x: Any, size: Any) -> Any:
    """The first value of magnitude `size`."""
    i = 0
    while abs(x[i]) != size:
        i += 1
    return x[i]


@kernel
def inverse(step: Any) -> Any:
    """1 / step, or 0 for 0."""
    return np.float32(1) / step if step != 0 else np.float32(0)


@kernel
def round_symmetric(first: int, last: int, w: Any, bits: Any, low: int, d: Any, codes: Any) -> None:
    """Q4_0, Q5_0: d = peak / low, code = trunc(x / d - low + 1/2) + low, at most -low - 1."""
    shift, top = np.float32(0.5 - low), np.float32(-2 * low - 1)
    for block in range(first, last):
        x = w[block]
        least, largest = extremes(bits[block])
        peak = largest if largest > -least else least
        if largest == -least:
            peak = first_of(x, largest) if largest != 0 else np.float32(0)
        step = peak / np.float32(low)
        d[block] = step
        factor = inverse(step)
        for i in range(len(x)):
            v = x[i] * factor + shift
            codes[block, i] = np.int32(v if v < top else top) + low


@kernel
def round_bytes(first: int, last: int, w: Any, bits: Any, d: Any, codes: Any) -> None:
    """Q8_0: d = magnitude / 127, code = x / d rounded half away from zero."""
    for block in range(first, last):
        x = w[block]
        step = magnitude(bits[block]) / np.float32(127)
        d[block] = step
        factor = inverse(step)
        for i in range(len(x)):
            v = x[i] * factor
            code = np.int32(v)
            rest = v - np.float32(code)
            codes[block, i] = code + np.int32(rest >= np.float32(0.5)) - np.int32(rest <= np.float32(-0.5))


@kernel
def round_affine(first: int, last: int, w: Any, bits: Any, top: int, d: Any, m: Any, codes: Any) -> None:
    """Q4_1, Q5_1: m = least, d = range / top, code = trunc((x - m) / d + 1/2)."""
    # Slices, since an index from range(first, last) may be negative for all LLVM knows: twice as fast.
    w, bits, d, m, codes = w[first:last], bits[first:last], d[first:last], m[first:last], codes[first:last]
    most = np.float32(top)
    for block in range(len(w)):
        x = w[block]
        low, high = extremes(bits[block])
        step = (high - low) / most
        d[block], m[block] = step, low
        factor = inverse(step)
        for i in range(len(x)):
            v = (x[i] - low) * factor + np.float32(0.5)
            codes[block, i] = np.int32(v if v < most else most)
    for block in range(len(w)):
        if m[block] == 0:
            m[block] = first_of(w[block], np.float32(0))


@kernel
def round_ternary(first: int, last: int, w: Any, bits: Any, d: Any, codes: Any) -> None:
    """TQ1_0, TQ2_0: d = magnitude, code = x / d rounded half away from zero."""
    for block in range(first, last):
        x = w[block]
        step = magnitude(bits[block])
        d[block] = step
        factor = inverse(step)
        for i in range(len(x)):
            v = x[i] * factor
            codes[block, i] = np.int32(v >= np.float32(0.5)) - np.int32(v <= np.float32(-0.5))


@kernel
def round_fp4(first: int, last: int, w: Any, unit: Any, codes: Any) -> None:
    """Nearest E2M1 codes for `unit` (blocks,), the value of 1.0; ties to the smaller magnitude, zero is +0."""
    for block in range(first, last):
        # Nothing is nearer than 0 to a scale of 0.
        x, one = w[block], unit[block] if unit[block] > 0 else np.float32(np.inf)
        t0, t1, t2 = np.float32(0.25) * one, np.float32(0.75) * one, np.float32(1.25) * one
        t3, t4, t5, t6 = np.float32(1.75) * one, np.float32(2.5) * one, np.float32(3.5) * one, np.float32(5) * one
        for i in range(len(x)):
            size = abs(x[i])
            code = np.int32(size > t0) + np.int32(size > t1) + np.int32(size > t2) + np.int32(size > t3)
            code += np.int32(size > t4) + np.int32(size > t5) + np.int32(size > t6)
            codes[block, i] = code + (np.int32(8) if (x[i] < 0) & (code > 0) else np.int32(0))


@kernel
def magnitudes(first: int, last: int, bits: Any, out: Any) -> None:
    """Largest magnitude of every block, (blocks,) float32."""
    for block in range(first, last):
        out[block] = magnitude(bits[block])


@kernel
def row_mean_squares(first: int, last: int, w: Any, cols: int, out: Any) -> None:
    """Mean of squares of every row, summed in order in float32."""
    for row in range(first, last):
        squares = np.float32(0)
        for i in range(row * cols, row * cols + cols):
            squares += w[i] * w[i]
        out[row] = squares / np.float32(cols)


@kernel
def search_symmetric(
    first: int,
    last: int,
    w: Any,
    importance: Any,
    period: int,
    variance: Any,
    width: int,
    top: float,
    steps: Any,
    d: Any,
    kept: Any,
) -> None:
    """Q4_0, Q5_0 with importance; `variance` is (rows,), the mean square of the block's row."""
    x, weights = np.empty((width, 16), np.float32), np.empty((width, 16), np.float32)
    rows = np.empty((3, 16), np.float32)
    for block in range(first, last, 16):
        _weigh_blocks(block, last, w, importance, period, variance, x, weights, rows)
        scale, factor, base = symmetric(x, weights, 0, width, top, steps)
        store(rows, 0, scale)
        store(rows, 1, factor)
        store(rows, 2, base)
        for lane in range(min(16, last - block)):
            d[block + lane] = rows[0, lane]
            kept[block + lane, 0], kept[block + lane, 1] = rows[1, lane], rows[2, lane]


@kernel
def search_affine(
    first: int,
    last: int,
    w: Any,
    importance: Any,
    period: int,
    variance: Any,
    top: float,
    steps: Any,
    d: Any,
    m: Any,
    kept: Any,
) -> None:
    """Q4_1, Q5_1 with importance, as `search_symmetric`, in blocks of 32."""
    x, weights = np.empty((32, 16), np.float32), np.empty((32, 16), np.float32)
    scratch, rows = np.empty((32, 16), np.float32), np.empty((4, 16), np.float32)
    for block in range(first, last, 16):
        _weigh_blocks(block, last, w, importance, period, variance, x, weights, rows)
        scale, low, factor, base = affine(x, weights, scratch, 0, 32, top, steps, False)
        store(rows, 0, scale)
        store(rows, 1, low)
        store(rows, 2, factor)
        store(rows, 3, base)
        for lane in range(min(16, last - block)):
            d[block + lane], m[block + lane] = rows[0, lane], rows[1, lane]
            kept[block + lane, 0], kept[block + lane, 1] = rows[2, lane], rows[3, lane]


@kernel
def _weigh_blocks(
    block: int, last: int, w: Any, importance: Any, period: int, variance: Any, x: Any, weights: Any, rows: Any
) -> None:
    width = len(x)
    gather(w, block, last, width, last, x)
    gather(importance, block, last, width, period, weights)
    for lane in range(16):
        rows[0, lane] = variance[min(block + lane, last - 1) // period]
    weigh(x, weights, width, load(rows, 0))


@kernel
def nearest_code(v: float, low: int, high: int) -> int:
    """Nearest integer within [low, high], ties to even."""
    low, high = np.float32(low), np.float32(high)
    v = v if v > low else low
    v = v if v < high else high
    return np.int32((v + np.float32(12582912.0)) - np.float32(12582912.0))


@kernel
def kept_codes(first: int, last: int, w: Any, kept: Any, low: int, high: int, codes: Any) -> None:
    """The codes of a search: nearest(factor * (x - base)) within [low, high]."""
    width = codes.shape[1]
    for block in range(first, last):
        factor, base = kept[block, 0], kept[block, 1]
        for i in range(width):
            codes[block, i] = nearest_code(factor * (w[block * width + i] - base), low, high)
