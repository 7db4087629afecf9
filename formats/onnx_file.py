"""Reads ONNX files that we did not write: every rule is checked before a byte of data is touched.

| part                | rule                                                                                          |
|---------------------|-----------------------------------------------------------------------------------------------|
| file                | one ModelProto below 2 GiB with a graph, an opset import and an IR version                    |
| graph               | nodes in topological order, each value made once, every input and output known                |
| functions           | no call circle                                                                                |
| initializer         | unique name, known fixed-size type, rank <= 32, dims >= 0, data exactly as long as they say    |
| external data       | keys location, offset, length, checksum, each once; numbers in plain digits                    |
| location            | relative, inside the model's directory, no `..`, no link (symbolic or hard), a regular file   |
| offset, length      | offset + length within the file, length equal to what type and dims need                      |

Where the `onnx` package and ONNX Runtime differ, the stricter rule holds, so that what passes here opens in both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tightship.dtypes import BY_ONNX
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.untrusted import refuse_impostor

if TYPE_CHECKING:
    import onnx

MAX_FILE = (1 << 31) - 1  # protobuf's own limit
MAX_RANK = 32
MAX_DEPTH = 16  # graphs inside graphs
_KEYS = ("location", "offset", "length", "checksum")
_DIGITS = re.compile(r"[0-9]{1,19}")
_PACKED = {21: (4, ml_dtypes.uint4), 22: (4, ml_dtypes.int4), 25: (2, ml_dtypes.uint2), 26: (2, ml_dtypes.int2)}
_WORDS = {21: "uint4", 22: "int4", 25: "uint2", 26: "int2"}
# Field of TensorProto that may hold the elements of a type instead of raw_data.
_TYPED = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data", 13: "uint64_data"}


@dataclass(frozen=True)
class StoredTensor:
    """An initializer; `read()` returns its elements in NumPy (4- and 2-bit ones unpacked), checked again.

    Attributes:
        name: in the graph.
        dtype: our word (`f32`, `bf16`, `u8`), or int4, uint4, int2, uint2.
        shape: as stored.
        nbytes: in the file.
        location: of external data, relative, or None where the graph holds them.
        offset: of external data in their file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    location: str | None
    read: Callable[[], np.ndarray]
    offset: int = 0


@dataclass(frozen=True)
class OnnxFile:
    """What a file says of itself.

    Attributes:
        metadata: IR version, opsets, inputs, outputs, operators counted, producer.
        initializers: by name, in file order.
        files: external data files, relative.
        weights: numbers that the initializers stand for: packed codes unpacked, scales and zero points left out. Bytes
            that several initializers name count once, as the first of them sees them.
    """

    path: Path
    metadata: Mapping[str, Any]
    initializers: Mapping[str, StoredTensor]
    files: tuple[str, ...]
    weights: int


def read_onnx(path: Path) -> OnnxFile:
    """Structure of an ONNX file; data stay where they are.

    Raises:
        Malformed: a rule of the table above is broken; names the tensor or node.
        Unsupported: string or sparse initializers.
    """
    model = _parse(path)
    if model.graph.sparse_initializer:
        raise Unsupported(
            "sparse initializers are not read",
            tensor=model.graph.sparse_initializer[0].values.name,
            hint="tightship expand makes a shrunk file dense again",
        )
    _check_graph(model.graph, set(), 0)
    _check_functions(model)
    found: dict[str, StoredTensor] = {}
    for tensor in model.graph.initializer:
        if not tensor.name or tensor.name in found:
            raise Malformed(f"two initializers are called {tensor.name!r}", tensor=tensor.name)
        found[tensor.name] = _stored(tensor, path.parent)
    for tensor in _constants(model):
        _stored(tensor, path.parent)
    files = sorted({t.location for t in found.values() if t.location})
    return OnnxFile(path, _metadata(model), found, tuple(files), _weights(model, found))


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UsageError(f"there is no such file: {path.name}")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE:
        raise Malformed(f"{path.name} has {size} bytes; an ONNX graph has between 1 and {MAX_FILE}")
    data = path.read_bytes()
    refuse_impostor(path.name, data[:64])
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise Malformed(
            f"{path.name} is not an ONNX model: {error}", hint="the file is damaged or cut short"
        ) from error
    if not model.HasField("graph") or not model.opset_import or model.ir_version < 3:
        raise Malformed(f"{path.name} has no graph, no opset import or no IR version", hint="it is no ONNX model")
    return model


