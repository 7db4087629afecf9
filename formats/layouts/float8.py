"""FP8: eight-bit floats (E4M3) times a float32 scale for the tensor, each row, each group, or each tile; and MXFP8.

| array | dtype   | fp8-e4m3       | mxfp8             | meaning                                               |
|-------|---------|----------------|-------------------|-------------------------------------------------------|
| codes | uint8   | (rows, cols)   | (rows, cols)      | E4M3FN: sign, 4 bits of exponent (bias 7), 3 mantissa |
| scale | float32 | (rows, groups) |                   | a step                                                |
| scale | uint8   |                | (rows, cols / 32) | E8M0: 2^(scale - 127)                                 |

value = E4M3 * scale; 0x7F and 0xFF are NaN. Scales that several rows share (one for the tensor, tiles of 128 x 128) are
repeated on each of these rows, so that every array is row-wise; a packing stores them once and refuses rows that
disagree.

E4M3FN is the format of Micikevicius et al., arXiv:2209.05433, section 3: no infinity, largest value 448. MXFP8: OCP
Microscaling Formats 1.0, section 6.3. Importance changes nothing: a step moves the grid's binades, not its fineness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tightship.errors import Malformed
from tightship.layout import Arrays, ArraySpec, Context, Layout, TableGrid

LARGEST = np.float32(448)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def _table() -> np.ndarray:
    """float32 of all 256 codes; the two NaNs read as infinity, which is nearest to nothing."""
    values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    return np.where(np.isnan(values), np.float32(np.inf), values)


TABLE = _table()


def encode(x: np.ndarray) -> np.ndarray:
    """uint8 codes of float32, rounded to nearest even, beyond +-448 clamped."""
    return np.clip(x, -LARGEST, LARGEST).astype(E4M3).view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Float8(Layout):
    """`tile_rows` rows (0: all) and `group_size` columns (0: the whole row) share a scale."""

    kind: ClassVar[str] = "float8"
    tile_rows: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.tile_rows < 0 or self.group_size < 0:
            raise Malformed(f"an fp8 tile has sizes of 0 or more, found {self.tile_rows} x {self.group_size}")

    @property
    def name(self) -> str:
        words = {(0, 0): "", (1, 0): "-channel", (128, 128): "-block"}
        shared = words.get((self.tile_rows, self.group_size))
        if shared is None:
            tile = f"-block{self.tile_rows}x{self.group_size}"
            shared = f"-g{self.group_size}" if self.tile_rows == 1 else tile
        return f"fp8-e4m3{shared}"

    @property
    def block(self) -> int:
        return self.group_size

    @property
    def rows_together(self) -> int:
        return self.tile_rows

    @property
    def keeps_zero(self) -> bool:
        return True

    def blocks_per_row(self, cols: int) -> int:
        """Tiles in a row of `cols` columns; the last may be narrower."""
        return -(-cols // (self.group_size or cols))

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        return {
            "codes": ArraySpec(np.dtype(np.uint8), shape),
            "scale": ArraySpec(np.dtype(np.float32), (shape[0], self.blocks_per_row(shape[1]))),
        }

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        """The largest magnitude of a tile becomes 448; a tile of zeros has scale 1."""
        w = np.ascontiguousarray(w, np.float32)
        rows, cols = w.shape
        largest = np.maximum.reduceat(np.abs(w), np.arange(0, cols, self.group_size or cols), axis=1)
        step = self.tile_rows or rows
        tiles = np.maximum.reduceat(largest, np.arange(0, rows, step), axis=0) / LARGEST
        scale = np.repeat(np.where(tiles > 0, tiles, np.float32(1)), step, axis=0)[:rows]
        return {"codes": encode(w / self._wide(scale, cols)), "scale": scale}

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        scale = params["scale"]
        if scale.shape[1] == 1:
            return TableGrid(scale, TABLE)
        cols = params["codes"].shape[1] if "codes" in params else scale.shape[1] * self.group_size
        return TableGrid(self._wide(scale, cols), TABLE)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = arrays["codes"]
        found = codes.view(E4M3).astype(np.float64)
        return found * self._wide(arrays["scale"], codes.shape[1])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tile_rows": self.tile_rows, "group_size": self.group_size}

    def _wide(self, scale: np.ndarray, cols: int) -> np.ndarray:
        return np.repeat(scale, self.group_size or cols, axis=1)[:, :cols]


@dataclass(frozen=True, kw_only=True)
class MXFP8(Layout):
    """8.25 bits a weight: groups of 32 with a power of two as scale."""

    kind: ClassVar[str] = "mxfp8"
    width: ClassVar[int] = 32

    @property
    def name(self) -> str:
        return self.kind

    @property
    def block(self) -> int:
        return self.width

    @property
    def keeps_zero(self) -> bool:
        return True

    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        groups = (shape[0], self.blocks_per_row(shape[1]))
        return {"codes": ArraySpec(np.dtype(np.uint8), shape), "scale": ArraySpec(np.dtype(np.uint8), groups)}

    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:  # noqa: ARG002
        """Section 6.3: the scale is 2^(floor(log2 magnitude) - 8), 8 being the exponent of 448; larger values clamp."""
        w = np.ascontiguousarray(w, np.float32)
        largest = np.abs(w.reshape(len(w), -1, self.width)).max(axis=2)
        exponent = np.frexp(largest)[1] - 1
        scale = np.where(largest > 0, np.clip(exponent - 8 + 127, 0, 254), 127).astype(np.uint8)
        return {"codes": encode(w / self._steps(scale)), "scale": scale}

    def grid(self, params: Mapping[str, np.ndarray]) -> TableGrid:
        return TableGrid(self._steps(params["scale"]).astype(np.float32), TABLE)

    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return arrays["codes"].view(E4M3).astype(np.float64) * self._steps(arrays["scale"])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def _steps(self, scale: np.ndarray) -> np.ndarray:
        return np.repeat(np.ldexp(1.0, scale.astype(np.int32) - 127), self.width, axis=1)
