"""The safetensors container: a reader that distrusts the header, and a streaming writer whose bytes never vary.

| offset | bytes | meaning                                                                                |
|--------|-------|----------------------------------------------------------------------------------------|
| 0      | 8     | N, length of the header, u64 little-endian, at most 100 000 000                        |
| 8      | N     | JSON object, first byte `{`, may end in spaces; `__metadata__` maps strings to strings |
| 8 + N  | rest  | tensors, row-major little-endian, without holes, overlaps or trailing bytes            |

Each header entry is `{"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}`, offsets counted from 8 + N.
docs/formats/safetensors.md lists the rules; https://github.com/huggingface/safetensors#format defines the format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from tightship.dtypes import BY_SAFETENSORS, DType, of_array
from tightship.errors import Malformed, Unsupported
from tightship.untrusted import refuse_impostor, strict_json
from tightship.weights import Dense

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME = 1024
MAX_RANK = 32
_NOT_MAPPED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `begin` and `end` are absolute byte offsets."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: every entry lies inside the file and fits its shape."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """The tensor, read now into memory of its own.

        Raises:
            Malformed: no such tensor, or the file became shorter since its header was read.
        """
        entry = self._entry(name)
        return self._bytes(name, entry.begin, entry.end).view(entry.dtype.numpy).reshape(entry.shape)

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Entries `first` to `last - 1` of the tensor's first axis, and no other bytes of the file; see `read`."""
        entry = self._entry(name)
        row = (entry.end - entry.begin) // entry.shape[0]
        data = self._bytes(name, entry.begin + first * row, entry.begin + last * row)
        return data.view(entry.dtype.numpy).reshape(last - first, *entry.shape[1:])

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise Malformed(f"{self.path.name} holds no such tensor", tensor=name)
        return entry

    def _bytes(self, name: str, begin: int, end: int) -> np.ndarray:
        data = np.fromfile(self.path, np.uint8, count=end - begin, offset=begin)
        if data.size != end - begin:
            raise Malformed(f"{self.path.name} was cut short while it was read", tensor=name)
        return data

    def dense(self, name: str) -> Dense:
        """The tensor as a lazy weight: nothing is read, nothing kept."""
        entry = self.entries[name]
        rows = functools.partial(self.read_rows, name) if entry.shape and entry.shape[0] else None
        return Dense(entry.shape, entry.dtype.name, lambda: self.read(name), rows)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; tensor data are not touched.

    Raises:
        Malformed: any rule of docs/formats/safetensors.md is broken.
        Unsupported: an element type that the format has and we do not map.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[8:9] != b"{":
            refuse_impostor(path.name, head)
        length = int.from_bytes(head[:8], "little")
        if size < 10 or length < 2:
            raise Malformed(f"{path.name} has {size} bytes and a header of {length}: too short for a safetensors file")
        if length > MAX_HEADER:
            raise Malformed(f"{path.name} announces a header of {length} bytes; the limit is {MAX_HEADER}")
        if 8 + length > size:
            raise Malformed(
                f"{path.name} announces a header of {length} bytes but has only {size}", hint="the file is truncated"
            )
        file.seek(8)
        raw = file.read(length)
    table, metadata = _table(raw, path.name)
    entries = {name: _entry(name, value, 8 + length) for name, value in table.items()}
    _check_cover(entries.values(), 8 + length, size, path.name)
    return Header(path, entries, metadata)


def header_entries(raw: bytes, file: str) -> dict[str, Entry]:
    """The tensors that a header announces, each fitting its shape; whether a file holds them is not looked at.

    Raises:
        Malformed, Unsupported: as `read_header`.
    """
    entries = {name: _entry(name, value, 8 + len(raw)) for name, value in _table(raw, file)[0].items()}
    end = max((entry.end for entry in entries.values()), default=8 + len(raw))
    _check_cover(entries.values(), 8 + len(raw), end, file)
    return entries


