"""Cuts the nodes around a weight out of a published ONNX graph and lets ONNX Runtime say what the weight is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import Malformed
from tightship.validators.onnx_joined_products import alone

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

_ELEMENTS = 1 << 22
_MOST_NODES = 32
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_JOINS = (
    "Add",
    "Cast",
    "DequantizeLinear",
    "Transpose",
    "Shape",
    "ConstantOfShape",
)  # of values the weight itself made
_BITS = (
    "BitShift",
    "BitwiseAnd",
    "BitwiseXor",
)  # that take codes apart, with constants and what follows from the index
_OF_INDEX = ("Div", "Mod", "Mul", "Cast")
_RANK = 3
_ROWS = 4096


class OnnxGraph:
    """A model whose weights stay outside until they are asked for."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self.producer: dict[str, onnx.NodeProto] = {}
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                self.readers[name].append((node, index))
            self.producer.update(dict.fromkeys(node.output, node))

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """The data of an initializer, in its own type."""
        import onnx

        held = onnx.TensorProto()
        held.CopyFrom(tensor)
        if onnx.external_data_helper.uses_external_data(held):
            onnx.external_data_helper.load_external_data_for_tensor(held, str(self.path.parent))
        return onnx.numpy_helper.to_array(held)

    def type_word(self, tensor: onnx.TensorProto) -> str:
        import onnx

        return onnx.TensorProto.DataType.Name(tensor.data_type)

    def bits(self, name: str) -> int:
        """`bits` of the node that reads a packed initializer."""
        for node, _ in self.readers[name]:
            if node.op_type == "Concat":
                return self.bits(node.output[0])
            for attribute in node.attribute:
                if attribute.name == "bits":
                    return int(attribute.i)
        return 4  # the operators' default

    def turned(self, name: str) -> bool:
        """Whether quantized codes lie as (in, out): DequantizeLinear then has its blocks along axis 0."""
        return any(
            node.op_type == "DequantizeLinear" and any(a.name == "axis" and a.i == 0 for a in node.attribute)
            for node, _ in self.readers[name]
        )

    def places(self, name: str) -> np.ndarray | None:
        """Where a constant Gather takes rows of an initializer from; None if there is none."""
        for node, index in self.readers[name]:
            if node.op_type == "Cast":
                return self.places(node.output[0])
            if node.op_type == "Gather" and index == 0 and node.input[1] in self.initializers:
                return self.array(self.initializers[node.input[1]])
        return None

    def floats(self, tensor: onnx.TensorProto) -> np.ndarray:
        """float32 of a float initializer, a matrix as (out, in) by what its readers do with it."""
        data = self.array(tensor).astype(np.float32)
        if data.ndim != 2:
            return data
        ways = set(self._ways(tensor.name))
        if len(ways) > 1:
            raise Malformed("is read both as (out, in) and as (in, out)", tensor=tensor.name)
        return data.T if ways == {"turned"} else data

    def _ways(self, name: str) -> Iterable[str]:
        for node, index in self.readers[name]:
            if node.op_type in ("Cast", "Concat"):
                yield from self._ways(node.output[0])
            elif node.op_type == "Transpose":
                for way in self._ways(node.output[0]):
                    yield "plain" if way == "turned" else "turned"
            elif index == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))):
                yield "turned"
            else:
                yield "plain"

    def decoded(self, names: set[str], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """(out, in) float32 of a packed matrix in each way it is used: as a `product`, as a `lookup`, or both.

        Raises:
            Malformed: no node computes with these initializers.
        """
        found: dict[str, np.ndarray] = {}
        for way in ("product", "lookup"):
            inside = self._inside(names, way)
            if inside is not None and way == "product":
                found[way] = self._product(*inside, names, shape[1])
            elif inside is not None:
                found[way] = self._lookup(*inside, names, shape[0])
        if not found:
            raise Malformed("no node of the graph computes with it", tensor=min(names))
        return found

    def _product(self, probe: str, result: str, names: set[str], cols: int) -> np.ndarray:
        """The product with the identity, `cols` = in."""
        session, rank = self._session(probe, result, names, lookup=False)
        step = max(1, _ELEMENTS // cols)
        parts = []
        for start in range(0, cols, step):
            rows = np.zeros((min(step, cols - start), cols), np.float32)
            rows[np.arange(len(rows)), start + np.arange(len(rows))] = 1
            (found,) = session.run(None, {"probe": rows.reshape((1,) * (rank - 2) + rows.shape)})
            parts.append(found.reshape(len(rows), -1))
        return np.ascontiguousarray(np.concatenate(parts).T, np.float32)

    def _lookup(self, probe: str, result: str, names: set[str], rows: int) -> np.ndarray:
        """Every row looked up."""
        session, _ = self._session(probe, result, names, lookup=True)
        parts = []
        for start in range(0, rows, _ROWS):
            (found,) = session.run(None, {"probe": np.arange(start, min(start + _ROWS, rows), dtype=np.int64)[None]})
            parts.append(found[0])
        return np.concatenate(parts).astype(np.float32)

    def _session(self, probe: str, result: str, names: set[str], *, lookup: bool) -> tuple[ort.InferenceSession, int]:
        """A session on the nodes between two values, and the rank that its input needs.

        Where the matrix of `names` is one of several in a product, it is the only one (onnx_joined_products.py).
        """
        import onnx
        import onnxruntime as ort

        copies = []
        for node in self._between(result, probe):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = ["probe" if name == probe else name for name in node.input]
            kept = [a for a in node.attribute if a.name != "accuracy_level"]  # activations stay float32
            del copy.attribute[:]
            copy.attribute.extend(kept)
            copies.append(copy)
        copies = alone(copies, names, self.initializers)
        used = [
            self.initializers[n] for n in dict.fromkeys(n for c in copies for n in c.input) if n in self.initializers
        ]
        blocks = [c.input[1] for c in copies if c.op_type == "Reshape" and c.input[0] == "probe"]
        rank = len(self.array(self.initializers[blocks[0]])) - 1 if blocks else _RANK
        kind = onnx.TensorProto.INT64 if lookup else onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            copies, "probe", [onnx.helper.make_tensor_value_info("probe", kind, None)],
            [onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None)], used,
        )  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path.parent))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session, rank

    def _inside(self, names: set[str], way: str) -> tuple[str, str] | None:
        """Data input of the nodes that compute with the given initializers in one way, and the value they end in."""
        constants, values = set(names), dict[str, None]()
        inside: list[onnx.NodeProto] = []
        probe, numbers = "", set[str]()
        for node in self.model.graph.node:
            inputs = [name for name in node.input if name]
            if constants.intersection(inputs):
                if all(name in constants or name in self.initializers for name in inputs):
                    constants.update(node.output)
                    continue
                if (node.op_type in _LOOKUPS) != (way == "lookup"):
                    continue
                if not probe and way == "lookup":
                    probe = self._index(node.input[1])
                    numbers = self._of_index(probe)
                probe = probe or node.input[0]
            elif not self._goes_on(node, values, numbers):
                continue
            inside.append(node)
            values.update(dict.fromkeys(node.output))
        if not inside:
            return None
        result = next(name for name in values if not any(name in node.input for node in inside))
        return probe, result

    def _goes_on(self, node: onnx.NodeProto, values: Iterable[str], numbers: set[str]) -> bool:
        """Whether a node makes more of what the weight made, and nothing else."""
        inputs = [name for name in node.input if name]
        if numbers and node.op_type in _BITS and any(name in values for name in inputs):
            return all(name in values or name in numbers or name in self.initializers for name in inputs)
        return bool(inputs) and node.op_type in _JOINS and all(name in values for name in inputs)

    def _index(self, name: str) -> str:
        """The index that the index of a Gather was computed from."""
        node = self.producer.get(name)
        if node is None or node.op_type not in _OF_INDEX or any(n not in self.initializers for n in node.input[1:]):
            return name
        return self._index(node.input[0])

    def _of_index(self, name: str) -> set[str]:
        """What is computed from an index and constants alone."""
        found = {name}
        for node in self.model.graph.node:
            known = all(n in found or n in self.initializers for n in node.input)
            if node.op_type in _OF_INDEX and known and found.intersection(node.input):
                found.update(node.output)
        return found

    def _between(self, result: str, probe: str) -> list[onnx.NodeProto]:
        """Nodes on the way from `probe` to `result`, in graph order."""
        wanted: list[onnx.NodeProto] = []
        open_values = [result]
        while open_values:
            name = open_values.pop()
            node = self.producer.get(name)
            if name == probe or node is None or any(node is w for w in wanted):
                continue
            wanted.append(node)
            open_values += [n for n in node.input if n]
            if len(wanted) > _MOST_NODES:
                raise Malformed(f"the nodes before {result} cannot be cut out of the graph")
        return [node for node in self.model.graph.node if any(node is w for w in wanted)]


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n * 8 / bits) int32 of uint8 (rows, n): the first code in the lowest bits."""
    shifts = np.arange(0, 8, bits)
    codes = (packed[..., None].astype(np.int32) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def _flag(node: onnx.NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
