"""ONNX artifacts of the embedded checkpoints, judged by ONNX Runtime, onnxruntime-genai and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tightship.activations import Activations, fixed
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported, UsageError
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate
from tightship.exporters.onnx_candidates.skeleton import Candidate
from tightship.exporters.onnx_emit import Emitter
from tightship.exporters.onnx_storage import Style, storage
from tightship.exporters.onnx_units import Unit, Use
from tightship.exporters.to_onnx import OnnxExporter, reference_graph
from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.float8 import Float8
from tightship.formats.onnx_file import read_onnx
from tightship.formats.onnx_writer import write_onnx
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target, TargetPlan, no_progress
from tightship.validators.integers import digest, pieces_of
from tightship.validators.parity import judge
from tightship.validators.runtimes import genai, onnx_runtime
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Alias, Dense, Factored, Quantized, Sum, Weight

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPORTER = OnnxExporter(judge=judge)
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))
Build = Callable[..., tuple[Path, TargetPlan, Exported]]


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EXAMPLES / "ember")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """(checkpoint, scheme, options) -> artifact directory, plan, what was exported."""

    def make(checkpoint: Checkpoint, scheme: str | None = None, **options: object) -> tuple[Path, TargetPlan, Exported]:
        target = Target("onnx", scheme, options)
        solved = rounded(checkpoint, EXPORTER.layout_for(checkpoint, target))
        directory = tmp_path / f"{target.id}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        plan = EXPORTER.plan(solved, target)
        return directory, plan, EXPORTER.export(solved, plan, directory, no_progress)

    return make


def rounded(checkpoint: Checkpoint, layouts: dict[str, object]) -> Checkpoint:
    """Every tensor rounded to what the scheme wants."""
    changed: dict[str, Weight] = {}
    for name, layout in layouts.items():
        value = checkpoint.resolve(name).value()
        if isinstance(layout, str):
            changed[name] = Dense.of(value.astype(dtype(layout).numpy))
        else:
            changed[name] = Quantized.of(layout, layout.quantize(value))
    return checkpoint.with_weights(changed)


def transformers_outputs(checkpoint: Checkpoint, directory: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' own loader on the directory's files, decoded weights put in their place."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, checkpoint.config["architectures"][0])
    model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in checkpoint.weights.items():
            if not isinstance(weight, Alias):
                model.get_parameter(name).copy_(torch.from_numpy(np.array(weight.value())))
        out = model(torch.from_numpy(ids), output_hidden_states=True)
    return {"logits": out.logits.numpy(), "last_hidden_state": out.hidden_states[-1].numpy()}


def in_onnx_runtime(directory: Path, ids: np.ndarray, **job: object) -> dict[str, np.ndarray]:
    whole = {"artifact": str(directory), "main": "model.onnx", "mode": "graph", **job}
    return onnx_runtime.run(whole, {"input_ids": ids})[1]


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_as_it_is_equals_transformers(ember: Checkpoint, build: Build) -> None:
    """bf16 weights, stored as such; one pass and decoding; optimisations off and as shipped; and in genai."""
    directory, _, exported = build(ember)
    expected = transformers_outputs(ember, EXAMPLES / "ember", IDS)["logits"]
    for mode in ("graph", "shipped"):
        for want in ("outputs", "decode"):
            assert relative_l2(in_onnx_runtime(directory, IDS, mode=mode, want=want)["logits"], expected) <= 1e-5
    assert relative_l2(genai.run({"artifact": str(directory)}, {"input_ids": IDS})[1]["logits"], expected) <= 1e-5
    assert exported.main == "model.onnx"
    assert {"config.json", "genai_config.json", "tokenizer.json", "model.onnx_data"} <= set(exported.files)


def test_padding_on_either_side_changes_nothing(ember: Checkpoint, build: Build) -> None:
    directory, _, _ = build(ember)
    alone = in_onnx_runtime(directory, IDS[:1, :5])["logits"][0]
    for left in (False, True):
        ids, mask = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
        kept = slice(7, None) if left else slice(5)
        ids[0, kept], mask[0, kept], ids[1], mask[1] = IDS[0, :5], 1, IDS[1], 1
        job = {"artifact": str(directory), "main": "model.onnx", "mode": "graph", "want": "decode", "prefill": 9}
        padded = onnx_runtime.run(job, {"input_ids": ids, "attention_mask": mask})[1]["logits"][0, kept]
        assert relative_l2(padded, alone) <= 1e-5


@pytest.mark.parametrize(
    "scheme", ["fp32", "fp16", "int4", "int8", "int2", "int4-portable", "int8-portable", "int8-dynamic"]
)
def test_schemes_compute_what_the_stored_weights_say(ember: Checkpoint, build: Build, scheme: str) -> None:
    directory, plan, _ = build(ember, scheme)
    solved = rounded(ember, EXPORTER.layout_for(ember, plan.target))
    expected = transformers_outputs(solved, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(directory, IDS)["logits"], expected) <= 1e-5
    assert relative_l2(in_onnx_runtime(directory, IDS, mode="shipped", want="decode")["logits"], expected) <= 0.05
    stored = sum(t.nbytes for t in plan.tensors)
    files = sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    assert plan.file_bytes == stored <= files  # vectors of the norms lie in model.onnx


@pytest.mark.parametrize("word", ["int4", "int8-g64-asym", "int3-g16", "int6", "int4-channel"])
def test_the_kernel_multiplies_with_the_layouts_values(ember: Checkpoint, build: Build, word: str) -> None:
    """Each MatMulNBits of the file, cut out and applied to the identity, gives the layout's values, bit by bit."""
    layout = parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    directory, _, _ = build(ember.with_weights(quantized))
    seen = 0
    for name, operands, attributes in nodes_of(directory, "MatMulNBits"):
        got = on_identity(operands, attributes)
        arrays = quantized[name].read()
        np.testing.assert_array_equal(got, layout.values(arrays).astype(np.float32).T)
        seen += 1
    assert seen == len(quantized)


