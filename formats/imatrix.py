"""Importance matrices of llama.cpp: which input channels of each matrix carry much. Read and written in both formats.

GGUF (the current format), beside the container's own table in `gguf_file.py`:

| where                 | type and shape          | what                                                           |
|-----------------------|-------------------------|----------------------------------------------------------------|
| `general.type`        | str                     | "imatrix"                                                      |
| `imatrix.datasets`    | [str]                   | names of the texts                                             |
| `imatrix.chunk_count` | u32                     | windows of text                                                |
| `imatrix.chunk_size`  | u32                     | tokens of a window                                             |
| tensor `NAME.in_sum2` | F32 (matrices, columns) | sum over tokens of x^2, per input channel; one row an expert   |
| tensor `NAME.counts`  | F32 (matrices, 1)       | tokens that were summed; 0 for an expert that no token reached |

Legacy (.dat), little endian:

| bytes                                                | what                                               |
|------------------------------------------------------|----------------------------------------------------|
| i32                                                  | number of entries                                  |
| i32 length, name, i32 calls, i32 values, f32[values] | an entry: mean of x^2, or 1 if unseen, times calls |
| i32, i32 length, text                                | chunks; name of the text (may be missing)          |

`NAME` is the tensor's name in GGUF, `blk.0.attn_q.weight`. Definition: tools/imatrix/imatrix.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tightship.errors import Malformed, UsageError
from tightship.formats.gguf_file import MAGIC, Field, GgufTensor, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, header_bytes

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES = 1 << 20
_MAX_NAME = 1 << 10


@dataclass(frozen=True)
class Entry:
    """What reached one tensor.

    Attributes:
        sums: (matrices, columns) float32, sums of squares; one row for each expert of a stack.
        counts: (matrices,) float32, tokens.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def importance(self) -> np.ndarray:
        """(matrices, columns) float32: mean squares; ones for an expert that no token reached, as llama-quantize."""
        seen = self.counts[:, None] > 0
        return np.where(seen, self.sums / np.where(seen, self.counts[:, None], np.float32(1)), np.float32(1))


@dataclass(frozen=True)
class Imatrix:
    """A whole file. `chunks` windows of `chunk_size` tokens from `datasets`; entries by GGUF name."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: str | Path) -> Imatrix:
    """Read either format; which one is told by the first bytes.

    Raises:
        UsageError: there is no such file.
        Malformed: the file breaks its format's rules, or holds NaN, infinities or negative numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path.name}: no such file", hint="give an importance matrix in GGUF or in the older format")
    with path.open("rb") as file:
        is_gguf = file.read(4) == MAGIC
    found = _from_gguf(path) if is_gguf else _from_legacy(path)
    for name, entry in found.entries.items():
        if not all(np.isfinite(part).all() and (part >= 0).all() for part in (entry.sums, entry.counts)):
            raise Malformed(f"{path.name} holds numbers that are no sums of squares", tensor=name)
    return found


def imatrix_bytes(imatrix: Imatrix) -> bytes:
    """The file in GGUF; entries sorted by name, so that the same content is the same bytes."""
    fields = {
        "general.type": Field("str", "imatrix"),
        "imatrix.datasets": Field("[str]", list(imatrix.datasets)),
        "imatrix.chunk_count": Field("u32", imatrix.chunks),
        "imatrix.chunk_size": Field("u32", imatrix.chunk_size),
    }
    tensors = []
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, array in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
            chunks = partial(_one, np.ascontiguousarray(array, "<f4"))
            tensors.append(TensorToWrite(name + suffix, "F32", array.shape, chunks))
    body = [header_bytes(fields, tensors)]
    for tensor in tensors:
        data = b"".join(chunk.tobytes() for chunk in tensor.chunks())
        body.append(data.ljust(-(-len(data) // 32) * 32, b"\0"))
    return b"".join(body)


def legacy_bytes(imatrix: Imatrix) -> bytes:
    """The file in the older format. Counts of experts are lost: an expert that no token reached weighs 1."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        calls = max(1, -(-int(entry.counts.max()) // max(imatrix.chunk_size, 1)))
        values = (entry.importance * np.float32(calls)).astype("<f4")
        encoded = name.encode()
        parts.append(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size))
        parts.append(values.tobytes())
    dataset = ", ".join(imatrix.datasets).encode()
    parts.append(struct.pack("<ii", imatrix.chunks, len(dataset)) + dataset)
    return b"".join(parts)


def _one(array: np.ndarray) -> Iterator[np.ndarray]:
    yield array


def _from_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    meta = file.metadata
    if meta.get("general.type") != "imatrix":
        raise Malformed(f"{path.name} is no importance matrix: general.type is {meta.get('general.type')!r}")
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in meta:
            raise Malformed(f"{path.name}: the metadata lack {key}")
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    strange = sorted(set(file.tensors) - {name + suffix for name in names for suffix in (_SUMS, _COUNTS)})
    if strange:
        raise Malformed(f"{path.name}: neither sums nor their counts", tensor=strange[0])
    entries = {name: _entry(path, name, file.tensors) for name in names}
    datasets = tuple(str(name) for name in meta["imatrix.datasets"])
    return Imatrix(entries, datasets, int(meta["imatrix.chunk_count"]), int(meta["imatrix.chunk_size"]))


def _entry(path: Path, name: str, tensors: Mapping[str, GgufTensor]) -> Entry:
    sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
    if counts is None:
        raise Malformed(f"{path.name}: sums without {_COUNTS}", tensor=name)
    if {sums.type_name, counts.type_name} != {"F32"}:
        raise Malformed(f"{path.name}: sums and counts must be F32", tensor=name)
    if sums.rows != counts.rows * counts.shape[-1]:
        raise Malformed(f"{path.name}: {sums.shape} sums and {counts.shape} counts do not fit", tensor=name)
    return Entry(sums.read_rows().view("<f4"), counts.read_rows().view("<f4").reshape(-1))


class _Legacy:
    """Forward reads of a legacy file that never believe a length."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.name = path.name
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        if not 0 <= count <= len(self.data) - self.position:
            raise Malformed(
                f"{self.name}, byte {self.position}: {what} has {count} bytes, {len(self.data) - self.position} follow"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, what: str, least: int, most: int) -> int:
        value = int.from_bytes(self.take(4, what), "little", signed=True)
        if not least <= value <= most:
            raise Malformed(f"{self.name}, byte {self.position - 4}: {what} must be {least} to {most}, found {value}")
        return value

    def text(self, what: str, least: int) -> str:
        try:
            return self.take(self.number(f"length of {what}", least, _MAX_NAME), what).decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"{self.name}: {what} is not UTF-8") from error


def _from_legacy(path: Path) -> Imatrix:
    file = _Legacy(path)
    entries: dict[str, Entry] = {}
    for _ in range(file.number("number of entries", 1, _MAX_ENTRIES)):
        name = file.text("a name", 1)
        calls = file.number("calls", 0, 1 << 30)
        size = file.number("number of values", 1, 1 << 28)
        values = np.frombuffer(file.take(4 * size, f"values of {name}"), "<f4").reshape(1, -1)
        if name in entries:
            raise Malformed(f"{path.name} has two entries of this name", tensor=name)
        entries[name] = Entry(values, np.array([max(calls, 1)], np.float32))
    if file.position == len(file.data):
        return Imatrix(entries)
    chunks = file.number("number of chunks", 0, 1 << 30)
    dataset = file.text("name of the text", 0)
    if file.position != len(file.data):
        raise Malformed(f"{path.name}: {len(file.data) - file.position} bytes follow the end")
    return Imatrix(entries, (dataset,) if dataset else (), chunks)
