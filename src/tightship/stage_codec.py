"""A checkpoint as the difference from its parent: only changed weights are written, one file each.

A weight's description in `stage.json`:

| kind      | fields                     | arrays in its file              |
|-----------|----------------------------|---------------------------------|
| parent    | name                       | none: the parent's weight `name` |
| alias     | owner                      | none                            |
| dense     | dtype, shape               | `data`                          |
| quantized | layout, shape              | the layout's arrays             |
| factored  | left, right                | `left.` and `right.` before     |
| sum       | base, residual             | `base.` and `residual.` before  |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tightship.activations import Activations
from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint
from tightship.dtypes import of_array
from tightship.durable import flush_file, sha256_file
from tightship.layout import Layout
from tightship.weights import Alias, Dense, Factored, Quantized, Stored, Sum, Weight


def save_stage(folder: Path, parent: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """Write what `result` changed below `folder`; its description for `stage.json`."""
    parents = {id(weight): name for name, weight in parent.weights.items()}
    (folder / "weights").mkdir()
    files: dict[str, str] = {}
    weights: dict[str, Any] = {}
    for number, (name, weight) in enumerate(result.weights.items()):
        known = parents.get(id(weight))
        if known is not None and result.weights[name] is parent.weights[known]:
            weights[name] = {"kind": "parent", "name": known}
        elif isinstance(weight, Alias):
            weights[name] = {"kind": "alias", "owner": weight.owner}
        else:
            file = f"weights/{number}.safetensors"
            weights[name] = {**_describe(weight), "file": file}
            files[file] = write_arrays(folder / file, dict(_arrays(weight, "")))
    blobs = _save_blobs(folder, parent, result, files)
    return {
        "config": dict(result.config),
        "weights": weights,
        "activations": {module: asdict(scheme) for module, scheme in result.activations.items()},
        "history": [dict(entry) for entry in result.history[len(parent.history) :]],
        "files": files,
        **blobs,
    }


def load_stage(folder: Path, body: Mapping[str, Any], parent: Checkpoint) -> Checkpoint:
    """The checkpoint that `save_stage` described in `body`; weights are read from the stage when asked for."""
    weights = {name: _load(folder, entry, parent) for name, entry in body["weights"].items()}
    blobs = {
        field: {name: (folder / file).read_bytes() for name, file in body[field].items()}
        for field in ("changed_files", "adapters")
    }
    same = body["config"].get("architectures") == parent.config.get("architectures")
    return parent.replace(
        config=body["config"],
        architecture=parent.architecture if same else architecture_for(body["config"]),
        weights=weights,
        activations={module: Activations(**scheme) for module, scheme in body["activations"].items()},
        history=(*parent.history, *body["history"]),
        files={**{n: parent.files[n] for n in body["kept_files"]}, **blobs["changed_files"]},
        adapters=blobs["adapters"],
    )


def _save_blobs(folder: Path, parent: Checkpoint, result: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
    (folder / "blobs").mkdir()
    kept = sorted(n for n, data in result.files.items() if parent.files.get(n) == data)
    groups = {"changed_files": {n: d for n, d in result.files.items() if n not in kept}, "adapters": result.adapters}
    saved: dict[str, Any] = {"kept_files": kept}
    for field, blobs in groups.items():
        saved[field] = {}
        for name, data in sorted(blobs.items()):
            file = f"blobs/{len(files)}"
            (folder / file).write_bytes(data)
            files[file] = sha256_file(folder / file)
            saved[field][name] = file
    return saved


def _describe(weight: Stored) -> dict[str, Any]:
    if isinstance(weight, Dense):
        return {"kind": "dense", "dtype": weight.dtype, "shape": list(weight.shape)}
    if isinstance(weight, Quantized):
        return {"kind": "quantized", "layout": weight.layout.to_json(), "shape": list(weight.shape)}
    if isinstance(weight, Factored):
        return {"kind": "factored", "left": _describe(weight.left), "right": _describe(weight.right)}
    return {"kind": "sum", "base": _describe(weight.base), "residual": _describe(weight.residual)}


def _arrays(weight: Stored, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(weight, Dense):
        yield f"{prefix}data", weight.read()
    elif isinstance(weight, Quantized):
        yield from ((prefix + key, array) for key, array in weight.read().items())
    elif isinstance(weight, Factored):
        yield from _arrays(weight.left, f"{prefix}left.")
        yield from _arrays(weight.right, f"{prefix}right.")
    else:
        yield from _arrays(weight.base, f"{prefix}base.")
        yield from _arrays(weight.residual, f"{prefix}residual.")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays of one weight as a safetensors file; its sha256."""
    from tightship.formats.safetensors_file import SafetensorsWriter, Spec

    specs = {name: Spec(of_array(array), array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name in writer.order:
            writer.write(name, arrays[name])
    return writer.sha256


def write_whole(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as a safetensors file that is there whole or, after a crash, as it was before."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # what a kill left
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(partial, arrays)
    flush_file(partial)
    partial.replace(path)
    flush_file(path.parent)


def _load(folder: Path, entry: Mapping[str, Any], parent: Checkpoint) -> Weight:
    if entry["kind"] == "parent":
        return parent.weights[entry["name"]]
    if entry["kind"] == "alias":
        return Alias(entry["owner"])
    return _stored(folder / entry["file"], entry, "")


def _stored(path: Path, entry: Mapping[str, Any], prefix: str) -> Any:
    kind = entry["kind"]
    if kind == "dense":
        return Dense(
            tuple(entry["shape"]), entry["dtype"], lambda: read_arrays(path, [f"{prefix}data"])[f"{prefix}data"]
        )
    if kind == "quantized":
        import tightship.formats.layouts  # noqa: F401 - registers the layouts

        layout, (rows, cols) = Layout.from_json(entry["layout"]), entry["shape"]
        keys = [prefix + key for key in layout.array_specs((rows, cols))]
        return Quantized(
            layout, (rows, cols), lambda: {k.removeprefix(prefix): v for k, v in read_arrays(path, keys).items()}
        )
    first, second = ("left", "right") if kind == "factored" else ("base", "residual")
    parts = [_stored(path, entry[part], f"{prefix}{part}.") for part in (first, second)]
    return Factored(*parts) if kind == "factored" else Sum(*parts)


def read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named arrays of a file, read now."""
    from tightship.formats.safetensors_file import read_header

    header = read_header(path)
    return {name: header.read(name) for name in names}
