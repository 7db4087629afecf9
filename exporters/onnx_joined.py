"""Several products of one input, laid side by side: one product by the matrices laid side by side.

| pattern                                   | check                                  | rewritten to           |
|-------------------------------------------|----------------------------------------|------------------------|
| Concat of MatMulNBits of one input        | as many operands each, one block, bits | MatMulNBits by Concats |
| Concat of MatMul of one input, by weights | initializers, or casts of them         | MatMul by a Concat     |
| the same with a bias added to each        | initializers                           | and one Add behind it  |

In the file every matrix keeps initializers of its own; ONNX Runtime joins them once, when it loads the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_ALONG = {"MatMulNBits": 0, "MatMul": 1}  # the axis of a stored operand on which outputs lie


def join_products(graph: ir.Graph) -> int:
    """Rewrite every Concat that fits; how many there were."""
    joiner = _Joiner(graph)
    found = 0
    for node in [n for n in graph if n.op_type == "Concat" and not n.domain]:
        parts = [value.producer() for value in node.inputs if value is not None and len(value.uses()) == 1]
        makers = [part for part in parts if part is not None]
        biased = bool(makers) and all(maker.op_type == "Add" and is_stored(maker.inputs[1]) for maker in makers)
        products = [_behind(maker) for maker in makers] if biased else makers
        fit = [product for product in products if product is not None]
        if len(fit) == len(node.inputs) and _alike(fit):
            joiner.join(node, fit, makers if biased else [])
            found += 1
    return found


def _behind(maker: ir.Node) -> ir.Node | None:
    """The node whose output, read by nobody else, a bias is added to."""
    value = maker.inputs[0]
    return value.producer() if value is not None and len(value.uses()) == 1 else None


def _alike(products: list[ir.Node]) -> bool:
    """Whether these are products of one kind of one input."""
    first = products[0]
    if first.op_type not in _ALONG or len(set(products)) != len(products):
        return False
    return all(
        product.op_type == first.op_type
        and product.inputs[0] is first.inputs[0]
        and len(product.inputs) == len(first.inputs)
        and _numbers(product) == _numbers(first)
        and all(is_stored(value) for value in product.inputs[1:])
        for product in products
    )


def _numbers(product: ir.Node) -> dict[str, int]:
    return {name: attribute.as_int() for name, attribute in product.attributes.items() if name != "N"}


def is_stored(value: ir.Value | None) -> bool:
    """An initializer, or the wider form of one."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "Cast":
        return is_stored(maker.inputs[0])
    return value is not None and maker is None and not value.is_graph_input()


class _Joiner:
    """Writes into one graph; blocks that share weights share what is joined."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.known: dict[tuple[ir.Value | None, ...], ir.Value] = {}

    def join(self, node: ir.Node, products: list[ir.Node], adds: list[ir.Node]) -> None:
        """One product in the place of a Concat."""
        import onnx_ir as ir
        from onnx_ir import convenience

        first = products[0]
        new: list[ir.Node] = []
        operands = [
            self._operand(tuple(product.inputs[place] for product in products), _ALONG[first.op_type], new)
            for place in range(1, len(first.inputs))
        ]
        attributes = _numbers(first)
        if "N" in first.attributes:
            attributes["N"] = sum(product.attributes["N"].as_int() for product in products)
        new.append(ir.node(first.op_type, [first.inputs[0], *operands], attributes, domain=first.domain))
        if adds:
            product = new[-1].outputs[0]
            bias = self._operand(tuple(add.inputs[1] for add in adds), 0, new)
            new.append(ir.node("Add", [product, bias]))
        for index, fresh in enumerate(new):
            fresh.name = fresh.outputs[0].name = f"{node.name}.{fresh.op_type}_{index}"
        convenience.replace_nodes_and_values(self.graph, node, [node], new, [node.outputs[0]], [new[-1].outputs[0]])
        for old in (*adds, *products):
            self.graph.remove(old, safe=True)

    def _operand(self, parts: tuple[ir.Value | None, ...], axis: int, new: list[ir.Node]) -> ir.Value:
        """The parts laid side by side."""
        import onnx_ir as ir

        if parts not in self.known:
            new.append(ir.node("Concat", parts, {"axis": axis}))
            self.known[parts] = new[-1].outputs[0]
        return self.known[parts]
