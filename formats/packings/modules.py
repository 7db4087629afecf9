"""How the tensors of one linear module in a safetensors file hold a matrix: one `ModulePacking` a storage.

| storage              | layouts                | tensors                  | byte table            |
|----------------------|------------------------|--------------------------|-----------------------|
| pack-quantized       | affine                 | weight_packed, ...       | compressed_tensors.py |
| int-quantized        | affine                 | weight, weight_scale ... | compressed_tensors.py |
| float-quantized      | fp8                    | weight, weight_scale     | compressed_floats.py  |
| mxfp8-quantized      | mxfp8                  | weight, weight_scale     | compressed_floats.py  |
| mxfp4-pack-quantized | mxfp4                  | weight_packed, ...       | compressed_floats.py  |
| nvfp4-pack-quantized | nvfp4, nvfp4-scaled    | weight_packed, ...       | compressed_floats.py  |
| fp8                  | fp8 in tiles           | weight, weight_scale_inv | compressed_floats.py  |
| gptq, gptq_v2, awq   | affine                 | qweight, ...             | gptq.py               |

compressed-tensors' naive-quantized is int-quantized or float-quantized under another word: weights alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.errors import Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.layouts.float8 import MXFP8, Float8
from tightship.formats.layouts.mx import MXFP4, NVFP4
from tightship.formats.packings import compressed_floats as floats
from tightship.formats.packings import compressed_tensors as integers
from tightship.formats.packings import gptq
from tightship.layout import Arrays, ArraySpec, Layout

_FP8_SUFFIX = "weight_scale_inv"


@dataclass(frozen=True)
class ModulePacking:
    """Pure functions between logical arrays and a module's tensors, by suffix. They take the layout first.

    Attributes:
        storage: the format's own word.
        layouts: kinds of layout that it carries.
        main: suffix of the tensor that holds the codes.
    """

    storage: str
    layouts: tuple[type[Layout], ...]
    main: str
    specs: Callable[[Any, tuple[int, int]], dict[str, ArraySpec]]
    pack: Callable[[Any, Mapping[str, np.ndarray]], Arrays]
    unpack: Callable[[Any, Mapping[str, np.ndarray]], Arrays]

    def check(self, layout: Layout, shape: tuple[int, int]) -> dict[str, ArraySpec]:
        """The tensors of a matrix, without data.

        Raises:
            Unsupported: the storage cannot say this layout or shape.
        """
        if not isinstance(layout, self.layouts):
            raise Unsupported(f"{self.storage} has no layout {layout.name}")
        return self.specs(layout, shape)


def _fine_grained(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of float-quantized under the names of the `fp8` method."""
    return {_FP8_SUFFIX if key == "weight_scale" else key: value for key, value in tensors.items()}


def _fine_grained_specs(layout: Float8, shape: tuple[int, int]) -> dict[str, ArraySpec]:
    if not (layout.tile_rows and layout.group_size):
        raise Unsupported(f"the fp8 method stores tiles, found {layout.name}", hint="use fp8-e4m3-block")
    return _fine_grained(floats.float8_specs(layout, shape))


def _from_fine_grained(layout: Float8, tensors: Mapping[str, np.ndarray]) -> Arrays:
    return floats.unpack_float8(layout, {"weight": tensors["weight"], "weight_scale": tensors[_FP8_SUFFIX]})


_PACKED = ModulePacking(
    "pack-quantized", (Affine,), "weight_packed",
    integers.packed_specs, integers.pack_quantized, integers.unpack_quantized,
)  # fmt: skip
_PLAIN = functools.partial(
    ModulePacking, layouts=(Affine,), main="weight",
    specs=integers.plain_specs, pack=integers.plain_quantized, unpack=integers.unplain_quantized,
)  # fmt: skip
_FLOAT8 = functools.partial(
    ModulePacking, main="weight", specs=floats.float8_specs, pack=floats.pack_float8, unpack=floats.unpack_float8
)
_FLOAT4 = functools.partial(
    ModulePacking, main="weight_packed", specs=floats.fp4_specs, pack=floats.pack_fp4, unpack=floats.unpack_fp4
)


def _gptq(storage: str, *, v2: bool) -> ModulePacking:
    pack, unpack = functools.partial(gptq.pack_gptq, v2=v2), functools.partial(gptq.unpack_gptq, v2=v2)
    return ModulePacking(storage, (Affine,), "qweight", gptq.gptq_specs, pack, unpack)


_FINE_GRAINED = ModulePacking(
    "fp8", (Float8,), "weight", _fine_grained_specs,
    lambda layout, arrays: _fine_grained(floats.pack_float8(layout, arrays)), _from_fine_grained,
)  # fmt: skip

PACKINGS: Mapping[str, ModulePacking] = {
    packing.storage: packing
    for packing in (
        _PACKED,
        _PLAIN("int-quantized"),
        _FLOAT8("float-quantized", layouts=(Float8,)),
        _FLOAT8("mxfp8-quantized", layouts=(MXFP8,)),
        _FLOAT4("mxfp4-pack-quantized", layouts=(MXFP4,)),
        _FLOAT4("nvfp4-pack-quantized", layouts=(NVFP4,)),
        _FINE_GRAINED,
        _gptq("gptq", v2=False),
        _gptq("gptq_v2", v2=True),
        ModulePacking("awq", (Affine,), "qweight", gptq.awq_specs, gptq.pack_awq, gptq.unpack_awq),
    )
}
