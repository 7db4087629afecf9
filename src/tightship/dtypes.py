"""The one table of element types: our name, NumPy, safetensors, GGUF and ONNX spellings.

| name    | bits | safetensors | GGUF type id | ONNX TensorProto |
|---------|------|-------------|--------------|------------------|
| f32     | 32   | F32         | 0            | 1                |
| f16     | 16   | F16         | 1            | 10               |
| bf16    | 16   | BF16        | 30           | 16               |
| f64     | 64   | F64         | 28           | 11               |
| f8_e4m3 | 8    | F8_E4M3     | -            | 17               |
| f8_e5m2 | 8    | F8_E5M2     | -            | 19               |
| f8_e8m0 | 8    | F8_E8M0     | -            | 24               |
| i8 ...  |      | I8 ...      | 24 ...       | 3 ...            |
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tightship.errors import Malformed


@dataclass(frozen=True)
class DType:
    """One element type. `gguf` and `onnx` are None where the container has no such type."""

    name: str
    numpy: np.dtype
    safetensors: str
    gguf: int | None
    onnx: int | None

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        return self.name[0] in "fb" and self.name != "bool"


_TABLE = (
    DType("f32", np.dtype(np.float32), "F32", 0, 1),
    DType("f16", np.dtype(np.float16), "F16", 1, 10),
    DType("bf16", np.dtype(ml_dtypes.bfloat16), "BF16", 30, 16),
    DType("f64", np.dtype(np.float64), "F64", 28, 11),
    DType("f8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", None, 17),
    DType("f8_e5m2", np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2", None, 19),
    DType("f8_e8m0", np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E8M0", None, 24),
    DType("i8", np.dtype(np.int8), "I8", 24, 3),
    DType("i16", np.dtype(np.int16), "I16", 25, 5),
    DType("i32", np.dtype(np.int32), "I32", 26, 6),
    DType("i64", np.dtype(np.int64), "I64", 27, 7),
    DType("u8", np.dtype(np.uint8), "U8", None, 2),
    DType("u16", np.dtype(np.uint16), "U16", None, 4),
    DType("u32", np.dtype(np.uint32), "U32", None, 12),
    DType("u64", np.dtype(np.uint64), "U64", None, 13),
    DType("bool", np.dtype(np.bool_), "BOOL", None, 9),
)

BY_NAME = {d.name: d for d in _TABLE}
BY_SAFETENSORS = {d.safetensors: d for d in _TABLE}
BY_GGUF = {d.gguf: d for d in _TABLE if d.gguf is not None}
BY_ONNX = {d.onnx: d for d in _TABLE if d.onnx is not None}
BY_NUMPY = {d.numpy: d for d in _TABLE}


def dtype(name: str) -> DType:
    """Look a type up by our name.

    Raises:
        Malformed: no such element type; the message lists those that exist.
    """
    found = BY_NAME.get(name)
    if found is None:
        raise Malformed(f"element type {name!r} is unknown; known: {', '.join(BY_NAME)}")
    return found


def of_array(array: np.ndarray) -> DType:
    """The table row of an array's dtype."""
    found = BY_NUMPY.get(array.dtype)
    if found is None:
        raise Malformed(f"arrays of dtype {array.dtype} have no place in any container; known: {', '.join(BY_NAME)}")
    return found