def _check_graph(graph: onnx.GraphProto, outer: Set[str], depth: int) -> None:
    """Topological order, unique values, known outputs; subgraphs see what was made before their node."""
    if depth > MAX_DEPTH:
        raise Malformed(f"graphs are nested more than {MAX_DEPTH} deep")
    made = {value.name for value in graph.input}
    known = set(outer) | made | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        label = node.name or node.op_type
        unknown = [name for name in node.input if name and name not in known]
        if unknown:
            raise Malformed(
                f"node {label!r} reads {unknown[0]!r} before anything makes it: a circle, or a missing node"
            )
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _check_graph(subgraph, known, depth + 1)
        for name in node.output:
            if name and name in made:
                raise Malformed(f"the value {name!r} is made twice, the second time by node {label!r}")
            made.add(name)
        known |= set(node.output)
    missing = [output.name for output in graph.output if output.name not in known]
    if missing:
        raise Malformed(f"nothing makes the graph output {missing[0]!r}")


def _check_functions(model: onnx.ModelProto) -> None:
    """No function calls itself, directly or through others."""
    calls = {(f.domain, f.name): {(n.domain, n.op_type) for n in f.node} for f in model.functions}
    if len(calls) != len(model.functions):
        raise Malformed("two functions of the model have one name")
    done: set[tuple[str, str]] = set()
    while ready := [key for key, called in calls.items() if key not in done and called & calls.keys() <= done]:
        done.update(ready)
    if len(done) < len(calls):
        raise Malformed(f"the function {min(calls.keys() - done)[1]!r} calls itself in the end")


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors inside nodes, at any depth."""
    open_nodes: list[Iterable[onnx.NodeProto]] = [model.graph.node, *(f.node for f in model.functions)]
    while open_nodes:
        for node in open_nodes.pop():
            for attribute in node.attribute:
                yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from graph.initializer
                    open_nodes.append(graph.node)


def _stored(tensor: onnx.TensorProto, root: Path) -> StoredTensor:
    """Type, shape and place of a tensor, every bound checked."""
    kind, dims = tensor.data_type, tuple(tensor.dims)
    if kind == tensor.STRING:
        raise Unsupported("tensors of strings are not read", tensor=tensor.name)
    if kind not in BY_ONNX and kind not in _PACKED:
        raise Malformed(f"element type {kind} is unknown", tensor=tensor.name)
    if len(dims) > MAX_RANK or any(d < 0 for d in dims) or math.prod(dims) >= 1 << 62:
        raise Malformed(
            f"the shape {dims[:8]} is negative, too large or has more than {MAX_RANK} axes", tensor=tensor.name
        )
    bits = _PACKED[kind][0] if kind in _PACKED else 8 * BY_ONNX[kind].itemsize
    expected = -(-math.prod(dims) * bits // 8)
    word = _WORDS.get(kind) or BY_ONNX[kind].name
    if tensor.data_location == tensor.EXTERNAL:
        location, start = _external(tensor, root, expected)

        def read_file() -> np.ndarray:
            with open(contained(root, location, tensor.name), "rb") as stream:
                stream.seek(start)
                return _elements(stream.read(expected), tensor.name, kind, dims, expected)

        return StoredTensor(tensor.name, word, dims, expected, location, read_file, start)
    if len(tensor.external_data):
        raise Malformed(
            "external data are named, but the tensor says that it holds its data itself", tensor=tensor.name
        )
    _check_inline(tensor, kind, expected, math.prod(dims))

    def read_inline() -> np.ndarray:
        from onnx import numpy_helper

        if tensor.raw_data or not expected:
            return _elements(tensor.raw_data, tensor.name, kind, dims, expected)
        return np.asarray(numpy_helper.to_array(tensor))

    return StoredTensor(tensor.name, word, dims, expected, None, read_inline)


def _check_inline(tensor: onnx.TensorProto, kind: int, expected: int, elements: int) -> None:
    typed = {f: len(getattr(tensor, f)) for f in (*dict.fromkeys(_TYPED.values()), "int32_data", "string_data")}
    used = {field: count for field, count in typed.items() if count}
    if tensor.raw_data:
        if used or len(tensor.raw_data) != expected:
            raise Malformed(f"{len(tensor.raw_data)} bytes of data where {expected} are needed", tensor=tensor.name)
        return
    field = _TYPED.get(kind, "int32_data")
    slots = -(-elements * _PACKED[kind][0] // 8) if kind in _PACKED else elements
    if used != ({field: slots} if slots else {}):
        raise Malformed(f"{used or 'no'} elements of data where {field} needs {slots}", tensor=tensor.name)


def _external(tensor: onnx.TensorProto, root: Path, expected: int) -> tuple[str, int]:
    """(location, offset) of external data of exactly `expected` bytes."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS or entry.key in entries:
            raise Malformed(f"external data key {entry.key[:40]!r} is unknown or occurs twice", tensor=tensor.name)
        entries[entry.key] = entry.value
    if tensor.raw_data or "location" not in entries:
        raise Malformed("external data need a location, and no data in the graph beside it", tensor=tensor.name)
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key)
        if text is not None and not _DIGITS.fullmatch(text):
            raise Malformed(f"external data {key} {text[:40]!r} is not a plain number", tensor=tensor.name)
        numbers[key] = None if text is None else int(text)
    size = contained(root, entries["location"], tensor.name).stat().st_size
    offset = numbers["offset"] or 0
    length = size - offset if numbers["length"] is None else numbers["length"]
    if length != expected:
        raise Malformed(f"external data of {length} bytes where type and shape need {expected}", tensor=tensor.name)
    if offset + length > size:
        raise Malformed(
            f"external data end at byte {offset + length}, {entries['location']} at {size}",
            tensor=tensor.name,
            hint="the data file is cut short, or belongs to another model",
        )
    return entries["location"], offset


