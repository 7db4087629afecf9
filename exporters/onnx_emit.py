"""Writes the nodes that read stored weights into a skeleton's graph, and collects their initializers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tightship.activations import Activations
from tightship.errors import Unsupported
from tightship.exporters.onnx_activations import by_token, in_fixed_range
from tightship.exporters.onnx_lookups import contrib_rows, standard_rows, views
from tightship.exporters.onnx_nodes import NodeWriter, rank_of
from tightship.exporters.onnx_storage import (
    Style,
    blocked_of,
    by_channel,
    dense_initializer,
    nbits_of,
    operand_initializers,
)
from tightship.exporters.onnx_units import Unit, Use
from tightship.formats.packings import onnx_table
from tightship.formats.packings.matmul_nbits import NBits
from tightship.weights import Dense, Factored, Quantized, Stored

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _INT32 = 1, 6


class Emitter(NodeWriter):
    """Puts units into one graph."""

    def __init__(self, graph: ir.Graph, style: Style, activations: Mapping[str, Activations] | None = None) -> None:
        super().__init__(graph)
        self.style = style
        self.activations = activations or {}

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
        stored = self.add(dense_initializer(unit.name, weight, turned=not plain))
        narrow = _is_narrow(stored)
        for use in unit.uses:
            if narrow and use.is_lookup:
                use.node.replace_input_with(use.index, stored)
                self._widen_after(use.node)
                continue
            value = self.first("Cast", stored, attributes={"to": _FLOAT}) if narrow else stored
            if use.turned and plain:
                value = self.first("Transpose", value, attributes={"perm": [1, 0]})
            use.node.replace_input_with(use.index, value)

    def _widen_after(self, node: ir.Node) -> None:
        """Look up the narrow rows first, then widen them: the table is never widened whole."""
        found = node.outputs[0]
        readers = list(found.uses())
        cast = self.node("Cast", [found], {"to": _FLOAT})
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
            stored = self.add(dense_initializer(name, weight, turned=True))
            wide = self.first("Cast", stored, attributes={"to": _FLOAT}) if _is_narrow(stored) else stored
            return self.append(nodes, "MatMul", [x, wide])
        if isinstance(weight, Quantized):
            return self._quantized_product(x, name, weight, nodes, table=False)
        if isinstance(weight, Factored):
            inner = self._multiply(x, f"{name}.right", weight.right, nodes)
            return self._multiply(inner, f"{name}.left", weight.left, nodes)
        base = self._multiply(x, f"{name}.base", weight.base, nodes)
        residual = self._multiply(x, f"{name}.residual", weight.residual, nodes)
        return self.append(nodes, "Add", [base, residual])

    def _quantized_product(
        self, x: ir.Value, name: str, weight: Quantized, nodes: list[ir.Node], *, table: bool
    ) -> ir.Value:
        if by_channel(weight, self.style) and not table:
            return self._integer_product(x, name, weight, nodes)
        if onnx_table.fits(weight.layout):
            return self.append(nodes, "MatMul", [x, self._out_of_table(name, weight, nodes)])
        operands = self._operands(name, weight, table=table)
        offsets = operands.pop("offsets", None)
        spec = nbits_of(weight, table=table)
        if self.style.portable:
            attributes = {"axis": 0, "block_size": spec.block}
            dense = self.append(nodes, "DequantizeLinear", list(operands.values()), attributes)
            product = self.append(nodes, "MatMul", [x, dense])
        else:
            rows, cols = weight.shape
            attributes = {"K": cols, "N": rows, "bits": spec.bits, "block_size": spec.block}
            attributes["accuracy_level"] = self.style.accuracy_level
            if not spec.zero_points:  # a lookup's, of a shared table: those meant without any, a fifth slower to read
                operands.pop("zero_points", None)
            inputs = [x, *operands.values()]
            product = self.append(nodes, "MatMulNBits", inputs, attributes, domain="com.microsoft")
        if offsets is None:
            return product
        return self.append(nodes, "Add", [product, self._minimum(x, offsets, spec, nodes)])

    def _out_of_table(self, name: str, weight: Quantized, nodes: list[ir.Node]) -> ir.Value:
        """The matrix (in, out) in float32, from initializers alone."""
        operands = self._operands(name, weight)
        if "table" in operands:
            index = self.append(nodes, "Cast", [operands["codes"]], {"to": _INT32})
            found = self.append(nodes, "Gather", [operands["table"], index], {"axis": 0})
        else:
            found = self.append(nodes, "Cast", [operands["codes"]], {"to": _FLOAT})
        if "scales" in operands:
            places = onnx_table.block_of_column(weight.layout, weight.shape[1])
            scales = operands["scales"]
            if _is_narrow(scales):
                scales = self.append(nodes, "Cast", [scales], {"to": _FLOAT})
            if places.any():
                key = f"blocks_{len(places)}_{onnx_table.group_of(weight.layout)}"
                scales = self.append(nodes, "Gather", [scales, self.number(key, places)], {"axis": 0})
            found = self.append(nodes, "Mul", [found, scales])
        return self.append(nodes, "Div", [found, operands["divisor"]]) if "divisor" in operands else found

    def _integer_product(self, x: ir.Value, name: str, weight: Quantized, nodes: list[ir.Node]) -> ir.Value:
        """x rounded to 8 bits, times a matrix with one scale a row."""
        matrix = self.append(nodes, "DequantizeLinear", list(self._operands(name, weight).values()), {"axis": 1})
        module = name.split(".rows", maxsplit=1)[0].removesuffix(".weight")
        said = self.activations.get(module)
        if said is not None and said.scale is not None:
            return self.append(nodes, "MatMul", [in_fixed_range(self, x, module, said), matrix])
        if said is None and not self.style.dynamic:
            raise Unsupported("this matrix has integers, but nothing says how its inputs are rounded", tensor=name)
        rounded, scale = by_token(self, x)
        return self.append(nodes, "Mul", [self.append(nodes, "MatMul", [rounded, matrix]), scale])

    def _minimum(self, x: ir.Value, offsets: ir.Value, spec: NBits, nodes: list[ir.Node]) -> ir.Value:
        """block_sums(x) @ offsets: what a minimum per block adds, without float zero points."""
        shape = self.integers([0] * (rank_of(x) - 1) + [spec.blocks, spec.block])
        blocks = self.append(nodes, "Reshape", [x, shape])
        sums = self.append(nodes, "ReduceSum", [blocks, self.integers([-1])], {"keepdims": 0})
        return self.append(nodes, "MatMul", [sums, offsets])

    def _look_up(self, ids: ir.Value, unit: Unit, nodes: list[ir.Node]) -> None:
        weight = unit.weight
        if not isinstance(weight, Quantized):
            raise Unsupported("a low-rank embedding has no lookup in ONNX", tensor=unit.tensor, hint="leave it dense")
        if not self.style.portable:
            operands = self._operands(unit.name, weight, table=True)
            contrib_rows(self, ids, operands, nbits_of(weight, table=True), nodes)
            return
        blocked = blocked_of(weight, table=True)
        items = list(operand_initializers(unit.name, weight, self.style, table=True).values())
        shared = any(use.is_linear for use in unit.uses)
        for item in items if shared else ():
            self.add(item)
        read = views(unit.name, items, blocked, weight.shape[0], shared=shared)
        standard_rows(self, ids, {key: self.add(item) for key, item in read.items()}, blocked, nodes)

    def _operands(self, name: str, weight: Quantized, *, table: bool = False) -> dict[str, ir.Value]:
        items = operand_initializers(name, weight, self.style, table=table)
        return {key: self.add(item) for key, item in items.items()}

    def _replace(self, use: Use, nodes: Sequence[ir.Node]) -> None:
        from onnx_ir import convenience

        old = use.node
        convenience.replace_nodes_and_values(self.graph, old, [old], nodes, [old.outputs[0]], [nodes[-1].outputs[0]])


def _is_narrow(value: ir.Value) -> bool:
    """A float type that must be widened before it is computed with."""
    return value.dtype is not None and value.dtype.is_floating_point() and value.dtype.value != _FLOAT


def _given(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    if value is None:
        raise Unsupported(f"a {node.op_type} of the graph has no input {index}")
    return value
