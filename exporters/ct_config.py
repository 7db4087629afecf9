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
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tightship.architecture import Architecture, TensorInfo
from tightship.errors import Unsupported
from tightship.formats.layouts.affine import Affine

FORMAT = "pack-quantized"
# The version of the format written here: that of the library it was checked against.
VERSION = "0.20.0"
# Sizes that vLLM's Marlin kernels take.
_KERNEL_GROUPS = (0, 32, 64, 128)
_FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


def quantization_config(
    layouts: Mapping[str, Affine], infos: Mapping[str, TensorInfo], ignored: Iterable[str]
) -> dict[str, Any]:
    """The section for config.json.

    `layouts` maps the on-disk name of each quantized matrix to its layout, `ignored` are the module paths of linear
    modules that stay in float.
    """
    groups: dict[Affine, list[str]] = {}
    for name in sorted(layouts):
        groups.setdefault(layouts[name], []).append(name)
    only_linears = all(infos[name].rule.kind == "linear" for name in layouts)
    ordered = sorted(groups, key=lambda layout: layout.name)
    config_groups = {}
    for number, layout in enumerate(ordered):
        whole = len(groups) == 1 and only_linears
        targets = ["Linear"] if whole else _targets(groups[layout], infos)
        config_groups[f"group_{number}"] = _group(layout, targets)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "version": VERSION,
        "config_groups": config_groups,
    }


def _group(layout: Affine, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group_size else "channel",
        "group_size": layout.group_size or None,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


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


def check_readable(layouts: Mapping[str, Affine], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse what no way of loading decodes rightly (the last two rows of the table above).

    Raises:
        Unsupported: naming a tensor of the odd layout.
    """
    by_layout = {layout: name for name, layout in sorted(layouts.items(), reverse=True)}
    asymmetric = [name for layout, name in by_layout.items() if not layout.symmetric]
    if len(by_layout) > 1 and asymmetric:
        raise Unsupported(
            f"transformers cannot load several layouts when one is asymmetric ({layouts[asymmetric[0]].name})",
            tensor=asymmetric[0],
            hint="use symmetric layouts, or one layout for all",
        )
    experts = {layouts.get(name): name for name, info in infos.items() if info.expert is not None}
    if len(experts) > 1 and layouts:
        found = ", ".join(sorted(layout.name if layout else "float" for layout in experts))
        raise Unsupported(
            f"transformers decodes all experts by one layout, found {found}", tensor=min(experts.values())
        )


def reader_notes(
    layouts: Mapping[str, Affine], infos: Mapping[str, TensorInfo], architecture: Architecture
) -> list[str]:
    """What some readers refuse or compute slowly, for the user's eyes; the file itself is lawful."""
    if not layouts:
        return []
    notes = [architecture.packed_note] if architecture.packed_note else []
    if any(not layout.symmetric for layout in layouts.values()):
        notes.append("asymmetric: transformers 5.23 needs dequantize=True to load it")
    if len(set(layouts.values())) > 1:
        notes.append("several layouts: transformers 5.23 with dequantize=True would decode all by one; load it plainly")
    odd = sorted({x.name for x in layouts.values() if x.group_size not in _KERNEL_GROUPS})
    if odd:
        notes.append(f"{', '.join(odd)}: vLLM's kernels know groups of 32, 64, 128 or one a row")
    shapes = sorted({infos[n].shape for n in layouts if infos[n].shape[0] % 64 or infos[n].shape[1] % 128})
    if shapes:
        notes.append(f"shapes {', '.join(f'{a}x{b}' for a, b in shapes[:4])}: vLLM's kernels want out % 64, in % 128")
    fused: dict[tuple[int | None, int], set[Affine | None]] = {}
    for name, info in infos.items():
        for number, roles in enumerate(_FUSED):
            if info.rule.role in roles and info.rule.kind == "linear":
                fused.setdefault((info.block, number), set()).add(layouts.get(name))
    for (block, number), found in sorted(fused.items()):
        if len(found) > 1:
            notes.append(f"{', '.join(_FUSED[number])} of block {block} differ in layout: vLLM fuses and refuses them")
            break
    return notes
