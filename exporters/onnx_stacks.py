"""Experts' integers in the stacks that ONNX Runtime's QMoE reads: which fit, and their bytes.

| initializer                         | type, shape                             | content                        |
|-------------------------------------|-----------------------------------------|--------------------------------|
| experts.{0-7}.{w1,w3}.weight.B      | uint8 (experts, turns * rows, cols / 2) | codes + 8, first column lowest |
| experts.{0-7}.{w1,w3}.weight.scales | float32 (experts, turns * rows, blocks) | one a block                    |

The name says which tensors lie in it: expert e along the first axis, and row r of the t-th word in braces at
r * turns + t of the second. Every tensor takes as many bytes as in a MatMulNBits of its own, without zero points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.one_node import OP
from tightship.exporters.onnx_candidates.skeleton import Skeleton
from tightship.exporters.onnx_storage import Style, nbits_of, of_numpy
from tightship.formats.onnx_writer import Initializer
from tightship.formats.packings import matmul_nbits
from tightship.formats.packings.matmul_nbits import NBits
from tightship.target import Refused
from tightship.weights import Quantized, Stored

if TYPE_CHECKING:
    import onnx_ir as ir

BITS = 4


def experts_of(checkpoint: Checkpoint) -> list[str]:
    """On-disk names of the matrices of single experts."""
    return [i.name for i in checkpoint.linears() if i.expert is not None and i.name in checkpoint.weights]


def check_experts(checkpoint: Checkpoint) -> None:
    """That QMoE takes every expert.

    Raises:
        Unsupported: there are no experts, or some do not fit; the message says how many, and why the first does not.
    """
    names = experts_of(checkpoint)
    if not names:
        raise Unsupported("experts: qmoe, and this model has no experts with matrices of their own")
    block = _block(checkpoint.resolve(names[0]))
    unfit = [name for name in names if _misfit(checkpoint.resolve(name), block)]
    if unfit:
        raise Unsupported(
            f"experts: qmoe, and {len(unfit)} of {len(names)} matrices do not fit: "
            f"{_misfit(checkpoint.resolve(unfit[0]), block)}",
            tensor=unfit[0],
            hint="quantize all experts with int4, or leave the option out",
        )


def fits(checkpoint: Checkpoint) -> bool:
    """Whether QMoE takes every expert."""
    names = experts_of(checkpoint)
    return bool(names) and not any(_misfit(checkpoint.resolve(n), _block(checkpoint.resolve(names[0]))) for n in names)


def _block(weight: Stored) -> int:
    spec = matmul_nbits.nbits_for(weight.layout, weight.shape[1]) if isinstance(weight, Quantized) else None
    return spec.block if isinstance(spec, NBits) else 0


def _misfit(weight: Stored, block: int) -> str | None:
    """Why a matrix cannot lie in a stack whose blocks have `block` columns."""
    if not isinstance(weight, Quantized):
        return "it has no integers"
    spec = matmul_nbits.nbits_for(weight.layout, weight.shape[1])
    if isinstance(spec, Refused):
        return spec.reason
    if spec.bits != BITS:
        return f"{weight.layout.name} takes {spec.bits} bits, where QMoE rounds what experts are given or has no kernel"
    if spec.zero_points or spec.offsets:
        return f"{weight.layout.name} has zero points or minima"
    if spec.block != block or weight.shape[1] % block:
        return f"rows of {weight.shape[1]} are no whole blocks of {block}"
    return None


def stack_words(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> the word of its storage."""
    return {n: f"{OP} {BITS} bit, block {_block(checkpoint.resolve(n))}" for n in experts_of(checkpoint)}


def stack_initializers(skeleton: Skeleton, checkpoint: Checkpoint, style: Style) -> dict[str, Initializer]:
    """The stacks of a graph by name, taken out of its initializers. Their readers are told block and accuracy level.

    Raises:
        Unsupported: an expert has no integers.
    """
    found: dict[str, Initializer] = {}
    scales: dict[tuple[tuple[str, ...], ...], list[np.ndarray]] = {}
    for name, stack in skeleton.stacks.items():
        value = skeleton.model.graph.initializers.pop(name)
        weights = [[_integers(checkpoint, tensor) for tensor in turns] for turns in stack.tensors]
        spec = nbits_of(weights[0][0])
        for node, _ in value.uses():
            _configure(node, spec.block, style.accuracy_level)
        read = _Reader(weights, spec, scales.setdefault(stack.tensors, []), stack.operand)
        dtype, (rows, *width) = spec.shapes(weights[0][0].shape[0])[stack.operand]
        shape = (len(weights), rows * len(weights[0]), math.prod(width))
        found[name] = Initializer(name, of_numpy(dtype), shape, dtype.itemsize * math.prod(shape), read)
    return found


def _integers(checkpoint: Checkpoint, name: str) -> Quantized:
    weight = checkpoint.resolve(name)
    if not isinstance(weight, Quantized):
        raise Unsupported("a stack of integers is made of quantized experts only", tensor=name)
    return weight


@dataclass
class _Reader:
    """One operand, expert by expert. Scales are kept when codes are read, so that each matrix is packed once."""

    weights: Sequence[Sequence[Quantized]]
    spec: NBits
    scales: list[np.ndarray]
    operand: str

    def __call__(self) -> Iterator[np.ndarray]:
        if self.operand == "scales":
            yield from self.scales
            self.scales.clear()
            return
        for turns in self.weights:
            packed = [matmul_nbits.pack(w.layout, w.read(), self.spec) for w in turns]
            self.scales.append(_in_turns([p["scales"] for p in packed]))
            yield _in_turns([p["B"] for p in packed])


def _in_turns(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(turns * rows, ...): the first row of each, the second of each, ..."""
    return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def _configure(node: ir.Node, block: int, level: int) -> None:
    import onnx_ir as ir

    for key, number in (("expert_weight_bits", BITS), ("block_size", block), ("accuracy_level", level)):
        node.attributes[key] = ir.AttrInt64(key, number)
