"""Artifacts of the tiny Qwen2, and where each tensor lies in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.exporters import exporter_for
from tightship.formats.gguf_file import read_gguf
from tightship.formats.layouts import parse_layout
from tightship.formats.safetensors_file import read_header
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target, TargetPlan, no_progress
from tightship.weights import Quantized


@pytest.fixture(scope="session")
def original(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


def quantized(checkpoint: Checkpoint, word: str) -> Checkpoint:
    """Every linear of the blocks rounded to a layout."""
    layout = parse_layout(word)
    changed = {}
    for info in checkpoint.linears():
        weight = checkpoint.resolve(info.name).value()
        changed[info.name] = Quantized.of(layout, layout.quantize(weight))
    return checkpoint.with_weights(changed)


@dataclass
class Artifact:
    """One exported target. `compressed` is what it must say."""

    compressed: Checkpoint
    plan: TargetPlan
    directory: Path
    exported: Exported

    @property
    def container(self) -> str:
        return self.plan.target.container

    def place(self, name: str) -> tuple[Path, int, int]:
        """File, offset and size of the tensor that is called `name` in the file."""
        path = self.directory / self.exported.main
        if self.container == "gguf":
            tensor = read_gguf(path).tensors[name]
            return path, tensor.offset, tensor.nbytes
        if self.container == "safetensors":
            entry = read_header(path).entries[name]
            return path, entry.begin, entry.end - entry.begin
        import onnx

        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        data = {entry.key: entry.value for entry in tensor.external_data}
        if data:
            return self.directory / data["location"], int(data["offset"]), int(data["length"])
        assert path.read_bytes().count(tensor.raw_data) == 1
        return path, path.read_bytes().index(tensor.raw_data), len(tensor.raw_data)

    def edit(self, name: str, change: Callable[[np.ndarray], np.ndarray], dtype: Any = np.uint8) -> None:
        """Rewrite a tensor's bytes in place; `change` maps its 1-D array to one of the same size."""
        path, offset, size = self.place(name)
        data = bytearray(path.read_bytes())
        array = np.frombuffer(bytes(data[offset : offset + size]), dtype).copy()
        changed = np.ascontiguousarray(change(array)).astype(dtype).tobytes()
        assert len(changed) == size
        assert changed != bytes(data[offset : offset + size])
        data[offset : offset + size] = changed
        path.write_bytes(data)


@pytest.fixture(scope="session")
def exports(
    original: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str | None, str | None], Artifact]:
    """(container, layout, profile) -> an artifact of the tiny Qwen2, made once; not to be changed."""
    from tightship.validators.parity import judge

    made: dict[tuple[str, str | None, str | None], Artifact] = {}

    def make(container: str, layout: str | None = None, profile: str | None = None) -> Artifact:
        key = (container, layout, profile)
        if key not in made:
            checkpoint = quantized(original, layout) if layout else original
            exporter = exporter_for(container, **({"judge": judge} if container == "onnx" else {}))
            plan = exporter.plan(checkpoint, Target(container, None, {"profile": profile} if profile else {}))
            folder = tmp_path_factory.mktemp("artifact")
            made[key] = Artifact(checkpoint, plan, folder, exporter.export(checkpoint, plan, folder, no_progress))
        return made[key]

    return make


@pytest.fixture
def staged(exports: Callable[..., Artifact], tmp_path: Path) -> Callable[..., Artifact]:
    """As `exports`, a copy that a test may damage."""

    def make(container: str, layout: str | None = None, profile: str | None = None) -> Artifact:
        whole = exports(container, layout, profile)
        folder = tmp_path / f"{container}-{layout}-{profile}"
        shutil.copytree(whole.directory, folder)
        return Artifact(whole.compressed, whole.plan, folder, whole.exported)

    return make
