"""Experts that lie in the stacks of QMoE (exporters/onnx_stacks.py has the bytes), out of a published graph.

What a matrix is, QMoE itself says: one expert, no activation, the identity behind it, and the identity as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tightship.exporters.onnx_candidates.one_node import CONTRIB, OP, expand
from tightship.validators.integers import Piece
from tightship.validators.onnx_probe import OnnxGraph, unpack_bits

_ROWS = 256  # that are multiplied at once
_BITS, _ZERO, _ONE = 4, 0x88, 9


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the stack's name, and its expert and turn."""

    stack: str
    expert: int
    turn: int
    turns: int


class Stacks:
    """The experts of one graph."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.places: dict[str, _Place] = {}
        for key in graph.initializers:
            stack = key.removesuffix(".B")
            for expert, names in enumerate(expand(stack) if key != stack else ()):
                for turn, name in enumerate(names):
                    self.places[name] = _Place(stack, expert, turn, len(names))

    def value(self, name: str) -> np.ndarray:
        """(out, in) float32 as QMoE understands it."""
        codes, scales = self._operands(name)
        step = min(_ROWS, codes.shape[1] * 8 // _BITS)  # what comes out is as wide as what goes in
        runs = (slice(start, start + step) for start in range(0, len(codes), step))
        return np.concatenate([_multiplied(codes[rows], scales[rows]) for rows in runs])

    def integers(self, name: str) -> Piece:
        codes, scales = self._operands(name)
        block = codes.shape[1] * 8 // _BITS // scales.shape[1]
        return Piece(unpack_bits(codes, _BITS) - (1 << (_BITS - 1)), np.repeat(scales, block, axis=1))

    def _operands(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows, cols / 2) uint8 and (rows, blocks) float32."""
        at = self.places[name]
        rows = slice(at.turn, None, at.turns)
        codes, scales = (self.graph.array(self.graph.initializers[f"{at.stack}.{part}"]) for part in ("B", "scales"))
        return codes[at.expert, rows], scales[at.expert, rows]


def _multiplied(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(rows, cols) float32: what QMoE makes of the identity."""
    import onnx
    import onnxruntime as ort

    rows, cols = len(codes), codes.shape[1] * 8 // _BITS
    block = cols // scales.shape[1]
    inner = -(-rows // block) * block  # QMoE wants whole blocks
    first = np.full((1, inner, codes.shape[1]), _ZERO, np.uint8)
    first[0, :rows] = codes
    first_scales = np.zeros((1, inner, scales.shape[1]), np.float32)
    first_scales[0, :rows] = scales
    held = {"fc1": first, "fc1.scales": first_scales, "fc2": _identity(cols, inner)}
    held["fc2.scales"] = np.ones((1, cols, inner // block), np.float32)
    node = onnx.helper.make_node(
        OP, ["x", "share", "fc1", "fc1.scales", "", "fc2", "fc2.scales"], ["y"], domain=CONTRIB, k=1,
        activation_type="identity", normalize_routing_weights=1, expert_weight_bits=_BITS, block_size=block,
    )  # fmt: skip
    floats = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "share", "y")]
    tensors = [onnx.numpy_helper.from_array(array, n) for n, array in held.items()]
    graph = onnx.helper.make_graph([node], "probe", floats[:2], floats[2:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(CONTRIB, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens = {"x": np.eye(cols, dtype=np.float32), "share": np.ones((cols, 1), np.float32)}
    return np.ascontiguousarray(session.run(None, tokens)[0].T[:rows])


def _identity(rows: int, cols: int) -> np.ndarray:
    """(1, rows, cols / 2) codes of a matrix that is 1 on the diagonal."""
    codes = np.full((rows, cols), _ZERO & 0xF, np.uint8)
    np.fill_diagonal(codes, _ONE)
    return (codes[None, :, 0::2] | codes[None, :, 1::2] << 4).astype(np.uint8)
