"""ALiBi by the graph and by transformers, for more places than bfloat16 tells apart, some of them padding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint
from tightship.exporters.onnx_candidates.families import FAMILIES
from tightship.exporters.onnx_candidates.network import Network
from tightship.exporters.onnx_candidates.positions import alibi
from tightship.exporters.onnx_candidates.skeleton import BATCH, TOTAL
from tightship.modelview import ModelView

PLACES, HEAD_DIM = 700, 16  # the divisor is exact
LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
Tiny = Callable[[str], Checkpoint]


KINDS = {"falcon": transformers.FalconForCausalLM, "bloom": transformers.BloomForCausalLM}


def theirs(family: str) -> Any:
    """The module of transformers that has the family."""
    return sys.modules[KINDS[family].__module__]


@pytest.mark.parametrize("family", ["falcon", "bloom"])
@pytest.mark.parametrize("heads", [4, 6, 71])
@pytest.mark.parametrize("level", LEVELS)
def test_biases_are_those_of_transformers(family: str, heads: int, level: ort.GraphOptimizationLevel) -> None:
    mask = np.ones((2, PLACES), np.int64)
    mask[1, :9] = mask[1, -5:] = 0
    expected = theirs(family).build_alibi_tensor(torch.from_numpy(mask), heads, torch.float32)
    expected = expected.reshape(2, heads, 1, PLACES).numpy() / (np.sqrt(HEAD_DIM) if family == "falcon" else 1)
    config = {**KINDS[family].config_class().to_dict(), "architectures": [KINDS[family].__name__]}
    net = Network(config, architecture_for(config), {}, FAMILIES[family])
    net.hyper["head_dim"] = HEAD_DIM
    net.output("bias", alibi(net, net.input("attention_mask", (BATCH, TOTAL)), heads), (BATCH, heads, 1, TOTAL))
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    model = ir.to_proto(net.skeleton().model).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"attention_mask": mask})[0], expected, rtol=1e-6)


def test_falcon_adds_it_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention adds it to the mask and to the scores: the model is that with half of it."""
    falcon = tiny("falcon").replace(config={**tiny("falcon").config, "alibi": True})
    module = ModelView(falcon).module()
    ids, mask = torch.arange(1, 23).reshape(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        found = module(ids, attention_mask=mask).logits[mask == 1].numpy()
        module.config._attn_implementation = "eager"
        twice = module(ids, attention_mask=mask).logits[mask == 1].numpy()
        whole = theirs("falcon").build_alibi_tensor
        monkeypatch.setattr(theirs("falcon"), "build_alibi_tensor", lambda *given, **named: whole(*given, **named) / 2)
        once = module(ids, attention_mask=mask).logits[mask == 1].numpy()
    assert np.linalg.norm(found - once) <= 1e-5 * np.linalg.norm(once)
    assert np.linalg.norm(found - twice) > 1e-3 * np.linalg.norm(twice)
