"""Graphs with ONNX Runtime's own operators: right for every kind of attention, and told when they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import GptOssConfig

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.fused import FusedCandidate, shares_cache
from tightship.exporters.onnx_candidates.skeleton import Skeleton
from tightship.validators import parity
from tightship.validators.parity_model import small_checkpoint
from tightship.weights import Dense

Tiny = Callable[[str], Checkpoint]
LIMIT = 1e-5
FUSED = FusedCandidate(DirectCandidate())
PACKED = FusedCandidate(DirectCandidate(), packed=True)


def built(candidate: Any, checkpoint: Checkpoint) -> Skeleton:
    shapes = {name: tuple(checkpoint.resolve(name).shape) for name in checkpoint.weights}
    return candidate.build(checkpoint.config, checkpoint.architecture, shapes)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "opt"])
def test_fused_graphs_are_right(tiny: Tiny, family: str) -> None:
    """Grouped heads, norms of queries and keys, windows, soft caps, learned positions; padding on either side."""
    small = small_checkpoint(tiny(family))
    found = parity.judge_candidate(FUSED, small, parity.references(small))
    assert found.passed, found.reason
    assert found.margin <= LIMIT
    kinds = [node.op_type for node in built(FUSED, small).model.graph]
    layers = int(small.hyper["layers"])
    assert kinds.count("GroupQueryAttention") == layers
    assert "Attention" not in kinds


@pytest.mark.parametrize(
    ("family", "packed", "rotated"),
    [("llama", 2, 2), ("qwen2", 2, 2), ("phi3", 2, 2), ("opt", 2, 0), ("qwen3", 0, 0)],
)
def test_packed_graphs_are_right(tiny: Tiny, family: str, packed: int, rotated: int) -> None:
    """Biases, rows of a fused matrix; norms between product and rotation keep both apart."""
    small = small_checkpoint(tiny(family))
    found = parity.judge_candidate(PACKED, small, parity.references(small))
    assert found.passed, found.reason
    assert found.margin <= LIMIT
    graph = built(PACKED, small).model.graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert sum(node.inputs[1] is None for node in attention) == packed
    assert sum(node.inputs[7] is not None for node in attention) == rotated
    assert ("position_ids" in [value.name for value in graph.inputs]) == (not rotated)


@pytest.fixture(scope="module")
def gpt_oss() -> Checkpoint:
    """Windows in every other layer, YaRN, biases."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    resolved = GptOssConfig(vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=2, **sizes)
    config = {**resolved.to_dict(), "architectures": ["GptOssForCausalLM"]}
    architecture = architecture_for(config)
    weights = {name: Dense.of(np.zeros(i.shape, np.float32)) for name, i in architecture.lookup(config).items()}
    return small_checkpoint(Checkpoint("gpt-oss", config, weights, {}, architecture, Source("random", None, ())))


@pytest.mark.parametrize("candidate", [FUSED, PACKED])
def test_sinks_go_into_the_operator(gpt_oss: Checkpoint, candidate: FusedCandidate) -> None:
    found = parity.judge_candidate(candidate, gpt_oss, parity.references(gpt_oss))
    assert found.passed, found.reason
    assert found.margin <= LIMIT
    graph = built(candidate, gpt_oss).model.graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    names = [node.inputs[11].name for node in attention]
    assert names == [f"model.layers.{block}.self_attn.sinks" for block in range(int(gpt_oss.hyper["layers"]))]
    assert {"Attention", "Pad"}.isdisjoint(node.op_type for node in graph)
    assert shares_cache(graph)


class Sinkless(FusedCandidate):
    def build(self, *arguments: Any) -> Skeleton:
        skeleton = super().build(*arguments)
        for node in skeleton.model.graph:
            if node.op_type == "GroupQueryAttention":
                node.replace_input_with(11, None)
        return skeleton


def test_forgotten_sinks_are_found_out(gpt_oss: Checkpoint) -> None:
    found = parity.judge_candidate(Sinkless(DirectCandidate()), gpt_oss, parity.references(gpt_oss))
    assert not found.passed
    assert all(value > 1e-3 for name, value in found.cases)


class AsBuildersDo(FusedCandidate):
    """Row lengths from the mask and no bias, as onnxruntime-genai's builder writes it."""

    def build(self, *arguments: Any) -> Skeleton:
        import onnx_ir as ir

        skeleton = super().build(*arguments)
        graph = skeleton.model.graph
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        one, axis = (ir.tensor(np.array(n, np.int64), name=f"b{i}") for i, n in enumerate((1, [1])))
        values = [ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype), shape=t.shape) for t in (one, axis)]
        for value in values:
            graph.register_initializer(value)
        count = ir.node("ReduceSum", [mask, values[1]], {"keepdims": 0})
        last = ir.node("Sub", [count.outputs[0], values[0]])
        narrow = ir.node("Cast", [last.outputs[0]], {"to": 6})
        graph.insert_before(graph[0], [count, last, narrow])
        for node in graph:
            if node.op_type == "GroupQueryAttention":
                node.replace_input_with(5, narrow.outputs[0])
                node.replace_input_with(10, None)
        return skeleton


def test_row_lengths_from_the_mask_are_found_out(tiny: Tiny) -> None:
    """Right without padding, wrong under left padding: the judge refuses it for that."""
    small = small_checkpoint(tiny("llama"))
    found = parity.judge_candidate(AsBuildersDo(DirectCandidate()), small, parity.references(small))
    assert not found.passed
    wrong = {name for name, value in found.cases if not value <= LIMIT}
    assert {name.split(" ", 1)[1] for name in wrong} == {"left padding logits", "decode after left padding logits"}


def test_encoders_have_nothing_to_fuse(tiny: Tiny) -> None:
    with pytest.raises(Unsupported, match="no attention with a cache"):
        built(FUSED, small_checkpoint(tiny("bert")))


def test_only_grouped_attention_shares_its_cache(tiny: Tiny) -> None:
    small = small_checkpoint(tiny("llama"))
    assert shares_cache(built(FUSED, small).model.graph)
    assert not shares_cache(built(DirectCandidate(), small).model.graph)
