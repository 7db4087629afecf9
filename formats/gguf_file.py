"""GGUF container, reading: every count, length, type, size and offset is checked before it is believed.

| part        | bytes (little endian)                                                                           |
|-------------|-------------------------------------------------------------------------------------------------|
| header      | "GGUF"; u32 version (2 or 3); u64 tensor count; u64 metadata count                              |
| string      | u64 length; UTF-8 bytes, no terminator                                                          |
| metadata    | string key; u32 type; value. An array is u32 element type; u64 count; the elements              |
| tensor info | string name; u32 dimensions; u64 extents, fastest first; u32 GGML type; u64 offset in the data  |
| padding     | up to the next multiple of `general.alignment` (32 where the key is missing)                    |
| data        | tensors in the order of their infos, each starting on an aligned offset                         |

Definition: ggml/docs/gguf.md; what is demanded here is listed in docs/formats/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tightship.dtypes import BY_GGUF
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.formats.packings.ggml import BLOCK_TYPES, unpack_ggml
from tightship.weights import Dense, Quantized

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_KEY = 65535
MAX_NAME = 63  # ggml keeps 64 bytes with the terminator
MAX_DIMS = 4
MAX_HEADER = 1 << 30
MAX_STRINGS = 1 << 24
_SMALLEST_FIELD = 8 + 1 + 4 + 1
_SMALLEST_INFO = 8 + 1 + 4 + 8 + 4 + 8

# kind -> (GGUF value type, NumPy type); `str` has no NumPy type, an array of kind k is written `[k]`
SCALARS: dict[str, tuple[GGUFValueType, np.dtype]] = {
    "u8": (GGUFValueType.UINT8, np.dtype("u1")),
    "i8": (GGUFValueType.INT8, np.dtype("i1")),
    "u16": (GGUFValueType.UINT16, np.dtype("<u2")),
    "i16": (GGUFValueType.INT16, np.dtype("<i2")),
    "u32": (GGUFValueType.UINT32, np.dtype("<u4")),
    "i32": (GGUFValueType.INT32, np.dtype("<i4")),
    "f32": (GGUFValueType.FLOAT32, np.dtype("<f4")),
    "bool": (GGUFValueType.BOOL, np.dtype("u1")),
    "u64": (GGUFValueType.UINT64, np.dtype("<u8")),
    "i64": (GGUFValueType.INT64, np.dtype("<i8")),
    "f64": (GGUFValueType.FLOAT64, np.dtype("<f8")),
}
_KIND_OF = {int(value_type): kind for kind, (value_type, _) in SCALARS.items()}


@dataclass(frozen=True)
class Field:
    """One metadata value with its type: `kind` is a key of SCALARS, `str`, or either in brackets for an array."""

    kind: str
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file. `shape` is NumPy's order, (out, in) for matrices; `offset` counts from the file's start."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read_rows(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """uint8 (count, bytes of a row), leading dimensions flattened.

        Raises:
            Malformed: the file has become shorter since it was opened.
        """
        count = self.rows - first if count is None else count
        width = self.nbytes // self.rows
        with self.path.open("rb") as file:
            file.seek(self.offset + first * width)
            data = np.fromfile(file, np.uint8, count * width)
        if data.size != count * width:
            raise Malformed(f"{self.path.name} has become shorter while it was read", tensor=self.name)
        return data.reshape(count, width)

    def weight(self) -> Dense | Quantized:
        """The tensor as a lazy weight: plain element types of any rank, block types as matrices.

        A stack of quantized matrices comes as one matrix of all their rows.

        Raises:
            Unsupported: a block type that has no packing here.
        """
        plain = BY_GGUF.get(int(GGMLQuantizationType[self.type_name]))
        if plain is not None:
            return Dense(self.shape, plain.name, lambda: self.read_rows().view(plain.numpy).reshape(self.shape))
        kind = BLOCK_TYPES.get(self.type_name)
        if kind is None:
            raise Unsupported(f"GGML type {self.type_name} is not decoded here", tensor=self.name)
        cols = self.shape[-1]
        return Quantized(kind.layout, (self.rows, cols), lambda: unpack_ggml(self.type_name, self.read_rows(), cols)[1])


@dataclass(frozen=True)
class GgufFile:
    """What `read_gguf` found: typed metadata and lazy tensors, both in the file's order."""

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, GgufTensor]
    data_offset: int
    bytes_read: int

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Values without their types; arrays of numbers are NumPy arrays, arrays of strings are lists."""
        return {key: field.value for key, field in self.fields.items()}


def read_gguf(path: str | Path) -> GgufFile:
    """Read metadata and tensor infos of one file; no tensor data.

    Raises:
        UsageError: there is no such file.
        Malformed: a rule of docs/formats/gguf.md is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path.name}: no such file", hint="give the path of a .gguf file")
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file, size, path.name)
        version, n_tensors, n_fields = _read_header(cursor)
        fields: dict[str, Field] = {}
        for _ in range(n_fields):
            key, field = _read_field(cursor)
            if key in fields:
                raise cursor.malformed(f"metadata key {key!r} appears twice")
            fields[key] = field
        alignment = _alignment(fields, cursor)
        infos = [_read_info(cursor) for _ in range(n_tensors)]
        data_offset = padded(cursor.position, alignment)
        tensors = _place(infos, data_offset, alignment, cursor, path)
        return GgufFile(path, version, alignment, fields, tensors, data_offset, cursor.position)


