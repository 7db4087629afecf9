"""GPTQ and AWQ checkpoints. The words are those of `formats/packings/gptq.py`.

| key of quantization_config           | meaning                                                                   |
|--------------------------------------|---------------------------------------------------------------------------|
| bits, w_bit                          | of the codes                                                              |
| group_size, q_group_size             | -1: one group a row                                                       |
| sym                                  | GPTQ: zero points are the middle code (AWQ stores them in any case)       |
| checkpoint_format                    | `gptq_v2` stores zero points as they are, `gptq` less one                 |
| dynamic                              | GPTQModel: `+:REGEX` -> other bits, group_size, sym; `-:REGEX`: in float  |
| version                              | AWQ: `gemm` is read                                                       |

Columns in the order of activations (`desc_act` with a permuted g_idx) are refused: a column's group is then anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.packings.gptq import unpack_awq_zeros, unpack_gptq_zeros
from tightship.formats.packings.modules import PACKINGS
from tightship.formats.quantized.modules import Found, Modules, affine, group_size_of, quantized
from tightship.weights import Dense, Quantized

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def read(section: Mapping[str, Any], modules: Modules) -> Found:
    """See `formats.quantized.read_quantized`."""
    awq = section["quant_method"] == "awq"
    if awq and str(section.get("version", "gemm")).lower() != "gemm":
        raise Unsupported(f"AWQ of version {section['version']!r}", hint="gemm is read")
    storage = "awq" if awq else str(section.get("checkpoint_format", "gptq"))
    if storage not in PACKINGS:
        raise Unsupported(f"GPTQ of checkpoint_format {storage!r}", hint="gptq and gptq_v2 are read")
    return {f"{m}.weight": _module(m, storage, section, modules) for m in modules.names("qweight")}, {}


def _module(module: str, storage: str, section: Mapping[str, Any], modules: Modules) -> Quantized:
    name = f"{module}.weight"
    said = {**section, **_override(module, section.get("dynamic") or {})}
    bits = said.get("bits", said.get("w_bit"))
    if bits not in (2, 3, 4, 8):
        raise Unsupported(f"{storage} with {bits!r} bits", tensor=name)
    group = group_size_of(said.get("group_size", said.get("q_group_size")), name)
    tensors = modules.take(module, *_SUFFIXES)
    missing = [suffix for suffix in _SUFFIXES[:3] if suffix not in tensors]
    if missing:
        raise Malformed(f"the module is quantized, and its {missing[0]} is missing", tensor=name)
    words, scales = tensors["qweight"], tensors["scales"]
    if len(words.shape) != 2 or len(scales.shape) != 2:
        raise Malformed(f"words of shape {words.shape} and scales of {scales.shape}", tensor=name)
    rows = scales.shape[1]
    cols = words.shape[0] if storage == "awq" else words.shape[0] * 32 // bits
    if storage != "awq":
        _check_order(name, tensors, group or cols, cols)
    zeros = tensors["qzeros"].read()
    if storage == "awq":
        zero = unpack_awq_zeros(zeros, rows)
    else:
        zero = unpack_gptq_zeros(zeros, bits, rows, v2=storage == "gptq_v2")
    symmetric = bool(said.get("sym", False)) if storage != "awq" else not zero.any()
    if symmetric and zero.any():
        raise Malformed(
            "the file says sym, and its zero points are not the middle code; runtimes disagree about such files",
            tensor=name,
            hint="check `sym` and `checkpoint_format` in config.json",
        )
    layout = affine(bits, group if group < cols else 0, scales.read(), zero, symmetric=symmetric)
    return quantized(name, layout, (rows, cols), PACKINGS[storage], tensors)


def _override(module: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first pattern that matches says of a module."""
    for pattern, said in dynamic.items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            return said
    return {}


def _check_order(name: str, tensors: dict[str, Dense], group: int, cols: int) -> None:
    """An absent g_idx is added; all zeros, as old files have it, say nothing.

    Raises:
        Unsupported: columns are in another order.
    """
    plain = (np.arange(cols) // group).astype(np.int32)
    if "g_idx" not in tensors:
        tensors["g_idx"] = Dense.of(plain)
    if tensors["g_idx"].shape == (cols,):
        found = tensors["g_idx"].read()
        if not np.array_equal(found, plain) and found.any():
            raise Unsupported(
                "its columns are in the order of activations (desc_act), which no other format can say",
                tensor=name,
                hint="start from a GPTQ made with desc_act=false or static groups, or from the original",
            )
