"""llama.cpp as a judge: what it answers besides logits, and how it fails. Logits are tested with the GGUF exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.errors import GateFailed
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import read_gguf
from tightship.formats.gguf_writer import TensorToWrite, write_gguf
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.validators.gguf_float32 import as_float32
from tightship.validators.runtimes import llama_cpp
from tightship.validators.runtimes.child import Limits, run_child

pytest.importorskip("cyllama")
EMBER = Path(__file__).parents[3] / "examples" / "ember"


@pytest.fixture(scope="module")
def ember(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job of a GGUF file of ember."""
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint, exporter = open_checkpoint(EMBER), GgufExporter()
    exported = exporter.export(checkpoint, exporter.plan(checkpoint, Target("gguf")), folder, no_progress)
    return {"artifact": str(folder), "main": exported.main, "mode": "graph", "threads": 1}


def test_greedy_tokens_are_those_of_the_reference(ember: dict[str, Any]) -> None:
    prompt = np.random.default_rng(0).integers(1, 1000, (1, 12))
    _, found = llama_cpp.run({**ember, "want": "generate", "tokens": 8}, {"input_ids": prompt})
    ids = prompt
    view = ModelView(open_checkpoint(EMBER))
    for _ in range(8):
        ids = np.concatenate([ids, view.outputs(ids)["logits"][:, -1].argmax(-1)[:, None]], axis=1)
    assert found["tokens"].tolist() == ids[:, 12:].tolist()


def test_vocabulary_is_that_of_the_file(ember: dict[str, Any]) -> None:
    answer, _ = llama_cpp.run({**ember, "want": "vocab"}, {})
    metadata = read_gguf(Path(ember["artifact"]) / ember["main"]).metadata
    assert answer["pieces"] == metadata["tokenizer.ggml.tokens"]
    assert answer["merges"] == metadata["tokenizer.ggml.merges"]
    assert (answer["bos"], answer["eos"], answer["add_bos"], answer["add_eos"]) == (0, 0, False, False)


def test_long_prompts_are_cut_into_chunks(ember: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(1, 1000, (1, 30))
    _, whole = llama_cpp.run(ember, {"input_ids": ids})
    monkeypatch.setattr(llama_cpp, "_CHUNK", 8)
    _, cut = llama_cpp.run(ember, {"input_ids": ids})
    np.testing.assert_allclose(cut["logits"], whole["logits"], atol=1e-4)


def test_a_file_that_llama_cpp_refuses_fails_the_gate(ember: dict[str, Any], tmp_path: Path) -> None:
    source = read_gguf(Path(ember["artifact"]) / ember["main"])
    kept = [t for name, t in source.tensors.items() if name != "output_norm.weight"]
    tensors = [TensorToWrite(t.name, t.type_name, t.shape, lambda t=t: [t.read_rows()]) for t in kept]
    write_gguf(tmp_path / "x.gguf", source.fields, tensors)
    with pytest.raises(GateFailed, match=r"does not load x\.gguf"):
        llama_cpp.run({"artifact": str(tmp_path), "main": "x.gguf"}, {"input_ids": np.ones((1, 4), np.int64)})


def test_widening_keeps_values_and_leaves_float32_alone(ember: dict[str, Any], tmp_path: Path) -> None:
    path = Path(ember["artifact"]) / ember["main"]
    wide = as_float32(path, tmp_path)
    first, second = read_gguf(path), read_gguf(wide)
    assert {t.type_name for t in second.tensors.values()} == {"F32"}
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.weight().value(), second.tensors[name].weight().value())
    assert as_float32(wide, tmp_path) == wide


def test_in_a_child_process(ember: dict[str, Any]) -> None:
    job = {**ember, "want": "tokenize", "texts": ["a b", ""]}
    answer, _ = run_child("llama_cpp", job, {}, limits=Limits(seconds=60))
    assert len(answer["ids"]) == 2
    assert answer["ids"][1] == []
