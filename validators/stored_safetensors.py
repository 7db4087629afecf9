"""safetensors by the safetensors package, quantized modules by decoders that are not ours.

| quant_method       | values are decoded by                                  |
|--------------------|--------------------------------------------------------|
| compressed-tensors | its own decompressors                                  |
| gptq, awq          | onnxruntime-genai's unpacking, and one product         |
| fp8                | transformers' own FP8 code; in cut tiles, torch's cast |

How a module is packed is read from the published config.json (`quantization_config`), not from the plan.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.validators import foreign_words
from tightship.validators.integers import Piece, pieces_of
from tightship.weights import Quantized

ADAPTER = "adapter/adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
_PACKED = (
    "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale", "weight",
    "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx",
)  # fmt: skip
_FACTORS = (".left", ".right")
_LORA = {".residual.right": "lora_A", ".residual.left": "lora_B"}
_MARKS = ("weight_packed", "weight_scale", "weight_scale_inv", "qweight")


class SafetensorsFiles:
    """The weights of one artifact, whole or in shards, under their on-disk names."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.directory = directory
        self.config = json.loads((directory / "config.json").read_text("utf-8"))
        self._files = {path.name: safe_open(path, "pt") for path in sorted(directory.glob("*.safetensors"))}
        self.places = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118
        adapter = directory / ADAPTER
        self.adapter = safe_open(adapter, "pt") if adapter.is_file() else None

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        pieces = {name: self._files[file].get_slice(name) for name, file in self.places.items()}
        if self.adapter is not None:
            names = self.adapter.keys()
            pieces |= {name.removeprefix(PREFIX): self.adapter.get_slice(name) for name in names}
        return {
            name: (str(piece.get_dtype()), tuple(int(n) for n in piece.get_shape())) for name, piece in pieces.items()
        }

    def factor(self, module: str, side: str) -> np.ndarray:
        """float32 of `lora_A` or `lora_B` of a module, as PEFT names them.

        Raises:
            Malformed: the adapter does not have it.
        """
        name = f"{PREFIX}{module}.{side}.weight"
        if self.adapter is None or name not in self.adapter.keys():  # noqa: SIM118
            raise Malformed(f"the adapter has no {side}", tensor=f"{module}.weight")
        return np.asarray(self.adapter.get_tensor(name).float().numpy())

    def weights(self) -> list[str]:
        """Names of weights: `X.weight` for a quantized module X, other tensors as they are called."""
        found = set()
        for name in self.places:
            module, _, suffix = name.rpartition(".")
            marked = any(f"{module}.{mark}" in self.places for mark in _MARKS)
            found.add(f"{module}.weight" if marked and suffix in _PACKED else name)
        return sorted(found)

    def decoded(self, key: str) -> np.ndarray:
        """float32 of a weight as it lies on disk.

        Raises:
            Malformed: there is no such tensor, or config.json does not say how it is packed.
        """
        tensors = self._tensors(key)
        section = self.config.get("quantization_config") or {}
        if not any(mark in tensors for mark in _MARKS):
            return np.asarray(tensors["weight"].float().numpy())
        if section.get("quant_method") == "fp8":
            return _fine_grained(tensors, section["weight_block_size"])
        if section.get("quant_method") in ("gptq", "awq"):
            arrays = {suffix: tensor.numpy() for suffix, tensor in tensors.items()}
            storage = section.get("checkpoint_format", section["quant_method"])
            return foreign_words.values(storage, arrays, section["bits"], max(section["group_size"], 0))
        return _decompress(tensors, self._scheme(key), key)

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
        if not section:
            return None
        module = key.removesuffix(".weight")
        if any(match_name(module, pattern) for pattern in section.get("ignore") or ()):
            return None
        for group in section.get("config_groups", {}).values():
            if any(target == "Linear" or match_name(module, target) for target in group["targets"]):
                return {**group, "format": group.get("format") or section.get("format")}
        return None


class SafetensorsStored(SafetensorsFiles):
    """See `stored.Stored`."""

    def __init__(self, checkpoint: Checkpoint, directory: Path) -> None:
        super().__init__(directory)
        self.checkpoint = checkpoint
        self.infos = checkpoint.infos()

    def value(self, name: str, part: str = "") -> np.ndarray:
        if part.startswith(".residual"):
            return self.factor(name.removesuffix(".weight"), _LORA[part])
        found = self.decoded(_place(name, part))
        if part in _FACTORS:
            return found
        info = self.infos.get(name)
        return found.T if info is not None and info.rule.transposed else found

    def changed(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def restored(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        weight = self._quantized.get(_place(name, part))
        return pieces_of(weight.layout, weight.read()) if isinstance(weight, Quantized) else None

    @functools.cached_property
    def _quantized(self) -> Mapping[str, Any]:
        """Quantized modules as our own reader understands the files."""
        from tightship.formats.quantized import read_quantized
        from tightship.formats.safetensors_file import read_header

        section = self.config.get("quantization_config")
        if not section:
            return {}
        headers = [read_header(self.directory / name) for name in self._files]
        return read_quantized(section, {n: header.dense(n) for header in headers for n in header.entries})[0]


def _place(name: str, part: str) -> str:
    """Where a part of a weight lies: a factor is a module within the module, a base is where the weight would be."""
    return f"{name.removesuffix('.weight')}{part}.weight" if part in _FACTORS else name


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


def _fine_grained(tensors: Mapping[str, Any], tile: list[int]) -> np.ndarray:
    """float32 of FP8 in tiles."""
    codes, scales = tensors["weight"], tensors["weight_scale_inv"]
    if codes.shape[0] % tile[0] or codes.shape[1] % tile[1]:  # transformers' reader knows whole tiles alone
        wide = scales.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
        return np.asarray((codes.float() * wide[: codes.shape[0], : codes.shape[1]]).numpy())
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found: Any = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    return np.asarray(found.float().numpy())
