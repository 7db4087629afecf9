"""`quantization_config` of the methods beside compressed-tensors: GPTQ, AWQ, and fine-grained FP8.

| method | config.json says                                    | linears that stay in float                  |
|--------|-----------------------------------------------------|---------------------------------------------|
| gptq   | bits, group_size, sym, desc_act, checkpoint_format  | `dynamic`: `-:^NAME$`                       |
| awq    | bits, group_size, zero_point, version               | `modules_to_not_convert`                    |
| fp8    | activation_scheme, weight_block_size                | `modules_to_not_convert`, `ignored_layers`  |

Read in GPTQModel's quantize config, transformers' FineGrainedFP8Config, and vLLM's auto_gptq.py, gptq_utils.py,
auto_awq.py and fp8.py (which knows only `ignored_layers`). A group_size of -1 is one group a row.

Each has one layout for the whole file. `desc_act` is false: codes lie in the order of the columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tightship.errors import Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.layouts.float8 import Float8
from tightship.layout import Layout

METHODS = ("gptq", "gptq_v2", "awq", "fp8")


def method_config(method: str, layouts: Mapping[str, Layout], ignored: Iterable[str]) -> dict[str, Any]:
    """The section for config.json.

    `layouts` maps the on-disk name of each quantized matrix to its layout, `ignored` are the module paths of linear
    modules that stay in float.

    Raises:
        Unsupported: several layouts, naming a tensor of the odd one.
    """
    layout = one_layout(method, layouts)
    floats = sorted(ignored)
    if isinstance(layout, Float8):
        tile = [layout.tile_rows, layout.group_size]
        skipped = {"modules_to_not_convert": floats, "ignored_layers": floats}
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": tile, **skipped}
    assert isinstance(layout, Affine)
    sizes = {"bits": layout.bits, "group_size": layout.group_size or -1}
    if method == "awq":
        return {"quant_method": "awq", **sizes, "zero_point": True, "version": "gemm", "modules_to_not_convert": floats}
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in floats if name != "lm_head"}
    return {
        "quant_method": "gptq",
        **sizes,
        "sym": layout.symmetric,
        "desc_act": False,
        "checkpoint_format": method,
        "pack_dtype": "int32",
        "lm_head": False,
        **({"dynamic": rules} if rules else {}),
    }


def one_layout(method: str, layouts: Mapping[str, Layout]) -> Layout:
    """The layout that all matrices share. Raises as `method_config`."""
    first, *others = dict.fromkeys(layouts.values())
    if others:
        name = next(name for name, layout in layouts.items() if layout == others[0])
        raise Unsupported(f"a {method} file has one layout, found {first.name} and {others[0].name}", tensor=name)
    return first
