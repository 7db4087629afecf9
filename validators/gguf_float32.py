"""A GGUF file with every weight widened to float32, by the gguf package's own decoders.

llama.cpp quantizes activations where weights are quantized, and rounds them to float16 where weights are float16. The
widened file takes that away, so that what is left between it and the reference is the graph: names, permutations,
metadata, arithmetic. It also is a second opinion on our bytes, since another decoder reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, dequantize

from tightship.formats.gguf_file import GgufTensor
from tightship.formats.gguf_shards import read_shards
from tightship.formats.gguf_writer import TensorToWrite, write_gguf

_CHUNK_WEIGHTS = 1 << 22


def as_float32(path: Path, directory: Path) -> Path:
    """The file itself where it is float32 already, else a widened copy in `directory`.

    Raises:
        Malformed: the file breaks a rule of the container.
        NotImplementedError: the gguf package cannot decode a type.
    """
    source = read_shards(path)
    if all(t.type_name == "F32" for t in source.tensors.values()):
        return path
    target = directory / "float32.gguf"
    fields = {key: field for key, field in source.fields.items() if not key.startswith("split.")}
    write_gguf(target, fields, [_widened(tensor) for tensor in source.tensors.values()])
    return target


def _widened(tensor: GgufTensor) -> TensorToWrite:
    kind = GGMLQuantizationType[tensor.type_name]
    if kind.name.startswith("I") and not kind.name.startswith("IQ"):  # plain integers stay
        return TensorToWrite(tensor.name, tensor.type_name, tensor.shape, lambda: [tensor.read_rows()])

    def chunks() -> Iterator[np.ndarray]:
        step = max(1, _CHUNK_WEIGHTS // tensor.shape[-1])
        for first in range(0, tensor.rows, step):
            rows = tensor.read_rows(first, min(step, tensor.rows - first))
            yield dequantize(rows, kind) if kind.name != "F64" else rows.view(np.float64).astype(np.float32)

    return TensorToWrite(tensor.name, "F32", tensor.shape, chunks)
