"""The weight algebra: what a checkpoint holds under each name. Shape and dtype now, data on request, nothing cached.

`Weight = Dense | Quantized | Factored | Sum | Alias`. Matrices are (out, in). Operations on `Quantized` are exact:
they move codes and parameters and never decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tightship.dtypes import dtype as dtype_of
from tightship.dtypes import of_array
from tightship.errors import Malformed, Unsupported
from tightship.layout import Arrays, Layout

Shape = tuple[int, ...]
_RUN = 1 << 20  # elements that are decoded at a time


def _rows_of(array: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: array[first:last]


@dataclass(frozen=True)
class Dense:
    """A float or integer array of any rank. `read()` returns it in `dtype`'s NumPy type.

    `read_rows(first, last)`, where the source has it, reads entries first to last - 1 of the first axis and no others.
    """

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None

    @classmethod
    def of(cls, array: np.ndarray) -> Dense:
        """Wrap an array that is in memory already."""
        return cls(tuple(array.shape), of_array(array).name, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    def rows(self) -> Callable[[int, int], np.ndarray]:
        """`read_rows`, or where the source has none, a reader of the whole array, which is read now."""
        return self.read_rows or _rows_of(self.read())

    def value(self) -> np.ndarray:
        """float32 copy or view. bf16, f16 and f32 widen exactly."""
        return self.read().astype(np.float32, copy=False)


@dataclass(frozen=True)
class Quantized:
    """A (rows, cols) matrix said in a layout. `read()` returns its logical arrays (see the layout's table)."""

    layout: Layout
    shape: tuple[int, int]
    read: Callable[[], Arrays]

    @classmethod
    def of(cls, layout: Layout, arrays: Arrays) -> Quantized:
        shape = arrays["codes"].shape
        layout.check(arrays, shape)
        return cls(layout, shape, lambda: arrays)

    @property
    def dtype(self) -> str:
        return "f32"

    @property
    def nbytes(self) -> int:
        """Bytes of the unpacked logical arrays; what a container stores is the container's to say."""
        return sum(spec.nbytes for spec in self.layout.array_specs(self.shape).values())

    def value(self) -> np.ndarray:
        """float32 of the exact float64 values, decoded in runs of rows."""
        arrays = self.read()
        decoded = np.empty(self.shape, np.float32)
        step = max(1, _RUN // max(self.shape[1], 1))
        for first in range(0, self.shape[0], step):
            rows = slice(first, first + step)
            decoded[rows] = self.layout.values({key: array[rows] for key, array in arrays.items()})
        return decoded

    def take_rows(self, rows: np.ndarray | Sequence[int]) -> Quantized:
        """The given rows in the given order (RoPE permutation, pruned heads): every array is row-wise."""
        index = np.asarray(rows, np.int64)
        return Quantized(
            self.layout, (len(index), self.shape[1]), lambda: {k: v[index] for k, v in self.read().items()}
        )

    def split_rows(self, sizes: Sequence[int]) -> list[Quantized]:
        """Consecutive runs of rows (a fused qkv taken apart).

        Raises:
            Malformed: the sizes do not add up to the rows.
        """
        if sum(sizes) != self.shape[0]:
            raise Malformed(f"cannot split {self.shape[0]} rows into {list(sizes)}")
        starts = np.cumsum([0, *sizes[:-1]])
        return [self.take_rows(range(int(a), int(a) + n)) for a, n in zip(starts, sizes, strict=True)]


def concat_rows(parts: Sequence[Quantized]) -> Quantized:
    """Stack matrices of one layout and width on top of each other, exactly.

    Raises:
        Unsupported: layouts or widths differ.
    """
    first = parts[0]
    if any(p.layout != first.layout or p.shape[1] != first.shape[1] for p in parts):
        found = ", ".join(f"{p.layout.name} {p.shape}" for p in parts)
        raise Unsupported(f"fusing rows needs one layout and one width, found {found}")

    def read() -> Arrays:
        arrays = [p.read() for p in parts]
        return {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]}

    return Quantized(first.layout, (sum(p.shape[0] for p in parts), first.shape[1]), read)


@dataclass(frozen=True)
class Factored:
    """left (out, r) @ right (r, in): low rank."""

    left: Dense | Quantized
    right: Dense | Quantized

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def dtype(self) -> str:
        return self.left.dtype

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def value(self) -> np.ndarray:
        return (self.left.value().astype(np.float64) @ self.right.value().astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class Sum:
    """base + low-rank residual: a quantized matrix with its correction."""

    base: Dense | Quantized
    residual: Factored

    @property
    def shape(self) -> Shape:
        return self.base.shape

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.residual.nbytes

    def value(self) -> np.ndarray:
        return self.base.value() + self.residual.value()


@dataclass(frozen=True)
class Alias:
    """The same data as the weight named `owner`; stored once where the container can."""

    owner: str


Stored = Dense | Quantized | Factored | Sum
Weight = Stored | Alias


def check_finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array itself, if it holds no NaN or infinity; integers always pass. Works in chunks.

    Raises:
        Malformed: naming the tensor, the number of bad elements and the first one's flat index.
    """
    if not (of_array(array).is_float):
        return array
    flat = array.reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.size, 1 << 20):
        wrong = ~np.isfinite(flat[start : start + (1 << 20)])
        count = int(np.count_nonzero(wrong))
        if count and first < 0:
            first = start + int(np.argmax(wrong))
        bad += count
    if bad:
        raise Malformed(
            f"{bad} of {flat.size} elements are NaN or infinite, the first at flat index {first}",
            tensor=name,
            hint="the checkpoint is damaged or was trained to divergence; nothing can be built from it",
        )
    return array
