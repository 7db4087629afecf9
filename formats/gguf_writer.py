"""GGUF container, writing: metadata and tensor infos first, then the data tensor by tensor, hashed on the way.

The byte table is in `gguf_file.py`. Version 3, alignment 32, fields and tensors in the order given, so that the same
input makes the same bytes. Memory stays at a few chunks of rows: while one is hashed and written, the next are made.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME, SCALARS, Field, padded
from tightship.formats.threads import behind
from tightship.target import Progress, no_progress

VERSION = 3


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to come: `shape` in NumPy's order, `chunks()` yields its bytes in order, as arrays of any shape."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        return math.prod(self.shape) // block * block_bytes


@dataclass(frozen=True)
class WrittenGguf:
    """What lies on the disk now: size and sha256 of the whole file."""

    size: int
    sha256: str


def header_bytes(fields: Mapping[str, Field], tensors: Sequence[TensorToWrite]) -> bytes:
    """Everything before the data, padding included.

    Raises:
        Unsupported: a name, rank, row length or value that the container cannot hold.
    """
    parts = [MAGIC, _number("u32", VERSION), _number("u64", len(tensors)), _number("u64", len(fields))]
    parts += [_field_bytes(key, field) for key, field in fields.items()]
    offset = 0
    for tensor in tensors:
        parts.append(_info_bytes(tensor, offset))
        offset += padded(tensor.nbytes, DEFAULT_ALIGNMENT)
    data = b"".join(parts)
    return data.ljust(padded(len(data), DEFAULT_ALIGNMENT), b"\0")


def file_bytes(fields: Mapping[str, Field], tensors: Sequence[TensorToWrite]) -> int:
    """Size of the file that `write_gguf` would write, without reading any data."""
    return len(header_bytes(fields, tensors)) + sum(padded(t.nbytes, DEFAULT_ALIGNMENT) for t in tensors)


def write_gguf(
    path: str | Path,
    fields: Mapping[str, Field],
    tensors: Sequence[TensorToWrite],
    progress: Progress = no_progress,
) -> WrittenGguf:
    """Write a new file; it is complete, and its data handed to the disk, when this returns.

    Raises:
        Unsupported: see `header_bytes`.
        Malformed: a tensor yields more or fewer bytes than its shape needs.
        FileExistsError: the path is taken.
    """
    header = header_bytes(fields, tensors)
    total = len(header) + sum(padded(t.nbytes, DEFAULT_ALIGNMENT) for t in tensors)
    digest = hashlib.sha256(header)
    with Path(path).open("xb") as file:

        def write(data: memoryview | bytes) -> None:
            digest.update(data)
            file.write(data)

        file.write(header)
        done = len(header)
        with behind(write) as put:
            for tensor in tensors:
                progress(f"write gguf: {tensor.name}", done, total)
                _put_tensor(put, tensor)
                done += padded(tensor.nbytes, DEFAULT_ALIGNMENT)
    progress("write gguf", total, total)
    return WrittenGguf(total, digest.hexdigest())


def _put_tensor(put: Callable[[memoryview | bytes], None], tensor: TensorToWrite) -> None:
    written = 0
    for chunk in tensor.chunks():
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        written += data.nbytes
        put(data)
    if written != tensor.nbytes:
        raise Malformed(
            f"{tensor.type_name} {tensor.shape} are {tensor.nbytes} bytes, {written} came", tensor=tensor.name
        )
    put(bytes(padded(written, DEFAULT_ALIGNMENT) - written))


def _info_bytes(tensor: TensorToWrite, offset: int) -> bytes:
    kind = GGMLQuantizationType[tensor.type_name]
    block = GGML_QUANT_SIZES[kind][0]
    if not 0 < len(tensor.name.encode()) <= MAX_NAME:
        raise Unsupported(f"a GGUF tensor name has 1 to {MAX_NAME} bytes", tensor=tensor.name)
    if not 1 <= len(tensor.shape) <= MAX_DIMS:
        raise Unsupported(f"a GGUF tensor has 1 to {MAX_DIMS} dimensions, found {tensor.shape}", tensor=tensor.name)
    if tensor.shape[-1] % block:
        raise Unsupported(
            f"{tensor.type_name} rows come in blocks of {block}, found {tensor.shape[-1]} columns", tensor=tensor.name
        )
    extents = b"".join(_number("u64", extent) for extent in reversed(tensor.shape))
    return b"".join(
        (_string(tensor.name), _number("u32", len(tensor.shape)), extents, _number("u32", kind), _number("u64", offset))
    )


def _field_bytes(key: str, field: Field) -> bytes:
    kind = field.kind.strip("[]")
    number = _number("u32", GGUFValueType.STRING if kind == "str" else SCALARS[kind][0])
    if kind == field.kind:
        return _string(key) + number + (_string(field.value) if kind == "str" else _number(kind, field.value))
    head = _string(key) + _number("u32", GGUFValueType.ARRAY) + number + _number("u64", len(field.value))
    return head + (b"".join(map(_string, field.value)) if kind == "str" else _numbers(kind, field.value))


def _number(kind: str, value: float) -> bytes:
    dtype = SCALARS[kind][1]
    if dtype.kind == "f":
        return np.array(value, dtype).tobytes()
    try:
        return int(value).to_bytes(dtype.itemsize, "little", signed=dtype.kind == "i")
    except OverflowError:
        raise Unsupported(f"metadata value {value} does not fit {kind}") from None


def _numbers(kind: str, values: Any) -> bytes:
    try:
        return np.array(values, SCALARS[kind][1]).tobytes()
    except OverflowError:
        raise Unsupported(f"metadata values from {min(values)} to {max(values)} do not fit {kind}") from None


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data
