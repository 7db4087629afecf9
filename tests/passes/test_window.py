"""Windows against dense runs under an explicit band, in torch and ONNX Runtime; GGUF where the loader reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters import exporter_for
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.pipeline import exporter_of
from tightship.target import Target

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

EMBER = Path(__file__).parents[2] / "examples" / "ember"
Tiny = Callable[[str], Checkpoint]
IDS = np.random.default_rng(0).integers(1, 96, (2, 24))


def windowed(checkpoint: Checkpoint, size: int) -> Checkpoint:
    step = pass_for("window", {"size": size})
    step.requires(checkpoint)
    return step.apply(checkpoint, Run())


def banded(checkpoint: Checkpoint, size: int) -> np.ndarray:
    """Logits of the dense model under a mask made here: key j is seen by query i where 0 <= i - j < size."""
    length = IDS.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) & (distance < size)
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = mask[None, None].expand(len(IDS), 1, length, length)
    with torch.no_grad():
        found: np.ndarray = ModelView(checkpoint).module()(torch.from_numpy(IDS), attention_mask=mask).logits.numpy()
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3", "phi3"])
def test_a_wide_window_is_the_dense_model_bit_for_bit(family: str, tiny: Tiny) -> None:
    dense = tiny(family)
    wide = windowed(dense, 64)
    expected, found = (ModelView(c, threads=1).outputs(IDS)["logits"] for c in (dense, wide))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "qwen3", "phi3"])
def test_a_window_is_a_dense_run_under_a_band(family: str, tiny: Tiny) -> None:
    dense = tiny(family)
    found = ModelView(windowed(dense, 5)).outputs(IDS)["logits"]
    np.testing.assert_allclose(found, banded(dense, 5), rtol=1e-4, atol=1e-4)
    assert np.abs(found - ModelView(dense).outputs(IDS)["logits"]).max() > 0.1


def test_onnx_runtime_sees_the_same_band(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("llama")
    small = windowed(dense, 5)
    exporter = exporter_of("onnx")
    exporter.export(small, exporter.plan(small, Target("onnx")), tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    feeds: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32)
        elif entry.name == "position_ids":
            feeds[entry.name] = np.broadcast_to(np.arange(24), (2, 24)).copy()
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits, banded(dense, 5), rtol=1e-3, atol=1e-3)


def test_gguf_is_refused_where_the_loader_ignores_windows_and_gemma_is_not(tiny: Tiny) -> None:
    ember = open_checkpoint(EMBER)
    with pytest.raises(Unsupported, match="ignores sliding windows"):
        exporter_for("gguf").plan(windowed(ember, 64), Target("gguf"))
    harmless = Target("gguf", options={"context": 64})
    assert exporter_for("gguf").plan(windowed(ember, 64), harmless).file_bytes > 0
    assert windowed(tiny("gemma2"), 5).hyper["window_layers"] == [1, 1]


def test_families_without_a_word_for_it_are_refused(tiny: Tiny) -> None:
    for family in ("distilbert", "gpt2", "opt"):
        with pytest.raises(Unsupported, match="no word for a sliding window"):
            windowed(tiny(family), 8)
    with pytest.raises(Unsupported, match="another base"):
        windowed(tiny("gemma3"), 8)
    with pytest.raises(Unsupported, match="lists no sliding layers"):
        pass_for("window", {"size": 8, "layers": "listed"}).requires(tiny("llama"))
    with pytest.raises(UsageError, match="size"):
        pass_for("window", {"size": 0})


LONG = {
    "RobertaForMaskedLM": ({"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}, 0),
    "RobertaForSequenceClassification": ({"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}, 1),
    "BertForMaskedLM": ({"max_position_embeddings": 64, "pad_token_id": 0}, 0),
    "BertForSequenceClassification": ({"max_position_embeddings": 64, "pad_token_id": 0}, 1),
    "BertModel": ({"max_position_embeddings": 64, "pad_token_id": 0}, 0),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """class -> a random model of two layers, opened from the files that transformers writes."""
    transformers = pytest.importorskip("transformers")

    def make(name: str) -> Checkpoint:
        model_class = getattr(transformers, name)
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**sizes, num_attention_heads=4, **LONG[name][0]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return open_checkpoint(folder)

    return make


def first(outputs: Any) -> np.ndarray:
    """Logits, or hidden states of a bare encoder."""
    return np.asarray(outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"])


@pytest.mark.parametrize("name", list(LONG))
def test_an_encoder_behind_a_wide_window_is_longformer(name: str, encoder: Callable[[str], Checkpoint]) -> None:
    dense = encoder(name)
    step = pass_for("window", {"size": 64, "global_tokens": LONG[name][1]})
    long = step.apply(dense, Run())
    assert long.config["architectures"][0].startswith("Longformer")
    ids = np.random.default_rng(0).integers(5, 96, (2, 32))
    expected, found = (first(ModelView(c).outputs(ids)) for c in (dense, long))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    narrow = pass_for("window", {"size": 4, "global_tokens": LONG[name][1]}).apply(dense, Run())
    assert np.abs(first(ModelView(narrow).outputs(ids)) - expected).max() > 0.01


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "BertForSequenceClassification"])
def test_a_narrow_longformer_is_the_dense_encoder_under_a_band(
    name: str, encoder: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """The mask is made here; torch and ONNX Runtime see half a window either way, and the global token everything."""
    dense, count = encoder(name), LONG[name][1]
    long = pass_for("window", {"size": 8, "global_tokens": count}).apply(dense, Run())
    ids = np.random.default_rng(0).integers(5, 96, (2, 24))
    place = np.arange(24)
    seen = (np.abs(place[:, None] - place) <= 4) | (place[:, None] < count) | (place < count)
    mask = torch.zeros(24, 24).masked_fill(~torch.from_numpy(seen), torch.finfo(torch.float32).min)
    module = ModelView(dense).module()
    with torch.no_grad():
        expected = module(torch.from_numpy(ids), attention_mask=mask[None, None].expand(2, 1, 24, 24)).logits.numpy()
    np.testing.assert_allclose(ModelView(long).outputs(ids)["logits"], expected, rtol=1e-5, atol=1e-5)
    exporter = exporter_of("onnx")
    exporter.export(long, exporter.plan(long, Target("onnx")), tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds["global_attention_mask"] = np.zeros_like(ids)
    (logits,) = session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_global_tokens_are_those_that_the_class_takes(encoder: Callable[[str], Checkpoint], tiny: Tiny) -> None:
    for name, count in (("BertForMaskedLM", 1), ("RobertaForSequenceClassification", 0)):
        with pytest.raises(Unsupported, match="global tokens of its own"):
            pass_for("window", {"size": 8, "global_tokens": count}).requires(encoder(name))
    with pytest.raises(Unsupported, match="no global tokens"):
        pass_for("window", {"size": 8, "global_tokens": 1}).requires(tiny("llama"))
    with pytest.raises(UsageError, match="two equal halves"):
        pass_for("window", {"size": 7}).requires(encoder("BertModel"))
