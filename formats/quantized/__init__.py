"""Checkpoints that are quantized already: the tensors of their modules as weights, nothing rounded again.

| quant_method        | read by               | weights                                             |
|---------------------|-----------------------|-----------------------------------------------------|
| compressed-tensors  | compressed_tensors.py | affine integers, FP8, MXFP8, MXFP4, NVFP4           |
| gptq, auto-round    | gptq.py               | affine integers of 2, 3, 4 or 8 bits                |
| awq                 | gptq.py               | affine integers of 4 bits                           |
| fp8                 | fp8.py                | FP8 in tiles, or with one scale for the tensor      |
| mxfp4               | mxfp4.py              | gpt-oss' experts, decoded                           |
| bitsandbytes        | bitsandbytes.py       | eight bits a row; four bits, decoded                |

Headers say names and shapes; beside them the scales are read on opening, to know the narrowest type that holds them
(float16 scales make a matrix fit GGUF). Codes are read when asked for. Adding a method: a module with
`read(section, modules)`, and its line in `_READERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tightship.activations import Activations
from tightship.errors import Malformed, Unsupported
from tightship.formats.quantized.modules import Modules, Read
from tightship.weights import Dense

_READERS = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "awq": "gptq",
    "auto-round": "gptq",
    "fp8": "fp8",
    "mxfp4": "mxfp4",
    "bitsandbytes": "bitsandbytes",
}
# What to feed instead of a checkpoint that is refused.
INSTEAD = {
    "exl2": "ExLlamaV2's trellis is not a grid that others have: start from the original, or a GPTQ of it",
    "exl3": "ExLlamaV3's trellis is not a grid that others have: start from the original, or a GPTQ of it",
    "mlc": "MLC compiles for one device: start from the original, or an AWQ of it",
    "torchao": "start from the original, or export it as compressed-tensors",
    "hqq": "start from the original, or a GPTQ of it",
    "quanto": "start from the original",
}


def read_quantized(
    section: Mapping[str, Any], tensors: Mapping[str, Dense]
) -> tuple[dict[str, Any], dict[str, Activations]]:
    """Weights by name (`X.weight` where a module X is quantized, other tensors as they are), and activations by module.

    `section` is config.json's `quantization_config`.

    Raises:
        Unsupported: a method, or a feature of one, that is not read; the message says what to feed instead.
        Malformed: tensors and section do not belong together; the tensor is named.
    """
    method = section.get("quant_method")
    if method not in _READERS:
        raise Unsupported(
            f"the checkpoint is quantized with {method!r}, which is not read",
            hint=INSTEAD.get(str(method), f"read: {', '.join(_READERS)}; or start from the original"),
        )
    modules = Modules(tensors)
    read: Read = importlib.import_module(f"tightship.formats.quantized.{_READERS[method]}").read
    weights, activations = read(section, modules)
    if not weights:
        raise Malformed(f"config.json says {method}, and no tensor is stored that way")
    return {**modules.left(), **weights}, activations
