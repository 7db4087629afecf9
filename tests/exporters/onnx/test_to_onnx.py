"""ONNX artifacts of the embedded checkpoints, judged by ONNX Runtime, onnxruntime-genai and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate
from tightship.exporters.onnx_storage import Style
from tightship.exporters.to_onnx import reference_graph
from tightship.formats.layouts import parse_layout
from tightship.formats.onnx_file import read_onnx
from tightship.opening import open_checkpoint
from tightship.validators.parity import judge
from tightship.validators.runtimes import genai, onnx_runtime
from tightship.weights import Dense, Quantized

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))


def test_as_it_is_equals_transformers(ember: Checkpoint, lab: Any) -> None:
    """bf16 weights, stored as such; one pass and decoding; optimisations off and as shipped; and in genai."""
    directory, _, exported = lab.build(ember)
    expected = lab.expected(ember, EXAMPLES / "ember", IDS)["logits"]
    for mode in ("graph", "shipped"):
        for want in ("outputs", "decode"):
            assert lab.apart(lab.run(directory, IDS, mode=mode, want=want)["logits"], expected) <= 1e-5
    assert lab.apart(genai.run({"artifact": str(directory)}, {"input_ids": IDS})[1]["logits"], expected) <= 1e-5
    assert exported.main == "model.onnx"
    assert {"config.json", "genai_config.json", "tokenizer.json", "model.onnx_data"} <= set(exported.files)


def test_padding_on_either_side_changes_nothing(ember: Checkpoint, lab: Any) -> None:
    directory, _, _ = lab.build(ember)
    alone = lab.run(directory, IDS[:1, :5])["logits"][0]
    for left in (False, True):
        ids, mask = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
        kept = slice(7, None) if left else slice(5)
        ids[0, kept], mask[0, kept], ids[1], mask[1] = IDS[0, :5], 1, IDS[1], 1
        job = {"artifact": str(directory), "main": "model.onnx", "mode": "graph", "want": "decode", "prefill": 9}
        padded = onnx_runtime.run(job, {"input_ids": ids, "attention_mask": mask})[1]["logits"][0, kept]
        assert lab.apart(padded, alone) <= 1e-5


@pytest.mark.parametrize(("scheme", "shared"), [("int8", True), ("int4-portable", False)])
def test_greedy_text_of_genai_is_our_own_loops(ember: Checkpoint, lab: Any, scheme: str, shared: bool) -> None:
    """64 tokens: genai fills the cache in place where the graph can, our loop hands it from step to step."""
    directory, _, exported = lab.build(ember, scheme)
    settings = json.loads((directory / "genai_config.json").read_text())
    assert settings["search"]["past_present_share_buffer"] is shared
    assert ("fused" in exported.graph_source) is shared
    prompt = IDS[0, :6]
    graph = onnx_runtime.Graph(onnx_runtime.open_session(directory / "model.onnx", "shipped"))
    theirs = genai.run({"artifact": str(directory), "want": "generate", "tokens": 64}, {"input_ids": prompt[None]})
    kept = theirs[1]["tokens"][0]
    ended = np.flatnonzero(kept == -1)
    stop = int(ended[0]) if len(ended) else 64
    assert stop > 32
    np.testing.assert_array_equal(kept[:stop], graph.greedy(prompt, 64)[:stop])


def test_a_graph_in_a_folder_of_its_own(ember: Checkpoint, lab: Any) -> None:
    """As model hubs have it: the graph in onnx/, everything else beside that folder."""
    directory, _, exported = lab.build(ember, "int4", folder="onnx")
    assert exported.main == "onnx/model.onnx"
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "config.json", "genai_config.json"} <= set(exported.files)
    job = {"artifact": str(directory), "want": "generate", "tokens": 4}
    theirs = genai.run(job, {"input_ids": IDS[:1, :6]})[1]["tokens"][0]
    graph = onnx_runtime.Graph(onnx_runtime.open_session(directory / exported.main, "shipped"))
    np.testing.assert_array_equal(theirs, graph.greedy(IDS[0, :6], 4))


def test_the_same_bytes_twice_and_no_word_of_the_machine(ember: Checkpoint, lab: Any) -> None:
    first, _, exported = lab.build(ember, "int4")
    second, _, _ = lab.build(ember, "int4")
    for name in exported.files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    model = onnx.load(first / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert not model.producer_name
    assert not model.metadata_props
    text = (first / "model.onnx").read_bytes()
    for word in (b"site-packages", b".py", b"/tmp", b"/root", b"/home", b"mobius"):
        assert word not in text


def test_masked_language_model_gives_logits_and_hidden_states(lab: Any) -> None:
    bert = open_checkpoint(EXAMPLES / "ember-bert")
    directory, plan, exported = lab.build(bert, "int8")
    solved = lab.rounded(bert, lab.exporter.layout_for(bert, plan.target))
    ids = IDS % 2048
    expected = lab.expected(solved, EXAMPLES / "ember-bert", ids)
    got = lab.run(directory, ids)
    for name in ("logits", "last_hidden_state"):
        assert lab.apart(got[name], expected[name]) <= 1e-5
    assert "genai_config.json" not in exported.files
    assert lab.nodes(directory, "MatMulNBits")


def test_reference_graph_decodes_everything(ember: Checkpoint, lab: Any, tmp_path: Path) -> None:
    layout = parse_layout("int4-g64-asym")
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized)
    path = reference_graph(mixed, tmp_path, judge)
    expected = lab.expected(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(path.parent, IDS)["logits"], expected) <= 1e-5
    types = {i.data_type for i in onnx.load(path, load_external_data=False).graph.initializer}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def test_genai_config_has_no_key_of_our_own(ember: Checkpoint, lab: Any) -> None:
    directory, _, _ = lab.build(ember)
    config = json.loads((directory / "genai_config.json").read_text())
    assert config["model"]["vocab_size"] == 1024
    assert config["model"]["context_length"] == config["search"]["max_length"] == 512
    assert config["model"]["decoder"]["num_key_value_heads"] == 2


def test_a_tensor_that_the_graph_would_drop_is_an_error(ember: Checkpoint, tmp_path: Path) -> None:
    stranger = ember.with_weights({"lm_head.weight": Dense.of(np.zeros((1024, 256), np.float32))})
    shapes = {name: tuple(ember.resolve(name).shape) for name in ember.weights}
    skeleton = MobiusCandidate().build(ember.config, ember.architecture, shapes)
    with pytest.raises(Unsupported, match="does not read") as caught:
        write_graph(skeleton, stranger, tmp_path, Style())
    assert caught.value.tensor == "lm_head.weight"


def test_the_strict_reader_opens_our_files(ember: Checkpoint, lab: Any) -> None:
    directory, plan, _ = lab.build(ember, "int4")
    file = read_onnx(directory / "model.onnx")
    assert file.files == ("model.onnx_data",)
    assert file.metadata["opsets"] == {"ai.onnx": 23, "com.microsoft": 1}
    logical = sum(int(np.prod(t.shape)) for t in plan.tensors)
    assert logical <= file.weights <= logical + 2 * 512 * 32 + 64  # rotary tables and shape constants on top
