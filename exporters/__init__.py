"""Containers by name. Adding one: a module with an `Exporter`, and a line here."""

from __future__ import annotations

import importlib
from typing import Any

from tightship.errors import UsageError
from tightship.target import CONTAINERS, Exporter

_EXPORTERS = {
    "gguf": ("tightship.exporters.to_gguf", "GgufExporter"),
    "onnx": ("tightship.exporters.to_onnx", "OnnxExporter"),
    "safetensors": ("tightship.exporters.to_safetensors", "SafetensorsExporter"),
}


def exporter_for(container: str, **injected: Any) -> Exporter:
    """The exporter of a container; `injected` is passed to its constructor (the parity judge for ONNX).

    Raises:
        UsageError: no such container.
    """
    if container not in _EXPORTERS:
        raise UsageError(f"container {container!r} is unknown; known: {', '.join(CONTAINERS)}")
    module, name = _EXPORTERS[container]
    return getattr(importlib.import_module(module), name)(**injected)
