"""What the words of `--to safetensors:SCHEME` and the recipe's `with` mean.

| scheme         | matrices of the blocks                     | the rest             |
|----------------|--------------------------------------------|----------------------|
| (none)         | as the passes left them                    | as the source has it |
| f32, f16, bf16 | that type                                  | that type            |
| w2a16 .. w8a16 | affine integers, groups of 128, symmetric  | as the source has it |

Options: `group` (a number, or `channel`), `asym: true`, `include: [head]`, `shard_size` (`5GB`, `500MB`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.formats.layouts import parse_layout
from tightship.layout import Layout
from tightship.suggest import did_you_mean
from tightship.target import Target
from tightship.weights import Alias

FLOATS = ("f32", "f16", "bf16")
INTEGERS = {f"w{bits}a16": bits for bits in range(2, 9)}
LATER = ("w8a8", "fp8", "nvfp4", "mxfp4", "gptq", "awq")
OPTIONS = ("group", "asym", "include", "shard_size")
DEFAULT_SHARD = 5_000_000_000
_INCLUDABLE = {"head": "head"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def layouts_of(checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
    """What a scheme wants of each tensor; empty without one.

    Raises:
        UsageError: unknown scheme or option.
        Unsupported: a scheme that is not made yet, or a family whose matrices the container cannot quantize.
    """
    options = checked_options(target)
    scheme = target.scheme
    if scheme is None:
        return {}
    if scheme in LATER:
        raise Unsupported(f"safetensors:{scheme} is not made yet", hint=f"made: {', '.join((*FLOATS, *INTEGERS))}")
    stored = {name: w for name, w in checkpoint.weights.items() if not isinstance(w, Alias)}
    if scheme in FLOATS:
        return dict.fromkeys(stored, scheme)
    if scheme not in INTEGERS:
        known = (*FLOATS, *INTEGERS)
        raise UsageError(
            f"safetensors has no scheme {scheme!r}{did_you_mean(scheme, known)}", hint=f"known: {', '.join(known)}"
        )
    kinds = {"linear", *(_INCLUDABLE[word] for word in options.get("include", ()))}
    infos = checkpoint.infos()
    return {
        name: _layout(INTEGERS[scheme], options, int(weight.shape[-1]))
        for name, weight in stored.items()
        if name in infos and infos[name].rule.kind in kinds
    }


def shard_size(target: Target) -> int:
    """Bytes of tensors in one shard at most (a single larger module still makes one shard)."""
    value = checked_options(target).get("shard_size", DEFAULT_SHARD)
    found = re.fullmatch(r"\s*(\d+)\s*([kKmMgG]?[iI]?[bB]?)\s*", str(value))
    unit = found[2].upper() if found else "?"
    if not found or unit not in _UNITS or int(found[1]) == 0:
        raise UsageError(f"shard_size {value!r} is not a size", hint="write it as 5GB, 500MB or 1GiB")
    return int(found[1]) * _UNITS[unit]


def checked_options(target: Target) -> Mapping[str, Any]:
    """The target's options, names and values checked.

    Raises:
        UsageError: an unknown option or value, or one that does not belong to the scheme.
    """
    options = target.options
    for key in options:
        if key == "solver":  # said to every container of a quantizing scheme; it decides nothing here
            continue
        if key not in OPTIONS:
            raise UsageError(f"safetensors has no option {key!r}{did_you_mean(key, OPTIONS)}")
        if key != "shard_size" and target.scheme not in INTEGERS:
            raise UsageError(f"option {key!r} belongs to {', '.join(INTEGERS)}", hint="or use --quantize LAYOUT")
    for word in options.get("include", ()):
        if word not in _INCLUDABLE:
            raise UsageError(f"include knows {', '.join(_INCLUDABLE)}, found {word!r}")
    group = options.get("group", 128)
    if group != "channel" and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise UsageError(f"group is a number of columns or `channel`, found {group!r}")
    return options


def _layout(bits: int, options: Mapping[str, Any], cols: int) -> Layout:
    """Groups of 128, or the largest of 64 and 32 that rows are a multiple of, or one a row."""
    group = options.get("group")
    if group is None:
        group = next((size for size in (128, 64, 32) if cols % size == 0), "channel")
    word = "channel" if group == "channel" else f"g{group}"
    return parse_layout(f"int{bits}-{word}" + ("-asym" if options.get("asym") else ""))
