# ruff: noqa: PLR0917  kernels take positional arguments only
"""Search of scale and zero point for asymmetric affine groups, weighted by importance.

A group x of weights with importance v wants scale s > 0 and integer zero point z in 0..top that minimise
sum v (s (q - z) - x)^2 over codes q in 0..top. Candidates shrink the range of x, from below, from above and from both
ends; each is refined by weighted least squares for scale and minimum, then brought to what can be stored: the scale
to `bits` significant bits (both neighbours are tried), the minimum to a whole zero point (again both). The error that
decides is that of the stored parameters. Plain range fitting is the first candidate, so the result is never worse.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tightship.formats.jit import kernel

SHRINKS = np.arange(1.1, 0.39, -0.05, dtype=np.float64)  # share of the range that the codes span
CENTRES = np.array([0.0, 0.5, 1.0])  # where the rest is cut: above, on both sides, below


@kernel
def search(first: int, last: int, w: Any, importance: Any, top: int, bits: int, scale: Any, zero: Any) -> None:
    """Fill `scale` and `zero` (0..top) of groups [first, last).

    `w` is (groups, width) float32, `importance` (groups in a row, width) float64; `scale` comes in with plain range
    fitting's stored scales and `zero` with its zero points.
    """
    per_row = len(importance)
    for group in range(first, last):
        x, v = w[group], importance[group % per_row]
        best_scale, best_zero = float(scale[group]), float(zero[group])
        if best_scale == 0.0:
            continue
        best = _error(x, v, best_scale, best_zero, top)
        low, high = 0.0, 0.0
        for value in x:
            low, high = min(low, float(value)), max(high, float(value))
        for shrink in SHRINKS:
            for centre in CENTRES:
                step = (high - low) * shrink / top
                start = low + (1.0 - shrink) * (high - low) * centre
                step, start = _least_squares(x, v, step, start, top)
                for side in range(2):
                    stored = _significant(step, bits, side == 1)
                    if stored <= 0.0:
                        continue
                    exact = min(max(-start / stored, 0.0), float(top))
                    for point in (math.floor(exact), math.ceil(exact)):
                        error = _error(x, v, stored, float(point), top)
                        if error < best:
                            best, best_scale, best_zero = error, stored, float(point)
        scale[group], zero[group] = best_scale, int(best_zero)


@kernel
def _error(x: Any, v: Any, scale: float, zero: float, top: int) -> float:
    """Weighted squared error of rounding to nearest."""
    inverse, total = 1.0 / scale, 0.0
    for i in range(len(x)):
        code = min(max(np.rint(x[i] * inverse + zero), 0.0), float(top))
        difference = scale * (code - zero) - x[i]
        total += v[i] * difference * difference
    return total


@kernel
def _least_squares(x: Any, v: Any, step: float, start: float, top: int) -> Any:
    """(step, start) of the line through the codes that the given ones round to; unchanged where it is not defined."""
    inverse = 1.0 / step
    n = sum_q = sum_qq = sum_x = sum_qx = 0.0
    for i in range(len(x)):
        code = min(max(np.rint((x[i] - start) * inverse), 0.0), float(top))
        n += v[i]
        sum_q += v[i] * code
        sum_qq += v[i] * code * code
        sum_x += v[i] * x[i]
        sum_qx += v[i] * code * x[i]
    determinant = n * sum_qq - sum_q * sum_q
    if determinant <= 0.0:
        return step, start
    slope = (n * sum_qx - sum_q * sum_x) / determinant
    if slope <= 0.0:
        return step, start
    return slope, (sum_x - slope * sum_q) / n


@kernel
def _significant(x: float, bits: int, up: bool) -> float:
    """Neighbour of x > 0 with `bits` significant bits that float16 can hold (below 2^-14 its spacing is 2^-24)."""
    mantissa, exponent = math.frexp(x)
    unit = max(exponent - bits, -24)
    scaled = math.ldexp(mantissa, exponent - unit)
    return math.ldexp(math.ceil(scaled) if up else math.floor(scaled), unit)
