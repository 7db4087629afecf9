"""gpt-oss' own MXFP4: stacks of experts, decoded exactly to bfloat16.

| tensor   | dtype | shape                           | meaning                                                 |
|----------|-------|---------------------------------|---------------------------------------------------------|
| X_blocks | U8    | [experts, out, in / 32, 16]     | E2M1 codes, two a byte, low nibble first                 |
| X_scales | U8    | [experts, out, in / 32]         | E8M0: 2^(scale - 127)                                    |

X itself is (experts, in, out), as transformers holds it. The value of a code has one bit of mantissa, so bfloat16 says
it exactly for scales up to 2^125. Stacks of three axes are no matrices on a grid here: they are decoded, one expert at
a time.
Read from transformers' integrations/mxfp4.py (`convert_moe_packed_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tightship.errors import Malformed
from tightship.formats.layouts.mx import TABLE
from tightship.formats.quantized.modules import Found, Modules
from tightship.weights import Dense, Quantized

_BLOCKS, _SCALES = "_blocks", "_scales"


def read(section: Mapping[str, Any], modules: Modules) -> Found:  # noqa: ARG001 - the tensors say it all
    """See `formats.quantized.read_quantized`."""
    found: dict[str, Dense | Quantized] = {}
    for name in sorted(n.removesuffix(_BLOCKS) for n in modules.left() if n.endswith(_BLOCKS)):
        module, _, leaf = name.rpartition(".")
        found[name] = _stack(name, modules.need(module, leaf + _BLOCKS), modules.need(module, leaf + _SCALES))
    return found, {}


def _stack(name: str, blocks: Dense, scales: Dense) -> Dense:
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        raise Malformed(f"blocks of shape {blocks.shape} with scales of {scales.shape}", tensor=name)
    experts, out, groups, _ = blocks.shape

    def decode(first: int, last: int) -> np.ndarray:
        codes, exponent = blocks.rows()(first, last), scales.rows()(first, last)
        levels = TABLE[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(last - first, out, groups, 32)
        values = np.ldexp(levels, exponent.astype(np.int32)[..., None] - 127).astype(ml_dtypes.bfloat16)
        return np.ascontiguousarray(values.reshape(last - first, out, groups * 32).swapaxes(1, 2))

    return Dense((experts, groups * 32, out), "bf16", lambda: decode(0, experts), decode)