def nodes_of(directory: Path, op: str) -> list[tuple[str, dict[str, onnx.TensorProto], dict[str, int]]]:
    """(tensor name, operands, attributes) of each node of a type."""
    model = onnx.load(directory / "model.onnx")
    initializers = {i.name: i for i in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == op:
            operands = {name: initializers[name] for name in node.input if name in initializers}
            tensor = next(iter(operands)).rsplit(".", 1)[0]
            found.append((tensor, operands, {a.name: a.i for a in node.attribute}))
    return found


def on_identity(operands: dict[str, onnx.TensorProto], attributes: dict[str, int]) -> np.ndarray:
    import onnxruntime as ort

    width = attributes["K"]
    settings = {**attributes, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", ["A", *operands], ["Y"], domain="com.microsoft", **settings)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [width, width])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        list(operands.values()),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"A": np.eye(width, dtype=np.float32)})[0])


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("word", ["q4_1", "int4"])
def test_low_rank_and_free_minima(ember: Checkpoint, build: Build, word: str, portable: bool) -> None:
    """Factors, a quantized base with a residual, and layouts with a minimum keep their values."""
    layout = parse_layout(word)
    rng = np.random.default_rng(1)
    names = [i.name for i in ember.linears()]
    changed: dict[str, Weight] = {}
    for index, name in enumerate(names):
        value = ember.resolve(name).value()
        rows, cols = value.shape
        left = Dense.of((rng.standard_normal((rows, 8)) * 0.05).astype(np.float32))
        right = Dense.of((rng.standard_normal((8, cols)) * 0.05).astype(np.float32))
        base = Quantized.of(layout, layout.quantize(value))
        changed[name] = (base, Sum(base, Factored(left, right)), Factored(left, right))[index % 3]
    mixed = ember.with_weights(changed)
    directory, _, _ = build(mixed, profile="portable" if portable else "ort")
    expected = transformers_outputs(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(directory, IDS)["logits"], expected) <= 1e-5
    assert relative_l2(in_onnx_runtime(directory, IDS, want="decode")["logits"], expected) <= 1e-5


SHARED = [("int4", "int4"), ("int4-portable", "int4"), ("int4-portable", "int4-g64-asym"), ("int8-portable", "int8")]
SHARED += [("int8-dynamic", "int8-channel")]


@pytest.mark.parametrize(("scheme", "layout"), SHARED)
def test_quantized_embedding_shared_with_the_head(
    ember: Checkpoint, build: Build, tmp_path: Path, scheme: str, layout: str
) -> None:
    """One table, in the file once, looked up and multiplied; ONNX Runtime multiplies it by its own kernel."""
    directory, plan, _ = build(ember, scheme, include=["embeddings", "head"], layout=layout)
    solved = rounded(ember, EXPORTER.layout_for(ember, plan.target))
    expected = transformers_outputs(solved, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(directory, IDS)["logits"], expected) <= 1e-5
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert not [i.name for i in model.graph.initializer if i.name.startswith("lm_head")]
    others = 0 if scheme == "int8-dynamic" else len(ember.linears())  # which go to the integer kernel there
    assert optimized(directory, tmp_path).count("MatMulNBits") == 1 + others
    table = next(t for t in plan.tensors if t.name == "model.embed_tokens.weight")
    assert table.nbytes < 1024 * 256 * (0.7 if "int4" in layout else 1.3)
    assert (directory / "model.onnx_data").stat().st_size < 1.05 * plan.file_bytes
    stored = OnnxStored(solved, directory / "model.onnx")
    weight = solved.weights[table.name]
    assert isinstance(weight, Quantized)
    np.testing.assert_array_equal(stored.value(table.name), weight.value())
    pieces = stored.integers(table.name)
    assert pieces is not None
    assert digest(pieces) == digest(pieces_of(weight.layout, weight.read()))
    assert read_onnx(directory / "model.onnx").weights < 1.05 * sum(int(np.prod(t.shape)) for t in plan.tensors)


@pytest.mark.parametrize("rows", [96, 97])
def test_a_portable_table_of_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    """Pairs of codes in a byte where rows are even, a byte each where they are not; every row comes back exactly."""
    import onnx_ir as ir
    import onnxruntime as ort

    layout = parse_layout("int4-g16-asym")
    values = np.random.default_rng(0).standard_normal((rows, 32)).astype(np.float32)
    table = Quantized.of(layout, layout.quantize(values))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, 32]))
    node = ir.node("Gather", [weight, ids], {"axis": 0})
    node.outputs[0].name, node.outputs[0].type = "y", weight.type
    graph = ir.Graph([ids], node.outputs, nodes=[node], opset_imports={"": 23}, name="main")
    emitter = Emitter(graph, Style(portable=True))
    emitter.place(Unit("t", "t", table, [Use(node, 0, turned=False)]))
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    write_onnx(proto, [*emitter.constants, *emitter.initializers], tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"ids": np.arange(rows)})
    np.testing.assert_array_equal(got, table.value())
    codes = next(i for i in emitter.initializers if i.name == "t.lookup.codes")
    assert codes.nbytes == rows * 32 // (2 if rows == 96 else 1)
    assert emitter.initializers[0].nbytes + emitter.initializers[1].nbytes + emitter.initializers[2].nbytes == (
        storage(table, Style(portable=True), table=True).nbytes
    )


