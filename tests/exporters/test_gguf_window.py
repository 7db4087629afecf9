"""Windows in llama.cpp: the dense model's file behind a window, against the dense model under a band made here.

The MLPs put out nothing: llama.cpp reads Gemma's GELU from a float16 table, whose steps would hide what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tightship.exporters import exporter_for
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.target import Target
from tightship.validators.runtimes import llama_cpp
from tightship.weights import Dense

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 128,
    "sliding_window": 128,
}  # fmt: skip
WINDOW, LENGTH = 7, 40


@pytest.mark.parametrize(("name", "layers"), [("Gemma2ForCausalLM", 2), ("Gemma3ForCausalLM", 6)])
def test_llama_cpp_sees_the_band(
    name: str, layers: int, save_model: Callable[..., Path], byte_level: Path, tmp_path: Path
) -> None:
    whole = open_checkpoint(save_model(name, {**SIZES, "num_hidden_layers": layers}, byte_level))
    silent = [info for info in whole.linears() if info.rule.role == "ffn_down"]
    dense = whole.with_weights({info.name: Dense.of(np.zeros(info.shape, np.float32)) for info in silent})
    step = pass_for("window", {"size": WINDOW, "layers": "listed"})
    small = step.apply(dense, Run())
    exporter = exporter_for("gguf")
    exporter.export(small, exporter.plan(small, Target("gguf")), tmp_path, lambda *_: None)
    ids = np.random.default_rng(0).integers(3, 500, (1, LENGTH))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    hidden = (distance < 0) | (distance >= WINDOW)
    low = torch.finfo(torch.float32).min
    band, causal = (torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(where, low) for where in (hidden, distance < 0))
    module = ModelView(dense).module()
    with torch.no_grad():
        both = {"full_attention": causal, "sliding_attention": band}
        expected = module(torch.from_numpy(ids), attention_mask=both).logits.numpy()
        unbanded = module(torch.from_numpy(ids)).logits.numpy()
    job = {"artifact": str(tmp_path), "main": f"{small.name}.gguf", "mode": "graph", "decode": 3}
    found = llama_cpp.run(job, {"input_ids": ids})[1]["logits"]
    norms = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(found - expected, axis=-1) / norms).max() <= 1e-5
    assert (np.linalg.norm(unbanded - expected, axis=-1) / norms).max() > 1e-2
