"""One matrix of a product that several share, cut out of a published ONNX graph.

| published                                                    | cut out, for the second matrix           |
|--------------------------------------------------------------|------------------------------------------|
| Concat of a.B, b.B, c.B; of a.scales, b.scales, c.scales     | b.B, b.scales, b.zero_points as they are |
| MatMulNBits by these, N = rows of a + rows of b + rows of c  | MatMulNBits by these, N = rows of b      |

So one matrix is computed instead of all of them. It is those rows of the whole product because every operand lists the
same matrices in one order, from the top down: that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tightship.errors import Malformed

if TYPE_CHECKING:
    import onnx

    Makers = Mapping[str, onnx.NodeProto]
    Initializers = Mapping[str, onnx.TensorProto]


def alone(nodes: Sequence[onnx.NodeProto], names: set[str], initializers: Initializers) -> list[onnx.NodeProto]:
    """The nodes around a packed matrix, in graph order, without the other matrices of its product.

    Args:
        nodes: those of shared products are changed.
        names: initializers of the matrix.
        initializers: of the graph.

    Raises:
        Malformed: the operands of a product do not list the same matrices in one order, or not all of its rows.
    """
    makers = {name: node for node in nodes for name in node.output}
    unread: set[str] = set()
    for node in [node for node in nodes if node.op_type == "MatMulNBits"]:
        parts = [_parts(makers, name) for name in node.input[1:]]
        if max(map(len, parts)) > 1:
            _check(node, makers, initializers, min(names))
            stored = [_stored(makers, name) for name in parts[0]]
            place = next(place for place, name in enumerate(stored) if name in names)
            unread.update(node.input[1:], *parts)
            node.input[1:] = [part[place] for part in parts]
            unread.difference_update(node.input[1:])
            _number(node, "N").i = initializers[stored[place]].dims[0]
    return [node for node in nodes if unread.isdisjoint(node.output)]


def _check(product: onnx.NodeProto, makers: Makers, initializers: Initializers, tensor: str) -> None:
    """Every operand lists the same matrices in one order, below each other, and they are all rows of the product."""
    stored = [[_stored(makers, part) for part in _parts(makers, name)] for name in product.input[1:]]
    orders = {tuple(name.rpartition(".")[0] for name in names) for names in stored}
    if len(orders) != 1:
        found = "; ".join(", ".join(order) for order in sorted(orders))
        raise Malformed(f"the operands of {product.name} list different matrices: {found}", tensor=tensor)
    if any(_number(makers[name], "axis").i != 0 for name in product.input[1:]):
        raise Malformed(f"the operands of {product.name} do not lie below each other", tensor=tensor)
    rows, said = sum(initializers[name].dims[0] for name in stored[0]), _number(product, "N").i
    if rows != said:
        raise Malformed(f"{product.name} says that it has {said} outputs; its matrices have {rows}", tensor=tensor)


def _parts(makers: Makers, name: str) -> list[str]:
    """What an operand is made of: itself, or what is laid side by side in it."""
    maker = makers.get(name)
    return list(maker.input) if maker is not None and maker.op_type == "Concat" else [name]


def _stored(makers: Makers, name: str) -> str:
    """The initializer of an operand, or the one that it is a wider form of."""
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "Cast" else name


def _number(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)