def contained(root: Path, location: str, tensor: str) -> Path:
    """The path of an external data file, inside `root` and no link on the way.

    Raises:
        Malformed: absolute, with `..`, through a link, or not a regular file.
    """
    parts = PurePosixPath(location).parts
    odd = "\\" in location or "\0" in location or ":" in location or not location.strip()
    if odd or not parts or location.startswith("/") or ".." in parts:
        raise Malformed(f"external data at {location[:80]!r} lie outside the model's directory", tensor=tensor)
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise Malformed(
                f"external data at {location!r} go through the link {part!r}",
                tensor=tensor,
                hint="runtimes refuse links; copy the file to where the link stands",
            )
    if not path.is_file():
        raise Malformed(f"external data file {location!r} is missing or not a regular file", tensor=tensor)
    if path.stat().st_nlink > 1:
        raise Malformed(
            f"external data file {location!r} has hard links, which the onnx package refuses", tensor=tensor
        )
    return path


def _elements(data: bytes, name: str, kind: int, dims: tuple[int, ...], expected: int) -> np.ndarray:
    if len(data) != expected:
        raise Malformed(f"{len(data)} bytes could be read where {expected} are needed", tensor=name)
    if kind not in _PACKED:
        return np.frombuffer(data, BY_ONNX[kind].numpy.newbyteorder("<")).reshape(dims)
    bits, element = _PACKED[kind]
    packed = np.frombuffer(data, np.uint8)
    lanes = [(packed >> np.uint8(shift)) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
    codes = np.stack(lanes, axis=1).reshape(-1)[: math.prod(dims)]
    signed = np.dtype(element) in (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.int2))
    half = 1 << (bits - 1)
    values = (codes.astype(np.int8) ^ half) - half if signed else codes
    return values.astype(element).reshape(dims)


def _weights(model: onnx.ModelProto, held: Mapping[str, StoredTensor]) -> int:
    counts = {name: math.prod(tensor.shape) for name, tensor in held.items()}
    joined = {node.output[0]: node.input for node in model.graph.node if node.op_type == "Concat" and node.output}
    for node in model.graph.node:
        names = [*node.input, *[""] * 5]
        sizes = {a.name: a.i for a in node.attribute}
        beside = {
            "MatMulNBits": names[2:],
            "DequantizeLinear": names[1:],
            "GatherBlockQuantized": names[2:],
            "QMoE": names[3:4] + names[6:7],
        }
        packing = (part for name in beside.get(node.op_type, ()) for part in joined.get(name, (name,)))
        counts.update({name: 0 for name in packing if name in held})
        codes = [name for name in joined.get(names[1], names[1:2]) if node.op_type == "MatMulNBits" and name in held]
        counts.update({name: max(0, sizes.get("K", 0)) * (held[name].shape or (0,))[0] for name in codes})
        if node.op_type == "QMoE":
            bits = min(max(1, sizes.get("expert_weight_bits", 4)), 8)
            counts.update({n: math.prod(held[n].shape) * 8 // bits for n in (names[2], names[5]) if n in held})
    places = {(t.location, t.offset) if t.location else name: name for name, t in reversed(list(held.items()))}
    return sum(counts[name] for name in places.values())


def _metadata(model: onnx.ModelProto) -> dict[str, Any]:
    held = {i.name for i in model.graph.initializer}
    return {
        "ir_version": model.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_value(v) for v in model.graph.input if v.name not in held],
        "outputs": [_value(v) for v in model.graph.output],
        "operators": dict(sorted(Counter(_operator(n) for n in model.graph.node).items())),
    }


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _value(value: onnx.ValueInfoProto) -> str:
    """`name kind[axis, axis]`."""
    tensor = value.type.tensor_type
    axes = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    kind = BY_ONNX[tensor.elem_type].name if tensor.elem_type in BY_ONNX else str(tensor.elem_type)
    return f"{value.name} {kind}[{', '.join(axes)}]"
