"""The shape of one GGML packing: a pair of pure functions and the sizes they work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tightship.layout import Arrays, Layout


@dataclass(frozen=True)
class BlockType:
    """One GGML block type.

    Attributes:
        name: the GGML name, upper case, such as `Q4_K`.
        block: weights in a block.
        nbytes: bytes of a block.
        layout: what `unpack` yields arrays of.
        pack: logical arrays -> uint8 (rows, blocks * nbytes).
        unpack: uint8 (rows, blocks * nbytes), columns -> logical arrays.
    """

    name: str
    block: int
    nbytes: int
    layout: Layout
    pack: Callable[[Arrays], np.ndarray]
    unpack: Callable[[np.ndarray, int], Arrays]


def as_bytes(array: np.ndarray, blocks: int) -> np.ndarray:
    """(rows, anything) -> uint8 (rows * blocks per row, bytes of one block's share), in row order, little endian."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(blocks, -1)


def join(rows: int, *parts: np.ndarray) -> np.ndarray:
    """Fields of every block side by side: uint8 (blocks, n_i) ... -> uint8 (rows, bytes of a row)."""
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def cut(data: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """uint8 (rows, bytes of a row) -> one contiguous uint8 (blocks, size) for each field."""
    blocks = np.ascontiguousarray(data).reshape(-1, sum(sizes))
    ends = np.cumsum(sizes)
    return [np.ascontiguousarray(blocks[:, end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def halves(field: np.ndarray, rows: int) -> np.ndarray:
    """uint8 (blocks, 2 n) -> float16 (rows, n of every block)."""
    return field.view("<f2").astype(np.float16, copy=False).reshape(rows, -1)
