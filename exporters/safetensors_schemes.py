"""What the words of `--to safetensors:SCHEME` and the recipe's `with` mean.

| scheme         | matrices of the blocks                     | the rest             |
|----------------|--------------------------------------------|----------------------|
| (none)         | as the passes left them                    | as the source has it |
| f32, f16, bf16 | that type                                  | that type            |
| w2a16 .. w8a16 | affine integers, groups of 128, symmetric  | as the source has it |
| w8a8           | int8, one scale a row; inputs int8-dynamic | as the source has it |
| fp8            | FP8, one scale a row; inputs fp8-dynamic   | as the source has it |
| nvfp4          | NVFP4 with a scale for the tensor          | as the source has it |
| mxfp4, mxfp8   | that layout                                | as the source has it |
| gptq           | int4, groups of 128, symmetric             | as the source has it |
| awq            | int4, groups of 128, asymmetric            | as the source has it |

Groups are of 64 or 32, or a row's, where rows are no multiple of 128: each matrix for itself, or all alike where
readers know one layout (gptq, awq, asymmetric ones, and families that transformers has to decode on loading, as T5).

Options: `group` (a number, or `channel`) and `asym: true` of integers; `granularity: tensor, channel, block` of fp8;
`format: compressed-tensors, gptq, gptq_v2, awq, fp8` (how quantized matrices are written; the schemes gptq and awq
choose their own); `include: [head]`; `shard_size` (`5GB`, `500MB`). `activations` and its kin belong to the solver and
win over the scheme's (docs/contract.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.exporters.method_configs import METHODS
from tightship.exporters.safetensors_items import COMPRESSED
from tightship.formats.layouts import parse_layout
from tightship.layout import Layout
from tightship.suggest import did_you_mean
from tightship.target import Target
from tightship.weights import Alias

FLOATS = ("f32", "f16", "bf16")
INTEGERS = {f"w{bits}a16": bits for bits in range(2, 9)}
BY_ROW = {"w8a8": 8}
WORDS = {"gptq": 4, "awq": 4}
NARROW = {"nvfp4": "nvfp4-scaled", "mxfp4": "mxfp4", "mxfp8": "mxfp8"}
FLOAT8 = {"tensor": "fp8-e4m3", "channel": "fp8-e4m3-channel", "block": "fp8-e4m3-block"}
SCHEMES = (*FLOATS, *INTEGERS, *BY_ROW, "fp8", *NARROW, *WORDS)
FORMATS = (COMPRESSED, *METHODS)
_ACTIVATIONS = {"w8a8": "int8-dynamic", "fp8": "fp8-dynamic"}
# Option -> the schemes that have it; the others belong to every target.
OPTIONS = {
    "group": (*INTEGERS, *WORDS),
    "asym": (*INTEGERS, "gptq"),
    "granularity": ("fp8",),
    "include": tuple(scheme for scheme in SCHEMES if scheme not in FLOATS),
    "format": (),
    "shard_size": (),
}
DEFAULT_SHARD = 5_000_000_000
_INCLUDABLE = {"head": "head"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def layouts_of(checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
    """What a scheme wants of each tensor; empty without one.

    Raises:
        UsageError: unknown scheme or option.
    """
    options = checked_options(target)
    scheme = target.scheme
    if scheme is None:
        return {}
    stored = {name: w for name, w in checkpoint.weights.items() if not isinstance(w, Alias)}
    if scheme in FLOATS:
        return dict.fromkeys(stored, scheme)
    if scheme not in SCHEMES:
        raise UsageError(
            f"safetensors has no scheme {scheme!r}{did_you_mean(scheme, SCHEMES)}", hint=f"known: {', '.join(SCHEMES)}"
        )
    kinds = {"linear", *(_INCLUDABLE[word] for word in options.get("include", ()))}
    infos = checkpoint.infos()
    chosen = {name: w for name, w in stored.items() if name in infos and infos[name].rule.kind in kinds}
    widths = {name: int(weight.shape[-1]) for name, weight in chosen.items()}
    if _reads_one_layout(scheme, options, checkpoint):
        widths = dict.fromkeys(widths, math.gcd(*widths.values()))
    return {name: _layout(scheme, options, width) for name, width in widths.items()}


def _reads_one_layout(scheme: str, options: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether matrices have to agree on one group: formats with one for a file, and what is decoded on loading."""
    return scheme in WORDS or bool(options.get("asym") or checkpoint.architecture.packed_note)


def activations_of(target: Target) -> str | None:
    """The word for activations that a scheme rounds."""
    if target.scheme == "fp8" and checked_options(target).get("granularity") == "block":
        return "fp8-dynamic-g128"
    return _ACTIVATIONS.get(target.scheme or "")


def method_of(target: Target) -> str:
    """How quantized matrices are written: one of `FORMATS`."""
    options = checked_options(target)
    own = target.scheme if target.scheme in WORDS else None
    if own == "gptq" and options.get("asym"):
        own = "gptq_v2"  # version 1 cannot say every zero point
    return str(options.get("format") or own or COMPRESSED)


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
        if OPTIONS[key] and target.scheme not in OPTIONS[key]:
            raise UsageError(f"option {key!r} belongs to {', '.join(OPTIONS[key])}", hint="or use --quantize LAYOUT")
    for key, known in (("format", FORMATS), ("granularity", FLOAT8)):
        if key in options and options[key] not in known:
            raise UsageError(f"{key} {options[key]!r} is unknown", hint=f"known: {', '.join(known)}")
    for word in options.get("include", ()):
        if word not in _INCLUDABLE:
            raise UsageError(f"include knows {', '.join(_INCLUDABLE)}, found {word!r}")
    group = options.get("group", 128)
    if group != "channel" and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise UsageError(f"group is a number of columns or `channel`, found {group!r}")
    return options


def _layout(scheme: str, options: Mapping[str, Any], cols: int) -> Layout:
    """Groups of 128, or the largest of 64 and 32 that `cols` is a multiple of, or one a row."""
    if scheme in NARROW:
        return parse_layout(NARROW[scheme])
    if scheme == "fp8":
        return parse_layout(FLOAT8[options.get("granularity", "channel")])
    if scheme in BY_ROW:
        return parse_layout(f"int{BY_ROW[scheme]}-channel")
    bits = (INTEGERS | WORDS)[scheme]
    group = options.get("group")
    if group is None:
        group = next((size for size in (128, 64, 32) if cols % size == 0), "channel")
    word = "channel" if group == "channel" else f"g{group}"
    return parse_layout(f"int{bits}-{word}" + ("-asym" if options.get("asym") or scheme == "awq" else ""))
