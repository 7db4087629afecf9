"""`quantization_config` of compressed-tensors: which modules are quantized how, said so that every reader agrees.

Readers match `targets` in different ways: vLLM's regular expressions are anchored at the start alone, class names match
as parts of words, and a group without its own `format` is guessed at. So each group says its format, targets are
either the class `Linear` (when all quantized modules share one layout) or expressions anchored at both ends, and
every linear module that stays in float is listed in `ignore`.

What transformers 5.23 with compressed-tensors 0.20 makes of it, measured:

| file                            | loaded as it is          | loaded with dequantize=True                     |
|---------------------------------|--------------------------|-------------------------------------------------|
| one symmetric layout            | exact                    | exact                                           |
| several symmetric layouts       | exact                    | wrong without a word: one group decodes them all |
| one asymmetric layout           | refused: size mismatch   | exact                                           |
| several, some asymmetric        | refused                  | wrong                                           |
| experts in several layouts      | wrong: one group decodes all experts | wrong                               |
| a family with a `packed_note`   | does not run             | as above                                        |
| FP4, MXFP8, loaded as float32   | refused: it decodes to bfloat16 | exact                                           |
| activations rounded             | rounded                  | left alone                                      |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tightship.activations import Activations, scheme_of
from tightship.architecture import Architecture, TensorInfo
from tightship.errors import Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.layouts.float8 import MXFP8, Float8
from tightship.formats.layouts.mx import MXFP4, NVFP4
from tightship.layout import Layout

# The version of the format written here: that of the library it was checked against.
VERSION = "0.20.0"
# Sizes that vLLM's Marlin kernels take.
_KERNEL_GROUPS = (0, 32, 64, 128)
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
CACHE_SCALES = (".k_scale", ".v_scale")
_FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


def storage_word(layout: Layout, activations: str | None) -> str | None:
    """The format under which compressed-tensors holds a layout (`packings/modules.py`); None if it has none.

    Integers are written plainly where activations are rounded too, otherwise packed.
    """
    if isinstance(layout, Affine):
        return "int-quantized" if activations else "pack-quantized"
    words = {Float8: "float-quantized", MXFP8: "mxfp8-quantized", MXFP4: "mxfp4-pack-quantized"}
    return "nvfp4-pack-quantized" if isinstance(layout, NVFP4) else words.get(type(layout))


def quantization_config(
    layouts: Mapping[str, Layout],
    infos: Mapping[str, TensorInfo],
    ignored: Iterable[str],
    activations: Mapping[str, Activations],
) -> dict[str, Any]:
    """The section for config.json.

    `layouts` maps the on-disk name of each quantized matrix to its layout, `ignored` are the module paths of linear
    modules that stay in float, `activations` are the checkpoint's.
    """
    groups = _groups(layouts, activations)
    only_linears = all(infos[name].rule.kind == "linear" for name in layouts)
    config_groups = {}
    for number, (layout, word) in enumerate(sorted(groups, key=lambda pair: (pair[0].name, pair[1] or ""))):
        whole = len(groups) == 1 and only_linears
        targets = ["Linear"] if whole else _targets(groups[layout, word], infos)
        config_groups[f"group_{number}"] = _group(layout, word, targets)
    formats = {group["format"] for group in config_groups.values()}
    cached = any(name.endswith(CACHE_SCALES) for name in activations)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": {**_FLOAT8, "strategy": "tensor", "dynamic": False} if cached else None,
        "version": VERSION,
        "config_groups": config_groups,
    }


def _groups(
    layouts: Mapping[str, Layout], activations: Mapping[str, Activations]
) -> dict[tuple[Layout, str | None], list[str]]:
    """Names of the matrices that share a layout and a word for their inputs."""
    groups: dict[tuple[Layout, str | None], list[str]] = {}
    for name in sorted(layouts):
        inputs = activations.get(module(name))
        groups.setdefault((layouts[name], inputs.scheme if inputs else None), []).append(name)
    return groups


def _group(layout: Layout, word: str | None, targets: list[str]) -> dict[str, Any]:
    storage = storage_word(layout, word)
    return {
        "targets": targets,
        "format": "naive-quantized" if storage == "float-quantized" and word is None else storage,
        "weights": {**_weights(layout), "dynamic": False},
        "input_activations": None if word is None else _inputs(word),
        "output_activations": None,
    }


def _weights(layout: Layout) -> dict[str, Any]:
    """How compressed-tensors says a layout."""
    if isinstance(layout, Affine):
        integers = {"num_bits": layout.bits, "type": "int", "symmetric": layout.symmetric}
        return {**integers, **_groups_of(layout.group_size)}
    if isinstance(layout, Float8):
        if layout.tile_rows != 1 and layout.group_size:
            return {**_FLOAT8, "strategy": "block", "block_structure": [layout.tile_rows, layout.group_size]}
        return (
            {**_FLOAT8, "strategy": "tensor"} if layout.tile_rows == 0 else {**_FLOAT8, **_groups_of(layout.group_size)}
        )
    if isinstance(layout, MXFP8):
        return {**_FLOAT8, **_groups_of(MXFP8.width), "scale_dtype": "torch.uint8"}
    if isinstance(layout, NVFP4):
        return {**_FLOAT4, "strategy": "tensor_group", "group_size": layout.group}
    return {**_FLOAT4, **_groups_of(MXFP4.group)}


def _groups_of(size: int) -> dict[str, Any]:
    return {"strategy": "group" if size else "channel", "group_size": size or None}


def _inputs(word: str) -> dict[str, Any]:
    """How compressed-tensors says a word of `tightship.activations`."""
    scheme = scheme_of(word)
    numbers = {"int8": {**_FLOAT8, "type": "int", "symmetric": scheme.symmetric}, "fp8": _FLOAT8, "fp4": _FLOAT4}
    said = numbers[scheme.numbers]
    if word == "nvfp4-local":
        return {**said, "strategy": "tensor_group", "group_size": scheme.group, "dynamic": "local"}
    if scheme.group:
        return {**said, "strategy": "group", "group_size": scheme.group, "dynamic": True}
    return {**said, "strategy": scheme.per, "dynamic": not scheme.static}


def _targets(names: Sequence[str], infos: Mapping[str, TensorInfo]) -> list[str]:
    """Anchored expressions for exactly these tensors: one a rule where all its blocks are here, else one a tensor."""
    chosen = set(names)
    targets = []
    for disk in sorted({infos[name].rule.disk for name in names}):
        same_rule = [name for name, info in infos.items() if info.rule.disk == disk]
        if len(same_rule) > 1 and chosen.issuperset(same_rule):
            pattern = re.escape(module(disk)).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+")
            targets.append(f"re:^{pattern}$")
        else:
            targets += [f"re:^{re.escape(module(name))}$" for name in same_rule if name in chosen]
    return targets


def module(name: str) -> str:
    """The module's path of a weight's on-disk name."""
    return name.removesuffix(".weight")


def check_readable(
    layouts: Mapping[str, Layout],
    infos: Mapping[str, TensorInfo],
    activations: Mapping[str, Activations],
    architecture: Architecture,
) -> None:
    """Refuse what no way of loading decodes rightly (see the table above).

    Raises:
        Unsupported: naming a tensor of the odd layout.
    """
    by_layout = {layout: name for name, layout in sorted(layouts.items(), reverse=True)}
    if len(by_layout) > 1 and architecture.packed_note:
        raise Unsupported(
            f"{architecture.packed_note}; so they are decoded on loading, all by one layout, and here are "
            f"{', '.join(sorted(layout.name for layout in by_layout))}",
            tensor=min(by_layout.values()),
            hint="use one layout for all",
        )
    asymmetric = [name for layout, name in by_layout.items() if isinstance(layout, Affine) and not layout.symmetric]
    if len(by_layout) > 1 and asymmetric:
        raise Unsupported(
            f"transformers cannot load several layouts when one is asymmetric ({layouts[asymmetric[0]].name})",
            tensor=asymmetric[0],
            hint="use symmetric layouts, or one layout for all",
        )
    narrow = [name for layout, name in by_layout.items() if isinstance(layout, MXFP4 | NVFP4 | MXFP8)]
    several = _groups(layouts, activations)
    if len(several) > 1 and (narrow or any(word for _, word in several)):
        name = narrow[0] if narrow else min(layouts)
        raise Unsupported(
            "of several layouts, transformers decodes neither FP4 and MXFP8 nor those with rounded activations rightly",
            tensor=name,
            hint="use one layout for all",
        )
    experts = {layouts.get(name): name for name, info in infos.items() if info.expert is not None}
    if len(experts) > 1 and layouts:
        found = ", ".join(sorted(layout.name if layout else "float" for layout in experts))
        raise Unsupported(
            f"transformers decodes all experts by one layout, found {found}", tensor=min(experts.values())
        )


def reader_notes(
    layouts: Mapping[str, Layout], infos: Mapping[str, TensorInfo], architecture: Architecture
) -> list[str]:
    """What some readers refuse or compute slowly, for the user's eyes; the file itself is lawful."""
    if not layouts:
        return []
    notes = [architecture.packed_note] if architecture.packed_note else []
    integers = [layout for layout in layouts.values() if isinstance(layout, Affine)]
    if any(not layout.symmetric for layout in integers):
        notes.append("asymmetric: transformers 5.23 needs dequantize=True to load it")
    if len(set(layouts.values())) > 1:
        notes.append("several layouts: transformers 5.23 with dequantize=True would decode all by one; load it plainly")
    if any(isinstance(layout, MXFP4 | NVFP4 | MXFP8) for layout in layouts.values()):
        notes.append("FP4 and MXFP8: transformers 5.23 decodes to bfloat16; in another dtype it needs dequantize=True")
    odd = sorted({x.name for x in integers if x.group_size not in _KERNEL_GROUPS})
    if odd:
        notes.append(f"{', '.join(odd)}: vLLM's kernels know groups of 32, 64, 128 or one a row")
    shapes = sorted({infos[n].shape for n in layouts if infos[n].shape[0] % 64 or infos[n].shape[1] % 128})
    if shapes:
        notes.append(f"shapes {', '.join(f'{a}x{b}' for a, b in shapes[:4])}: vLLM's kernels want out % 64, in % 128")
    fused: dict[tuple[int | None, int], set[Layout | None]] = {}
    for name, info in infos.items():
        for number, roles in enumerate(_FUSED):
            if info.rule.role in roles and info.rule.kind == "linear":
                fused.setdefault((info.block, number), set()).add(layouts.get(name))
    for (block, number), found in sorted(fused.items()):
        if len(found) > 1:
            notes.append(f"{', '.join(_FUSED[number])} of block {block} differ in layout: vLLM fuses and refuses them")
            break
    return notes
