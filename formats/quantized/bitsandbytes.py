"""bitsandbytes checkpoints: eight bits with one scale a row (LLM.int8), four bits by a table (NF4, FP4).

| tensor                                | dtype | shape       | meaning                                               |
|---------------------------------------|-------|-------------|-------------------------------------------------------|
| X.weight                              | I8    | [out, in]   | LLM.int8: codes -127..127                             |
| X.SCB                                 | F32   | [out]       | the row's largest magnitude; value = code * SCB / 127 |
| X.weight_format                       | U8    | []          | how rows lie in memory; 0 is row by row               |
| X.weight                              | U8    | [n / 2, 1]  | four bits: high nibble first, row after row           |
| X.weight.quant_map                    | F32   | [16]        | value of each code                                    |
| X.weight.absmax                       | F32   | [n / block] | factor of each block of the flattened matrix          |
| X.weight.quant_state.bitsandbytes__T  | U8    | [...]       | JSON (T is nf4 or fp4): shape, blocksize, nested_*    |
| X.weight.absmax, where it is nested   | U8    | [n / block] | factor = map[code] * nested_absmax + nested_offset    |
| X.weight.nested_quant_map             | F32   | [256]       | that map                                              |
| X.weight.nested_absmax                | F32   | [...]       | one for nested_blocksize factors                      |

Blocks of four bits cross no layout's groups (they run over the flattened matrix, their scales are float32), so they are
decoded: dense float32. Eight bits keep their codes. Read from bitsandbytes 0.50, functional.py (`QuantState`,
`dequantize_4bit`, `int8_vectorwise_dequant`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.layouts.affine import Affine
from tightship.formats.quantized.modules import Found, Modules
from tightship.layout import Arrays
from tightship.untrusted import strict_json
from tightship.weights import Dense, Quantized

_STATES = ("nf4", "fp4")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def read(section: Mapping[str, Any], modules: Modules) -> Found:  # noqa: ARG001 - the tensors say it all
    """See `formats.quantized.read_quantized`."""
    found: dict[str, Dense | Quantized] = {}
    for module in modules.names("SCB"):
        found[f"{module}.weight"] = _int8(module, modules)
    for module in modules.names("weight.absmax"):
        found[f"{module}.weight"] = _four_bit(module, modules)
    return found, {}


def _int8(module: str, modules: Modules) -> Quantized:
    name = f"{module}.weight"
    codes, row_max = modules.need(module, "weight"), modules.need(module, "SCB")
    order = modules.take(module, "weight_format")
    if order and int(order["weight_format"].read().reshape(-1)[0]) != 0:
        raise Unsupported("rows of LLM.int8 that lie in a GPU's tiles", tensor=name, hint="save it again, row by row")
    if codes.dtype != "i8" or len(codes.shape) != 2 or row_max.shape != codes.shape[:1]:
        raise Malformed(f"{codes.dtype} {codes.shape} with SCB of shape {row_max.shape}", tensor=name)

    def arrays() -> Arrays:
        return {"codes": codes.read(), "scale": row_max.value().reshape(-1, 1) / np.float32(127)}

    return Quantized(Affine(bits=8, group_size=0, scale_dtype="f32"), (codes.shape[0], codes.shape[1]), arrays)


@dataclasses.dataclass(frozen=True)
class _State:
    """What the JSON beside a matrix of four bits says."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    nested_offset: float


def _state(name: str, kind: str, tensor: Dense) -> _State:
    said = strict_json(tensor.read().tobytes(), f"quant_state of {name}")
    shape, block = said.get("shape"), said.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise Malformed(f"its {kind} state has shape {shape!r}", tensor=name)
    if type(block) is not int or block < 1:
        raise Malformed(f"its {kind} state has blocksize {block!r}", tensor=name)
    nested = said.get("nested_blocksize", 1)
    return _State((shape[0], shape[1]), block, int(nested), float(said.get("nested_offset", 0.0)))


def _four_bit(module: str, modules: Modules) -> Dense:
    name = f"{module}.weight"
    states = modules.take(module, *(f"weight.quant_state.bitsandbytes__{kind}" for kind in _STATES))
    if len(states) != 1:
        raise Malformed("a matrix of four bits has one quant_state, nf4 or fp4", tensor=name)
    ((kind, stored),) = states.items()
    state = _state(name, kind.rpartition("__")[2], stored)
    packed, absmax, table = (modules.need(module, key) for key in ("weight", "weight.absmax", "weight.quant_map"))
    nested = modules.take(module, *_NESTED)
    count = math.prod(state.shape)
    blocks = -(-count // state.block)
    if math.prod(packed.shape) != -(-count // 2) or absmax.shape != (blocks,) or table.shape != (16,):
        raise Malformed(
            f"{state.shape} in blocks of {state.block} do not fit {packed.shape}, {absmax.shape}", tensor=name
        )
    if nested and (len(nested) != 2 or nested[_NESTED[0]].shape != (-(-blocks // state.nested_block),)):
        raise Malformed("its nested factors do not fit its blocks", tensor=name)

    def value() -> np.ndarray:
        factor = absmax.read()
        if nested:
            outer, inner = (nested[key].value() for key in _NESTED)
            factor = inner[factor] * np.repeat(outer, state.nested_block)[:blocks] + np.float32(state.nested_offset)
        codes = packed.read().reshape(-1)
        values = table.value()[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]]
        values *= np.repeat(factor.astype(np.float32, copy=False), state.block)[:count]
        return values.reshape(state.shape)

    return Dense(state.shape, "f32", value)
