"""GPTQ and AWQ words unpacked by onnxruntime-genai's model builder: code that is not ours.

Its own dequantization rounds to float16, so only its integers are used; one product in float64 makes values of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def unpacked(
    storage: str, tensors: Mapping[str, np.ndarray], bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (out, in) and zero points (out, groups), both unsigned integers, of a module's tensors by suffix.

    `storage` is gptq, gptq_v2 or awq; `group_size` 0 means one group a row.

    Raises:
        NotImplementedError: a width that the builder does not know (3 bits).
    """
    import torch
    from onnxruntime_genai.models.loaders.awq import AWQModel
    from onnxruntime_genai.models.loaders.base import QuantizedTensorModule
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    kind: Any = AWQModel if storage == "awq" else GPTQModel
    reader = kind.__new__(kind)  # its constructor wants a whole model
    module = QuantizedTensorModule()
    for name, array in tensors.items():
        setattr(module, name, torch.from_numpy(array.copy()))
    module.bits = bits
    module.out_features = tensors["scales"].shape[1]
    module.in_features = len(tensors["g_idx"]) if "g_idx" in tensors else len(tensors["qweight"])
    module.group_size = group_size or module.in_features
    if storage == "gptq":
        reader.handle_qzeros(module)
    reader.unpack_qzeros(module)
    reader.unpack_qweight(module)
    return module.qweight.numpy().T, module.qzeros.numpy().T


def values(storage: str, tensors: Mapping[str, np.ndarray], bits: int, group_size: int) -> np.ndarray:
    """(out, in) float32: (code - zero point) * scale."""
    codes, zero = unpacked(storage, tensors, bits, group_size)
    width = codes.shape[1] // zero.shape[1]
    scale = tensors["scales"].T.astype(np.float64)
    wide = np.repeat(scale, width, axis=1), np.repeat(zero.astype(np.int64), width, axis=1)
    return ((codes - wide[1]) * wide[0]).astype(np.float32)
