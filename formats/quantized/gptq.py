"""GPTQ and AWQ checkpoints, AutoRound's among them. The words are those of `formats/packings/gptq.py`.

| key of quantization_config           | meaning                                                                   |
|--------------------------------------|---------------------------------------------------------------------------|
| bits, w_bit                          | of the codes                                                              |
| group_size, q_group_size             | -1: one group a row                                                       |
| sym                                  | GPTQ: zero points are the middle code (AWQ stores them in any case)       |
| checkpoint_format                    | `gptq_v2` stores zero points as they are, `gptq` less one                 |
| dynamic                              | GPTQModel: `+:REGEX` -> other bits, group_size, sym; `-:REGEX`: in float  |
| version                              | AWQ: `gemm` is read                                                       |
| packing_format, extra_config         | AutoRound: `_AUTO_ROUND`; other settings by module, or by an expression   |

Columns in the order of activations (`desc_act` with a permuted g_idx): a column's group is anywhere, so every column
becomes a group of its own. The codes stay; safetensors holds them so, other containers take the decoded values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.packings.gptq import unpack_awq_zeros, unpack_gptq_zeros
from tightship.formats.packings.modules import PACKINGS
from tightship.formats.quantized.modules import Found, Modules, affine, by_column, group_size_of, quantized
from tightship.weights import Dense, Quantized

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


def read(section: Mapping[str, Any], modules: Modules) -> Found:
    """See `formats.quantized.read_quantized`."""
    storage = _storage(section)
    if storage not in PACKINGS:
        raise Unsupported(f"GPTQ of checkpoint_format {storage!r}", hint="gptq and gptq_v2 are read")
    return {f"{m}.weight": _module(m, storage, section, modules) for m in modules.names("qweight")}, {}


def _storage(section: Mapping[str, Any]) -> str:
    """The packing's word.

    Raises:
        Unsupported: a version of AWQ, or a packing of AutoRound, that is not read.
    """
    if section["quant_method"] == "awq":
        if str(section.get("version", "gemm")).lower() != "gemm":
            raise Unsupported(f"AWQ of version {section['version']!r}", hint="gemm is read")
        return "awq"
    if section["quant_method"] == "gptq":
        return str(section.get("checkpoint_format", "gptq"))
    word = section.get("packing_format")
    if word not in _AUTO_ROUND or section.get("data_type", "int") != "int":
        raise Unsupported(
            f"AutoRound's packing {word!r} of {section.get('data_type', 'int')!r}",
            hint=f"read: {', '.join(_AUTO_ROUND)}; or export it as auto_gptq, auto_awq or llm_compressor",
        )
    return _AUTO_ROUND[word]


def _module(module: str, storage: str, section: Mapping[str, Any], modules: Modules) -> Quantized:
    name = f"{module}.weight"
    said = {**section, **_override(module, section)}
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
    order = None if storage == "awq" else _order(name, tensors, group or cols, cols)
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
    weight = quantized(name, layout, (rows, cols), PACKINGS[storage], tensors)
    return weight if order is None else by_column(name, weight, order)


def _override(module: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first pattern that matches says of a module: AutoRound's own settings, or GPTQModel's.

    Raises:
        Malformed: settings that are none, or an expression that is none.
    """
    for key, match in (("extra_config", re.fullmatch), ("dynamic", re.match)):
        settings = section.get(key) or {}
        if not isinstance(settings, Mapping):
            raise Malformed(f"quantization_config: {key} must be an object, found {settings!r:.80}")
        for pattern, said in settings.items():
            try:
                fits = pattern == module or (not pattern.startswith("-:") and match(pattern.removeprefix("+:"), module))
            except re.error as error:
                raise Malformed(f"quantization_config: {key} has the expression {pattern!r:.80}: {error}") from error
            if fits and isinstance(said, Mapping):
                return {word: value for word, value in said.items() if value is not None}
    return {}


def _order(name: str, tensors: dict[str, Dense], group: int, cols: int) -> np.ndarray | None:
    """The group of every column where they are in another order than their own; an absent g_idx is added.

    All zeros, as old files have it, say nothing.

    Raises:
        Malformed: a group that is not there.
    """
    plain = (np.arange(cols) // group).astype(np.int32)
    if "g_idx" not in tensors:
        tensors["g_idx"] = Dense.of(plain)
    if tensors["g_idx"].shape != (cols,):
        return None  # its shape is refused with those of the others
    found = tensors["g_idx"].read()
    if np.array_equal(found, plain) or not found.any():
        return None
    if found.min() < 0 or found.max() > plain[-1]:
        raise Malformed(f"g_idx names groups {found.min()} to {found.max()} of {plain[-1] + 1}", tensor=name)
    return found
