"""Cuts the nodes around a weight out of a published ONNX graph and lets ONNX Runtime say what the weight is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tightship.errors import Malformed

if TYPE_CHECKING:
    import onnx

_ELEMENTS = 1 << 22
_MOST_NODES = 32
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_JOINS = ("Add", "Cast", "DequantizeLinear")  # of values that the weight itself made
_RANK = 3


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
            for attribute in node.attribute:
                if attribute.name == "bits":
                    return int(attribute.i)
        return 4  # the operators' default

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
            if node.op_type == "Cast":
                yield from self._ways(node.output[0])
            elif node.op_type == "Transpose":
                for way in self._ways(node.output[0]):
                    yield "plain" if way == "turned" else "turned"
            elif index == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))):
                yield "turned"
            else:
                yield "plain"

    def matrix(self, names: set[str], cols: int) -> np.ndarray:
        """(out, in) float32 of a packed matrix: its product with the identity, `cols` = in."""
        session, rank = self._session(names)
        step = max(1, _ELEMENTS // cols)
        parts = []
        for start in range(0, cols, step):
            rows = np.zeros((min(step, cols - start), cols), np.float32)
            rows[np.arange(len(rows)), start + np.arange(len(rows))] = 1
            (found,) = session.run(None, {"probe": rows.reshape((1,) * (rank - 2) + rows.shape)})
            parts.append(found.reshape(len(rows), -1))
        return np.ascontiguousarray(np.concatenate(parts).T, np.float32)

    def table(self, names: set[str], rows: int) -> np.ndarray:
        """(rows, cols) float32 of a packed table: every row looked up."""
        session, _ = self._session(names)
        parts = []
        for start in range(0, rows, 4096):
            (found,) = session.run(None, {"probe": np.arange(start, min(start + 4096, rows), dtype=np.int64)[None]})
            parts.append(found[0])
        return np.concatenate(parts).astype(np.float32)

    def _session(self, names: set[str]) -> tuple[object, int]:
        """A session on the nodes that use the given initializers, from their data input to their one result."""
        import onnx
        import onnxruntime as ort

        inside, probe, result = self._inside(names)
        nodes = self._between(result, probe, names)
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = ["probe" if name == probe else name for name in node.input]
            kept = [a for a in node.attribute if a.name != "accuracy_level"]  # activations stay float32
            del copy.attribute[:]
            copy.attribute.extend(kept)
            copies.append(copy)
        used = [
            self.initializers[n] for n in dict.fromkeys(n for c in nodes for n in c.input) if n in self.initializers
        ]
        shapes = [len(self.array(self.initializers[n.input[1]])) for n in nodes if n.op_type == "Reshape"]
        lookup = inside[0].op_type in _LOOKUPS
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
        return session, (shapes[0] - 1 if shapes else _RANK)

    def _inside(self, names: set[str]) -> tuple[list[onnx.NodeProto], str, str]:
        """Nodes that compute with the given initializers, their data input, and the value they end in."""
        constants, values = set(names), dict[str, None]()
        inside: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            inputs = [name for name in node.input if name]
            if constants.intersection(inputs):
                if all(name in constants or name in self.initializers for name in inputs):
                    constants.update(node.output)
                    continue
            elif not inputs or node.op_type not in _JOINS or not all(name in values for name in inputs):
                continue
            inside.append(node)
            values.update(dict.fromkeys(node.output))
        ends = [name for name in values if not any(name in node.input for node in inside)]
        if not ends:
            raise Malformed("no node of the graph computes with it", tensor=min(names))
        first = inside[0]
        probe = first.input[1] if first.op_type in _LOOKUPS else first.input[0]
        return inside, probe, ends[0]

    def _between(self, result: str, probe: str, names: set[str]) -> list[onnx.NodeProto]:
        """Nodes on the way from `probe` to `result`, in graph order."""
        wanted, open_values = [], [result]
        while open_values:
            name = open_values.pop()
            node = self.producer.get(name)
            if name == probe or node is None or any(node is w for w in wanted):
                continue
            wanted.append(node)
            open_values += [n for n in node.input if n]
            if len(wanted) > _MOST_NODES:
                raise Malformed("the nodes around it cannot be cut out of the graph", tensor=min(names))
        return [node for node in self.model.graph.node if any(node is w for w in wanted)]


def unpack_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n * 8 / bits) int32 of uint8 (rows, n): the first code in the lowest bits."""
    shifts = np.arange(0, 8, bits)
    codes = (packed[..., None].astype(np.int32) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def _flag(node: onnx.NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
