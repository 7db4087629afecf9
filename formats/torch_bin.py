"""PyTorch's `pytorch_model.bin`: a zip archive of one pickle and raw storages, or one legacy pickle.

| entry             | meaning                                                           |
|-------------------|-------------------------------------------------------------------|
| `*/data.pkl`      | pickled dict name -> tensor, each a view of a numbered storage     |
| `*/data/0`, ...   | storages, raw and uncompressed                                    |
| `*/version`, ...  | small bookkeeping                                                  |

A pickle is a program. It is only ever run by torch's restricted reader (`weights_only=True`), on a torch that is not
known to be broken, after the archive was checked: no compression (a small file cannot unfold into a big one), nothing
larger than the file.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tightship.dtypes import BY_NAME, DType
from tightship.errors import EnvironmentFailure, Malformed, Unsupported
from tightship.untrusted import refuse_impostor
from tightship.weights import Dense

MAX_PICKLE = 100_000_000
MAX_ENTRIES = 1_000_000
FIRST_SAFE_TORCH = (2, 10)
_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "float8_e4m3fn": "f8_e4m3"}
_NAMES |= {"float8_e5m2": "f8_e5m2", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8"}
_NAMES |= {"bool": "bool"}


def read_bin(path: Path) -> dict[str, Dense]:
    """Tensors of a file by name, memory-mapped; each `read()` copies one.

    Raises:
        Malformed: not a flat dict of tensors, an archive that lies about its sizes, or a pickle that asks for more than
            tensors.
        Unsupported: an element type that we do not map.
        EnvironmentFailure: the installed torch reads pickles unsafely.
    """
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < FIRST_SAFE_TORCH:
        raise EnvironmentFailure(
            f"torch {torch.__version__} does not read pickles safely", hint="install torch >= 2.10"
        )
    zipped = _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the reader raises half a dozen kinds on hostile input
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Malformed(
            f"{path.name} is not a plain dict of tensors: {reason:.200}",
            hint="ask for safetensors files; pickles with code in them are never run",
        ) from error
    if not isinstance(state, dict):
        raise Malformed(f"{path.name} holds a {type(state).__name__}, not a dict of tensors")
    tensors = {_name(key, path.name): _dense(key, value, path.name) for key, value in state.items()}
    if zipped:
        _check_storages(path, state)
    return tensors


def _check_storages(path: Path, state: dict[str, Any]) -> None:
    """torch maps as many bytes as the pickle asks for, wherever the archive's entry ends; the two must agree."""
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda e: e.header_offset)
    stored = [e.file_size for e in entries if e.filename.split("/")[-2:-1] == ["data"] and e.file_size]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in state.values()) if s.nbytes()}
    if [storages[at] for at in sorted(storages)] != stored:
        raise Malformed(f"{path.name}: the sizes of its tensors are not those of the stored data")


def _check_archive(path: Path) -> bool:
    """True for a zip, False for a legacy pickle."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"PK\x03\x04"):
        refuse_impostor(path.name, head)
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise Malformed(f"{path.name} is a damaged archive: {error}", hint="the file is truncated; fetch it") from error
    if len(entries) > MAX_ENTRIES:
        raise Malformed(f"{path.name} holds {len(entries)} archive entries; the limit is {MAX_ENTRIES}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Malformed(f"{path.name} holds compressed entries; PyTorch writes none", hint="save it again with torch")
    if sum(entry.file_size for entry in entries) > size:
        raise Malformed(f"{path.name} announces more bytes than its {size}")
    if any(e.filename.endswith(".pkl") and e.file_size > MAX_PICKLE for e in entries):
        raise Malformed(f"{path.name} holds a pickle above {MAX_PICKLE} bytes")
    return True


def _name(key: Any, file: str) -> str:
    if not isinstance(key, str) or not key or len(key) > 1024 or not key.isprintable():
        raise Malformed(f"{file}: {key!r:.80} is not a tensor name")
    return key


def _dense(name: str, tensor: Any, file: str) -> Dense:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise Malformed(
            f"{file} holds a {type(tensor).__name__} under this name, not a tensor",
            tensor=name,
            hint="a training checkpoint must be unwrapped first: save model.state_dict() alone",
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise Malformed(f"{file}: only plain dense tensors are read, found {tensor.layout}", tensor=name)
    word = str(tensor.dtype).removeprefix("torch.")
    if word not in _NAMES:
        raise Unsupported(f"element type {word} is not one we map", tensor=name)
    dtype = BY_NAME[_NAMES[word]]
    return Dense(tuple(tensor.shape), dtype.name, lambda: _array(tensor, dtype))


def _array(tensor: Any, dtype: DType) -> np.ndarray:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if dtype.numpy == np.dtype(ml_dtypes.bfloat16) or dtype.name.startswith("f8"):
        flat = flat.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    return flat.numpy().view(dtype.numpy).reshape(tuple(tensor.shape)).copy()
