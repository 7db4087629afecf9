"""Integers and scales in one form for every container, so that "the same integers in all three" is a comparison.

A quantized matrix is q * scale + offset, each of shape (rows, cols): q int32, scale float32, offset float64 with
whole multiples of the scale moved into q (a zero point and a minimum that is its multiple say the same). Where the
scale is zero, q says nothing and counts as zero. With a table, the value is scale * table[q].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tightship.layout import AffineGrid, Arrays, Layout

_CHUNK = 1 << 20
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A run of rows. Arrays broadcast to the shape of `q`; `raw` replaces them where codes span several columns."""

    q: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    table: np.ndarray | None = None
    raw: bytes = b""


def pieces_of(layout: Layout, arrays: Arrays) -> Iterator[Piece]:
    """The pieces of a matrix in a layout, rows ascending."""
    rows, cols = arrays["codes"].shape
    if layout.code_width > 1:  # one container only, and no grid of single columns: the arrays as they are
        yield Piece(np.zeros(0), np.zeros(0), raw=b"".join(arrays[key].tobytes() for key in sorted(arrays)))
        return
    by_row = {key for key, array in arrays.items() if array.ndim == 2 and len(array) == rows}
    in_blocks = any(array.ndim == 2 and len(array) != rows for array in arrays.values())  # of rows: not to be cut
    step = max(rows if in_blocks else _CHUNK // max(cols, 1), 1)
    for start in range(0, rows, step):
        piece = {k: a[start : start + step] if k in by_row else a for k, a in arrays.items()}
        grid = layout.grid(piece)
        if isinstance(grid, AffineGrid):
            yield Piece(piece["codes"], grid.scale, grid.offset)
        else:
            yield Piece(piece["codes"], grid.scale, table=grid.table)


def digest(pieces: Iterable[Piece]) -> str:
    """sha256 (hex) over the canonical form. How the rows are cut into pieces does not matter."""
    sinks = [hashlib.sha256() for _ in range(3)]
    tail = b""
    for piece in pieces:
        for sink, array in zip(sinks, _canonical(piece), strict=True):
            sink.update(np.ascontiguousarray(array).data)
        tail = piece.raw or (b"" if piece.table is None else np.asarray(piece.table, np.float32).tobytes())
    return hashlib.sha256(b"".join(sink.digest() for sink in sinks) + tail).hexdigest()


def digest_all(digests: Mapping[str, str]) -> str:
    """One sha256 for many tensors: of the lines `name digest`, sorted."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _canonical(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = piece.q.shape
    scale = np.broadcast_to(np.asarray(piece.scale, np.float32), shape)
    offset = np.broadcast_to(np.asarray(0 if piece.offset is None else piece.offset, np.float64), shape)
    wide = scale.astype(np.float64)
    steps = np.rint(np.divide(offset, wide, out=np.zeros(shape), where=wide != 0))
    whole = (steps * wide == offset) & (np.abs(steps) < _LARGEST)
    q = piece.q.astype(np.int32) + np.where(whole, steps, 0).astype(np.int32)
    # Adding zero turns negative zeros into zeros: they say the same.
    return np.where(wide == 0, 0, q).astype(np.int32), scale + np.float32(0), np.where(whole, 0.0, offset) + 0.0
