"""The C library of llama.cpp, where an installed wheel exports it: its own quantizers, by ctypes.

The wheel of `xllamacpp` carries ggml with its symbols visible. It is optional: tests and benchmarks compare with it,
and the types whose search we do not have (IQ1_S to IQ3_S) are quantized by it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tightship.errors import EnvironmentFailure, Unsupported

_FLOATS = ctypes.POINTER(ctypes.c_float)


def available() -> bool:
    """True if a wheel with a visible ggml is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFailure(
            "this needs libggml, and no wheel that exports it is installed", hint="install xllamacpp"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))
    if not found:
        raise EnvironmentFailure("the xllamacpp wheel holds no shared library", hint="reinstall xllamacpp")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS,
    ]  # fmt: skip
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library


def quantize_chunk(
    type_name: str, w: np.ndarray, importance: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8 (rows, row bytes) of float32 `w` (rows, cols), by `ggml_quantize_chunk`; written to `out` where given.

    Raises:
        EnvironmentFailure: no libggml is installed.
        Unsupported: the type needs an importance vector, (cols,) float32, and none was given.
    """
    library = _library()
    number = int(GGMLQuantizationType[type_name])
    if importance is None and library.ggml_quantize_requires_imatrix(number):
        raise Unsupported(f"{type_name} needs importance data", hint="give a calibration text")
    w = np.ascontiguousarray(w, np.float32)
    rows, cols = w.shape
    if out is None:
        out = np.empty((rows, library.ggml_row_size(number, cols)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(_FLOATS)
    library.ggml_quantize_chunk(
        number, w.ctypes.data_as(_FLOATS), out.ctypes.data_as(ctypes.c_void_p), 0, rows, cols, weights
    )
    return out
