"""What `plan` says of speed before anything is built: the kernels behind a storage, against a float32 MatMul.

Figures are those of benchmarks/results/onnx_kernels.md (accuracy level 4, one thread, AVX2), rounded: how many
times as fast one row (a token that is decoded) and 128 rows (a prompt) are multiplied. Other processors differ:
`tightship bench` measures the artifact itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# (bits, block) -> one row, 128 rows
KERNELS = {
    (2, 32): (3.7, 0.8),
    (2, 64): (4.3, 1.1),
    (2, 128): (4.1, 1.0),
    (4, 16): (1.8, 0.7),
    (4, 32): (4.1, 1.0),
    (4, 64): (3.7, 1.0),
    (4, 128): (3.7, 1.0),
    (4, 256): (4.6, 1.1),
    (8, 16): (2.4, 0.6),
    (8, 32): (2.6, 0.7),
    (8, 64): (2.8, 0.7),
    (8, 128): (2.4, 0.8),
    (8, 256): (2.8, 0.7),
}
SLOW_HALF = (
    "slower than float32 on processors without float16 kernels: ONNX Runtime widens what goes into each product and "
    "narrows what comes out; store fp16 and compute in float32 there"
)
ONE_NODE = "experts in QMoE: single tokens about 1.1 times as fast as with one MatMulNBits a matrix, prompts 0.9 times"
_SLOWER = 0.95
_FUSED = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}  # DequantizeLinear in front of a MatMul runs in the same kernel


def speed_notes(storages: Iterable[str]) -> list[str]:
    """A sentence for each kernel that multiplies some matrices more slowly than float32.

    Args:
        storages: of the matrices that are multiplied, in the words of `onnx_storage`.
    """
    counts = Counter(storages)
    notes = []
    for storage, count in sorted(counts.items()):
        decode, prompt = KERNELS.get(_kernel(storage), (1.0, 1.0))
        if min(decode, prompt) < _SLOWER:
            notes.append(
                f"slower than float32 on prompts: {count} matrices stored as {storage} run at {prompt:g} times its "
                f"speed there, and at {decode:g} times on single tokens; int8-dynamic is faster on both"
            )
    return notes


def _kernel(storage: str) -> tuple[int, int]:
    """(bits, block) of `MatMulNBits 4 bit, block 32` or `DequantizeLinear INT4, block 32`; (0, 0) of anything else."""
    words = storage.replace(",", "").split()
    if words[:1] == ["MatMulNBits"] and len(words) == 5:
        return int(words[1]), int(words[4])
    if words[:1] == ["DequantizeLinear"] and len(words) == 4 and words[2] == "block":
        return _FUSED[words[1]], int(words[3])
    return 0, 0
