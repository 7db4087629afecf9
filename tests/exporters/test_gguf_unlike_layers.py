"""GGUF files of llama.cpp's `deci`, whose blocks have widths of their own, opened as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import Field, read_gguf
from tightship.gguf_source import open_gguf
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.weights import Alias, Dense, Quantized

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
WIDTHS = [(64, 3, 1), (96, 6, 3), (32, 4, 4)]  # ffn, heads, key heads
KEYS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
}


@pytest.fixture(scope="module")
def unlike(save_model: Callable, byte_level: Path) -> Callable[[str], Checkpoint]:
    """One of MODELS with random weights of the widths of WIDTHS."""

    def make(name: str) -> Checkpoint:
        whole = open_checkpoint(save_model("LlamaForCausalLM", {**SIZES, **MODELS[name]}, byte_level))
        table = {str(n): dict(zip(KEYS, own, strict=True)) for n, own in enumerate(WIDTHS)}
        config, rng = {**whole.config, "per_layer_config": table}, np.random.default_rng(0)
        shapes = {n: i.shape for n, i in whole.architecture.lookup(config).items() if n in whole.weights}
        changed = {
            name: Dense.of((len(shape) == 1) + rng.normal(0, 0.1, shape).astype(np.float32))
            for name, shape in shapes.items()
            if not isinstance(whole.weights[name], Alias)
        }
        return whole.with_weights(changed).replace(config=config)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_weights_logits_and_file_come_back(
    name: str, unlike: Callable, to_file: Callable, in_llama_cpp: Callable
) -> None:
    original = unlike(name)
    file = to_file(original)[1]
    assert read_gguf(file).metadata["general.architecture"] == "deci"
    back = open_checkpoint(file)
    assert back.config["per_layer_config"] == original.config["per_layer_config"]
    assert set(back.weights) == set(original.weights)
    for key in original.weights:
        assert np.array_equal(original.resolve(key).value(), back.resolve(key).value()), key
    ids = np.random.default_rng(1).integers(3, 500, (2, 40))
    ours = ModelView(back).outputs(ids)["logits"]
    np.testing.assert_array_equal(ours, ModelView(original).outputs(ids)["logits"])
    again = to_file(back)[1]
    found = [in_llama_cpp(path, ids)["logits"] for path in (file, again)]
    np.testing.assert_array_equal(*found)
    assert np.linalg.norm(found[0] - ours) <= 1e-5 * np.linalg.norm(ours)


def test_codes_stay_as_they_are(unlike: Callable, to_file: Callable) -> None:
    file = to_file(unlike("plain"), "q8_0")[1]
    back = open_gguf(file)
    assert isinstance(back.weights["model.layers.1.mlp.gate_proj.weight"], Quantized)
    again = read_gguf(to_file(back)[1])
    for name, tensor in read_gguf(file).tensors.items():
        assert np.array_equal(tensor.read_rows(), again.tensors[name].read_rows()), name


def test_what_a_file_need_not_say(unlike: Callable, to_file: Callable, rewritten: Callable, tmp_path: Path) -> None:
    """One number of key heads for all blocks; heads that share the stream out without saying their size."""
    original = unlike("plain")
    table = {str(n): {"num_attention_heads": heads} for n, heads in enumerate((4, 6, 2))}
    config = {**original.config, "num_key_value_heads": 2, "intermediate_size": 64, "per_layer_config": table}
    shapes = {name: info.shape for name, info in original.architecture.lookup(config).items()}
    cut = {n: Dense.of(np.resize(w.value(), shapes[n])) for n, w in original.weights.items()}
    original = original.with_weights(cut).replace(config=config)
    said = {"deci.attention.head_count_kv": Field("u32", 2), "deci.feed_forward_length": Field("u32", 64)}
    back = open_gguf(rewritten(to_file(original)[1], tmp_path / "x.gguf", {**said, "deci.attention.key_length": None}))
    assert (back.config["num_attention_heads"], back.config["num_key_value_heads"]) == (4, 2)
    assert [back.widths(width) for width in ("heads", "kv_heads", "ffn")] == [[4, 6, 2], [2] * 3, [64] * 3]
    ids = np.random.default_rng(1).integers(3, 500, (1, 24))
    np.testing.assert_array_equal(ModelView(back).outputs(ids)["logits"], ModelView(original).outputs(ids)["logits"])


def numbers(*entries: int) -> Field:
    return Field("[i32]", list(entries))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"feed_forward_length": numbers(64, 96)}, Malformed, "2 entries for 3 blocks"),
        ({"feed_forward_length": numbers()}, Malformed, "0 entries for 3 blocks"),
        ({"feed_forward_length": numbers(64, -96, 32)}, Malformed, "-96 for block 1"),
        ({"feed_forward_length": numbers(64, 0, 32)}, Unsupported, "0 for block 1: no feed-forward"),
        ({"feed_forward_length": numbers(64, 96, 64)}, Malformed, "where config.json says"),
        ({"feed_forward_length": Field("[f32]", [64.0, 96.0, 32.0])}, Malformed, "no array of whole numbers"),
        ({"feed_forward_length": Field("[str]", ["64", "96", "32"])}, Malformed, "no array of whole numbers"),
        ({"feed_forward_length": Field("[bool]", [True, True, True])}, Malformed, "no array of whole numbers"),
        ({"feed_forward_length": Field("str", "64")}, Malformed, "not a count"),
        ({"attention.head_count": numbers(3, 6, 0)}, Unsupported, "0 for block 2: no attention"),
        ({"attention.head_count": numbers(3, 7, 4)}, Malformed, "7 heads of block 1"),
        ({"attention.head_count": None}, Malformed, "not a positive number"),
        ({"attention.head_count": Field("str", "4")}, Malformed, "not a positive number"),
        ({"attention.head_count_kv": numbers(1, 3, 0)}, Unsupported, "0 for block 2: a matrix"),
        ({"attention.head_count_kv": numbers(1, 3, 4, 4)}, Malformed, "4 entries for 3 blocks"),
        ({"attention.head_count_kv": Field("str", "1")}, Malformed, "not a positive number"),
        ({"attention.head_count_kv": None}, Malformed, "where config.json says"),
        ({"block_count": None}, Malformed, "entries for None blocks"),
        ({"block_count": Field("u32", 4)}, Malformed, "3 entries for 4 blocks"),
        ({"expert_count": Field("u32", 4)}, Unsupported, "a deci file lacks tensors"),
    ],
)
def test_arrays_that_are_no_widths(  # noqa: PLR0917 - fixtures
    changes: dict[str, Field | None],
    kind: type[Exception],
    message: str,
    unlike: Callable,
    to_file: Callable,
    rewritten: Callable,
    tmp_path: Path,
) -> None:
    fields = {f"deci.{key}": field for key, field in changes.items()}
    broken = rewritten(to_file(unlike("plain"))[1], tmp_path / "broken.gguf", fields)
    with pytest.raises(kind, match=message):
        open_gguf(broken)


def test_arrays_of_equal_widths_are_a_plain_llama(  # noqa: PLR0917 - fixtures
    save_model: Callable,
    byte_level: Path,
    to_file: Callable,
    rewritten: Callable,
    in_llama_cpp: Callable,
    tmp_path: Path,
) -> None:
    """A file as another converter would write it: `deci` throughout, key heads left out where they are the heads."""
    original = open_checkpoint(save_model("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 4}, byte_level))
    plain = to_file(original)[1]
    named = {key: field for key, field in read_gguf(plain).fields.items() if key.startswith("llama.")}
    fields = dict.fromkeys(named) | {key.replace("llama", "deci", 1): field for key, field in named.items()}
    fields |= {"general.architecture": Field("str", "deci"), "deci.attention.head_count": numbers(4, 4, 4)}
    file = rewritten(plain, tmp_path / "deci.gguf", fields | {"deci.attention.head_count_kv": None})
    back = open_gguf(file)
    assert "per_layer_config" not in back.config
    assert back.hyper == original.hyper
    ids = np.random.default_rng(1).integers(3, 500, (1, 24))
    np.testing.assert_array_equal(ModelView(back).outputs(ids)["logits"], ModelView(original).outputs(ids)["logits"])
    found = in_llama_cpp(file, ids)["logits"]
    ours = ModelView(back).outputs(ids)["logits"]
    assert np.linalg.norm(found - ours) <= 1e-5 * np.linalg.norm(ours)
