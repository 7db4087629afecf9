"""Writes `model.onnx` and, tensor by tensor, `model.onnx_data`. Same input, same bytes.

| file            | content                                                                                  |
|-----------------|------------------------------------------------------------------------------------------|
| NAME            | ModelProto: graph, small initializers inline, IR version 10, no docs, paths or producer  |
| NAME_data       | little-endian tensor bytes, zero-filled gaps, in the order given                         |

Graphs that are written together have one data file; what several of them read lies there once.

A tensor of 1 MiB or more starts at a multiple of 64 KiB (the coarsest allocation granularity, so that it can be
mapped); smaller ones start at a multiple of 64 bytes. Two initializers may name the same bytes, as different types.
Definition: ExternalData.md of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tightship.errors import Malformed
from tightship.target import Progress, no_progress

if TYPE_CHECKING:
    import onnx

IR_VERSION = 10
INLINE_BYTES = 1024  # shape constants and the like stay in the graph, where shape inference looks for them
MAPPED_BYTES = 1 << 20
SMALL_ALIGNMENT = 64
MAPPED_ALIGNMENT = 1 << 16
_CHUNK = 1 << 20  # bytes: a turned copy stays in the cache


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph whose data are read only while it is written.

    Attributes:
        name: of the value in the graph.
        data_type: TensorProto.DataType number.
        shape: logical shape.
        nbytes: bytes in the file (4-bit and 2-bit types are packed, the last byte filled up with zero).
        read: the data as one contiguous array of exactly `nbytes` bytes, any dtype, or as several in a row.
        same_as: name of another initializer whose bytes these are; `read` is not called then.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray | Iterator[np.ndarray]]
    same_as: str = ""

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Initializer:
        """An array that is in memory already, in its own dtype."""
        from onnx.helper import np_dtype_to_tensor_dtype

        kind = np_dtype_to_tensor_dtype(array.dtype)
        return cls(name, kind, tuple(array.shape), array.nbytes, lambda: array)


def data_layout(sizes: Iterable[int], inline: int = INLINE_BYTES) -> tuple[list[int | None], int]:
    """Offset of each tensor in the data file (None: stays in the graph), and the file's size."""
    offsets: list[int | None] = []
    end = 0
    for size in sizes:
        if size <= inline:
            offsets.append(None)
            continue
        alignment = MAPPED_ALIGNMENT if size >= MAPPED_BYTES else SMALL_ALIGNMENT
        start = -(-end // alignment) * alignment
        offsets.append(start)
        end = start + size
    return offsets, end


@dataclass(frozen=True)
class Part:
    """One of several graphs, and its initializers.

    Attributes:
        model: scrubbed in place when written; initializers it already holds stay inline.
        own: its own constants, whatever others call theirs.
        weights: initializers that are the same in every part, where names are the same.
    """

    model: onnx.ModelProto
    own: Sequence[Initializer]
    weights: Sequence[Initializer]


def write_onnx(
    model: onnx.ModelProto,
    initializers: Sequence[Initializer],
    directory: Path,
    name: str = "model.onnx",
    progress: Progress = no_progress,
) -> list[str]:
    """Write one graph with these initializers; see `write_parts`."""
    return write_parts({name: Part(model, (), initializers)}, directory, f"{name}_data", progress)


def write_parts(
    parts: Mapping[str, Part], directory: Path, data_name: str, progress: Progress = no_progress
) -> list[str]:
    """Write graphs by the names of their files, and one data file; returns the relative names of the files written.

    Peak memory is the graphs plus the largest single tensor.

    Raises:
        Malformed: an initializer's data are not as many bytes as announced, or two parts differ about a weight.
    """
    items: dict[tuple[str, str], Initializer] = {}
    for name, part in parts.items():
        items |= {(name, item.name): item for item in part.own}
        for item in part.weights:
            known = items.setdefault(("", item.name), item)
            if (known.shape, known.data_type) != (item.shape, item.data_type):
                raise Malformed(f"graphs read it as {known.shape} and as {item.shape}", tensor=item.name)
            if item.same_as:
                items["", item.name] = item
    held = {key: item for key, item in items.items() if not item.same_as}
    starts, size = data_layout(i.nbytes for i in held.values())
    if size:
        _write_data(directory / data_name, list(held.values()), starts, progress)
    offsets = dict(zip(held, starts, strict=True))
    for name, part in parts.items():
        scrub(part.model)
        for key in [*((name, item.name) for item in part.own), *(("", item.name) for item in part.weights)]:
            owner = key if key in held else ("", items[key].same_as)
            _announce(part.model, items[key], held[owner], offsets[owner], data_name)
        with open(directory / name, "xb") as stream:
            stream.write(part.model.SerializeToString(deterministic=True))
    return [*parts, data_name] if size else [*parts]


def _write_data(path: Path, items: Sequence[Initializer], offsets: Sequence[int | None], progress: Progress) -> None:
    with open(path, "xb") as stream:
        for done, (item, offset) in enumerate(zip(items, offsets, strict=True)):
            if offset is not None:
                stream.write(bytes(offset - stream.tell()))
                _stream(item, stream)
            progress(f"write onnx: {item.name}", done + 1, len(items))


def scrub(model: onnx.ModelProto) -> None:
    """Drop what does not change the computation: producer, docs, stack traces, metadata, inferred shapes."""
    model.ir_version = IR_VERSION
    for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version", "metadata_props"):
        model.ClearField(field)
    model.graph.name = "main"
    _scrub_graph(model.graph)
    for function in model.functions:
        for field in ("doc_string", "metadata_props", "value_info"):
            function.ClearField(field)
        _scrub_nodes(function.node)


def _scrub_graph(graph: onnx.GraphProto) -> None:
    for field in ("doc_string", "metadata_props", "value_info", "quantization_annotation"):
        graph.ClearField(field)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    _scrub_nodes(graph.node)


def _scrub_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _scrub_graph(subgraph)


def _stream(item: Initializer, stream: BinaryIO) -> None:
    for data in _bytes_of(item):
        stream.write(data)


def _bytes_of(item: Initializer) -> Iterator[memoryview]:
    """The data, run by run of rows: a copy of a whole turned matrix would be new memory each time.

    Raises:
        Malformed: they are not as many bytes as announced.
    """
    data = item.read()
    found = 0
    for part in data if isinstance(data, Iterator) else (data,):
        array = np.atleast_1d(part)
        step = max(1, _CHUNK * len(array) // max(array.nbytes, 1))
        for start in range(0, len(array), step):
            run = np.ascontiguousarray(array[start : start + step])
            found += run.nbytes
            yield run.reshape(-1).view(np.uint8).data
    if found != item.nbytes:
        raise Malformed(f"{found} bytes of data where {item.nbytes} were announced", tensor=item.name)


def _announce(model: onnx.ModelProto, item: Initializer, owner: Initializer, offset: int | None, location: str) -> None:
    """Name the bytes of `owner`, which lie at `offset` or stay in the graph, as `item`."""
    proto = model.graph.initializer.add()
    proto.name = item.name
    proto.data_type = item.data_type
    proto.dims.extend(item.shape)
    if offset is None:
        proto.raw_data = b"".join(_bytes_of(owner))
        return
    point_to(proto, location, offset, item.nbytes)


def point_to(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Say that a tensor's bytes lie in a data file, in place of what it said before."""
    proto.data_location = proto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def packed_nbytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of a tensor whose elements have `bits` bits, packed without gaps."""
    return -(-math.prod(shape) * bits // 8)