def _table(raw: bytes, file: str) -> tuple[dict[str, Any], dict[str, str]]:
    if raw[:1] != b"{":
        raise Malformed(f"{file}: a safetensors header begins with '{{', found {raw[:1]!r}")
    table = strict_json(raw, f"header of {file}")
    metadata = _metadata(table.pop("__metadata__", {}), file)
    if len(table) > MAX_TENSORS:
        raise Malformed(f"{file} names {len(table)} tensors; the limit is {MAX_TENSORS}")
    return table, metadata


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise Malformed(f"{file}: __metadata__ must map strings to strings")
    return value


def _entry(name: str, value: Any, start: int) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise Malformed(f"tensor name {name[:80]!r} is empty, longer than {MAX_NAME} or not printable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Malformed("a header entry needs exactly dtype, shape and data_offsets", tensor=name)
    word, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if word in _NOT_MAPPED:
        raise Unsupported(f"element type {word} is not one we map", tensor=name)
    dtype = BY_SAFETENSORS.get(word) if isinstance(word, str) else None
    if dtype is None:
        raise Malformed(f"element type {word!r} is unknown; known: {', '.join(BY_SAFETENSORS)}", tensor=name)
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise Malformed(f"shape must be a list of at most {MAX_RANK} sizes, found {shape!r:.80}", tensor=name)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"data_offsets must be [begin, end], found {offsets!r:.80}", tensor=name)
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise Malformed(
            f"{dtype.safetensors} {shape} takes {nbytes} bytes, its offsets span {offsets[1] - offsets[0]}", tensor=name
        )
    return Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_cover(entries: Iterable[Entry], start: int, size: int, file: str) -> None:
    at = start
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.end > size:
            raise Malformed(f"{file} ends at byte {size}, this tensor at {entry.end}", tensor=entry.name)
        if entry.begin != at:
            what = "overlaps the one before it" if entry.begin < at else f"leaves a hole of {entry.begin - at} bytes"
            raise Malformed(f"in {file} this tensor {what}", tensor=entry.name)
        at = entry.end
    if at != size:
        raise Malformed(f"{file} has {size - at} bytes behind its last tensor")


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one file, tensor by tensor, holding none of them.

    All tensors are announced at the start, so that the header can be written first. `order` is the order in which they
    must come: wider element types first, so that every tensor is aligned to its elements, then by name.
    Metadata keys are sorted and the header is padded with spaces to a multiple of 8: same input, same bytes.

    Use as a context manager. After it, `sha256` is the digest of the whole file.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        self.order = tuple(sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)))
        self._specs = dict(specs)
        self._path = path
        self._hash = hashlib.sha256()
        self._next = 0
        self._file: BinaryIO | None = None
        self._header = _header_bytes(self.order, self._specs, metadata or {})

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        self._file = self._path.open("xb")
        self._put(self._header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if kind is None and self._next != len(self.order):
            raise ValueError(f"{self._path.name}: {len(self.order) - self._next} announced tensors were not written")

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the next tensor of `order`.

        Raises:
            ValueError: another tensor was due, or dtype or shape are not those announced.
        """
        due = self.order[self._next]
        spec = self._specs[due]
        if name != due or of_array(array) != spec.dtype or array.shape != spec.shape:
            raise ValueError(
                f"{due} {spec.dtype.name} {spec.shape} is due, got {name} {of_array(array).name} {array.shape}"
            )
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._next += 1

    def _put(self, data: bytes | memoryview) -> None:
        if self._file is None:
            raise ValueError("the writer is used outside its `with` block")
        self._hash.update(data)
        self._file.write(data)


def file_size(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that `SafetensorsWriter` makes of these tensors."""
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    return len(_header_bytes(order, specs, metadata or {})) + sum(spec.nbytes for spec in specs.values())


def _header_bytes(order: Iterable[str], specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        spec = specs[name]
        table[name] = {
            "dtype": spec.dtype.safetensors,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
