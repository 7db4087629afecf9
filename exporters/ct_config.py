"""`quantization_config` of compressed-tensors: which modules are quantized how, said so that every reader agrees.

Readers match `targets` in different ways: vLLM's regular expressions are anchored at the start alone, class names match
as parts of words, and a group without its own `format` is guessed at. So each group says its format, targets are
either the class `Linear` (when all quantized modules share one layout) or expressions anchored at both ends, and
every linear module that stays in float is listed in `ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tightship.architecture import TensorInfo
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


def kernel_notes(layouts: Mapping[str, Affine], infos: Mapping[str, TensorInfo]) -> list[str]:
    """What a serving runtime would refuse or compute slowly, for the user's eyes; the file itself is lawful."""
    notes = []
    odd = sorted({x.name for x in layouts.values() if x.group_size not in _KERNEL_GROUPS})
    if odd:
        notes.append(f"{', '.join(odd)}: vLLM's kernels know groups of 32, 64, 128 or one a row")
    shapes = sorted({infos[n].shape for n in layouts if infos[n].shape[0] % 64 or infos[n].shape[1] % 128})
    if shapes:
        notes.append(f"shapes {', '.join(f'{a}x{b}' for a, b in shapes[:4])}: vLLM's kernels want out % 64, in % 128")
    for block in sorted({info.block for n, info in infos.items() if n in layouts and info.block is not None}):
        for roles in _FUSED:
            found = {
                layouts.get(n)
                for n, i in infos.items()
                if i.block == block and i.rule.role in roles and len(i.shape) == 2
            }
            if len(found) > 1:
                notes.append(f"{', '.join(roles)} of block {block} differ in layout: vLLM fuses them and would refuse")
                return notes
    return notes
