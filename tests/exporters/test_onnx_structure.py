"""Graphs of changed structure (layers of unequal width, factors, blocks that share weights), and of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.onnx_assemble import write_graph
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_storage import Style
from tightship.exporters.to_onnx import OnnxExporter
from tightship.modelview import ModelView
from tightship.target import Target
from tightship.validators.parity import ParityJudge, relative_l2
from tightship.validators.runtimes.onnx_runtime import Graph, open_session
from tightship.weights import Alias, Dense, Factored

Tiny = Callable[[str], Checkpoint]
IDS = np.random.default_rng(0).integers(5, 96, (2, 12))
BLOCK = "model.layers.{}."


def logits(changed: Checkpoint, folder: Path) -> np.ndarray:
    """What our blocks give in ONNX Runtime, through the cache."""
    shapes = {name: tuple(changed.resolve(name).shape) for name in changed.weights}
    write_graph(DirectCandidate().build(changed.config, changed.architecture, shapes), changed, folder, Style())
    return Graph(open_session(folder / "model.onnx", "graph")).decode({"input_ids": IDS}, 5)["logits"]


def value(model: Checkpoint, name: str) -> np.ndarray:
    return np.asarray(model.resolve(name).value())


def test_layers_of_unequal_width(tiny: Tiny, tmp_path: Path) -> None:
    """Channels taken out of block 0 and a group of heads out of block 1: as if what they add were zero."""
    whole = tiny("llama")
    down, out = BLOCK.format(0) + "mlp.down_proj.weight", BLOCK.format(1) + "self_attn.o_proj.weight"
    channels, heads = np.arange(96) < 60, np.arange(64) < 32  # of 96 channels; of 4 heads of 16, two a key head
    silent = {down: Dense.of(value(whole, down) * channels), out: Dense.of(value(whole, out) * heads)}
    taken = {down: value(whole, down)[:, channels], out: value(whole, out)[:, heads]}
    for part in ("gate_proj", "up_proj"):
        name = f"{BLOCK.format(0)}mlp.{part}.weight"
        taken[name] = value(whole, name)[channels]
    for part, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        name = f"{BLOCK.format(1)}self_attn.{part}.weight"
        taken[name] = value(whole, name)[:rows]
    pruned = whole.with_weights({name: Dense.of(array) for name, array in taken.items()})
    expected = ModelView(whole.with_weights(silent)).outputs(IDS)["logits"]
    assert relative_l2(logits(pruned, tmp_path), expected) <= 1e-5
    cache = {
        i.name: i.type.tensor_type.shape.dim[1].dim_value for i in onnx.load(tmp_path / "model.onnx").graph.input[3:]
    }
    assert cache["past_key_values.0.key"] == 2
    assert cache["past_key_values.1.key"] == 1


def test_factors_are_two_products(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny("llama")
    name = BLOCK.format(0) + "mlp.up_proj.weight"
    left, _, right = np.linalg.svd(value(whole, name), full_matrices=False)
    left, right = left[:, :7].astype(np.float32), right[:7].astype(np.float32)
    factored = whole.with_weights({name: Factored(Dense.of(left), Dense.of(right))})
    expected = ModelView(whole.with_weights({name: Dense.of(left @ right)})).outputs(IDS)["logits"]
    assert relative_l2(logits(factored, tmp_path), expected) <= 1e-5
    stored = {i.name: tuple(i.dims) for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored[f"{name}.right"] == (64, 7)
    assert stored[f"{name}.left"] == (7, 96)


def test_shared_blocks_are_stored_once(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny("llama")
    first, second = BLOCK.format(0), BLOCK.format(1)
    names = [name for name in whole.weights if name.startswith(second)]
    shared = whole.with_weights({name: Alias(name.replace(second, first)) for name in names})
    copied = whole.with_weights({name: whole.weights[name.replace(second, first)] for name in names})
    expected = ModelView(copied).outputs(IDS)["logits"]
    assert relative_l2(logits(shared, tmp_path), expected) <= 1e-5
    stored = [i.name for i in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert not [name for name in stored if name.startswith(second)]
    assert len([name for name in stored if name.startswith(first)]) == len(names)


@pytest.mark.parametrize(
    "sizes", [{"batch_size": 2, "sequence_length": 20}, {"sequence_length": 12}, {"batch_size": 3}]
)
def test_fixed_shapes_give_what_open_ones_give(tiny: Tiny, tmp_path: Path, sizes: dict[str, int]) -> None:
    """Five rows of twelve tokens and less through graphs of other sizes."""
    bert = tiny("bert")
    target = Target("onnx", None, {"shapes": sizes})
    exporter = OnnxExporter(ParityJudge())
    exporter.export(bert, exporter.plan(bert, target), tmp_path)
    declared = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / "model.onnx").graph.input}
    found = [d.dim_param or d.dim_value for d in declared["input_ids"]]
    assert found == [sizes.get(axis, axis) for axis in ("batch_size", "sequence_length")]
    ids = np.random.default_rng(0).integers(5, 96, (5, 12))
    mask = (np.arange(12) < np.array([[12], [7], [9], [12], [3]])).astype(np.int64)
    expected = ModelView(bert).outputs(ids, mask)
    got = Graph(open_session(tmp_path / "model.onnx", "graph")).outputs({"input_ids": ids, "attention_mask": mask})
    for name, wanted in expected.items():
        assert relative_l2(got[name][mask == 1], wanted[mask == 1]) <= 1e-5


@pytest.mark.parametrize(
    ("family", "shapes", "error", "words"),
    [
        ("llama", {"batch_size": 1}, Unsupported, "cache grows"),
        ("bert", {"sequence_length": 65}, Unsupported, "64 positions"),
        ("bert", {"width": 3}, UsageError, "width"),
        ("bert", {"batch_size": 0}, UsageError, "batch_size = 0"),
    ],
)
def test_shapes_that_cannot_be_fixed(
    tiny: Tiny, family: str, shapes: dict[str, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        OnnxExporter().plan(tiny(family), Target("onnx", None, {"shapes": shapes}))
