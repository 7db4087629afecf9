"""transformers has two ways to load packed safetensors, each wrong for some files; the client picks the right one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.runtimes import transformers_client
from tightship.weights import Quantized

EMBER = Path(__file__).resolve().parents[3] / "examples" / "ember"


@pytest.mark.parametrize("mode", ["graph", "shipped"])
@pytest.mark.parametrize(("word", "other"), [("int4", "int4"), ("int4", "int8"), ("int4-asym", "int4-asym")])
def test_logits_are_those_of_the_compressed_checkpoint(word: str, other: str, mode: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    changed = {}
    for info in checkpoint.linears():
        layout = parse_layout(other if info.rule.role == "ffn_down" else word)
        changed[info.name] = Quantized.of(layout, layout.quantize(checkpoint.resolve(info.name).value()))
    checkpoint = checkpoint.with_weights(changed)
    exporter = SafetensorsExporter()
    exporter.export(checkpoint, exporter.plan(checkpoint, Target("safetensors")), tmp_path)
    ids = np.arange(3, 35)[None]
    expected = ModelView(checkpoint).outputs(ids)["logits"].astype(np.float64)
    _, arrays = transformers_client.run({"artifact": str(tmp_path), "mode": mode}, {"input_ids": ids})
    distance = np.linalg.norm(arrays["logits"] - expected) / np.linalg.norm(expected)
    # As shipped the file says bfloat16, and transformers computes in it: 8 bits of mantissa through two blocks.
    assert distance <= (1e-6 if mode == "graph" else 2.0**-6)
