"""Decoders that give the logits of the last token: right, and all of them when asked; one row in genai.

So does the graph that lies beside one of all logits, whatever the layout of the head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.direct import DirectCandidate
from tightship.exporters.onnx_candidates.last_logits import LastLogitsCandidate
from tightship.exporters.onnx_candidates.mobius_graphs import MobiusCandidate
from tightship.exporters.onnx_candidates.skeleton import KEPT
from tightship.formats.onnx_file import read_onnx
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators import parity
from tightship.validators.onnx_twin import twin_faults
from tightship.validators.parity_model import small_checkpoint
from tightship.validators.runtimes import genai, onnx_runtime

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = np.random.default_rng(0).integers(1, 1024, (2, 12))


def opened_by_genai(directory: Path) -> str:
    config = json.loads((directory / "genai_config.json").read_text())
    return str(config["model"]["decoder"]["filename"])


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_the_last_token_unless_asked(ember: Checkpoint, lab: Any, scheme: str | None) -> None:
    """Without the input: one row, that of transformers. With 0: all rows; with 3: three. In genai: the same text."""
    directory, plan, exported = lab.build(ember, scheme, logits="last", include=["embeddings", "head"])
    assert exported.graph_source.split(":")[0].endswith("fused for ONNX Runtime, logits of the last token")
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, plan.target))
    expected = lab.expected(solved, EXAMPLES / "ember", IDS)["logits"]
    assert lab.apart(lab.run(directory, IDS)["logits"], expected) <= 1e-5
    session = onnx_runtime.open_session(directory / "model.onnx", "graph")
    graph = onnx_runtime.Graph(session)
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **graph.empty_past(2)}
    for said, rows in ((None, 1), (0, 12), (1, 1), (3, 3)):
        (got,) = session.run(["logits"], feeds | ({} if said is None else {KEPT: np.asarray(said)}))
        assert got.shape == (2, rows, 1024)
        assert lab.apart(got, expected[:, -rows:]) <= 1e-5
    job = {"artifact": str(directory)}
    limit = 1e-5 if scheme is None else 0.05
    assert lab.apart(genai.run(job, {"input_ids": IDS})[1]["logits"], expected) <= limit
    tokens = genai.run({**job, "want": "generate", "tokens": 16}, {"input_ids": IDS[:1, :6]})[1]["tokens"][0]
    shipped = onnx_runtime.Graph(onnx_runtime.open_session(directory / "model.onnx", "shipped"))
    np.testing.assert_array_equal(tokens, shipped.greedy(IDS[0, :6], 16))


@pytest.mark.parametrize("scheme", [None, "int4", "int4-portable", "int8-dynamic", "fp16-compute"])
def test_the_twin_that_genai_opens(ember: Checkpoint, lab: Any, scheme: str | None) -> None:
    """One row, that of transformers; genai computes all of them from the two; the same graph, the same data."""
    head = {"include": ["embeddings", "head"]} if scheme in ("int4", "int4-portable") else {}
    directory, plan, exported = lab.build(ember, scheme, folder="onnx", **head)
    assert opened_by_genai(directory) == "onnx/genai.onnx"
    assert [name for name in exported.files if name.endswith("_data")] == ["onnx/model.onnx_data"]
    assert exported.main == "onnx/model.onnx"
    assert [*twin_faults(directory / "onnx/model.onnx", directory / "onnx/genai.onnx")] == []
    solved = lab.rounded(ember, lab.exporter.layout_for(ember, plan.target))
    expected = lab.expected(solved, EXAMPLES / "ember", IDS)["logits"]
    found = lab.run(directory, IDS, main="onnx/genai.onnx")["logits"]
    assert found.shape == (2, 1, 1024)
    assert lab.apart(found, expected[:, -1:]) <= (2e-3 if scheme == "fp16-compute" else 1e-5)
    answer = genai.run({"artifact": str(directory), "main": exported.main}, {"input_ids": IDS})[1]["logits"]
    assert answer.shape == expected.shape
    assert lab.apart(answer, expected) <= (1e-5 if scheme is None else 0.05)


def test_genai_can_be_told_to_open_the_graph_of_all(ember: Checkpoint, lab: Any) -> None:
    directory, _, exported = lab.build(ember, logits="all")
    assert "genai.onnx" not in exported.files
    assert opened_by_genai(directory) == "model.onnx"


def test_what_is_in_the_file(ember: Checkpoint, lab: Any) -> None:
    """One row in front of the head; the strict reader and the checker take the input that has a default."""
    directory, _, _ = lab.build(ember, "int4-portable", logits="last")
    onnx.checker.check_model(str(directory / "model.onnx"))
    assert not any(KEPT in value for value in read_onnx(directory / "model.onnx").metadata["inputs"])
    session = ort.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_overridable_initializers()] == [KEPT]
    assert session.get_outputs()[0].shape[1] == 1


@pytest.mark.parametrize(
    ("family", "source"),
    [("llama", MobiusCandidate()), ("gemma2", DirectCandidate()), ("gpt2", DirectCandidate())],
)
def test_parity_judges_it(tiny: Any, family: str, source: Any) -> None:
    """Tied heads, soft caps behind the head; padding on either side and the cache."""
    small = small_checkpoint(tiny(family))
    found = parity.judge_candidate(LastLogitsCandidate(source), small, parity.references(small))
    assert found.passed, found.reason


def test_models_without_a_last_token_are_refused(lab: Any) -> None:
    with pytest.raises(Unsupported, match="for decoders"):
        lab.exporter.plan(open_checkpoint(EXAMPLES / "ember-bert"), Target("onnx", None, {"logits": "last"}))
