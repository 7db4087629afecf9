"""What a file or directory of any of the three containers holds. Runs nothing and needs neither torch nor a runtime."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.console import size, table
from tightship.errors import UsageError

SUFFIXES = {".gguf": "gguf", ".safetensors": "safetensors", ".onnx": "onnx"}


@dataclass(frozen=True)
class Held:
    """One stored tensor: `storage` is the container's word; `zeros` the share of exact zeros, if counted."""

    name: str
    shape: tuple[int, ...]
    storage: str
    nbytes: int
    zeros: float | None = None


Found = tuple[dict[str, Any], list[Held], int]
"""Metadata, stored tensors, and how many weights they stand for."""


def inspect(path: Path, *, sparsity: bool = False) -> dict[str, Any]:
    """Describe a model file, or every model file below a directory.

    Returns:
        `{"files": [{"path", "container", "bytes", "metadata", "tensors", ...}], "manifest": {...} | None}`.

    Raises:
        UsageError: nothing there, or no file of a known container.
        Malformed: a file breaks a rule of its container.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist", hint="give a model file, or a directory that holds some")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files or (path.is_file() and path.suffix not in SUFFIXES):
        known = ", ".join(SUFFIXES)
        raise UsageError(f"{path} holds no model file", hint=f"known suffixes: {known}")
    root = path if path.is_dir() else path.parent
    manifest = root / "manifest.json"
    return {
        "files": [_describe(file, root, sparsity) for file in files],
        "manifest": _manifest(manifest) if path.is_dir() and manifest.is_file() else None,
    }


def _manifest(path: Path) -> dict[str, Any]:
    from tightship.untrusted import strict_json

    return strict_json(path.read_bytes(), path.name)


def _describe(path: Path, root: Path, sparsity: bool) -> dict[str, Any]:
    container = SUFFIXES[path.suffix]
    metadata, tensors, weights = {"gguf": _gguf, "safetensors": _safetensors, "onnx": _onnx}[container](path, sparsity)
    stored = sum(t.nbytes for t in tensors)
    return {
        "path": path.relative_to(root).as_posix(),
        "container": container,
        "bytes": path.stat().st_size,
        "metadata": metadata,
        "weights": weights,
        "tensor_bytes": stored,
        "bits_per_weight": round(8 * stored / weights, 4) if weights else None,
        "storages": dict(sorted(Counter(t.storage for t in tensors).items())),
        "tensors": [asdict(t) for t in tensors],
    }


def _share_of_zeros(values: np.ndarray) -> float:
    return float(np.count_nonzero(values == 0) / max(values.size, 1))


def _gguf(path: Path, sparsity: bool) -> Found:
    from tightship.formats.gguf_file import read_gguf

    file = read_gguf(path)
    held = [
        Held(t.name, t.shape, t.type_name, t.nbytes, _share_of_zeros(t.weight().value()) if sparsity else None)
        for t in file.tensors.values()
    ]
    weights = sum(math.prod(t.shape) for t in held)
    return {key: _shown(value) for key, value in file.metadata.items()}, held, weights


def _safetensors(path: Path, sparsity: bool) -> Found:
    from tightship.formats.safetensors_file import read_header

    header = read_header(path)
    held = [
        Held(
            name,
            entry.shape,
            entry.dtype.safetensors,
            entry.end - entry.begin,
            _share_of_zeros(header.read(name)) if sparsity and entry.dtype.is_float else None,
        )
        for name, entry in header.entries.items()
    ]
    return dict(header.metadata), held, sum(_logical(header, name) for name in header.entries)


# What goes with a packed matrix and is not weights itself.
_BESIDE = (
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
)


def _logical(header: Any, name: str) -> int:
    """Weights that a stored tensor stands for: a packed matrix says its own shape, scales stand for none."""
    stem, _, last = name.rpartition(".")
    if last == "weight_packed" and f"{stem}.weight_shape" in header.entries:
        return math.prod(int(n) for n in header.read(f"{stem}.weight_shape"))
    return 0 if last in _BESIDE else math.prod(header.entries[name].shape)


def _onnx(path: Path, sparsity: bool) -> Found:
    from tightship.formats.onnx_file import read_onnx

    file = read_onnx(path)
    held = [
        Held(t.name, t.shape, t.dtype.upper(), t.nbytes, _share_of_zeros(t.read()) if sparsity else None)
        for t in file.initializers.values()
    ]
    return dict(file.metadata), held, file.weights


def _shown(value: Any) -> Any:
    """Long arrays and texts by their length: the vocabulary is not what one wants to read here."""
    if isinstance(value, list | tuple | np.ndarray) and len(value) > 16:
        return f"[{len(value)} entries]"
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str) and len(value) > 200:
        return f"{value[:80]}… [{len(value)} characters]"
    return value


def render(found: dict[str, Any], *, verbose: bool = False) -> str:
    """Plain text for people: one block a file; `verbose` lists every tensor."""
    blocks = ["\n".join(_render_file(file, verbose)) for file in found["files"]]
    return "\n\n".join(blocks)


def _render_file(file: dict[str, Any], verbose: bool) -> Iterator[str]:
    yield f"{file['path']}  {file['container']}  {size(file['bytes'])}"
    rate = f", {file['bits_per_weight']:.2f} bits per weight" if file["bits_per_weight"] else ""
    yield f"  {file['weights']:,} weights in {len(file['tensors'])} tensors{rate}"
    yield "  " + ", ".join(f"{count} {storage}" for storage, count in file["storages"].items())
    zeros = [(t["zeros"], math.prod(t["shape"])) for t in file["tensors"] if t["zeros"] is not None]
    if zeros:
        yield f"  exact zeros: {sum(z * n for z, n in zeros) / max(sum(n for _, n in zeros), 1):.2%}"
    if verbose:
        for key, value in sorted(file["metadata"].items()):
            yield f"  {key} = {json.dumps(value, ensure_ascii=False, default=str)}"
        rows = [
            [t["name"], " x ".join(map(str, t["shape"])), t["storage"], size(t["nbytes"])]
            + ([f"{t['zeros']:.1%}"] if t["zeros"] is not None else [])
            for t in file["tensors"]
        ]
        header = ["tensor", "shape", "stored as", "size", *(["zeros"] if zeros else [])]
        yield table(rows, header, right=frozenset({3, 4}))
