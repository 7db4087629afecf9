"""Edits that every candidate's graph goes through until it keeps the contract of `skeleton`."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from tightship.exporters.onnx_candidates.skeleton import BATCH, PAST, SEQUENCE, TOTAL

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding exist; kernels of other providers reach no further
_AXES = {
    "input_ids": (BATCH, SEQUENCE),
    "attention_mask": (BATCH, TOTAL),
    "position_ids": (BATCH, SEQUENCE),
    "token_type_ids": (BATCH, SEQUENCE),
    "logits": (BATCH, SEQUENCE, None),
    "last_hidden_state": (BATCH, SEQUENCE, None),
    "start_logits": (BATCH, SEQUENCE),
    "end_logits": (BATCH, SEQUENCE),
}
_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Let libraries report errors only: what they warn of here (weights without data) is meant so."""
    loggers = [logging.getLogger(name) for name in libraries]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def inline_functions(model: ir.Model) -> None:
    """Replace calls of functions that travel in the model by their bodies, then drop what nobody reads."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    remove_unused(model)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer with data; the one that is there where the name is taken."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    return graph.initializers[name]


def remove_unused(model: ir.Model) -> None:
    """Drop nodes, initializers and opset imports that nobody reads."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    used = {node.domain for node in model.graph}
    for domain in [d for d in model.opset_imports if d and d not in used]:
        del model.opset_imports[domain]


def lower_opset(model: ir.Model) -> None:
    """Opset 24 to 23, where the graph uses nothing that is new in 24."""
    if model.opset_imports.get("") != OPSET + 1:
        return
    for node in model.graph:
        beyond = node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None
        if node.domain == "" and (beyond or node.op_type == "TensorScatter"):
            return
    model.opset_imports[""] = OPSET


def name_contract(model: ir.Model) -> None:
    """Symbolic axes of inputs and outputs as in `skeleton`."""
    import onnx_ir as ir

    decoder = any(_CACHE.fullmatch(value.name or "") for value in model.graph.inputs)
    known = _AXES if decoder else {**_AXES, "attention_mask": (BATCH, SEQUENCE)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name == "logits" and value.shape is not None and len(value.shape) == 2:
            axes = [BATCH, value.shape[1]]
        elif name in known and value.shape is not None:
            axes = [new or old for new, old in zip(known[name], value.shape, strict=True)]
        elif (match := _CACHE.fullmatch(name)) and value.shape is not None:
            length = PAST if match[1] == "past_key_values" else TOTAL
            axes = [BATCH, value.shape[1], length, value.shape[3]]
        else:
            continue
        value.shape = ir.Shape(axes)


def fix_axes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Put numbers in the place of symbolic axes, by their names, wherever a shape is noted."""
    import onnx_ir as ir

    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.outputs, *made):
        if value.shape is not None:
            named = [(axis if isinstance(axis, int) else axis.value, axis) for axis in value.shape]
            value.shape = ir.Shape([sizes.get(name, axis) if isinstance(name, str) else axis for name, axis in named])


def split_gemms(model: ir.Model) -> None:
    """Gemm with plain factors becomes [Transpose,] MatMul and Add, so that every linear is a MatMul."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Gemm" or node.domain:
            continue
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            continue
        left, right, *bias = node.inputs
        nodes = []
        if attributes.get("transB", 0):
            nodes.append(ir.node("Transpose", [right], {"perm": [1, 0]}))
            right = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [left, right]))
        if bias and bias[0] is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]]))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, [nodes[-1].outputs[0]])