TABLES = ["fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8", "mxfp4", "nvfp4", "nvfp4-scaled", "iq4_nl"]


@pytest.mark.parametrize("word", [*TABLES, "iq4_xs", "fp8-e4m3-g96"])
def test_floats_of_few_bits_are_decoded_once(ember: Checkpoint, build: Build, tmp_path: Path, word: str) -> None:
    """Every value as the layout has it; the file is small; what runs is a plain MatMul on folded weights."""
    layout = Float8(tile_rows=1, group_size=96) if word == "fp8-e4m3-g96" else parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized).replace(
        activations={"model.layers.0.mlp.up_proj": Activations("fp8-dynamic")}
    )
    directory, plan, _ = build(mixed)
    expected = transformers_outputs(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(directory, IDS, mode="shipped")["logits"], expected) <= 1e-5
    assert any("fp8-dynamic activations stay float32" in note for note in plan.notes)
    assert any("14 matrices are small in the file alone" in note for note in plan.notes)
    held = sum(t.nbytes for t in plan.tensors if t.name in quantized)
    assert held * 8 < (5.1 if "4" in word[:5] else 8.7) * sum(int(np.prod(w.shape)) for w in quantized.values())
    ran = optimized(directory, tmp_path)
    assert "DequantizeLinear" not in ran
    assert ran.count("MatMul") == 15 > ran.count("Cast")
    assert ran.count("Gather") == 1  # of the embedding: those of tables and scales are folded
    stored = OnnxStored(mixed, directory / "model.onnx")
    for name, weight in quantized.items():
        np.testing.assert_array_equal(stored.value(name), weight.value())
        pieces = stored.integers(name)
        assert pieces is not None
        assert digest(pieces) == digest(pieces_of(layout, weight.read()))


