"""safetensors by the safetensors package, packed tensors by compressed-tensors' own decompressors.

How a module is packed is read from the published config.json (`quantization_config`), not from the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import unpack_quantized, unplain_quantized
from tightship.validators.integers import Piece, pieces_of

INDEX = "model.safetensors.index.json"
_PACKED = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale", "weight")


class SafetensorsStored:
    """See `stored.Stored`. `directory` holds one artifact, whole or in shards."""

    def __init__(self, checkpoint: Checkpoint, directory: Path) -> None:
        from safetensors import safe_open

        self.checkpoint = checkpoint
        self.infos = checkpoint.infos()
        self.config = json.loads((directory / "config.json").read_text("utf-8"))
        self._files = {path.name: safe_open(path, "pt") for path in sorted(directory.glob("*.safetensors"))}
        self.places = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        found = {}
        for name, file in self.places.items():
            piece = self._files[file].get_slice(name)
            found[name] = (str(piece.get_dtype()), tuple(int(n) for n in piece.get_shape()))
        return found

    def value(self, name: str, part: str = "") -> np.ndarray:
        key = f"{name}{part}"
        tensors = self._tensors(key)
        scheme = self._scheme(key)
        if key in self.places and scheme is None:
            found = np.asarray(tensors["weight"].float().numpy())
        else:
            found = _decompress(tensors, scheme, key)
        info = self.infos.get(name)
        return found.T if info is not None and info.rule.transposed else found

    def changed(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def restored(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        key = f"{name}{part}"
        scheme = self._scheme(key)
        if scheme is None:
            return None
        weights = scheme["weights"]
        arrays = {suffix: tensor.numpy() for suffix, tensor in self._tensors(key).items()}
        layout = Affine(
            bits=weights["num_bits"],
            group_size=weights.get("group_size") or 0,
            symmetric=weights["symmetric"],
            scale_dtype="f32",
        )
        arrays["weight_scale"] = arrays["weight_scale"].astype(np.float32)
        unpack = unpack_quantized if "weight_packed" in arrays else unplain_quantized
        return pieces_of(layout, unpack(layout, arrays))

    def _tensors(self, key: str) -> dict[str, Any]:
        """Tensors of a weight by their suffix; `weight` where it is stored under its own name."""
        prefix = key.removesuffix("weight")
        names = {suffix: f"{prefix}{suffix}" for suffix in _PACKED} if key.endswith("weight") else {"weight": key}
        found = {s: self._files[self.places[n]].get_tensor(n) for s, n in names.items() if n in self.places}
        if not found:
            raise Malformed(f"the safetensors files hold no tensor of {key}", tensor=key)
        return found

    def _scheme(self, key: str) -> dict[str, Any] | None:
        """The config group that compressed-tensors applies to this weight, None where it stays float."""
        from compressed_tensors.utils.match import match_name

        section = self.config.get("quantization_config")
        packed = f"{key}_packed" in self.places or f"{key}_scale" in self.places
        if not section or not packed:
            return None
        module = key.removesuffix(".weight")
        if any(match_name(module, pattern) for pattern in section.get("ignore") or ()):
            return None
        for group in section.get("config_groups", {}).values():
            if any(target == "Linear" or match_name(module, target) for target in group["targets"]):
                return {**group, "format": group.get("format") or section.get("format")}
        return None


def _decompress(tensors: Mapping[str, Any], scheme: Mapping[str, Any] | None, key: str) -> np.ndarray:
    """float32 of a packed module.

    Raises:
        Malformed: config.json says nothing about this module, so no client would decode it.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if scheme is None:
        raise Malformed("is packed, and no group of quantization_config in config.json says how", tensor=key)
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    fields = {k: v for k, v in scheme.items() if k in ("targets", "weights", "input_activations", "output_activations")}
    found = compressor.decompress(dict(tensors), QuantizationScheme(**fields))
    return np.asarray(found["weight"].float().numpy())
