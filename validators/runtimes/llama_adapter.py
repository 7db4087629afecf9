"""llama.cpp with an adapter beside the model, through the C interface that the xllamacpp wheel exports.

cyllama loads an adapter and has no call that puts it to use. Job and answers are those of `llama_cpp` with `want:
outputs`, for models that write text; the adapter is `adapter` in the same directory (by default residual.gguf).

Parameters travel by value, in structures that grow from version to version. The ones set here are found by their
default values, so a wheel with another llama.h is refused, not misread:

| offset | llama_context_params | default | set to                     |
|--------|----------------------|---------|----------------------------|
| 0      | n_ctx                | 512     | the length                 |
| 4      | n_batch              | 2048    | the length                 |
| 52     | flash_attn_type      | -1      | 0 (off), in mode `graph`   |
| 104    | type_k               | 1 (F16) | 0 (F32), in mode `graph`   |
| 108    | type_v               | 1 (F16) | 0 (F32), in mode `graph`   |
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tightship.errors import GateFailed
from tightship.validators.gguf_float32 import as_float32
from tightship.validators.runtimes.llama_cpp import Arrays, chunks, kept_positions

_POINTERS = (
    "llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init", "llama_get_logits_ith",
    "llama_get_memory", "llama_model_get_vocab",
)  # fmt: skip


class _Batch(ctypes.Structure):
    """llama.h: struct llama_batch."""

    _fields_: ClassVar = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class _Params(ctypes.Structure):
    """Parameters by value, longer than llama.h's: the callee takes what it knows from the front."""

    _fields_: ClassVar = (("data", ctypes.c_uint8 * 512),)

    def put(self, place: int, value: int, expected: int) -> None:
        """Set a 32-bit field whose default is known; another default means another llama.h."""
        if struct.unpack_from("<i", self.data, place)[0] != expected:
            raise ImportError("this xllamacpp was built with another llama.h than the proof knows")
        struct.pack_into("<i", self.data, place, value)


def run(job: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Logits (b, s, vocab) for `input_ids` (b, s); positions that the mask leaves out are zero.

    Raises:
        ImportError: no xllamacpp, or one of another llama.h.
        GateFailed: the library refuses a file or a step.
    """
    path = Path(job["artifact"]) / job["main"]
    adapter = path.with_name(job.get("adapter", "residual.gguf"))
    widen = job.get("mode", "shipped") == "graph"
    with tempfile.TemporaryDirectory() if widen else nullcontext("") as directory:
        model = as_float32(path, Path(directory)) if widen else path
        session = _Session(model, adapter, arrays["input_ids"].shape[1], job)
        try:
            logits = _logits(session, arrays, int(job.get("decode", 0)))
        finally:
            session.close()
    return {"version": f"xllamacpp {version('xllamacpp')}"}, {"logits": logits}


def _logits(session: _Session, arrays: Arrays, decode: int) -> np.ndarray:
    ids = arrays["input_ids"]
    out = np.zeros((*ids.shape, session.vocabulary), np.float32)
    for row, kept in enumerate(kept_positions(arrays)):
        session.forget()
        for first, last in chunks(len(kept), decode):
            out[row, kept[first:last]] = session.step(ids[row, kept[first:last]], first)
    return out


class _Session:
    """A model, its adapter at scale 1, and a context."""

    def __init__(self, model: Path, adapter: Path, length: int, job: dict[str, Any]) -> None:
        self._lib = lib = _library()
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self._model = ctypes.c_void_p(lib.llama_model_load_from_file(str(model).encode(), params))
        if not self._model.value:
            raise GateFailed(f"llama.cpp does not load {model.name}")
        loaded = lib.llama_adapter_lora_init(self._model, str(adapter).encode())
        if not loaded:
            raise GateFailed(f"llama.cpp does not load the adapter {adapter.name}")
        self._context = ctypes.c_void_p(lib.llama_init_from_model(self._model, self._settings(length, job)))
        if not self._context.value:
            raise GateFailed(f"llama.cpp makes no context of {length} tokens")
        threads = int(job.get("threads", 1))
        lib.llama_set_n_threads(self._context, threads, threads)
        lib.llama_set_adapters_lora(self._context, (ctypes.c_void_p * 1)(loaded), 1, (ctypes.c_float * 1)(1.0))
        self.vocabulary = int(lib.llama_vocab_n_tokens(ctypes.c_void_p(lib.llama_model_get_vocab(self._model))))

    def _settings(self, length: int, job: dict[str, Any]) -> _Params:
        params: _Params = self._lib.llama_context_default_params()
        wanted = [(0, length, 512), (4, length, 2048)]
        if job.get("mode", "shipped") == "graph":
            wanted += [(52, 0, -1), (104, 0, 1), (108, 0, 1)]
        for place, value, expected in wanted:
            params.put(place, value, expected)
        return params

    def forget(self) -> None:
        """Start a new text."""
        self._lib.llama_memory_clear(ctypes.c_void_p(self._lib.llama_get_memory(self._context)), ctypes.c_bool(True))

    def step(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Append tokens; their logits (n, vocab)."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), start + i, 1, 1
            batch.seq_id[i][0] = 0
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise GateFailed(f"llama.cpp stops at token {start}: llama_decode returned {code}")
        rows = [self._lib.llama_get_logits_ith(self._context, i) for i in range(len(ids))]
        floats = [ctypes.cast(row, ctypes.POINTER(ctypes.c_float)) for row in rows]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)).copy() for row in floats])

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no xllamacpp, whose llama.cpp takes adapters, is installed")
    lib = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    for name in _POINTERS:
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_context_default_params.restype = lib.llama_model_default_params.restype = _Params
    lib.llama_batch_init.restype = _Batch
    return lib