@pytest.mark.parametrize("candidate", [MobiusCandidate(), DirectCandidate()])
@pytest.mark.parametrize("word", ["q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "tq2_0"])
def test_k_quants_keep_their_integers(ember: Checkpoint, tmp_path: Path, word: str, candidate: Candidate) -> None:
    """What a GGUF file says in super-blocks, said by MatMulNBits and block sums."""
    layout = parse_layout(word)
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized)
    shapes = {name: tuple(ember.resolve(name).shape) for name in ember.weights}
    write_graph(candidate.build(mixed.config, mixed.architecture, shapes), mixed, tmp_path, Style())
    expected = transformers_outputs(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(tmp_path, IDS, want="decode")["logits"], expected) <= 1e-5


def test_dynamic_activations_reach_the_integer_kernel(ember: Checkpoint, build: Build, tmp_path: Path) -> None:
    """ONNX Runtime's optimiser leaves MatMulIntegerToFloat for every matrix; as stored the graph is standard."""
    directory, plan, _ = build(ember, "int8-dynamic")
    stored = onnx.load(directory / "model.onnx", load_external_data=False)
    assert {node.domain for node in stored.graph.node} == {""}
    assert optimized(directory, tmp_path).count("MatMulIntegerToFloat") == 14
    assert len([t for t in plan.tensors if t.storage == "DequantizeLinear UINT8, by channel"]) == 14


def optimized(directory: Path, scratch: Path) -> list[str]:
    """Types of the nodes that ONNX Runtime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(scratch / "optimized.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("word", ["int8-static", "int8-static-asym"])
def test_calibrated_activations(ember: Checkpoint, build: Build, tmp_path: Path, word: str) -> None:
    """Right without rounding; the ranges given are the ones that round; every matrix runs in the integer kernel."""
    inputs = {i.name.removesuffix(".weight"): fixed(word, -9.0, 6.0 + n) for n, i in enumerate(ember.linears())}
    directory, plan, _ = build(ember.replace(activations=inputs), "int8-static")
    solved = rounded(ember, EXPORTER.layout_for(ember, plan.target))
    expected = transformers_outputs(solved, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(directory, IDS)["logits"], expected) <= 1e-5
    assert 1e-3 < relative_l2(in_onnx_runtime(directory, IDS, mode="shipped")["logits"], expected) < 0.3
    stored = onnx.load(directory / "model.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in stored.graph.initializer}
    quantizers = [node.input for node in stored.graph.node if node.op_type == "QuantizeLinear"]
    assert {node.domain for node in stored.graph.node} == {""}
    for _, scale, zero in quantizers:
        given = inputs[scale.removesuffix(".input_scale")]
        assert (float(held[scale]), int(held[zero])) == (given.scale, (given.zero_point or 0) + 128)
    ran = optimized(directory, tmp_path)
    assert ran.count("MatMulIntegerToFloat") == len(inputs)
    assert ran.count("MatMul") == 1  # the head


def test_activations_that_onnx_cannot_round_are_refused(ember: Checkpoint) -> None:
    name = ember.linears()[0].name.removesuffix(".weight")
    with pytest.raises(Unsupported, match="int8-dynamic-asym") as caught:
        EXPORTER.plan(ember.replace(activations={name: Activations("int8-dynamic-asym")}), Target("onnx"))
    assert caught.value.tensor == name
    with pytest.raises(Unsupported, match="one scale a row") as caught:
        EXPORTER.plan(ember.replace(activations={name: Activations("int8-dynamic")}), Target("onnx"))
    assert caught.value.tensor == f"{name}.weight"


@pytest.mark.parametrize(("scheme", "level"), [("int8", 0), ("int2", 1)])
def test_kernels_that_decode_for_every_product_are_refused(ember: Checkpoint, scheme: str, level: int) -> None:
    target = Target("onnx", scheme, {"accuracy_level": level})
    solved = rounded(ember, EXPORTER.layout_for(ember, target))
    with pytest.raises(Unsupported, match="slower than float32"):
        EXPORTER.plan(solved, target)


def test_portable_graphs_use_standard_operators_only(ember: Checkpoint, build: Build) -> None:
    directory, _, _ = build(ember, "int4-portable")
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    onnx.checker.check_model(str(directory / "model.onnx"))


@pytest.mark.parametrize(("scheme", "shared"), [("int8", True), ("int4-portable", False)])
def test_greedy_text_of_genai_is_our_own_loops(ember: Checkpoint, build: Build, scheme: str, shared: bool) -> None:
    """64 tokens: genai fills the cache in place where the graph can, our loop hands it from step to step."""
    directory, _, exported = build(ember, scheme)
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


def test_a_graph_in_a_folder_of_its_own(ember: Checkpoint, build: Build) -> None:
    """As model hubs have it: the graph in onnx/, everything else beside that folder."""
    directory, _, exported = build(ember, "int4", folder="onnx")
    assert exported.main == "onnx/model.onnx"
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "config.json", "genai_config.json"} <= set(exported.files)
    job = {"artifact": str(directory), "want": "generate", "tokens": 4}
    theirs = genai.run(job, {"input_ids": IDS[:1, :6]})[1]["tokens"][0]
    graph = onnx_runtime.Graph(onnx_runtime.open_session(directory / exported.main, "shipped"))
    np.testing.assert_array_equal(theirs, graph.greedy(IDS[0, :6], 4))


def test_the_same_bytes_twice_and_no_word_of_the_machine(ember: Checkpoint, build: Build) -> None:
    first, _, exported = build(ember, "int4")
    second, _, _ = build(ember, "int4")
    for name in exported.files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    model = onnx.load(first / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert not model.producer_name
    assert not model.metadata_props
    text = (first / "model.onnx").read_bytes()
    for word in (b"site-packages", b".py", b"/tmp", b"/root", b"/home", b"mobius"):
        assert word not in text


def test_tied_embedding_is_stored_once(ember: Checkpoint, build: Build) -> None:
    directory, plan, _ = build(ember)
    vocabulary = [t for t in plan.tensors if t.shape == (1024, 256)]
    assert len(vocabulary) == 1
    shapes = [tuple(i.dims) for i in onnx.load(directory / "model.onnx", load_external_data=False).graph.initializer]
    assert shapes.count((1024, 256)) + shapes.count((256, 1024)) == 1


def test_masked_language_model_gives_logits_and_hidden_states(build: Build) -> None:
    bert = open_checkpoint(EXAMPLES / "ember-bert")
    directory, plan, exported = build(bert, "int8")
    solved = rounded(bert, EXPORTER.layout_for(bert, plan.target))
    ids = IDS % 2048
    expected = transformers_outputs(solved, EXAMPLES / "ember-bert", ids)
    got = in_onnx_runtime(directory, ids)
    for name in ("logits", "last_hidden_state"):
        assert relative_l2(got[name], expected[name]) <= 1e-5
    assert "genai_config.json" not in exported.files
    assert nodes_of(directory, "MatMulNBits")


def test_reference_graph_decodes_everything(ember: Checkpoint, tmp_path: Path) -> None:
    layout = parse_layout("int4-g64-asym")
    quantized = {i.name: Quantized.of(layout, layout.quantize(ember.resolve(i.name).value())) for i in ember.linears()}
    mixed = ember.with_weights(quantized)
    path = reference_graph(mixed, tmp_path, judge)
    expected = transformers_outputs(mixed, EXAMPLES / "ember", IDS)["logits"]
    assert relative_l2(in_onnx_runtime(path.parent, IDS)["logits"], expected) <= 1e-5
    types = {i.data_type for i in onnx.load(path, load_external_data=False).graph.initializer}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def test_genai_config_has_no_key_of_our_own(ember: Checkpoint, build: Build) -> None:
    directory, _, _ = build(ember)
    config = json.loads((directory / "genai_config.json").read_text())
    assert config["model"]["vocab_size"] == 1024
    assert config["model"]["context_length"] == config["search"]["max_length"] == 512
    assert config["model"]["decoder"]["num_key_value_heads"] == 2


def test_unknown_words_are_refused(ember: Checkpoint) -> None:
    with pytest.raises(UsageError, match="no scheme"):
        EXPORTER.layout_for(ember, Target("onnx", "int5"))
    with pytest.raises(UsageError, match="no option"):
        EXPORTER.layout_for(ember, Target("onnx", "int4", {"group": 64}))
    with pytest.raises(UsageError, match="judge"):
        OnnxExporter().export(ember, EXPORTER.plan(ember, Target("onnx")), Path("nowhere"), no_progress)


def test_a_layout_without_exact_form_is_refused_in_the_plan(ember: Checkpoint) -> None:
    layout = parse_layout("int4-g8")
    name = ember.linears()[0].name
    mixed = ember.with_weights({name: Quantized.of(layout, layout.quantize(ember.resolve(name).value()))})
    with pytest.raises(Unsupported, match="blocks of 16") as caught:
        EXPORTER.plan(mixed, Target("onnx"))
    assert caught.value.tensor == name


def test_a_tensor_that_the_graph_would_drop_is_an_error(ember: Checkpoint, tmp_path: Path) -> None:
    stranger = ember.with_weights({"lm_head.weight": Dense.of(np.zeros((1024, 256), np.float32))})
    shapes = {name: tuple(ember.resolve(name).shape) for name in ember.weights}
    skeleton = MobiusCandidate().build(ember.config, ember.architecture, shapes)
    with pytest.raises(Unsupported, match="does not read") as caught:
        write_graph(skeleton, stranger, tmp_path, Style())
    assert caught.value.tensor == "lm_head.weight"


def test_the_strict_reader_opens_our_files(ember: Checkpoint, build: Build) -> None:
    directory, plan, _ = build(ember, "int4")
    file = read_onnx(directory / "model.onnx")
    assert file.files == ("model.onnx_data",)
    assert file.metadata["opsets"] == {"ai.onnx": 23, "com.microsoft": 1}
    logical = sum(int(np.prod(t.shape)) for t in plan.tensors)
    assert logical <= file.weights <= logical + 2 * 512 * 32 + 64  # rotary tables and shape constants on top
