"""GGUF files of random models in llama.cpp against transformers, position by position; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tightship.errors import Unsupported, UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import read_gguf
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.validators.llama_gelu import llama_gelus
from tightship.weights import Dense, Quantized

EMBER = Path(__file__).parents[2] / "examples" / "ember"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # one wavelength (32.4) lies between 64 / 4 and 64, where it is smooth
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# name -> class, config. Every parameter of these models is random, biases and norms included.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-rope3": ("LlamaForCausalLM", {**SIZES, "rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaForCausalLM", {**SIZES, "rope_parameters": {**YARN, "rope_type": "linear"}}),
    "llama-dynamic": ("LlamaForCausalLM", {**SIZES, "rope_parameters": {**YARN, "rope_type": "dynamic"}}),
    "llama-yarn": ("LlamaForCausalLM", {**SIZES, "rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 16}),
    "qwen3-tied": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0},
    ),
}
BERT = {**SIZES, "vocab_size": 2048, "type_vocab_size": 2, "hidden_act": "gelu", "attn_implementation": "eager"}


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 distance of each position."""
    distance = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    return distance / np.linalg.norm(expected.astype(np.float64), axis=-1)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative L2 distance over positions."""
    return float(distances(found, expected).max())


def assert_close_but_for_steps(found: np.ndarray, expected: np.ndarray) -> None:
    """For GELU from a float16 table: an input on the other side of a rounding step makes a jump at a few positions."""
    assert np.median(distances(found, expected)) <= 1e-6
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def token_ids(batch: int = 2, length: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(3, 500, (batch, length))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, save_model: Callable, byte_level: Path, to_file: Callable, in_llama_cpp: Callable
) -> None:
    checkpoint = open_checkpoint(save_model(*MODELS[name], byte_level))
    _, file = to_file(checkpoint)
    ids = token_ids()
    view = ModelView(checkpoint)
    with llama_gelus(view.module()):
        expected = view.outputs(ids)["logits"]
    found = in_llama_cpp(file, ids)["logits"]
    if name == "gpt2":
        assert_close_but_for_steps(found, expected)
    else:
        assert relative(found, expected) <= 1e-5


def test_bert_hidden_states(
    save_model: Callable, word_piece: Callable, to_file: Callable, in_llama_cpp: Callable
) -> None:
    checkpoint = open_checkpoint(save_model("BertModel", BERT, word_piece(True)))
    _, file = to_file(checkpoint)
    ids = token_ids()
    mask = np.ones_like(ids)
    mask[1, 30:] = 0
    found = in_llama_cpp(file, ids, mask, pooling="mean")
    view = ModelView(checkpoint)
    plain = view.outputs(ids, mask)["last_hidden_state"]
    with llama_gelus(view.module()):
        same_gelu = view.outputs(ids, mask)["last_hidden_state"]
    kept = mask.astype(bool)
    assert relative(found["last_hidden_state"][kept], plain[kept]) <= 1e-3
    assert_close_but_for_steps(found["last_hidden_state"][kept], same_gelu[kept])
    mean = (same_gelu * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    assert relative(found["sentence_embedding"], mean) <= 1e-5


def test_single_token_steps_give_the_same_logits(to_file: Callable, in_llama_cpp: Callable) -> None:
    _, file = to_file(open_checkpoint(EMBER))
    ids = token_ids(1, 20)
    whole, stepped = in_llama_cpp(file, ids)["logits"], in_llama_cpp(file, ids, decode=8)["logits"]
    assert relative(stepped, whole) <= 1e-5


def test_left_padding_is_skipped(to_file: Callable, in_llama_cpp: Callable) -> None:
    _, file = to_file(open_checkpoint(EMBER))
    ids = token_ids(1, 20)
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    padded = in_llama_cpp(file, ids, mask)["logits"]
    assert not padded[0, :5].any()
    assert relative(padded[:, 5:], in_llama_cpp(file, ids[:, 5:])["logits"]) <= 1e-6


def test_gguf_reads_names_and_values_of_ember(to_file: Callable) -> None:
    checkpoint = open_checkpoint(EMBER)
    plan, file = to_file(checkpoint)
    assert file.name == "ember.gguf"
    assert file.stat().st_size == plan.file_bytes
    assert (file.parent / "Modelfile").read_text() == "FROM ./ember.gguf\n"
    reader = gguf.GGUFReader(file)
    found = {t.name: t for t in reader.tensors}
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type.name == "BF16"
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    embedding = gguf.dequantize(found["token_embd.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert np.array_equal(embedding, checkpoint.resolve("model.embed_tokens.weight").value())
    # rotated halves become neighbours: row 1 of head 0 was row d / 2
    query = gguf.dequantize(found["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.BF16)
    disk = checkpoint.resolve("model.layers.0.self_attn.q_proj.weight").value()
    assert np.array_equal(query[:4], disk[[0, 32, 1, 33]])


def test_every_optional_key_is_there(to_file: Callable) -> None:
    _, file = to_file(open_checkpoint(EMBER))
    metadata = read_gguf(file).metadata
    wanted = "context_length embedding_length block_count feed_forward_length attention.head_count "
    wanted += "attention.head_count_kv attention.key_length attention.value_length rope.dimension_count rope.freq_base "
    wanted += "rope.scaling.type attention.layer_norm_rms_epsilon vocab_size"
    assert not [key for key in wanted.split() if f"llama.{key}" not in metadata]
    wanted = "model pre tokens token_type merges bos_token_id eos_token_id add_bos_token add_eos_token add_space_prefix"
    assert not [key for key in wanted.split() if f"tokenizer.ggml.{key}" not in metadata]
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert len(metadata["tightship.source.sha256"]) == 64
    kinds = {field.kind for key, field in read_gguf(file).fields.items() if key.startswith("llama.")}
    assert kinds == {"u32", "f32", "str"}


def test_the_same_input_makes_the_same_bytes(to_file: Callable) -> None:
    first, second = (to_file(open_checkpoint(EMBER))[1].read_bytes() for _ in range(2))
    assert first == second
    assert str(EMBER).encode() not in first


@pytest.mark.parametrize(
    "word", ["int4", "int8", "int4-asym", "q4_1", "q5_1", "int5", "q4_k", "q6_k", "q3_k", "q2_k", "q5_k"]
)
def test_quantized_layouts_are_carried_exactly(word: str, to_file: Callable, in_llama_cpp: Callable) -> None:
    checkpoint = open_checkpoint(EMBER)
    layout = parse_layout(word)
    changed = {
        info.name: Quantized.of(layout, layout.quantize(checkpoint.resolve(info.name).value()))
        for info in checkpoint.linears()
    }
    compressed = checkpoint.with_weights(changed)
    plan, file = to_file(compressed)
    ids = token_ids(1, 32)
    expected = ModelView(compressed).outputs(ids)["logits"]
    assert relative(in_llama_cpp(file, ids)["logits"], expected) <= 1e-5
    # as shipped, llama.cpp rounds activations to 8 bits: a per cent or two, no more
    assert relative(in_llama_cpp(file, ids, mode="shipped")["logits"], expected) <= 0.1
    types = {t.storage for t in plan.tensors if t.name in changed}
    assert len(types) == 1


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_dense_weights_keep_their_type(dtype: str, to_file: Callable) -> None:
    checkpoint = open_checkpoint(EMBER)
    name = "model.layers.0.mlp.up_proj.weight"
    from tightship.dtypes import dtype as dtype_of

    w = checkpoint.resolve(name).value().astype(dtype_of(dtype).numpy)
    plan, file = to_file(checkpoint.with_weights({name: Dense.of(w)}))
    assert read_gguf(file).tensors["blk.0.ffn_up.weight"].type_name == dtype.upper()
    assert np.array_equal(read_gguf(file).tensors["blk.0.ffn_up.weight"].weight().read(), w)
    assert next(t.layout for t in plan.tensors if t.name == name) == dtype


def save_config(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "computes silu"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "does not read rope type"),
        ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast"),
        ({"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention factor"),
        ({"sliding_window": 64}, "ignores sliding windows"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_the_loader_ignores_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(save_config(EMBER, tmp_path / "m", **changes))
    with pytest.raises(Unsupported, match=message) as caught:
        GgufExporter().plan(checkpoint, Target("gguf"))
    assert caught.value.exit_code == 3


def test_a_window_is_refused_until_the_context_fits_it(
    save_model: Callable, byte_level: Path, to_file: Callable, in_llama_cpp: Callable
) -> None:
    checkpoint = open_checkpoint(save_model("MistralForCausalLM", {**SIZES, "sliding_window": 24}, byte_level))
    with pytest.raises(Unsupported, match="24 tokens"):
        GgufExporter().plan(checkpoint, Target("gguf"))
    _, file = to_file(checkpoint, context=24)
    assert read_gguf(file).metadata["llama.context_length"] == 24
    ids = token_ids(1, 24)
    assert relative(in_llama_cpp(file, ids)["logits"], ModelView(checkpoint).outputs(ids)["logits"]) <= 1e-5


@pytest.mark.parametrize(("context", "message"), [(0, "1 to 512"), (513, "1 to 512"), ("8k", "'8k'")])
def test_contexts_that_cannot_be(context: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GgufExporter().plan(open_checkpoint(EMBER), Target("gguf", None, {"context": context}))


def test_learned_positions_fix_the_context(save_model: Callable, byte_level: Path) -> None:
    checkpoint = open_checkpoint(save_model(*MODELS["gpt2"], byte_level))
    with pytest.raises(UsageError, match="are learned"):
        GgufExporter().plan(checkpoint, Target("gguf", None, {"context": 64}))


def test_opt_has_no_graph(save_model: Callable, byte_level: Path) -> None:
    config = {"vocab_size": 512, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    checkpoint = open_checkpoint(save_model("OPTForCausalLM", {**config, "word_embed_proj_dim": 64}, byte_level))
    with pytest.raises(Unsupported, match="no OPT graph") as caught:
        GgufExporter().plan(checkpoint, Target("gguf"))
    assert caught.value.exit_code == 3


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    folder = save_config(EMBER, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Unsupported, match="GGUF needs a tokenizer"):
        GgufExporter().plan(open_checkpoint(folder), Target("gguf"))


def test_layouts_without_a_type_are_refused() -> None:
    checkpoint = open_checkpoint(EMBER)
    name = "model.layers.0.mlp.up_proj.weight"
    layout = parse_layout("int4-g16")
    changed = checkpoint.with_weights({name: Quantized.of(layout, layout.quantize(checkpoint.resolve(name).value()))})
    with pytest.raises(Unsupported, match="nearest: int4") as caught:
        GgufExporter().plan(changed, Target("gguf"))
    assert caught.value.tensor == name


def test_a_scheme_on_quantized_weights_is_a_usage_error() -> None:
    checkpoint = open_checkpoint(EMBER)
    name = "model.layers.0.mlp.up_proj.weight"
    layout = parse_layout("int8")
    changed = checkpoint.with_weights({name: Quantized.of(layout, layout.quantize(checkpoint.resolve(name).value()))})
    with pytest.raises(UsageError, match="already"):
        GgufExporter().plan(changed, Target("gguf", "q4_0"))


def test_names_with_phi_3_are_left_out(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_config(EMBER, tmp_path / "tiny-phi3-copy"))
    exporter = GgufExporter()
    plan = exporter.plan(checkpoint, Target("gguf"))
    assert "Phi-3" in plan.notes[0]
    (tmp_path / "out").mkdir()
    exported = exporter.export(checkpoint, plan, tmp_path / "out", no_progress)
    assert "general.name" not in read_gguf(tmp_path / "out" / exported.main).metadata
