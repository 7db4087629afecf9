"""One artifact as rules look at it: parsed small files and headers; data only where a rule asks for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightship.exporters.gguf_lora import NO_MODELS
from tightship.untrusted import strict_json

_ENDINGS = {".gguf": "gguf", ".safetensors": "safetensors", ".onnx": "onnx"}


@dataclass(frozen=True)
class Artifact:
    """A directory with the model files of one container."""

    directory: Path
    container: str

    @classmethod
    def of(cls, directory: Path) -> Artifact | None:
        """The artifact in a directory, or None where no model file lies there."""
        found = {_ENDINGS[p.suffix] for p in directory.iterdir() if p.suffix in _ENDINGS}
        return cls(directory, min(found)) if found else None

    @property
    def name(self) -> str:
        return self.directory.name

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where there is none."""
        return self.json("config.json")

    @property
    def quantization(self) -> dict[str, Any]:
        """Its quantization section; empty for floats."""
        return self.config.get("quantization_config") or {}

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """config_groups of compressed-tensors."""
        return self.quantization.get("config_groups") or {}

    @functools.cached_property
    def headers(self) -> list[Any]:
        """Checked headers of the safetensors files."""
        from tightship.formats.safetensors_file import read_header

        return [read_header(path) for path in sorted(self.directory.glob("*.safetensors"))]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each safetensors tensor."""
        return {name: entry.shape for header in self.headers for name, entry in header.entries.items()}

    def modules(self, suffix: str) -> list[str]:
        """Modules with a tensor `X.suffix`."""
        return sorted(name.removesuffix(f".{suffix}") for name in self.shapes if name.endswith(f".{suffix}"))

    def read(self, name: str) -> np.ndarray:
        """The data of a safetensors tensor."""
        header = next(header for header in self.headers if name in header.entries)
        data: np.ndarray = header.read(name)
        return data

    @functools.cached_property
    def gguf(self) -> Any:
        """The GGUF file, its shards joined."""
        from tightship.formats.gguf_shards import read_shards

        return read_shards(min(set(self.directory.glob("*.gguf")) - {self.directory / name for name in NO_MODELS}))

    @functools.cached_property
    def graphs(self) -> list[Any]:
        """The ONNX graphs, an encoder's and a decoder's where there are two, without their data."""
        import onnx

        return [onnx.load(path, load_external_data=False).graph for path in sorted(self.directory.glob("*.onnx"))]

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file; empty where there is none."""
        path = self.directory / name
        return strict_json(path.read_bytes(), name) if path.is_file() else {}
