"""Experts of a block in one node of ONNX Runtime (QMoE): right, with the same integers, read back by that node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, Unsupported, UsageError
from tightship.exporters.onnx_candidates.one_node import expand, stack_name
from tightship.exporters.to_onnx import OnnxExporter
from tightship.formats.layouts import parse_layout
from tightship.formats.onnx_file import read_onnx
from tightship.modelview import ModelView
from tightship.target import Target, TargetPlan, no_progress
from tightship.validators.integers import digest, pieces_of
from tightship.validators.onnx_probe import OnnxGraph
from tightship.validators.onnx_stacks import Stacks
from tightship.validators.parity import ParityJudge
from tightship.validators.runtimes import onnx_runtime
from tightship.validators.stored_onnx import OnnxStored
from tightship.validators.values import prove_values
from tightship.weights import Quantized

ONE_NODE = Target("onnx", None, {"experts": "qmoe"})
IDS = np.random.default_rng(0).integers(1, 96, (2, 9))
FIRST = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def rounded(checkpoint: Checkpoint, word: str, **others: str) -> Checkpoint:
    """Linears in a layout, those whose names end with a key of `others` (dots as __) in another."""
    changed = {}
    for info in checkpoint.linears():
        said = (w for key, w in others.items() if info.name.endswith(key.replace("__", ".")))
        layout = parse_layout(next(said, word))
        changed[info.name] = Quantized.of(layout, layout.quantize(checkpoint.resolve(info.name).value()))
    return checkpoint.with_weights(changed)


@pytest.fixture(scope="module")
def mixtral(tiny: Callable[[str], Checkpoint]) -> Checkpoint:
    return rounded(tiny("mixtral"), "int4")


@pytest.fixture(scope="module")
def exporter() -> OnnxExporter:
    return OnnxExporter(judge=ParityJudge())


@pytest.fixture(scope="module")
def artifact(
    mixtral: Checkpoint, exporter: OnnxExporter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TargetPlan]:
    directory = tmp_path_factory.mktemp("experts")
    plan = exporter.plan(mixtral, ONE_NODE)
    exported = exporter.export(mixtral, plan, directory, no_progress)
    assert "experts in QMoE" in exported.graph_source
    assert exported.details["candidates"][-1]["margin"] <= 1e-5
    return directory, plan


def test_the_graph_computes_the_stored_weights(artifact: tuple[Path, TargetPlan], mixtral: Checkpoint) -> None:
    """One pass, and through the cache; as shipped activations are rounded as those of MatMulNBits are."""
    import torch

    view = ModelView(mixtral)
    with view.computing():
        expected = view.module()(input_ids=torch.from_numpy(IDS), use_cache=False).logits.numpy()
    for mode, want, limit in (("graph", "outputs", 1e-5), ("graph", "decode", 1e-5), ("shipped", "outputs", 0.05)):
        job = {"artifact": str(artifact[0]), "main": "model.onnx", "mode": mode, "want": want}
        got = onnx_runtime.run(job, {"input_ids": IDS})[1]["logits"]
        assert np.linalg.norm(got - expected) <= limit * np.linalg.norm(expected)
    kinds = [node.op_type for node in onnx.load(artifact[0] / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("QMoE") == 2
    assert kinds.count("MatMulNBits") == 2 * 2  # queries, keys and values are one product


def test_stacks_hold_the_same_integers(artifact: tuple[Path, TargetPlan], mixtral: Checkpoint) -> None:
    """Values by QMoE itself, integers by the onnx package; every tensor of the plan, and its bytes."""
    directory, plan = artifact
    stored = OnnxStored(mixtral, directory / "model.onnx")
    proof = prove_values(mixtral, plan, stored)
    assert [c.reason for c in proof.checks if c.verdict != "pass"] == []
    assert any("prompts 0.9 times" in note for note in plan.notes)
    names = [t.name for t in plan.tensors if t.storage == "QMoE 4 bit, block 32"]
    assert len(names) == 2 * 4 * 3
    for name in names:
        weight = mixtral.weights[name]
        np.testing.assert_array_equal(stored.value(name), weight.value())
        pieces = stored.integers(name)
        assert pieces is not None
        assert digest(pieces) == digest(pieces_of(weight.layout, weight.read())) == proof.digests[name]
    logical = sum(int(np.prod(t.shape)) for t in plan.tensors)
    assert logical <= read_onnx(directory / "model.onnx").weights < logical + 4096  # rotary tables, constants


def test_a_byte_changed_in_a_stack_is_seen(
    artifact: tuple[Path, TargetPlan], mixtral: Checkpoint, tmp_path: Path
) -> None:
    """The first code of the second row of gate: QMoE decodes another value, the integers differ, others stay."""
    directory, plan = artifact
    stack = next(t for t in OnnxGraph(directory / "model.onnx").initializers.values() if "{w1,w3}.weight.B" in t.name)
    place = int({e.key: e.value for e in stack.external_data}["offset"]) + 2 * stack.dims[2]
    data = bytearray((directory / "model.onnx_data").read_bytes())
    data[place] ^= 1
    (tmp_path / "model.onnx_data").write_bytes(data)
    (tmp_path / "model.onnx").write_bytes((directory / "model.onnx").read_bytes())
    proof = prove_values(mixtral, plan, OnnxStored(mixtral, tmp_path / "model.onnx"))
    failed = [check for check in proof.checks if check.verdict != "pass"]
    assert {check.metric for check in failed} == {"mismatches", "integers"}
    assert {check.tensor for check in failed} == {FIRST}
    assert next(check.value for check in failed if check.metric == "mismatches") == 1


def test_qmoe_decodes_rows_that_are_no_whole_run(artifact: tuple[Path, TargetPlan]) -> None:
    stacks = Stacks(OnnxGraph(artifact[0] / "model.onnx"))
    assert stacks.places[FIRST].turns == 2
    assert stacks.value(FIRST).shape == (96, 64)


@pytest.mark.parametrize(
    ("word", "others", "reason"),
    [
        ("int8", {}, "24 of 24 matrices do not fit: int8-g32 takes 8 bits"),
        ("int4-g32-asym", {}, "zero points"),
        ("int4", {"experts__1__w2__weight": "int4-g16"}, "2 of 24 matrices do not fit: rows of 96"),
        ("int4-channel", {}, "8 of 24 matrices do not fit: rows of 96 are no whole blocks of 64"),
    ],
)
def test_experts_that_do_not_fit_are_counted_in_the_plan(
    tiny: Callable[[str], Checkpoint], exporter: OnnxExporter, word: str, others: dict[str, str], reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason) as caught:
        exporter.plan(rounded(tiny("mixtral"), word, **others), ONE_NODE)
    assert "block_sparse_moe.experts" in str(caught.value.tensor)


def test_what_has_no_experts_or_no_such_operator_is_refused(
    tiny: Callable[[str], Checkpoint], mixtral: Checkpoint, exporter: OnnxExporter
) -> None:
    with pytest.raises(Unsupported, match="no experts"):
        exporter.plan(rounded(tiny("llama"), "int4"), ONE_NODE)
    with pytest.raises(Unsupported, match="it has no integers"):
        exporter.plan(tiny("mixtral"), ONE_NODE)
    with pytest.raises(UsageError, match="ONNX Runtime's own"):
        exporter.plan(mixtral, Target("onnx", None, {"experts": "qmoe", "profile": "portable"}))


def test_a_stack_that_announces_other_bytes_is_no_file(mixtral: Checkpoint, tmp_path: Path) -> None:
    """The planned bytes of each expert are held against what was written."""
    exporter = OnnxExporter(judge=ParityJudge())
    plan = exporter.plan(mixtral, ONE_NODE)
    changed = [t if t.name != FIRST else type(t)(**{**vars(t), "nbytes": t.nbytes + 1}) for t in plan.tensors]
    with pytest.raises(GateFailed) as caught:
        exporter.export(mixtral, type(plan)(**{**vars(plan), "tensors": tuple(changed)}), tmp_path, no_progress)
    assert caught.value.tensor == FIRST


def test_names_of_stacks_say_what_is_in_them() -> None:
    pairs = [(f"a.{e}.w1.weight", f"a.{e}.w3.weight") for e in range(12)]
    assert stack_name(pairs) == "a.{0-11}.{w1,w3}.weight"
    assert expand("a.{0-11}.{w1,w3}.weight") == pairs
    assert stack_name([("b.0.down",), ("b.1.down",)]) == "b.{0-1}.down"
    assert expand("a.0.w1.weight") == []
    with pytest.raises(Unsupported, match="make no stack"):
        stack_name([("a.1.x",), ("a.0.x",)])
