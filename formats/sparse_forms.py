"""Sparse matrices as bytes for transport, and back, bit for bit.

A tensor is seen as a matrix of n rows and m columns (its last axis); z of its elements, b bytes each, have a bit set.
An element counts as zero if no bit of it is set, so -0.0 is kept.

| form    | arrays                                     | bytes             | meaning                                   |
|---------|--------------------------------------------|-------------------|-------------------------------------------|
| dense   | `data` (n, m)                              | n m b             | as it is                                  |
| bitmask | `values` (z,), `mask` u8 (n, ceil(m/8))    | z b + n ceil(m/8) | bit j % 8 of byte j // 8: element j stays |
| 2:4     | `values` (n, m/2), `places` u8 (n, m/8 up) | n m (b + 1/4) / 2 | of four columns two values, their places  |
| csr     | `values` (z,), `columns` (z,), `ends` (n,) | z (b + 2) + 8 n   | column of each value, ends of the rows    |
| coo     | `values` (z,), `at` (z,)                   | z (b + 4)         | flat place of each value                  |

`places` holds a nibble for every four columns, the first in the low half of a byte: two 2-bit places, the lower place
in the low bits; where fewer than two elements are there, zeros fill up. `columns` are u16 where m <= 65536, else u32;
`at` is u32 where n m <= 2^32, else u64; `ends` are u64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tightship.errors import Malformed

Arrays = dict[str, np.ndarray]
_FOUR = 4


def pack(form: str, matrix: np.ndarray) -> Arrays | None:
    """The arrays of a form for a (n, m) matrix of unsigned integers (the bits), or None where it does not fit."""
    return _PACKERS[form](matrix)


def unpack(form: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """The (n, m) matrix of unsigned integers again.

    Raises:
        Malformed: arrays missing, of other shapes or types than the form has, or places outside the matrix.
    """
    if form not in _UNPACKERS:
        raise Malformed(f"sparse form {form!r} is unknown; known: {', '.join(_UNPACKERS)}")
    return _UNPACKERS[form](arrays, shape, np.dtype(dtype))


def _need(arrays: Mapping[str, np.ndarray], key: str, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    array = arrays.get(key)
    if array is None or array.dtype != np.dtype(dtype) or array.shape != shape:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise Malformed(f"array {key} should be {np.dtype(dtype)} {shape}, found {found}")
    return array


def _dense(matrix: np.ndarray) -> Arrays:
    return {"data": matrix}


def _from_dense(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    return _need(arrays, "data", dtype, shape)


def _bitmask(matrix: np.ndarray) -> Arrays:
    there = matrix != 0
    return {"values": matrix[there], "mask": np.packbits(there, axis=1, bitorder="little")}


def _from_bitmask(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    mask = _need(arrays, "mask", np.uint8, (shape[0], -(-shape[1] // 8)))
    there = np.unpackbits(mask, axis=1, count=shape[1], bitorder="little").view(bool)
    found = np.zeros(shape, dtype)
    found[there] = _need(arrays, "values", dtype, (int(np.count_nonzero(there)),))
    return found


def _two_of_four(matrix: np.ndarray) -> Arrays | None:
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // _FOUR, _FOUR) if columns % _FOUR == 0 else None
    if groups is None or ((groups != 0).sum(axis=2) > 2).any():
        return None
    # Stable: those that are there come first, in their order; then sorted, so that the lower place is in front.
    places = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[:, :, :2], axis=2)
    values = np.take_along_axis(groups, places, axis=2).reshape(rows, columns // 2)
    nibbles = (places[:, :, 0] | places[:, :, 1] << 2).astype(np.uint8)
    nibbles = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)))
    return {"values": values, "places": nibbles[:, ::2] | nibbles[:, 1::2] << 4}


def _from_two_of_four(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    rows, groups = shape[0], shape[1] // _FOUR
    if shape[1] % _FOUR:
        raise Malformed(f"2:4 needs columns in groups of four, found {shape[1]}")
    values = _need(arrays, "values", dtype, (rows, 2 * groups)).reshape(rows, groups, 2)
    places = _need(arrays, "places", np.uint8, (rows, -(-groups // 2)))
    nibbles = np.stack([places & 15, places >> 4], axis=2).reshape(rows, 2 * places.shape[1])[:, :groups]
    found = np.zeros((rows, groups, _FOUR), dtype)
    at = np.stack([nibbles & 3, nibbles >> 2], axis=2).astype(np.int64)
    if (at[..., 0] >= at[..., 1]).any():
        raise Malformed("a group of four has its places out of order")
    np.put_along_axis(found, at, values, axis=2)
    return found.reshape(shape)


def _csr(matrix: np.ndarray) -> Arrays:
    rows, columns = np.nonzero(matrix)
    ends = np.cumsum(np.bincount(rows, minlength=len(matrix)), dtype=np.uint64)
    return {"values": matrix[rows, columns], "columns": columns.astype(_column_type(matrix.shape)), "ends": ends}


def _from_csr(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    ends = _need(arrays, "ends", np.uint64, (shape[0],)).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    if (counts < 0).any() or (counts > shape[1]).any():
        raise Malformed("the ends of the rows do not ascend, or a row has more values than columns")
    count = int(ends[-1]) if len(ends) else 0
    columns = _need(arrays, "columns", _column_type(shape), (count,))
    if count and int(columns.max()) >= shape[1]:
        raise Malformed(f"a column beyond the {shape[1]} there are")
    found = np.zeros(shape, dtype)
    found[np.repeat(np.arange(shape[0]), counts), columns] = _need(arrays, "values", dtype, (count,))
    return found


def _column_type(shape: tuple[int, ...]) -> type:
    return np.uint16 if shape[1] <= 1 << 16 else np.uint32


def _coo(matrix: np.ndarray) -> Arrays:
    at = np.flatnonzero(matrix)
    return {"values": matrix.reshape(-1)[at], "at": at.astype(_flat_type(matrix.shape))}


def _from_coo(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    at = arrays.get("at")
    at = _need(arrays, "at", _flat_type(shape), at.shape if at is not None and at.ndim == 1 else (0,))
    size = shape[0] * shape[1]
    if len(at) and (int(at[-1]) >= size or (at[1:] <= at[:-1]).any()):
        raise Malformed("places do not ascend, or lie beyond the matrix")
    found = np.zeros(size, dtype)
    found[at] = _need(arrays, "values", dtype, at.shape)
    return found.reshape(shape)


def _flat_type(shape: tuple[int, ...]) -> type:
    return np.uint32 if shape[0] * shape[1] <= 1 << 32 else np.uint64


_PACKERS: dict[str, Callable[[np.ndarray], Arrays | None]] = {
    "dense": _dense,
    "2:4": _two_of_four,
    "bitmask": _bitmask,
    "csr": _csr,
    "coo": _coo,
}
_UNPACKERS: dict[str, Callable[[Mapping[str, np.ndarray], tuple[int, int], np.dtype], np.ndarray]] = {
    "dense": _from_dense,
    "2:4": _from_two_of_four,
    "bitmask": _from_bitmask,
    "csr": _from_csr,
    "coo": _from_coo,
}
FORMS = tuple(_PACKERS)
