"""Writes the nodes that read stored weights into a skeleton's graph, and collects their initializers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tightship.activations import Activations
from tightship.errors import Unsupported
from tightship.exporters.onnx_storage import Style, by_channel, dense_initializer, operand_initializers
from tightship.exporters.onnx_units import Unit, Use
from tightship.formats.layouts.codebook import Codebook
from tightship.formats.onnx_writer import Initializer
from tightship.formats.packings import matmul_nbits
from tightship.formats.packings.matmul_nbits import NBits
from tightship.target import Refused
from tightship.weights import Dense, Factored, Quantized, Stored

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _INT32 = 1, 6


class Emitter:
    """Puts units into one graph. `initializers` are the weights in order of first use, `constants` what nodes need."""

    def __init__(self, graph: ir.Graph, style: Style, activations: Mapping[str, Activations] | None = None) -> None:
        self.graph = graph
        self.style = style
        self.activations = activations or {}
        self.initializers: list[Initializer] = []
        self.constants: list[Initializer] = []
        self._values: dict[str, ir.Value] = {}
        self._last_head: ir.Node | None = None
        self._counter = 0

    def place(self, unit: Unit) -> None:
        """Make every reader of a unit read what is stored.

        Raises:
            Unsupported: a quantized or low-rank tensor is read by something that is neither MatMul nor lookup.
        """
        if isinstance(unit.weight, Dense):
            self._place_dense(unit, unit.weight)
            return
        table = any(use.is_lookup for use in unit.uses)
        for use in unit.uses:
            nodes: list[ir.Node] = []
            if use.is_linear and isinstance(unit.weight, Quantized):
                self._quantized_product(_given(use.node, 0), unit.name, unit.weight, nodes, table=table)
            elif use.is_linear:
                self._multiply(_given(use.node, 0), unit.name, unit.weight, nodes)
            elif use.is_lookup:
                self._look_up(_given(use.node, 1), unit, nodes)
            else:
                raise Unsupported(
                    f"a quantized or low-rank tensor is read by {use.node.op_type}, which takes floats only",
                    tensor=unit.tensor,
                    hint="leave this tensor dense",
                )
            self._replace(use, nodes)

    # Dense

    def _place_dense(self, unit: Unit, weight: Dense) -> None:
        plain = [use for use in unit.uses if not use.turned]
        stored = self._add(dense_initializer(unit.name, weight, turned=not plain))
        narrow = _is_narrow(stored)
        for use in unit.uses:
            if narrow and use.is_lookup:
                use.node.replace_input_with(use.index, stored)
                self._widen_after(use.node)
                continue
            value = self._first("Cast", stored, attributes={"to": _FLOAT}) if narrow else stored
            if use.turned and plain:
                value = self._first("Transpose", value, attributes={"perm": [1, 0]})
            use.node.replace_input_with(use.index, value)

    def _widen_after(self, node: ir.Node) -> None:
        """Look up the narrow rows first, then widen them: the table is never widened whole."""
        found = node.outputs[0]
        readers = list(found.uses())
        cast = self._node("Cast", [found], {"to": _FLOAT})
        self.graph.insert_after(node, cast)
        cast.outputs[0].type, cast.outputs[0].shape = found.type, found.shape
        table = node.inputs[0]
        found.type = table.type if table is not None else None
        for reader, index in readers:
            reader.replace_input_with(index, cast.outputs[0])

    # Quantized, low rank

    def _multiply(self, x: ir.Value, name: str, weight: Stored, nodes: list[ir.Node]) -> ir.Value:
        """Append the nodes of x @ weight.T, x (..., in); the last node's output is the product."""
        if isinstance(weight, Dense):
            stored = self._add(dense_initializer(name, weight, turned=True))
            wide = self._first("Cast", stored, attributes={"to": _FLOAT}) if _is_narrow(stored) else stored
            return self._append(nodes, "MatMul", [x, wide])
        if isinstance(weight, Quantized):
            return self._quantized_product(x, name, weight, nodes, table=False)
        if isinstance(weight, Factored):
            inner = self._multiply(x, f"{name}.right", weight.right, nodes)
            return self._multiply(inner, f"{name}.left", weight.left, nodes)
        base = self._multiply(x, f"{name}.base", weight.base, nodes)
        residual = self._multiply(x, f"{name}.residual", weight.residual, nodes)
        return self._append(nodes, "Add", [base, residual])

    def _quantized_product(
        self, x: ir.Value, name: str, weight: Quantized, nodes: list[ir.Node], *, table: bool
    ) -> ir.Value:
        operands = self._operands(name, weight, table=table)
        if isinstance(weight.layout, Codebook):
            index = self._append(nodes, "Cast", [operands["codes"]], {"to": _INT32})
            dense = self._append(nodes, "Gather", [operands["table"], index], {"axis": 0})
            return self._append(nodes, "MatMul", [x, dense])
        if by_channel(weight, self.style) and not table:
            dense = self._append(nodes, "DequantizeLinear", list(operands.values()), {"axis": 1})
            return self._append(nodes, "MatMul", [self._rounded(x, name), dense])
        offsets = operands.pop("offsets", None)
        spec = nbits_of(weight)
        if self.style.portable:
            attributes = {"axis": 0, "block_size": spec.block}
            dense = self._append(nodes, "DequantizeLinear", list(operands.values()), attributes)
            product = self._append(nodes, "MatMul", [x, dense])
        else:
            rows, cols = weight.shape
            attributes = {"K": cols, "N": rows, "bits": spec.bits, "block_size": spec.block}
            attributes["accuracy_level"] = self.style.accuracy_level
            inputs = [x, *operands.values()]
            product = self._append(nodes, "MatMulNBits", inputs, attributes, domain="com.microsoft")
        if offsets is None:
            return product
        return self._append(nodes, "Add", [product, self._minimum(x, offsets, spec, nodes)])

    def _rounded(self, x: ir.Value, name: str) -> ir.Value:
        """x through 8 bits and back, once for all that round it alike; runtimes fuse this into integer kernels."""
        module = name.split(".rows", maxsplit=1)[0].removesuffix(".weight")
        fixed = self.activations.get(module) if self.style.static else None
        if self.style.static and fixed is None:
            raise Unsupported("this matrix has integers, but its inputs have no fixed range", tensor=name)
        key = f"{x.name}.rounded" + (f".{fixed.scale!r}.{fixed.zero_point}" if fixed else "")
        producer = x.producer()
        if key not in self._values and producer is not None:
            if fixed is None:
                codes = self._node("DynamicQuantizeLinear", [x], outputs=3)
                back = self._node("DequantizeLinear", codes.outputs)
            else:
                parameters = self._range(module, fixed)
                codes = self._node("QuantizeLinear", [x, *parameters])
                back = self._node("DequantizeLinear", [codes.outputs[0], *parameters])
            self.graph.insert_after(producer, [codes, back])
            self._values[key] = back.outputs[0]
        return self._values[key]

    def _range(self, module: str, fixed: Activations) -> list[ir.Value]:
        """Scale and zero point of calibrated activations, as unsigned codes: 128 more, the same numbers.

        Signed ones that several matrices share do not reach ONNX Runtime's integer kernels.
        """
        import numpy as np

        scale = Initializer.of(f"{module}.input_scale", np.asarray(fixed.scale, np.float32))
        zero = Initializer.of(f"{module}.input_zero_point", np.asarray((fixed.zero_point or 0) + 128, np.uint8))
        return [self._add(item, constant=True) for item in (scale, zero)]

    def _minimum(self, x: ir.Value, offsets: ir.Value, spec: NBits, nodes: list[ir.Node]) -> ir.Value:
        """block_sums(x) @ offsets: what a minimum per block adds, without float zero points."""
        shape = self._constant([0] * (_rank(x) - 1) + [spec.blocks, spec.block])
        blocks = self._append(nodes, "Reshape", [x, shape])
        sums = self._append(nodes, "ReduceSum", [blocks, self._constant([-1])], {"keepdims": 0})
        return self._append(nodes, "MatMul", [sums, offsets])

    def _look_up(self, indices: ir.Value, unit: Unit, nodes: list[ir.Node]) -> None:
        weight = unit.weight
        if not isinstance(weight, Quantized):
            raise Unsupported("a low-rank embedding has no lookup in ONNX", tensor=unit.tensor, hint="leave it dense")
        operands = self._operands(unit.name, weight, table=True)
        spec = nbits_of(weight)
        if self.style.portable:
            rows = [self._append(nodes, "Gather", [operand, indices], {"axis": 1}) for operand in operands.values()]
            values = self._append(nodes, "DequantizeLinear", rows, {"axis": 0, "block_size": spec.block})
            rank = _rank(indices)
            self._append(nodes, "Transpose", [values], {"perm": [*range(1, rank + 1), 0]})
            return
        codes = self._first("Reshape", operands["B"], [self._constant([weight.shape[0], -1])])
        attributes = {"bits": spec.bits, "block_size": spec.block, "gather_axis": 0, "quantize_axis": 1}
        inputs = [codes, indices, operands["scales"], operands["zero_points"]]
        self._append(nodes, "GatherBlockQuantized", inputs, attributes, domain="com.microsoft")

    def _operands(self, name: str, weight: Quantized, *, table: bool) -> dict[str, ir.Value]:
        items = operand_initializers(name, weight, self.style, table=table)
        return {key: self._add(item) for key, item in items.items()}

    # Graph

    def _replace(self, use: Use, nodes: Sequence[ir.Node]) -> None:
        from onnx_ir import convenience

        old = use.node
        convenience.replace_nodes_and_values(self.graph, old, [old], nodes, [old.outputs[0]], [nodes[-1].outputs[0]])

    def _add(self, item: Initializer, *, constant: bool = False) -> ir.Value:
        import onnx_ir as ir

        if item.name not in self._values:
            kind = ir.TensorType(ir.DataType(item.data_type))
            self._values[item.name] = ir.Value(name=item.name, type=kind, shape=ir.Shape(item.shape))
            (self.constants if constant else self.initializers).append(item)
        return self._values[item.name]

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        import numpy as np

        name = "shape_" + "_".join(str(n) for n in numbers)
        return self._add(Initializer.of(name, np.asarray(numbers, np.int64)), constant=True)

    def _first(
        self,
        op: str,
        source: ir.Value,
        others: Sequence[ir.Value] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A node on an initializer, in front of everything; made once for each of them."""
        key = f"{source.name}.{op}"
        if key not in self._values:
            node = self._node(op, [source, *others], attributes)
            node.outputs[0].name = key
            if self._last_head is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(self._last_head, node)
            self._last_head = node
            self._values[key] = node.outputs[0]
        return self._values[key]

    def _append(
        self,
        nodes: list[ir.Node],
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        nodes.append(self._node(op, inputs, attributes, domain=domain))
        return nodes[-1].outputs[0]

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        import onnx_ir as ir

        node = ir.node(op, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs)
        self._counter += 1
        node.name = f"weights.{op}_{self._counter}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}" if index else node.name
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return node


def _is_narrow(value: ir.Value) -> bool:
    """A float type that must be widened before it is computed with."""
    return value.dtype is not None and value.dtype.is_floating_point() and value.dtype.value != _FLOAT


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise Unsupported(f"the rank of {value.name} is not known in this graph")
    return len(value.shape)


def nbits_of(weight: Quantized) -> NBits:
    """The MatMulNBits form of a weight whose storage was found exact before."""
    spec = matmul_nbits.nbits_for(weight.layout, weight.shape[1])
    if isinstance(spec, Refused):
        raise Unsupported(spec.reason, hint=", ".join(spec.nearest))
    return spec


def _given(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    if value is None:
        raise Unsupported(f"a {node.op_type} of the graph has no input {index}")
    return value
