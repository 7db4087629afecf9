# ruff: noqa: PLR0917  kernels take positional arguments only
"""Kernels of the K-quants: sixteen super-blocks of 256 weights at a time, one in each lane.

Arrays, B blocks of S sub-blocks: `w` is flat float32; `importance` is (cols,) float32, empty for the searches without
it; `d` and `dmin` are float32 (B,), not yet rounded to float16; `scales`, `mins` are integers (B, S); `kept` is float32
(B, S, 2), the factor and base that give back the codes of the search (see `ggml_search`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tightship.formats.jit import kernel
from tightship.formats.lanes import absolute, load, root, splat, store, where
from tightship.formats.layouts.ggml_kernels import nearest_code
from tightship.formats.layouts.ggml_search import (
    ABOVE,
    TINY,
    affine,
    clamp,
    descents,
    gather,
    mean_square,
    peak,
    positive,
    symmetric,
    total,
    weigh,
)

SUPER = 256


class AffineSearch(NamedTuple):
    """How Q2_K, Q4_K or Q5_K searches: sub-blocks of `entries`, codes 0..top, scales and mins 0..scale_top."""

    entries: int
    top: float
    steps: np.ndarray
    scale_top: float
    scale_steps: np.ndarray
    variance: float


@kernel
def affine_blocks(
    first: int, last: int, w: Any, importance: Any, period: int, how: AffineSearch, steps: Any, scales: Any, kept: Any
) -> None:
    """Q2_K, Q4_K, Q5_K: fills `steps` = (d, dmin), `scales` = (scales, mins) and `kept`.

    Without importance the weights are |x| (sub-blocks of 16) or rms + |x| (of 32).
    """
    entries, (d, dmin), (scales, mins) = how.entries, steps, scales
    parts = SUPER // entries
    x, weights = np.empty((SUPER, 16), np.float32), np.empty((SUPER, 16), np.float32)
    scratch = np.empty((entries, 16), np.float32)
    rows = np.empty((7, parts, 16), np.float32)
    found, low, mass, factor, base, scale_codes, min_codes = (
        rows[0],
        rows[1],
        rows[2],
        rows[3],
        rows[4],
        rows[5],
        rows[6],
    )
    ends = np.empty((2, 16), np.float32)
    plain = len(importance) == 0
    for block in range(first, last, 16):
        gather(w, block, last, SUPER, last, x)
        if not plain:
            gather(importance, block, last, SUPER, period, weights)
            weigh(x, weights, SUPER, mean_square(x, 0, SUPER, how.variance))
        for j in range(parts):
            at = j * entries
            if plain:
                level = root(mean_square(x, at, entries, 1.0)) if entries == 32 else splat(0.0)
                for i in range(at, at + entries):
                    store(weights, i, level + absolute(load(x, i)))
            scale, minimum, f, b = affine(x, weights, scratch, at, entries, how.top, how.steps, plain and entries == 16)
            store(found, j, scale)
            store(low, j, splat(0.0) - minimum)
            store(factor, j, f)
            store(base, j, b)
            store(mass, j, total(weights, at, entries))
        if plain:
            store(ends, 0, _by_largest(found, scale_codes, parts, how.scale_top))
            store(ends, 1, _by_largest(low, min_codes, parts, how.scale_top))
        else:
            store(ends, 0, positive(found, mass, scale_codes, parts, how.scale_top, how.scale_steps))
            store(ends, 1, positive(low, mass, min_codes, parts, how.scale_top, how.scale_steps))
        for lane in range(min(16, last - block)):
            d[block + lane], dmin[block + lane] = ends[0, lane], ends[1, lane]
            for j in range(parts):
                scales[block + lane, j], mins[block + lane, j] = scale_codes[j, lane], min_codes[j, lane]
                kept[block + lane, j, 0], kept[block + lane, j, 1] = factor[j, lane], base[j, lane]


@kernel
def _by_largest(x: Any, codes: Any, count: int, top: float) -> Any:
    """Codes of non-negative rows with the largest at `top`; returns the step."""
    high = splat(0.0)
    for i in range(count):
        high = where(load(x, i) > high, load(x, i), high)
    inverse = where(high > 0.0, splat(top) / high, splat(0.0))
    for i in range(count):
        store(codes, i, clamp(inverse * load(x, i), 0.0, top))
    return high / splat(top)


@kernel
def symmetric_blocks(
    first: int,
    last: int,
    w: Any,
    importance: Any,
    period: int,
    top: float,
    steps: Any,
    scale_top: float,
    d: Any,
    scales: Any,
    kept: Any,
) -> None:
    """Q6_K, with and without importance: sub-blocks of 16, the scales by their largest at -scale_top."""
    parts = SUPER // 16
    x, weights = np.empty((SUPER, 16), np.float32), np.empty((SUPER, 16), np.float32)
    rows = np.empty((4, parts, 16), np.float32)
    found, factor, base, codes = rows[0], rows[1], rows[2], rows[3]
    end = np.empty((1, 16), np.float32)
    plain = len(importance) == 0
    for block in range(first, last, 16):
        gather(w, block, last, SUPER, last, x)
        if plain:
            for i in range(SUPER):
                store(weights, i, load(x, i) * load(x, i))
        else:
            gather(importance, block, last, SUPER, period, weights)
        for j in range(parts):
            scale, f, b = symmetric(x, weights, j * 16, 16, top, steps)
            store(found, j, scale)
            store(factor, j, f)
            store(base, j, b)
        store(end, 0, _by_peak(found, codes, parts, scale_top, TINY))
        _drop_empty(found, codes, factor, base, parts)
        _write_signed(block, last, end, codes, factor, base, d, scales, kept)


@kernel
def _by_peak(x: Any, codes: Any, count: int, top: float, least: float) -> Any:
    """Codes with the signed largest at -top; below `least` all are -top and the step is 0. Returns the step."""
    size, extreme = peak(x, 0, count)
    none = size < least
    inverse = splat(-top) / extreme
    for i in range(count):
        store(codes, i, where(none, splat(-top), clamp(inverse * load(x, i), -top, top - 1.0)))
    return where(none, splat(0.0), splat(1.0) / inverse)


@kernel
def _drop_empty(found: Any, codes: Any, factor: Any, base: Any, parts: int) -> None:
    """Q6_K writes zero bytes for a super-block without a scale: scales 0, lowest codes."""
    size, _ = peak(found, 0, parts)
    none = size < TINY
    for j in range(parts):
        store(codes, j, where(none, splat(0.0), load(codes, j)))
        store(factor, j, where(none, splat(1.0), load(factor, j)))
        store(base, j, where(none, splat(ABOVE), load(base, j)))


@kernel
def _write_signed(
    block: int, last: int, end: Any, codes: Any, factor: Any, base: Any, d: Any, scales: Any, kept: Any
) -> None:
    for lane in range(min(16, last - block)):
        d[block + lane] = end[0, lane]
        for j in range(codes.shape[0]):
            scales[block + lane, j] = codes[j, lane]
            kept[block + lane, j, 0], kept[block + lane, j, 1] = factor[j, lane], base[j, lane]


@kernel
def q3_blocks(
    first: int,
    last: int,
    w: Any,
    importance: Any,
    period: int,
    steps: Any,
    scale_steps: Any,
    d: Any,
    scales: Any,
    kept: Any,
) -> None:
    """Q3_K with importance."""
    parts = SUPER // 16
    x, weights = np.empty((SUPER, 16), np.float32), np.empty((SUPER, 16), np.float32)
    rows = np.empty((5, parts, 16), np.float32)
    found, factor, base, codes, mass = rows[0], rows[1], rows[2], rows[3], rows[4]
    end = np.empty((1, 16), np.float32)
    for block in range(first, last, 16):
        gather(w, block, last, SUPER, last, x)
        gather(importance, block, last, SUPER, period, weights)
        weigh(x, weights, SUPER, mean_square(x, 0, SUPER, 2.0))
        for j in range(parts):
            scale, f, b = symmetric(x, weights, j * 16, 16, 4.0, steps)
            store(found, j, scale)
            store(factor, j, f)
            store(base, j, b)
            store(mass, j, total(weights, j * 16, 16))
        step, f, b = symmetric(found, mass, 0, parts, 32.0, scale_steps)
        store(end, 0, step)
        for j in range(parts):
            store(codes, j, clamp(f * (load(found, j) - b), -32.0, 31.0))
        _write_signed(block, last, end, codes, factor, base, d, scales, kept)


@kernel
def q3_blocks_plain(first: int, last: int, w: Any, d: Any, scales: Any, codes: Any) -> None:
    """Q3_K without importance; its codes come from a descent, so they are written: int8 (B, 256)."""
    parts = SUPER // 16
    x, own = np.empty((SUPER, 16), np.float32), np.empty((32, 16), np.float32)
    found, scale_codes = np.empty((parts, 16), np.float32), np.empty((parts, 16), np.float32)
    end = np.empty((1, 16), np.float32)
    for block in range(first, last, 16):
        gather(w, block, last, SUPER, last, x)
        for j in range(0, parts, 2):
            one, other = descents(x, own, j * 16, 16, 4.0)
            store(found, j, one)
            store(found, j + 1, other)
            for lane in range(min(16, last - block)):
                for i in range(32):
                    codes[block + lane, j * 16 + i] = own[i, lane]
        store(end, 0, _by_peak(found, scale_codes, parts, 32.0, np.float32(1e-45)))
        for lane in range(min(16, last - block)):
            d[block + lane] = end[0, lane]
            for j in range(parts):
                scales[block + lane, j] = scale_codes[j, lane]


@kernel
def encode(
    first: int, last: int, w: Any, d: Any, dmin: Any, scales: Any, mins: Any, kept: Any, low: int, high: int, codes: Any
) -> None:
    """Final codes from the stored scales: nearest((x + dmin * min) / (d * scale)) within [low, high].

    `d` and `dmin` are the float16 values as float32. A sub-block whose step came out 0 keeps the codes of the search,
    from `kept` where that is not empty. `mins` may be empty (no minimum).
    """
    parts = scales.shape[1]
    entries = codes.shape[1] // parts
    for block in range(first, last):
        for j in range(parts):
            step = d[block] * np.float32(scales[block, j])
            offset = dmin[block] * np.float32(mins[block, j]) if len(mins) else np.float32(0.0)
            at = j * entries
            start = block * codes.shape[1] + at
            if step != 0:
                for i in range(entries):
                    v = (w[start + i] + offset) / step
                    codes[block, at + i] = nearest_code(v, low, high)
            elif len(kept):
                factor, base = kept[block, j, 0], kept[block, j, 1]
                for i in range(entries):
                    codes[block, at + i] = nearest_code(factor * (w[start + i] - base), low, high)
