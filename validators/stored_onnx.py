"""ONNX initializers by the onnx package, and packed ones by ONNX Runtime itself.

A packed matrix is not unpacked here. The nodes that multiply with it are cut out of the published graph and fed the
identity in ONNX Runtime (a lookup is fed every index): what comes out is the matrix as that runtime understands it.

| initializers of a weight `NAME`             | read as                                                 |
|---------------------------------------------|---------------------------------------------------------|
| NAME                                        | floats; turned where a MatMul reads them as (in, out)    |
| NAME.B, .scales, .zero_points, .offsets     | com.microsoft.MatMulNBits, plus block sums times offsets |
| NAME.codes, .scales, .zero_points, .offsets | DequantizeLinear and MatMul                             |
| NAME.codes, .table, .scales, .divisor       | Cast, Gather, Mul, Div and MatMul                       |
| the same behind a lookup                    | GatherBlockQuantized, or Gathers and DequantizeLinear   |
| NAME.lookup.codes, ...                      | the same bytes, two 4-bit codes to a UINT8              |
| NAME.rows{a}-{b}*                           | rows a to b of the weight                               |
| a name with braces                          | a stack of experts, see onnx_stacks.py                  |
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed
from tightship.exporters.onnx_candidates.skeleton import graph_files
from tightship.validators.integers import Piece
from tightship.validators.onnx_probe import OnnxGraph, unpack_bits
from tightship.validators.onnx_stacks import Stacks

if TYPE_CHECKING:
    import onnx

Rows = tuple[int, int] | None
_LOOKUP = "lookup."
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_NOTHING = np.empty(0)
_OPERANDS = ("B", "codes", "scales", "zero_points", "offsets", "table", "divisor")


class OnnxStored:
    """See `stored.Stored`. What several graphs read must be the same to each of them."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.graphs = [_StoredGraph(checkpoint, file) for file in graph_files(path)]

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {name: entry for graph in self.graphs for name, entry in graph.listing().items()}

    def value(self, name: str, part: str = "") -> np.ndarray:
        first, *others = (graph.value(name, part) for graph in self._holding(name, part))
        if any(not np.array_equal(first, other, equal_nan=True) for other in others):
            raise Malformed("it has different values in the encoder and in the decoder", tensor=name)
        return first

    def changed(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def restored(self, name: str, values: np.ndarray) -> np.ndarray:  # noqa: ARG002 - this container changes nothing
        return values

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        return self._holding(name, part)[0].integers(name, part)

    def _holding(self, name: str, part: str) -> list[_StoredGraph]:
        found = [graph for graph in self.graphs if graph.holds(name, part)]
        if not found:
            files = " and ".join(graph.graph.path.name for graph in self.graphs)
            raise Malformed(f"{files} have no initializer of {name}{part}", tensor=name)
        return found


class _StoredGraph:
    """The weights of one graph."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self.checkpoint = checkpoint
        self.graph = OnnxGraph(path)
        self.stacks = Stacks(self.graph)

    def holds(self, name: str, part: str) -> bool:
        return name in self.stacks.places or bool(self.runs(name, part))

    def listing(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {name: (self.graph.type_word(t), tuple(t.dims)) for name, t in self.graph.initializers.items()}

    def value(self, name: str, part: str = "") -> np.ndarray:
        if name in self.stacks.places:
            return self.stacks.value(name)
        shape = self._shape(name, part)
        found: dict[str, list[tuple[Rows, np.ndarray]]] = defaultdict(list)
        for rows, operands in self.runs(name, part).items():
            if "data" in operands:
                found["floats"].append((rows, self.graph.floats(operands["data"])))
                continue
            packed = {tensor.name for tensor in operands.values()}
            for way, values in self.graph.decoded(packed, shape).items():
                found[way].append((rows, values))
        first, *others = (_join(parts, shape, name) for parts in found.values())
        if any(not np.array_equal(first, other, equal_nan=True) for other in others):
            raise Malformed(f"as a {' and as a '.join(found)} it has different values", tensor=name)
        return first

    def integers(self, name: str, part: str = "") -> Iterator[Piece] | None:
        """None for floats."""
        if name in self.stacks.places:
            return iter([self.stacks.integers(name)])
        runs = sorted(self.runs(name, part).items(), key=lambda item: item[0] or (0, 0))
        if "data" in runs[0][1]:
            return None
        cols = self._shape(name, part)[1]
        return (self._piece(operands, cols) for _, operands in runs)

    def _shape(self, name: str, part: str) -> tuple[int, ...]:
        weight: Any = self.checkpoint.weights[name]
        for attribute in part.split(".")[1:]:
            weight = getattr(weight, attribute)
        return tuple(weight.shape)

    def runs(self, name: str, part: str) -> dict[Rows, dict[str, onnx.TensorProto]]:
        """Rows -> operand -> initializer, `data` being the operand of plain floats; empty if it is not in here."""
        pattern = re.compile(
            rf"{re.escape(name)}(?:\.rows(\d+)-(\d+))?{re.escape(part)}(?:\.(?P<operand>(?:lookup\.)?(?:{'|'.join(_OPERANDS)})))?"
        )
        found: dict[Rows, dict[str, onnx.TensorProto]] = defaultdict(dict)
        for key, tensor in self.graph.initializers.items():
            match = pattern.fullmatch(key)
            if match:
                rows = (int(match[1]), int(match[2])) if match[1] else None
                found[rows][match["operand"] or "data"] = tensor
        return found

    def _piece(self, operands: Mapping[str, onnx.TensorProto], cols: int) -> Piece:
        arrays = {key: self.graph.array(tensor) for key, tensor in operands.items() if not key.startswith(_LOOKUP)}
        if not arrays:
            arrays = self._looked_up({key.removeprefix(_LOOKUP): tensor for key, tensor in operands.items()})
        if "table" in arrays or arrays.get("codes", _NOTHING).dtype == _FLOAT8:
            return self._valued(operands, arrays, cols)
        if "codes" not in arrays:
            arrays = self._unpacked(operands["B"].name, arrays)
        elif arrays["scales"].ndim == 1:  # one for each row of the weight, which is a column of the turned codes
            arrays = {"codes": arrays["codes"].T} | {k: a[:, None] for k, a in arrays.items() if k != "codes"}
        elif operands.keys().isdisjoint(arrays) or self.graph.turned(operands["codes"].name):
            arrays = {key: array.T for key, array in arrays.items()}
        block = -(-arrays["codes"].shape[1] // arrays["scales"].shape[1])
        codes = arrays["codes"][:, :cols].astype(np.int32)  # the last block may reach beyond the matrix
        wide = {key: np.repeat(a, block, axis=1)[:, :cols] for key, a in arrays.items() if key != "codes"}
        zero = wide["zero_points"].astype(np.int32) if "zero_points" in wide else np.int32(0)
        return Piece(codes - zero, wide["scales"], wide.get("offsets"))

    def _valued(self, operands: Mapping[str, onnx.TensorProto], arrays: dict[str, np.ndarray], cols: int) -> Piece:
        """Codes that stand for values of a table, or are FLOAT8 themselves: not-a-number counts as infinity."""
        codes, table = arrays["codes"].T, arrays.get("table")
        if table is None:
            codes, every = codes.view(np.uint8), np.arange(256, dtype=np.uint8).view(_FLOAT8).astype(np.float32)
            table = np.where(np.isnan(every), np.float32(np.inf), every)
        if "scales" not in arrays:
            return Piece(codes, np.ones((), np.float32), table=table)
        scales = arrays["scales"].T.astype(np.float32) / arrays.get("divisor", np.float32(1))
        places = self.graph.places(operands["scales"].name)
        return Piece(codes, scales if places is None else scales[:, places[:cols]], table=table)

    def _looked_up(self, operands: Mapping[str, onnx.TensorProto]) -> dict[str, np.ndarray]:
        """Operands of a lookup: codes (cols, rows), the others (blocks, rows)."""
        arrays = {key: self.graph.array(tensor) for key, tensor in operands.items()}
        if arrays["codes"].shape[1] == arrays["scales"].shape[1]:
            return arrays
        halves = {key: unpack_bits(array, 4) for key, array in arrays.items() if key != "scales"}
        return arrays | {key: (codes ^ 8) - 8 for key, codes in halves.items()}

    def _unpacked(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Operands of MatMulNBits and GatherBlockQuantized: codes (rows, cols), the others (rows, blocks)."""
        bits = self.graph.bits(name)
        rows, blocks = arrays["scales"].shape
        found = {"codes": unpack_bits(arrays["B"].reshape(rows, -1), bits), "scales": arrays["scales"]}
        if "zero_points" in arrays:
            found["zero_points"] = unpack_bits(arrays["zero_points"], bits)[:, :blocks]
        else:
            found["zero_points"] = np.full((rows, blocks), 1 << (bits - 1))
        if "offsets" in arrays:
            found["offsets"] = arrays["offsets"].T
        return found


def _join(parts: list[tuple[Rows, np.ndarray]], shape: tuple[int, ...], name: str) -> np.ndarray:
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
