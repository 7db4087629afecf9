"""Several products of one input, laid side by side: one product by the matrices laid side by side.

| pattern                                   | check                                  | rewritten to           |
|-------------------------------------------|----------------------------------------|------------------------|
| Concat of MatMulNBits of one input        | as many operands each, one block, bits | MatMulNBits by Concats |
| Concat of MatMul of one input, by weights | initializers, or casts of them         | MatMul by a Concat     |

In the file every matrix keeps initializers of its own; ONNX Runtime joins them once, when it loads the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_ALONG = {"MatMulNBits": 0, "MatMul": 1}  # the axis of a stored operand on which outputs lie


def join_products(graph: ir.Graph) -> int:
    """Rewrite every Concat that fits; how many there were."""
    found = 0
    joined: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    for node in [n for n in graph if n.op_type == "Concat" and not n.domain]:
        products = [value.producer() if value is not None else None for value in node.inputs]
        makers = [product for product in products if product is not None]
        if len(makers) == len(products) and _fit(makers):
            _join(graph, node, makers, joined)
            found += 1
    return found


def _fit(products: list[ir.Node]) -> bool:
    """Whether these are products of one kind of one input, that nobody else reads."""
    first = products[0]
    if first.op_type not in _ALONG or len(set(products)) != len(products):
        return False
    return all(
        product.op_type == first.op_type
        and product.inputs[0] is first.inputs[0]
        and len(product.inputs) == len(first.inputs)
        and _numbers(product) == _numbers(first)
        and all(_is_stored(value) for value in product.inputs[1:])
        and len(product.outputs[0].uses()) == 1
        for product in products
    )


def _numbers(product: ir.Node) -> dict[str, int]:
    return {name: attribute.as_int() for name, attribute in product.attributes.items() if name != "N"}


def _is_stored(value: ir.Value | None) -> bool:
    """An initializer, or the wider form of one."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "Cast":
        return _is_stored(maker.inputs[0])
    return value is not None and maker is None and not value.is_graph_input()


def _join(
    graph: ir.Graph, node: ir.Node, products: list[ir.Node], joined: dict[tuple[ir.Value | None, ...], ir.Value]
) -> None:
    """One product in the place of a Concat; `joined` keeps what was joined before, for blocks that share weights."""
    import onnx_ir as ir
    from onnx_ir import convenience

    first = products[0]
    new: list[ir.Node] = []
    operands = []
    for place in range(1, len(first.inputs)):
        parts = tuple(product.inputs[place] for product in products)
        if parts not in joined:
            new.append(ir.node("Concat", parts, {"axis": _ALONG[first.op_type]}))
            new[-1].name = new[-1].outputs[0].name = f"{node.name}.operand.{place}"
            joined[parts] = new[-1].outputs[0]
        operands.append(joined[parts])
    attributes = _numbers(first)
    if "N" in first.attributes:
        attributes["N"] = sum(product.attributes["N"].as_int() for product in products)
    whole = ir.node(first.op_type, [first.inputs[0], *operands], attributes, domain=first.domain)
    whole.name = f"{node.name}.product"
    convenience.replace_nodes_and_values(graph, node, [node], [*new, whole], [node.outputs[0]], [whole.outputs[0]])
    for product in products:
        graph.remove(product, safe=True)
