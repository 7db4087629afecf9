"""The graph for onnxruntime-genai is the published one with the last token cut out, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tightship.exporters.to_onnx import OnnxExporter
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.onnx_twin import twin_faults
from tightship.validators.parity import judge

EXAMPLES = Path(__file__).parents[2] / "examples"
Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp32")
    checkpoint, exporter = open_checkpoint(EXAMPLES / "ember"), OnnxExporter(judge=judge)
    exporter.export(checkpoint, exporter.plan(checkpoint, Target("onnx")), directory)
    return directory


def node(graph: onnx.GraphProto, op: str) -> onnx.NodeProto:
    """The last one of a type."""
    return [found for found in graph.node if found.op_type == op][-1]


def two_tokens(graph: onnx.GraphProto) -> None:
    start = next(i for i in graph.initializer if i.name == node(graph, "Slice").input[1])
    start.CopyFrom(numpy_helper.from_array(np.asarray([-2]), start.name))


def every_token(graph: onnx.GraphProto) -> None:
    cut = node(graph, "Slice")
    cut.CopyFrom(onnx.helper.make_node("Identity", [cut.input[0]], [cut.output[0]]))


def another_epsilon(graph: onnx.GraphProto) -> None:
    next(a for a in node(graph, "RMSNormalization").attribute if a.name == "epsilon").f = 1e-3


def crossed_inputs(graph: onnx.GraphProto) -> None:
    product = node(graph, "Mul")
    product.input[0], product.input[1] = product.input[1], product.input[1]


def another_place(graph: onnx.GraphProto) -> None:
    first, second, *_ = [i for i in graph.initializer if i.name.endswith("mlp.down_proj.weight")]
    entries = [next(e for e in i.external_data if e.key == "offset") for i in (first, second)]
    entries[0].value = entries[1].value


def one_more(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "more"))


def test_the_twin_is_the_same_graph(artifact: Path) -> None:
    assert [*twin_faults(artifact / "model.onnx", artifact / "genai.onnx")] == []


@pytest.mark.parametrize(
    ("edit", "tensor", "said"),
    [
        (two_tokens, None, "has 0 nodes that cut out the last token"),
        (every_token, None, "has 0 nodes that cut out the last token"),
        (another_epsilon, None, "computes something else"),
        (crossed_inputs, None, "computes something else"),
        (another_place, "model.layers.0.mlp.down_proj.weight", "different values"),
        (one_more, "more", "only one of"),
    ],
)
def test_whatever_else_differs_is_named(
    artifact: Path, tmp_path: Path, edit: Edit, tensor: str | None, said: str
) -> None:
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copy(artifact / name, tmp_path)
    model = onnx.load(artifact / "genai.onnx", load_external_data=False)
    edit(model.graph)
    onnx.save(model, tmp_path / "genai.onnx")
    ((found, sentence),) = twin_faults(tmp_path / "model.onnx", tmp_path / "genai.onnx")
    assert found == tensor
    assert said in sentence
