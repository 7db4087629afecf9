"""One matrix cut out of a product by three: what ONNX Runtime makes of it, and orders that do not fit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from tightship.errors import Malformed
from tightship.validators.onnx_joined_products import alone

COLS, BLOCK = 32, 16
ROWS = {"q": 24, "k": 8, "v": 8}
OPERANDS = ("B", "scales", "zero_points")


def initializers() -> dict[str, onnx.TensorProto]:
    """Random 4-bit codes, scales and zero points of each matrix; scales in float16."""
    random = np.random.default_rng(0)
    found = {}
    for word, rows in ROWS.items():
        arrays = {
            "B": random.integers(0, 256, (rows, COLS // BLOCK, BLOCK // 2), np.uint8),
            "scales": random.normal(size=(rows, COLS // BLOCK)).astype(np.float16),
            "zero_points": random.integers(0, 256, (rows, 1), np.uint8),
        }
        found |= {f"{word}.{key}": numpy_helper.from_array(array, f"{word}.{key}") for key, array in arrays.items()}
    return found


def nodes(**orders: str) -> list[onnx.NodeProto]:
    """A product by the three; `orders` of an operand that is not laid as q, k, v."""
    made = [helper.make_node("Cast", [f"{word}.scales"], [f"{word}.wide"], to=onnx.TensorProto.FLOAT) for word in ROWS]
    for operand in OPERANDS:
        word = "wide" if operand == "scales" else operand
        parts = [f"{letter}.{word}" for letter in orders.get(operand, "qkv")]
        made.append(helper.make_node("Concat", parts, [operand], axis=0))
    product = helper.make_node("MatMulNBits", ["x", *OPERANDS], ["y"], "product", domain="com.microsoft")
    numbers = {"N": sum(ROWS.values()), "K": COLS, "bits": 4, "block_size": BLOCK}
    product.attribute.extend(helper.make_attribute(key, number) for key, number in numbers.items())
    return [*made, product]


def multiplied(graph: list[onnx.NodeProto], held: dict[str, onnx.TensorProto]) -> np.ndarray:
    """(rows, cols) that ONNX Runtime multiplies with."""
    floats = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    used = [tensor for name, tensor in held.items() if any(name in node.input for node in graph)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(graph, "product", floats[:1], floats[1:], used)
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(COLS, dtype=np.float32)})[0].T


@pytest.mark.parametrize("order", ["qkv", "vqk"])
def test_it_is_those_rows_of_the_whole_product(order: str) -> None:
    """By ONNX Runtime; three nodes of all are left, and one matrix's rows."""
    held, orders = initializers(), dict.fromkeys(OPERANDS, order)
    whole = multiplied(nodes(**orders), held)
    start = 0
    for word in order:
        cut = alone(nodes(**orders), {f"{word}.{operand}" for operand in OPERANDS}, held)
        assert [node.op_type for node in cut] == ["Cast", "MatMulNBits"]
        assert list(cut[1].input) == ["x", f"{word}.B", f"{word}.wide", f"{word}.zero_points"]
        np.testing.assert_array_equal(multiplied(cut, held), whole[start : start + ROWS[word]])
        start += ROWS[word]


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("word", list(ROWS))
def test_operands_in_different_orders_are_found(operand: str, word: str) -> None:
    """Shapes fit, so ONNX Runtime runs the graph."""
    held, swapped = initializers(), {operand: "qvk"}
    assert multiplied(nodes(**swapped), held).shape == (sum(ROWS.values()), COLS)
    with pytest.raises(Malformed, match="the operands of product list different matrices: q, k, v; q, v, k"):
        alone(nodes(**swapped), {f"{word}.{name}" for name in OPERANDS}, held)


def test_an_operand_of_one_matrix_is_found() -> None:
    graph = nodes()
    graph[-1].input[2] = "q.wide"
    with pytest.raises(Malformed, match="different matrices: q; q, k, v"):
        alone(graph, {"q.B"}, initializers())


def test_rows_that_are_not_all_or_beside_each_other_are_found() -> None:
    graph = nodes()
    next(attribute for attribute in graph[-1].attribute if attribute.name == "N").i -= 8
    with pytest.raises(Malformed, match="product says that it has 32 outputs; its matrices have 40"):
        alone(graph, {"q.B"}, initializers())
    graph = nodes()
    graph[3].attribute[0].i = 1
    with pytest.raises(Malformed, match="do not lie below each other"):
        alone(graph, {"q.B"}, initializers())
