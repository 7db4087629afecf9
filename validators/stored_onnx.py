"""ONNX initializers by the onnx package, and packed ones by ONNX Runtime itself.

A packed matrix is not unpacked here. The nodes that multiply with it are cut out of the published graph and fed the
identity in ONNX Runtime (a lookup is fed every index): what comes out is the matrix as that runtime understands it.

| initializers of a weight `NAME`             | read as                                                 |
|---------------------------------------------|---------------------------------------------------------|
| NAME                                        | floats; turned where a MatMul reads them as (in, out)    |
| NAME.B, .scales, .zero_points, .offsets     | com.microsoft.MatMulNBits, plus block sums times offsets |
| NAME.codes, .scales, .zero_points, .offsets | DequantizeLinear and MatMul                             |
| NAME.table.*                                | the same for a lookup                                   |
| NAME.rows{a}-{b}*                           | rows a to b of the weight                               |
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.validators.integers import Piece
from tightship.validators.onnx_probe import OnnxGraph, unpack_bits

if TYPE_CHECKING:
    import onnx

_OPERANDS = "B|codes|scales|zero_points|offsets"


class OnnxStored:
    """See `stored.Stored`."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.checkpoint = checkpoint
        self.graph = OnnxGraph(path)

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {name: (self.graph.type_word(t), tuple(t.dims)) for name, t in self.graph.initializers.items()}

    def value(self, name: str, part: str = "") -> np.ndarray:
        shape = self._shape(name, part)
        found: dict[str, np.ndarray] = {}
        for form, runs in self._forms(name, part).items():
            decoded = [(rows, self._decode(form, operands, shape)) for rows, operands in runs.items()]
            found[form] = _join(decoded, shape, name)
        first, *others = found.values()
        if any(not np.array_equal(first, other, equal_nan=True) for other in others):
            raise Malformed(f"its copies for {' and '.join(found)} hold different values", tensor=name)
        return first

    def shift(self, name: str) -> float:  # noqa: ARG002 - this container adds nothing
        return 0.0

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        forms = self._forms(name, part)
        form = next(iter(forms))
        if form == "floats":
            return None
        runs = sorted(forms[form].items(), key=lambda item: item[0] or (0, 0))
        return (self._piece(form, operands) for _, operands in runs)

    def _shape(self, name: str, part: str) -> tuple[int, ...]:
        weight = self.checkpoint.weights[name]
        for attribute in part.split(".")[1:]:
            weight = getattr(weight, attribute)
        return tuple(weight.shape)

    def _forms(self, name: str, part: str) -> dict[str, dict[tuple[int, int] | None, dict[str, onnx.TensorProto]]]:
        """form ("floats", "matrix", "table") -> rows -> operand -> initializer."""
        pattern = re.compile(
            rf"{re.escape(name)}(?:\.rows(\d+)-(\d+))?{re.escape(part)}(?:\.(?P<table>table\.)?(?P<operand>{_OPERANDS}))?"
        )
        found: dict = defaultdict(lambda: defaultdict(dict))
        for key, tensor in self.graph.initializers.items():
            match = pattern.fullmatch(key)
            if match:
                rows = (int(match[1]), int(match[2])) if match[1] else None
                form = "floats" if not match["operand"] else "table" if match["table"] else "matrix"
                found[form][rows][match["operand"] or "data"] = tensor
        if not found:
            raise Malformed(f"model.onnx has no initializer of {name}{part}", tensor=name)
        return found

    def _decode(self, form: str, operands: Mapping[str, onnx.TensorProto], shape: tuple[int, ...]) -> np.ndarray:
        if form == "floats":
            return self.graph.floats(operands["data"])
        names = {tensor.name for tensor in operands.values()}
        return self.graph.matrix(names, shape[1]) if form == "matrix" else self.graph.table(names, shape[0])

    def _piece(self, form: str, operands: Mapping[str, onnx.TensorProto]) -> Piece:
        arrays = {key: self.graph.array(tensor) for key, tensor in operands.items()}
        if "codes" in arrays:
            turn = (lambda a: a) if form == "table" else np.transpose
            codes = turn(arrays["codes"].astype(np.int32))
            scale, zero, offset = (turn(arrays[k]) if k in arrays else None for k in _PARAMETERS)
            zero = None if zero is None else zero.astype(np.int32)
        else:
            bits = self.graph.bits(operands["B"].name)
            rows, blocks = arrays["scales"].shape
            codes = unpack_bits(arrays["B"].reshape(rows, -1), bits)
            scale = arrays["scales"]
            packed = arrays.get("zero_points")
            zero = np.full((rows, blocks), 1 << (bits - 1)) if packed is None else unpack_bits(packed, bits)[:, :blocks]
            offset = arrays["offsets"].T if "offsets" in arrays else None
        block = -(-codes.shape[1] // scale.shape[1])
        spread = [
            None if a is None else np.repeat(a, block, axis=1)[:, : codes.shape[1]] for a in (scale, zero, offset)
        ]
        q = codes if spread[1] is None else codes - spread[1]
        return Piece(q, spread[0], spread[2])


_PARAMETERS = ("scales", "zero_points", "offsets")


def _join(parts: list[tuple[tuple[int, int] | None, np.ndarray]], shape: tuple[int, ...], name: str) -> np.ndarray:
    """Runs of rows put together; every row exactly once."""
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    whole = np.zeros(shape, np.float32)
    seen = np.zeros(shape[0], np.int64)
    for rows, values in parts:
        start, stop = rows or (0, shape[0])
        whole[start:stop] = values
        seen[start:stop] += 1
    if (seen != 1).any():
        raise Malformed(
            f"row {int(np.argmax(seen != 1))} is stored {int(seen[np.argmax(seen != 1)])} times", tensor=name
        )
    return whole
