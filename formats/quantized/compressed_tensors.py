"""compressed-tensors checkpoints: `config_groups` say how, the tensors of a module say that it is quantized.

A module belongs to the first group one of whose targets is its name, a `re:` expression that matches it from its
beginning, or the class `Linear`. Byte tables: `formats/packings/compressed_tensors.py`, `compressed_floats.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.activations import SCHEMES, Activations, Scheme
from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.float8 import MXFP8, Float8
from tightship.formats.layouts.mx import MXFP4, ScaledNVFP4
from tightship.formats.packings.compressed_tensors import unpack_codes
from tightship.formats.packings.modules import PACKINGS
from tightship.formats.quantized.modules import Found, Modules, affine, by_column, group_size_of, quantized
from tightship.layout import Layout
from tightship.weights import Dense, Quantized

_SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
_LINEAR = ("Linear", "ParallelLMHead")
_CACHE = ("k_scale", "v_scale")


def read(section: Mapping[str, Any], modules: Modules) -> Found:
    """See `formats.quantized.read_quantized`."""
    if (section.get("sparsity_config") or {}).get("targets"):
        raise Unsupported(
            "sparse compressed-tensors checkpoints", hint="its library dropped them after 0.14; expand it"
        )
    weights: dict[str, Quantized] = {}
    activations: dict[str, Activations] = {}
    for module in sorted({*modules.names("weight_packed"), *modules.names("weight_scale")}):
        group = _group(module, section)
        weights[f"{module}.weight"] = _module(module, group, modules)
        inputs = group.get("input_activations")
        if inputs:
            activations[module] = _inputs(module, inputs, modules)
    for suffix in _CACHE:
        for module in modules.names(suffix):
            scale = modules.need(module, suffix).value().reshape(-1)
            activations[f"{module}.{suffix}"] = Activations("fp8-static", float(scale[0]))
    return weights, activations


def _group(module: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a quantized module, with its format.

    Raises:
        Malformed: no group speaks of it.
    """
    for group in (section.get("config_groups") or {}).values():
        if any(_matches(module, str(target)) for target in group.get("targets") or ()):
            return {**group, "format": group.get("format") or section.get("format")}
    raise Malformed("the module is quantized, and no group of quantization_config speaks of it", tensor=module)


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module or target in _LINEAR


def _module(module: str, group: Mapping[str, Any], modules: Modules) -> Quantized:
    name, said = f"{module}.weight", group.get("weights") or {}
    order = modules.take(module, "weight_g_idx")
    tensors = modules.take(module, *_SUFFIXES)
    if said.get("type", "int") == "int":
        weight = _integers(name, said, group["format"], tensors)
        return by_column(name, weight, _groups(name, order["weight_g_idx"], weight)) if order else weight
    layout, storage = _float_layout(name, said)
    packing = PACKINGS[storage]
    if packing.main not in tensors or len(tensors[packing.main].shape) != 2:
        raise Malformed(f"{storage} needs a matrix {packing.main}", tensor=name)
    rows, cols = tensors[packing.main].shape
    shape = (rows, 2 * cols if packing.main == "weight_packed" else cols)
    if isinstance(layout, Float8) and not layout.group_size and layout.tile_rows == 0:
        tensors["weight_scale"] = _reshaped(tensors["weight_scale"], (1,), name)
    if isinstance(layout, ScaledNVFP4):
        tensors["weight_global_scale"] = _reshaped(tensors["weight_global_scale"], (1,), name)
    return quantized(name, layout, shape, packing, tensors)


def _groups(name: str, order: Dense, weight: Quantized) -> np.ndarray:
    """(cols,) the group of every column (actorder group); -1 throughout says that they are in their own order.

    Raises:
        Malformed: a group that is not there, or not one for each column.
    """
    found, count = order.read(), weight.layout.blocks_per_row(weight.shape[1])
    if found.shape == (weight.shape[1],) and (found == -1).all():
        return np.arange(weight.shape[1]) // (weight.layout.block or weight.shape[1])
    if found.shape != (weight.shape[1],) or found.min() < 0 or found.max() >= count:
        raise Malformed(f"weight_g_idx of shape {found.shape} does not name {count} groups", tensor=name)
    return found