def padded(position: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `position`."""
    return -(-position // alignment) * alignment


class _Cursor:
    """Forward reads that never ask for more bytes than the file holds."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file = file
        self.size = size
        self.limit = min(size, MAX_HEADER)
        self.name = name
        self.position = 0
        self.strings = 0

    def malformed(self, message: str, tensor: str | None = None) -> Malformed:
        return Malformed(f"{self.name}, byte {self.position}: {message}", tensor=tensor)

    @property
    def remaining(self) -> int:
        return self.limit - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self.malformed(f"{what} needs {count} bytes, the header can have {self.remaining} more")
        data = self.file.read(count)
        if len(data) != count:
            raise self.malformed(f"{what} needs {count} bytes, found {len(data)}")
        self.position += count
        return data

    def unsigned(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.unsigned(8, f"length of {what}")
        if longest is not None and not 0 < length <= longest:
            raise self.malformed(f"{what} must have 1 to {longest} bytes, found {length}")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"{what} is not UTF-8 ({error.reason})") from error


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        lfs = magic == b"vers"
        hint = "this is a Git LFS pointer; fetch the file itself with `git lfs pull`" if lfs else None
        raise Malformed(f"{cursor.name}: a GGUF file starts with {MAGIC!r}, found {magic!r}", hint=hint)
    version = cursor.unsigned(4, "version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise cursor.malformed(
            "big-endian files are not supported" if big_endian else f"version must be 2 or 3, found {version}"
        )
    n_tensors = cursor.unsigned(8, "tensor count")
    n_fields = cursor.unsigned(8, "metadata count")
    if n_tensors * _SMALLEST_INFO + n_fields * _SMALLEST_FIELD > cursor.remaining:
        raise cursor.malformed(
            f"{n_tensors} tensors and {n_fields} metadata fields cannot fit into {cursor.remaining} bytes"
        )
    return version, n_tensors, n_fields


def _read_field(cursor: _Cursor) -> tuple[str, Field]:
    key = cursor.string("metadata key", MAX_KEY)
    value_type = cursor.unsigned(4, f"type of {key!r}")
    if value_type == GGUFValueType.ARRAY:
        return key, _read_array(cursor, key)
    if value_type == GGUFValueType.STRING:
        return key, Field("str", cursor.string(repr(key)))
    kind = _KIND_OF.get(value_type)
    if kind is None:
        raise cursor.malformed(f"metadata {key!r} has the unknown value type {value_type}")
    dtype = SCALARS[kind][1]
    value = np.frombuffer(cursor.take(dtype.itemsize, repr(key)), dtype)[0].item()
    return key, Field(kind, _truth(cursor, key, value) if kind == "bool" else value)


def _truth(cursor: _Cursor, key: str, value: int) -> bool:
    if value > 1:
        raise cursor.malformed(f"metadata {key!r} must be a boolean, 0 or 1, found {value}")
    return bool(value)


def _read_array(cursor: _Cursor, key: str) -> Field:
    element = cursor.unsigned(4, f"element type of {key!r}")
    count = cursor.unsigned(8, f"length of {key!r}")
    if element == GGUFValueType.STRING:
        cursor.strings += count
        if count * 8 > cursor.remaining or cursor.strings > MAX_STRINGS:
            raise cursor.malformed(f"metadata {key!r} claims {count} strings in {cursor.remaining} bytes")
        return Field("[str]", [cursor.string(f"an entry of {key!r}") for _ in range(count)])
    kind = _KIND_OF.get(element)
    if kind is None:
        found = "an array inside an array" if element == GGUFValueType.ARRAY else f"element type {element}"
        raise cursor.malformed(f"metadata {key!r} holds {found}, which no loader reads")
    dtype = SCALARS[kind][1]
    values = np.frombuffer(cursor.take(count * dtype.itemsize, repr(key)), dtype)
    if kind == "bool":
        values = np.array([_truth(cursor, key, int(values.max(initial=0))) and v for v in values], np.bool_)
    return Field(f"[{kind}]", values)


def _alignment(fields: Mapping[str, Field], cursor: _Cursor) -> int:
    architecture = fields.get("general.architecture")
    further_shard = fields.get("split.no", Field("u16", 0)).value != 0
    names_none = further_shard or fields.get("general.type") == Field("str", "imatrix")
    if not names_none and (architecture is None or architecture.kind != "str" or not architecture.value):
        raise cursor.malformed("general.architecture must be a string that is not empty")
    field = fields.get("general.alignment", Field("u32", DEFAULT_ALIGNMENT))
    value = field.value
    if field.kind != "u32" or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.malformed(
            f"general.alignment must be a u32 power of two from 8 to {MAX_ALIGNMENT}, found {field.kind} {value!r}"
        )
    return value


@dataclass(frozen=True)
class _Info:
    name: str
    type_name: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def _read_info(cursor: _Cursor) -> _Info:
    name = cursor.string("tensor name", MAX_NAME)
    if "\0" in name:
        raise cursor.malformed("a tensor name holds a NUL byte", name)
    n_dims = cursor.unsigned(4, f"dimensions of {name}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.malformed(f"must have 1 to {MAX_DIMS} dimensions, found {n_dims}", name)
    extents = [cursor.unsigned(8, f"extents of {name}") for _ in range(n_dims)]
    number = cursor.unsigned(4, f"type of {name}")
    offset = cursor.unsigned(8, f"offset of {name}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.malformed(f"GGML type {number} is unknown or was withdrawn", name) from None
    if any(extent < 1 for extent in extents):
        raise cursor.malformed(f"extents must be positive, found {extents}", name)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if extents[0] % block:
        raise cursor.malformed(f"{kind.name} rows come in blocks of {block}, found {extents[0]} columns", name)
    nbytes = math.prod(extents) // block * block_bytes
    if nbytes > cursor.size:
        raise cursor.malformed(f"{extents} of {kind.name} are {nbytes} bytes, the file has {cursor.size}", name)
    return _Info(name, kind.name, tuple(reversed(extents)), nbytes, offset)


def _place(infos: list[_Info], data_offset: int, alignment: int, cursor: _Cursor, path: Path) -> dict[str, GgufTensor]:
    """Check that tensors follow one another without gap or overlap, as llama.cpp demands, and end with the file."""
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for info in infos:
        if info.name in tensors:
            raise cursor.malformed("two tensors have this name", info.name)
        if info.offset % alignment:
            raise cursor.malformed(f"offset {info.offset} is not a multiple of {alignment}", info.name)
        if info.offset != expected:
            kind = "overlaps the tensor before it" if info.offset < expected else "leaves a gap before it"
            raise cursor.malformed(f"offset {info.offset} {kind}; expected {expected}", info.name)
        start = data_offset + info.offset
        if start + info.nbytes > cursor.size:
            raise cursor.malformed(f"data end at {start + info.nbytes}, the file at {cursor.size}", info.name)
        tensors[info.name] = GgufTensor(info.name, info.type_name, info.shape, start, info.nbytes, path)
        expected = padded(info.offset + info.nbytes, alignment)
    end = data_offset + expected if infos else cursor.position
    if cursor.size > padded(end, alignment):
        raise cursor.malformed(f"{cursor.size - end} bytes follow the last tensor and belong to nothing")
    return tensors
