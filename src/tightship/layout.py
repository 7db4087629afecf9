"""What numbers can be said: the base of every layout, apart from solvers and containers.

A `Layout` is a frozen, JSON-able *spec*. Its data are plain NumPy arrays in a dict (`Arrays`): `codes`, one integer a
byte, shape (rows, cols), and the layout's own parameters (scales, zero points, mins). Weight matrices are
`(rows, cols) = (out, in)`; a block runs along a row.

Concrete layouts live in `formats/layouts/`, one file each, and register themselves by being defined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tightship.errors import Malformed, Unsupported

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArraySpec:
    """dtype and shape of one logical array, known without data."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class AffineGrid:
    """Values `scale * q + offset`, q an integer in [lo, hi]. Arrays broadcast to (rows, cols), float32."""

    scale: np.ndarray
    offset: np.ndarray
    lo: int
    hi: int


@dataclass(frozen=True)
class TableGrid:
    """Values `scale * table[q]`; `scale` broadcasts to (rows, cols), `table` is 1-D float32, ascending or not."""

    scale: np.ndarray
    table: np.ndarray


Grid = AffineGrid | TableGrid


@dataclass(frozen=True)
class Context:
    """What a block-wise search may need to know beyond its block.

    row_mean_square: (rows,) float32, mean of squares over the *whole* row (GGML's sigma2 for Q4_0..Q5_1).
    """

    row_mean_square: np.ndarray | None = None


class Layout(ABC):
    """Spec of a grid of sayable values. Subclasses are frozen dataclasses with keyword-only fields.

    Class attributes:
        kind: the JSON discriminator, unique among layouts.
        code_width: columns that one code spans; above 1 only data-free and importance solvers apply.
    """

    kind: ClassVar[str]
    code_width: ClassVar[int] = 1
    registry: ClassVar[dict[str, type[Layout]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        kind = cls.__dict__.get("kind")
        if kind is None:
            return
        # dataclass(slots=True) would define the class twice; plain redefinition is a bug.
        if kind in Layout.registry and Layout.registry[kind].__qualname__ != cls.__qualname__:
            raise TypeError(f"layout kind {kind!r} is already taken by {Layout.registry[kind].__qualname__}")
        Layout.registry[kind] = cls

    @property
    @abstractmethod
    def name(self) -> str:
        """The word of the contract's grammar, such as `int4-g32` or `q4_k`."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Columns of one independent block; 0 means the whole row."""

    @property
    def rows_together(self) -> int:
        """Rows that share parameters and are fitted in one piece; 0 means all. Arrays are row-wise all the same."""
        return 1

    @property
    def fitted_whole(self) -> bool:
        """True if a parameter reaches across blocks, so that all are fitted before the first column is rounded."""
        return False

    @property
    def refittable(self) -> Mapping[str, tuple[float, float]]:
        """Parameters that values are linear in while all else stays: name -> least and greatest storable entry.

        In the order in which a solver shall refit them to codes; others stay as `fit` found them.
        """
        return {}

    @property
    @abstractmethod
    def keeps_zero(self) -> bool:
        """True if 0.0 is sayable in every block, so that pruned weights stay zero."""

    @abstractmethod
    def array_specs(self, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        """Logical arrays for a matrix of `shape`, without data.

        Raises:
            Unsupported: `shape` cannot be cut into blocks of this layout.
        """

    @abstractmethod
    def fit(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """Search parameters for `w`, (rows, cols) float32, cols a multiple of the block.

        `importance` is (cols,) float32, the mean square of each input channel, or None.
        Returns the parameters, plus `codes` where the search itself finds them.
        """

    @abstractmethod
    def grid(self, params: Mapping[str, np.ndarray]) -> Grid:
        """Per-column grid of the columns that `params` cover; arrays broadcastable to (rows, cols)."""

    @abstractmethod
    def values(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """(rows, cols) float64: the value each code says, from integers and stored scales alone."""

    def stored(self, key: str, x: np.ndarray) -> np.ndarray:
        """The entries of a `refittable` parameter nearest to `x` (float64), in the parameter's dtype."""
        spec = self.array_specs((1, self.block or 1))[key]
        held = np.clip(x, *self.refittable[key])
        return (np.rint(held) if spec.dtype.kind in "iu" else held).astype(spec.dtype)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """`{"kind": ..., field: value}`; `from_json` is its inverse."""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        fields = dict(data)
        kind = fields.pop("kind", None)
        cls = Layout.registry.get(str(kind))
        if cls is None:
            raise Malformed(f"layout kind {kind!r} is unknown; known: {', '.join(sorted(Layout.registry))}")
        return cls(**fields)

    def quantize(self, w: np.ndarray, importance: np.ndarray | None = None, context: Context | None = None) -> Arrays:
        """`fit`, then nearest codes on the grid unless the search found them already: the data-free solver."""
        arrays = self.fit(w, importance, context)
        if "codes" not in arrays:
            arrays["codes"] = nearest(self.grid(arrays), w)
        return arrays

    def check(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> None:
        """Demand exactly the arrays of `array_specs(shape)`.

        Raises:
            Malformed: an array is missing, surplus, or of another dtype or shape.
        """
        specs = self.array_specs(shape)
        if set(specs) != set(arrays):
            raise Malformed(f"layout {self.name} needs arrays {sorted(specs)}, found {sorted(arrays)}")
        for key, spec in specs.items():
            found = arrays[key]
            if found.dtype != spec.dtype or found.shape != spec.shape:
                raise Malformed(
                    f"layout {self.name}, array {key}: expected {spec.dtype} {spec.shape}, "
                    f"found {found.dtype} {found.shape}"
                )

    def blocks_per_row(self, cols: int) -> int:
        """Blocks in a row of `cols` columns.

        Raises:
            Unsupported: `cols` is not a multiple of the block.
        """
        size = self.block or cols
        if cols % size:
            raise Unsupported(
                f"layout {self.name} needs rows in blocks of {size}, found {cols} columns",
                hint="choose a layout with a smaller group, or leave this tensor out",
            )
        return cols // size


def nearest(grid: Grid, w: np.ndarray) -> np.ndarray:
    """Codes of the grid values nearest to `w`; ties round to even (affine) or to the lower index (table).

    A zero scale maps everything to the code nearest the offset (affine: the code clamped from 0).
    """
    if isinstance(grid, AffineGrid):
        scale = np.broadcast_to(np.asarray(grid.scale, np.float32), w.shape)
        inverse = np.divide(np.float32(1), scale, out=np.zeros(w.shape, np.float32), where=scale != 0)
        codes = np.rint((w - grid.offset) * inverse)
        dtype = np.int8 if grid.lo < 0 else np.uint8
        return np.clip(codes, grid.lo, grid.hi).astype(dtype)
    scale = np.broadcast_to(np.asarray(grid.scale, np.float32), w.shape)
    best = np.zeros(w.shape, np.uint8)
    best_error = np.full(w.shape, np.inf, np.float32)
    for index, value in enumerate(grid.table):
        error = np.abs(w - scale * value)
        closer = error < best_error
        best[closer] = index
        best_error = np.minimum(error, best_error)
    return best
