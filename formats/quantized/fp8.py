"""FP8 checkpoints of the `fp8` method: DeepSeek's and transformers' tiles, and vLLM's one scale for the tensor.

| tensor                       | meaning                                                          |
|------------------------------|------------------------------------------------------------------|
| X.weight                     | F8_E4M3 codes                                                    |
| X.weight_scale_inv           | one scale a tile of weight_block_size                            |
| X.weight_scale               | one scale for the tensor                                         |
| X.input_scale, X.activation_scale | with activation_scheme static: of the inputs                |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightship.activations import Activations
from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.float8 import Float8
from tightship.formats.packings.modules import PACKINGS
from tightship.formats.quantized.modules import Found, Modules, quantized


def read(section: Mapping[str, Any], modules: Modules) -> Found:
    """See `formats.quantized.read_quantized`."""
    tile = section.get("weight_block_size")
    if tile is not None and not (isinstance(tile, list) and len(tile) == 2 and all(isinstance(n, int) for n in tile)):
        raise Unsupported(f"a weight_block_size of {tile!r}")
    static = section.get("activation_scheme", "dynamic") == "static"
    weights, activations = {}, {}
    for module in sorted({*modules.names("weight_scale_inv"), *modules.names("weight_scale")}):
        name = f"{module}.weight"
        codes = modules.need(module, "weight")
        scales = modules.take(module, "weight_scale_inv", "weight_scale")
        if codes.dtype != "f8_e4m3" or len(codes.shape) != 2:
            raise Malformed(f"it has scales, and is {codes.dtype} of shape {codes.shape}", tensor=name)
        shape = (codes.shape[0], codes.shape[1])
        scale = next(iter(scales.values()))
        if len(scale.shape) == 2 and tile is not None:
            layout, storage, suffix = Float8(tile_rows=tile[0], group_size=tile[1]), "fp8", "weight_scale_inv"
        else:
            layout, storage, suffix = Float8(), "float-quantized", "weight_scale"
            scale = _one(scale, name)
        weights[name] = quantized(name, layout, shape, PACKINGS[storage], {"weight": codes, suffix: scale})
        activations[module] = _inputs(module, modules, tile if layout.group_size else None, static=static)
    return weights, activations


def _one(scale: Any, name: str) -> Any:
    """A scalar as an array of one element."""
    import dataclasses

    if scale.shape not in ((), (1,), (1, 1)):
        raise Malformed(f"one scale for the tensor was expected, found shape {scale.shape}", tensor=name)
    return dataclasses.replace(scale, shape=(1,), read=lambda: scale.read().reshape(1))


def _inputs(module: str, modules: Modules, tile: list[int] | None, *, static: bool) -> Activations:
    given = modules.take(module, "input_scale", "activation_scale")
    if not static:
        return Activations("fp8-dynamic-g128" if tile and tile[1] == 128 else "fp8-dynamic")
    if not given:
        raise Malformed("activation_scheme is static, and there is no scale of the inputs", tensor=module)
    return Activations("fp8-static", float(next(iter(given.values())).value().reshape(-1)[0]))
