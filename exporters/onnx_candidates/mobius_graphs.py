"""Graphs of mobius-onnx: built declaratively in a fraction of a second, never trusted.

Its own renaming and splitting of tensors (`preprocess_weights`) is run once on tensors without data; which view of
which stored tensor each initializer is, is read off their storages and strides.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import inline_functions, lower_opset, name_contract, quiet
from tightship.exporters.onnx_candidates.skeleton import Feed, Skeleton
from tightship.exporters.onnx_candidates.tensor_views import meta_tensors, view_of

if TYPE_CHECKING:
    import torch

_CONFIG_KEYS_LEFT_OUT = frozenset({"auto_map", "quantization_config"})


class MobiusCandidate:
    """`mobius.build` with the portable provider and no weights."""

    rewrites = ("functions inlined", "opset 23", "names of the contract")

    @property
    def source(self) -> str:
        try:
            return f"mobius-onnx {importlib.metadata.version('mobius-onnx')}"
        except importlib.metadata.PackageNotFoundError:
            return "mobius-onnx (not installed)"

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        package, module = _build(config)
        if list(package) != ["model"]:
            raise Unsupported(f"mobius makes {len(package)} graphs of this model: {', '.join(package)}")
        model = package["model"]
        stored = meta_tensors(architecture, config, shapes)
        prepared = module.preprocess_weights(dict(stored)) if hasattr(module, "preprocess_weights") else stored
        feeds = {
            name: _feed(name, value, prepared, stored)
            for name, value in model.graph.initializers.items()
            if value.const_value is None
        }
        inline_functions(model)
        lower_opset(model)
        name_contract(model)
        return Skeleton(model, feeds)


def _build(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The package and the module it was built from, so that the module's renaming can be asked."""
    import mobius

    made: list[Any] = []
    kind = mobius.registry.get(config["model_type"])

    def construct(resolved: Any) -> Any:
        made.append(kind(resolved))
        return made[-1]

    construct.config_class = getattr(kind, "config_class", None)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        kept = {k: v for k, v in config.items() if k not in _CONFIG_KEYS_LEFT_OUT}
        (Path(folder) / "config.json").write_text(json.dumps(kept))
        with quiet("mobius", "onnx_ir", "onnxscript"):
            package = mobius.build(folder, module_class=construct, dtype="f32", load_weights=False)
    return package, made[-1]


def _feed(name: str, value: Any, prepared: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> Feed:
    if name not in prepared:
        raise Unsupported(f"mobius wants a tensor {name} that the checkpoint does not have")
    tensor = prepared[name]
    expected = tuple(int(d) for d in value.shape)
    if tuple(tensor.shape) != expected:
        raise Unsupported(f"mobius wants {name} as {expected}, the checkpoint gives {tuple(tensor.shape)}")
    return view_of(name, tensor, stored)