def _float_layout(name: str, said: Mapping[str, Any]) -> tuple[Layout, str]:
    """Layout and packing of FP8 and FP4 weights.

    Raises:
        Unsupported: other widths, or groups that no layout here has.
    """
    bits, strategy, group = said.get("num_bits"), said.get("strategy"), said.get("group_size")
    if bits == 4 and group in (16, 32):
        return (MXFP4(), "mxfp4-pack-quantized") if group == 32 else (ScaledNVFP4(), "nvfp4-pack-quantized")
    if bits == 8 and str(said.get("scale_dtype")) in ("torch.uint8", "uint8"):
        return MXFP8(), "mxfp8-quantized"
    if bits == 8 and strategy == "block":
        rows, cols = said["block_structure"]
        return Float8(tile_rows=rows, group_size=cols), "float-quantized"
    if bits == 8:
        return Float8(
            tile_rows=0 if strategy == "tensor" else 1, group_size=group_size_of(group, name)
        ), "float-quantized"
    raise Unsupported(f"compressed-tensors floats of {bits} bits in groups of {group}", tensor=name)


def _integers(name: str, said: Mapping[str, Any], storage: str | None, tensors: dict[str, Dense]) -> Quantized:
    if storage not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise Unsupported(f"compressed-tensors integers in the format {storage!r}", tensor=name)
    bits, symmetric = int(said.get("num_bits", 8)), bool(said.get("symmetric", True))
    packing = PACKINGS["pack-quantized" if storage == "pack-quantized" else "int-quantized"]
    missing = {packing.main, "weight_scale"} - tensors.keys()
    if missing:
        raise Malformed(f"{storage} needs {min(missing)}", tensor=name)
    if storage == "pack-quantized":
        rows, cols = (
            (int(n) for n in tensors["weight_shape"].read().reshape(-1)) if "weight_shape" in tensors else (0, 0)
        )
    else:
        rows, cols = tensors["weight"].shape
    if said.get("strategy") == "tensor":
        tensors["weight_scale"] = _repeated(tensors["weight_scale"], rows)
        if "weight_zero_point" in tensors:
            tensors["weight_zero_point"] = _repeated(tensors["weight_zero_point"], rows)
    scale = tensors["weight_scale"].read()
    zero = None
    if not symmetric:
        if "weight_zero_point" not in tensors:
            raise Malformed("asymmetric, and there is no weight_zero_point", tensor=name)
        stored = tensors["weight_zero_point"].read()
        zero = unpack_codes(np.ascontiguousarray(stored.T), bits, rows).T if stored.dtype == np.int32 else stored
    layout = affine(bits, group_size_of(said.get("group_size"), name), scale, zero, symmetric=symmetric)
    return quantized(name, layout, (rows, cols), packing, tensors)


def _reshaped(tensor: Dense, shape: tuple[int, ...], name: str) -> Dense:
    if int(np.prod(tensor.shape)) != int(np.prod(shape)):
        raise Malformed(f"one scale was expected, found shape {tensor.shape}", tensor=name)
    return dataclasses.replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape))


def _repeated(tensor: Dense, rows: int) -> Dense:
    """One value for the tensor as one a row."""
    return Dense((rows, 1), tensor.dtype, lambda: np.repeat(tensor.read().reshape(1, 1), rows, axis=0))


def _inputs(module: str, said: Mapping[str, Any], modules: Modules) -> Activations:
    """The word for a group's `input_activations`, with static scales from the file.

    Raises:
        Unsupported: none of the words means this.
    """
    dynamic, group = said.get("dynamic", False), said.get("group_size") or 0
    kind = "int8" if said.get("type", "int") == "int" else f"fp{said.get('num_bits', 8)}"
    grouped = said.get("strategy") in ("group", "tensor_group")
    wanted = Scheme(
        kind,  # type: ignore[arg-type]  # an unknown kind matches no scheme
        "token" if grouped or said.get("strategy") == "token" else "tensor",
        static=dynamic is not True,
        symmetric=bool(said.get("symmetric", True)),
        group=group if grouped else 0,
    )
    word = next((word for word, scheme in SCHEMES.items() if scheme == wanted), None)
    if word is None or said.get("num_bits", 8) not in (4, 8):
        raise Unsupported(f"input activations {dict(said)} are not mapped", tensor=module)
    given = modules.take(module, "input_scale", "input_zero_point", "input_global_scale")
    if not wanted.static:
        return Activations(word)
    scale = given.get("input_global_scale" if kind == "fp4" else "input_scale")
    if scale is None:
        raise Malformed(f"its inputs are {word}, and their scale is missing", tensor=module)
    zero = given.get("input_zero_point") if not wanted.symmetric else None
    value = float(scale.value().reshape(-1)[0])
    return Activations(word, value, None if zero is None else int(zero.read().reshape(-1)[0]))
