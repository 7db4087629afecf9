"""Graphs computed in float16 with float32 islands, against transformers in float32 and by the types of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from transformers import GptOssConfig, GptOssForCausalLM

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.fused import FusedCandidate
from tightship.exporters.onnx_candidates.skeleton import DECODER, MAIN
from tightship.exporters.onnx_schemes import style_of
from tightship.exporters.to_onnx import OnnxExporter
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.parity import relative_l2
from tightship.validators.runtimes.onnx_pair import Pair
from tightship.validators.runtimes.onnx_runtime import Graph, open_graph
from tightship.validators.tolerances import tolerances
from tightship.weights import Alias, Dense

Tiny = Callable[[str], Checkpoint]
LIMIT = tolerances().for_run("graph", "onnxruntime", "half")["rel_l2"].threshold


def halved(checkpoint: Checkpoint) -> Checkpoint:
    changed = {n: w for n, w in checkpoint.weights.items() if not isinstance(w, Alias)}
    return checkpoint.with_weights({n: Dense.of(w.value().astype(np.float16)) for n, w in changed.items()})


def written(checkpoint: Checkpoint, folder: Path, scheme: str) -> Graph | Pair:
    style = style_of(Target("onnx", scheme))
    source = FusedCandidate(DirectCandidate()) if style.fused else DirectCandidate()
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    write_graph(source.build(checkpoint.config, checkpoint.architecture, shapes), checkpoint, folder, style)
    return open_graph(next(path for path in map(folder.joinpath, (MAIN, DECODER)) if path.exists()), "shipped")


@pytest.mark.parametrize("scheme", ["fp16-compute", "fp16-compute-portable"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_padded_batches_through_the_cache(tiny: Tiny, tmp_path: Path, family: str, scheme: str) -> None:
    """Rows padded on the left, right and not at all; also rows of the mask that see nothing stay numbers."""
    checkpoint = halved(tiny(family))
    ids = np.random.default_rng(0).integers(5, 96, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    if family != "gpt2":  # whose places in a table are counted from the first token by transformers
        mask[0, :5] = 0
    expected = ModelView(checkpoint).outputs(ids, mask)["logits"]
    graph = written(checkpoint, tmp_path, scheme)
    given = {"input_ids": ids, "attention_mask": mask}
    for found in (graph.outputs(given), graph.decode(given, 8)):
        off = relative_l2(found["logits"][mask == 1], expected[mask == 1])
        assert 1e-5 < off <= LIMIT


def test_an_encoder_in_float16(tiny: Tiny, tmp_path: Path) -> None:
    bert = halved(tiny("bert"))
    ids = np.random.default_rng(0).integers(5, 96, (2, 12))
    expected = ModelView(bert).outputs(ids, np.ones_like(ids))
    got = written(bert, tmp_path, "fp16-compute-portable").outputs({"input_ids": ids})
    for name, wanted in expected.items():
        assert 1e-5 < relative_l2(got[name], wanted) <= LIMIT


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_and_its_decoder_in_float16(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Both caches hold float16, and steps compute what one pass does."""
    checkpoint = halved(tiny(family))
    rng = np.random.default_rng(0)
    arrays = {"input_ids": rng.integers(7, 96, (3, 12)), "decoder_input_ids": rng.integers(7, 96, (3, 9))}
    arrays["attention_mask"] = (np.arange(12) >= np.array([[0], [3], [5]])).astype(np.int64)
    expected = ModelView(checkpoint).outputs(
        arrays["input_ids"], arrays["attention_mask"], None, arrays["decoder_input_ids"]
    )["logits"]
    graph = written(checkpoint, tmp_path, "fp16-compute-portable")
    for found in (graph.outputs(arrays), graph.decode(arrays, 2)):
        assert 1e-5 < relative_l2(found["logits"], expected) <= LIMIT
    decoder = onnx.load(tmp_path / DECODER, load_external_data=False).graph
    caches = [v for v in (*decoder.input, *decoder.output) if v.name.startswith(("past_key_values.", "present."))]
    assert {v.type.tensor_type.elem_type for v in caches} == {TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model, folder = GptOssForCausalLM(GptOssConfig(**sizes, **heads)), tmp_path_factory.mktemp("gpt-oss")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return halved(open_checkpoint(folder))


def test_a_cache_that_more_than_attention_reads_is_refused(gpt_oss: Checkpoint, tmp_path: Path) -> None:
    """gpt-oss with standard operators pads keys and values with a sink."""
    with pytest.raises(Unsupported, match="caches of plain attention"):
        written(gpt_oss, tmp_path, "fp16-compute-portable")


def test_sinks_in_half(gpt_oss: Checkpoint, tmp_path: Path) -> None:
    """GroupQueryAttention takes them in the type of the queries."""
    ids = np.random.default_rng(0).integers(5, 96, (2, 12))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    expected = ModelView(gpt_oss).outputs(ids, mask)["logits"]
    graph = written(gpt_oss, tmp_path, "fp16-compute")
    arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    kept = mask.astype(bool)
    for found in (graph.outputs(arrays), graph.decode(arrays, 9)):
        assert relative_l2(found["logits"][kept], expected[kept]) <= LIMIT
    nodes = onnx.load(tmp_path / MAIN, load_external_data=False).graph.node
    assert [node.op_type for node in nodes if "Attention" in node.op_type] == ["GroupQueryAttention"] * 2


def test_what_is_computed_in_which_type(tiny: Tiny, tmp_path: Path) -> None:
    """By onnx's own inference: products and attention in float16, norms, sums, softmax and logits in float32."""
    graph = written(halved(tiny("llama")), tmp_path, "fp16-compute-portable")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / MAIN), strict_mode=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    by_type: dict[str, list[int]] = {}
    for node in model.graph.node:
        by_type.setdefault(node.op_type, []).append(kinds[node.output[0]])
    half, whole = TensorProto.FLOAT16, TensorProto.FLOAT
    assert by_type["MatMul"] == [half] * 14 + [whole]  # the last one makes the logits
    assert by_type["Attention"] == [half] * 2
    assert set(by_type["RMSNormalization"]) == {whole}
    assert by_type["Add"][-4:] == [whole] * 4
    for node in model.graph.node:
        if node.op_type == "Attention":
            assert {a.name: a.i for a in node.attribute}["softmax_precision"] == whole
    assert {graph.inputs[name].type for name in graph.past} == {"tensor(float16)"}
    assert kinds["logits"] == whole


def test_bfloat16_has_no_kernels_to_compute_in(tiny: Tiny) -> None:
    import onnxruntime as ort
    from onnx import helper

    with pytest.raises(Unsupported, match="bfloat16 kernels of MatMul"):
        OnnxExporter().layout_for(tiny("llama"), Target("onnx", "bf16-compute"))
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 2]) for name in "xwy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # once this passes, the scheme can be had
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_plan_says_that_it_is_slow(tiny: Tiny) -> None:
    notes = OnnxExporter().plan(halved(tiny("llama")), Target("onnx", "fp16-compute")).notes
    assert "slower than float32" in notes[0]
