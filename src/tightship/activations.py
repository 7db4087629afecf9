"""How the inputs of linears, and the cache of keys and values, are rounded at run time: the words, and what they mean.

| word                            | numbers | one scale for          | scale is                        |
|---------------------------------|---------|------------------------|---------------------------------|
| int8-dynamic, int8-dynamic-asym | int8    | each token             | found at run time               |
| int8-static, int8-static-asym   | int8    | the tensor             | calibrated                      |
| fp8-dynamic                     | E4M3    | each token             | found at run time               |
| fp8-dynamic-g128                | E4M3    | 128 channels of a token | found at run time              |
| fp8-static                      | E4M3    | the tensor             | calibrated                      |
| mxfp8-dynamic, mxfp4-dynamic    | E4M3, E2M1 | 32 channels of a token | found at run time            |
| nvfp4-local                     | E2M1    | 16 channels of a token | found at run time, its divisor calibrated |

value = scale * (code - zero point). A range [lo, hi] with lo <= 0 <= hi becomes, for codes Qmin..Qmax = -128..127,

    symmetric:   S = max(-lo, hi) / Qmax,        Z = 0
    asymmetric:  S = (hi - lo) / (Qmax - Qmin),  Z = round(Qmin - lo / S)

so that 0.0 is Z exactly and lo is Qmin (Jacob et al., arXiv:1712.05877, equation 1 and section 3; the form
Z = Qmax - lo / S that one meets is wrong: it puts lo on Qmax). FP8: S = max(-lo, hi) / 448. NVFP4 stores the divisor
448 * 6 / max(-lo, hi).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tightship.errors import UsageError
from tightship.suggest import did_you_mean

_LARGEST_E4M3, _LARGEST_E2M1 = 448.0, 6.0
_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class Activations:
    """How a linear's inputs (or a cache) are quantized at run time; `scale` and `zero_point` where they are static.

    An outline has no scale yet.
    """

    scheme: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Scheme:
    """What a word means. `group` is 0 for a whole token or tensor."""

    numbers: Literal["int8", "fp8", "fp4"]
    per: Literal["token", "tensor"]
    static: bool = False
    symmetric: bool = True
    group: int = 0


SCHEMES = {
    "int8-dynamic": Scheme("int8", "token"),
    "int8-dynamic-asym": Scheme("int8", "token", symmetric=False),
    "int8-static": Scheme("int8", "tensor", static=True),
    "int8-static-asym": Scheme("int8", "tensor", static=True, symmetric=False),
    "fp8-dynamic": Scheme("fp8", "token"),
    "fp8-dynamic-g128": Scheme("fp8", "token", group=128),
    "fp8-static": Scheme("fp8", "tensor", static=True),
    "mxfp8-dynamic": Scheme("fp8", "token", group=32),
    "mxfp4-dynamic": Scheme("fp4", "token", group=32),
    "nvfp4-local": Scheme("fp4", "token", static=True, group=16),
}


def scheme_of(word: str) -> Scheme:
    """The meaning of a word.

    Raises:
        UsageError: there is no such word; the message suggests the nearest.
    """
    found = SCHEMES.get(word)
    if found is None:
        raise UsageError(
            f"activations {word!r} are unknown{did_you_mean(word, SCHEMES)}", hint=f"known: {', '.join(SCHEMES)}"
        )
    return found


def fixed(word: str, low: float, high: float) -> Activations:
    """Static parameters for inputs in [low, high]; a range without extent gets scale 1.

    The scale is a float32. Raises as `scheme_of`.
    """
    scheme = scheme_of(word)
    low, high = min(low, 0.0), max(high, 0.0)
    largest = max(-low, high)
    if not largest:
        return Activations(word, 1.0, None if scheme.symmetric else 0)
    if scheme.numbers == "fp4":
        return Activations(word, _float32(_LARGEST_E4M3 * _LARGEST_E2M1 / largest))
    if scheme.numbers == "fp8":
        return Activations(word, _float32(largest / _LARGEST_E4M3))
    if scheme.symmetric:
        return Activations(word, _float32(largest / _HIGHEST))
    scale = _float32((high - low) / (_HIGHEST - _LOWEST))
    zero = int(np.clip(np.rint(_LOWEST - low / scale), _LOWEST, _HIGHEST))
    return Activations(word, scale, zero)


def _float32(x: float) -> float:
    return float(np.float32(x))
