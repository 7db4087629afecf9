"""IQ1, IQ2 and IQ3: four or eight neighbouring weights share one point of a fixed grid.

| array  | dtype   | shape              | meaning                                                               |
|--------|---------|--------------------|-----------------------------------------------------------------------|
| codes  | int8    | (rows, cols)       | signed coordinates of the grid points, see below                      |
| d      | float16 | (rows, cols / 256) | step                                                                  |
| scales | uint8   | (rows, cols / sub) | 0..15, or 0..7 for iq1_s and iq1_m                                    |

value = d * (2 scale + 1) * unit * code:

| type    | unit | sub | points of the grid | codes                                                        |
|---------|------|-----|--------------------|--------------------------------------------------------------|
| iq1_s   | 1/8  | 32  | 2048 of 8          | 8 g + s: g in -1, 0, 1 on the grid, s = 1 or -1 for 32 codes |
| iq1_m   | 1/8  | 16  | 2048 of 8          | the same, s for 8 codes                                      |
| iq2_xxs | 1/8  | 32  | 256 of 8           | +-8, +-25, +-43; an even number of them negative             |
| iq2_xs  | 1/8  | 16  | 512 of 8           | the same                                                     |
| iq2_s   | 1/8  | 16  | 1024 of 8          | +-8, +-25, +-43                                              |
| iq3_xxs | 1/4  | 32  | 256 of 4           | +-4, 12, 20, 28, 36, 44, 52, 62; of 8 an even number negative |
| iq3_s   | 1    | 32  | 512 of 4           | +-1, 3, 5, 7, 9, 11, 13, 15                                  |

Codes depend on each other, so there is no per-column grid, and solvers that round column by column do not apply. The
search is libggml's own (`formats/libggml.py`), which must be installed for it; reading needs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tightship.errors import Unsupported
from tightship.formats import libggml
from tightship.formats.layouts.ggml_base import GgmlLayout
from tightship.formats.threads import over_blocks
from tightship.layout import Arrays, Context, Grid


class _IqGrid(GgmlLayout):
    """Base of the family; `sub` columns share a scale."""

    width: ClassVar[int] = 256
    code_width: ClassVar[int] = 8
    code_dtype: ClassVar[type[np.integer]] = np.int8
    zero: ClassVar[bool] = False
    unit: ClassVar[float] = 0.125
    sub: ClassVar[int]

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        """`ggml_quantize_chunk`.

        Raises:
            EnvironmentFailure: no libggml is installed.
            Unsupported: the type needs importance, and none was given.
        """
        from tightship.formats.packings.ggml import row_bytes, unpack_ggml

        w = np.ascontiguousarray(w, np.float32)
        name = self.kind.upper()
        data = np.empty((len(w), row_bytes(name, w.shape[1])), np.uint8)

        def rows(first: int, last: int) -> None:
            libggml.quantize_chunk(name, w[first:last], importance, data[first:last])

        over_blocks(rows, len(w), together=1)
        return unpack_ggml(name, data, w.shape[1])[1]

    def grid(self, params: Mapping[str, np.ndarray]) -> Grid:  # noqa: ARG002
        raise Unsupported(
            f"codes of {self.name} span {self.code_width} columns, so they cannot be rounded column by column",
            hint="use the rtn or importance solver for this layout",
        )

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        steps = np.repeat(arrays["d"].astype(np.float64), self.width // self.sub, axis=1)
        steps *= (2.0 * arrays["scales"] + 1) * self.unit
        return arrays["codes"] * np.repeat(steps, self.sub, axis=1)


class _Sub16(_IqGrid):
    sub: ClassVar[int] = 16
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "scales": (np.uint8, 16)}


class _Sub32(_IqGrid):
    sub: ClassVar[int] = 32
    parameters: ClassVar[dict[str, tuple[type[np.generic], int]]] = {"d": (np.float16, 1), "scales": (np.uint8, 8)}


@dataclass(frozen=True)
class IQ1S(_Sub32):
    """1.5625 bits a weight; needs importance."""

    kind: ClassVar[str] = "iq1_s"


@dataclass(frozen=True)
class IQ1M(_Sub16):
    """1.75 bits a weight."""

    kind: ClassVar[str] = "iq1_m"


@dataclass(frozen=True)
class IQ2XXS(_Sub32):
    """2.0625 bits a weight; needs importance."""

    kind: ClassVar[str] = "iq2_xxs"


@dataclass(frozen=True)
class IQ2XS(_Sub16):
    """2.3125 bits a weight; needs importance."""

    kind: ClassVar[str] = "iq2_xs"


@dataclass(frozen=True)
class IQ2S(_Sub16):
    """2.5625 bits a weight."""

    kind: ClassVar[str] = "iq2_s"


@dataclass(frozen=True)
class IQ3XXS(_Sub32):
    """3.0625 bits a weight."""

    kind: ClassVar[str] = "iq3_xxs"
    unit: ClassVar[float] = 0.25


@dataclass(frozen=True)
class IQ3S(_Sub32):
    """3.4375 bits a weight."""

    kind: ClassVar[str] = "iq3_s"
    code_width: ClassVar[int] = 4
    unit: ClassVar[float] = 1.0
