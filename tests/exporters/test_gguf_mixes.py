"""Schemes against llama-quantize itself: the same types for every tensor, and the same bytes of the whole file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import LlamaFileType

from tightship.errors import Unsupported, UsageError
from tightship.exporters import gguf_mixes
from tightship.exporters.gguf_mixes import Matrix, Model, choose
from tightship.exporters.gguf_tensors import file_order
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import Field, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, write_gguf
from tightship.opening import open_checkpoint
from tightship.target import Target

EMBER = Path(__file__).parents[2] / "examples" / "ember"
WHOLE_FILE = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s",
    "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "iq3_s", "iq3_m", "tq1_0", "tq2_0",
]  # fmt: skip
# name -> architecture, layers, heads, key heads, experts, columns, whether there is an output.weight
MODELS = {
    "grouped": ("llama", 20, 8, 2, 0, 256, True),
    "ungrouped-tied": ("llama", 33, 8, 8, 0, 256, False),
    "large": ("llama", 80, 8, 1, 0, 256, True),
    "large-ungrouped": ("llama", 80, 8, 8, 0, 256, True),
    "large-qwen2": ("qwen2", 80, 8, 4, 0, 256, True),
    "mixtral": ("llama", 16, 8, 2, 8, 256, True),
    "four-experts": ("llama", 16, 8, 4, 4, 256, True),
    "falcon": ("falcon", 24, 8, 1, 0, 256, True),
    "rows-of-32": ("llama", 9, 8, 2, 0, 288, True),
    "rows-of-8": ("llama", 9, 8, 2, 0, 40, False),
}


def llama_quantize(source: Path, target: Path, file_type: str) -> None:
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    params = library.LlamaModelQuantizeParams()
    params.ftype = int(LlamaFileType[file_type])
    params.nthread = 1
    library.model_quantize(str(source), str(target), params)


def dry_run(source: Path, file_type: str) -> dict[str, str]:
    """Tensor -> type that llama-quantize would choose, read from what it says; untouched tensors are left out."""
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    said: list[str] = []
    library.set_log_callback(lambda _level, text: said.append(text))
    params = library.LlamaModelQuantizeParams()
    params.ftype = int(LlamaFileType[file_type])
    params.dry_run = True
    try:
        library.model_quantize(str(source), "unused", params)
    finally:
        library.set_log_callback(lambda _level, _text: None)
    lines = re.split(r"\[ *\d+/ *\d+\] ", "".join(said))[1:]
    types = {line.split()[0]: re.search(r"MiB \((\w+)\)", line) for line in lines}
    return {name: match[1].upper() for name, match in types.items() if match}


def matrices(name: str) -> tuple[list[Matrix], Model]:
    """A model's matrices, two rows each: only names and columns decide."""
    arch, layers, heads, kv_heads, experts, cols, untied = MODELS[name]
    names = ["token_embd.weight", "output_norm.weight", *(["output.weight"] if untied else [])]
    parts = ["attn_qkv"] if arch == "falcon" else ["attn_q", "attn_k", "attn_v"]
    stack = "_exps" if experts else ""
    parts += ["attn_norm", "attn_output", f"ffn_down{stack}", f"ffn_gate{stack}", "ffn_norm", f"ffn_up{stack}"]
    names += [f"blk.{i}.{part}.weight" for i in range(layers) for part in parts]
    names += [f"blk.{i}.ffn_gate_inp.weight" for i in range(layers) if experts]
    listed = [
        Matrix(n, (cols,) if "norm" in n else (experts, 2, cols) if n.endswith("_exps.weight") else (2, cols))
        for n in names
    ]
    model = Model(arch, layers, heads, kv_heads, experts, importance=False)
    return sorted(listed, key=lambda m: file_order(m.name)), model


def header_only(name: str, path: Path) -> list[Matrix]:
    """A file whose header llama-quantize understands; its matrices are zeros."""
    listed, model = matrices(name)
    numbers = {
        "block_count": model.layers, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256,
        "attention.head_count": model.heads, "attention.head_count_kv": model.kv_heads, "vocab_size": 1,
    }  # fmt: skip
    if model.experts:
        numbers |= {"expert_count": model.experts, "expert_used_count": 2}
    fields = {"general.architecture": Field("str", model.arch)}
    fields |= {f"{model.arch}.{key}": Field("u32", value) for key, value in numbers.items()}
    fields |= {
        f"{model.arch}.attention.{key}": Field("f32", 1e-5) for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon")
    }
    fields["tokenizer.ggml.model"] = Field("str", "no_vocab")
    write_gguf(path, fields, [TensorToWrite(m.name, "F32", m.shape, partial(zeros, m.shape)) for m in listed])
    return listed


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4_k_m", "q2_k", "mxfp4_moe"])
def test_whole_files_with_experts(
    scheme: str, save_model: Callable, byte_level: Path, to_file: Callable, tmp_path: Path
) -> None:
    config = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None,
    }  # fmt: skip
    checkpoint = open_checkpoint(save_model("MixtralForCausalLM", config, byte_level))
    _, source = to_file(checkpoint)
    _, ours = to_file(checkpoint, scheme)
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(source, theirs, str(gguf_mixes.scheme(scheme)["file_type"]))
    assert ours.read_bytes() == theirs.read_bytes()


def zeros(shape: tuple[int, ...]) -> list[np.ndarray]:
    return [np.zeros(shape, np.float32)]


@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_chooses_the_types_of_llama_quantize(name: str, tmp_path: Path) -> None:
    path = tmp_path / "header.gguf"
    listed = header_only(name, path)
    model = matrices(name)[1]
    for word, entry in gguf_mixes.tables()["schemes"].items():
        chosen = {n: c.type_name for n, c in choose(word, listed, model, check=False).items()}
        try:
            expected = dry_run(path, entry["file_type"])
        except RuntimeError:  # llama-quantize gives up on types without a fallback; here they become F16, and say so
            assert name == "rows-of-8"
            assert set(chosen.values()) == {"F16"}
            continue
        assert {n: t for n, t in chosen.items() if t != "F32"} == expected, word


def test_types_that_need_importance_data_are_refused_without_them() -> None:
    listed, model = matrices("grouped")
    with pytest.raises(Unsupported, match="needs importance data") as caught:
        choose("iq2_xs", listed, model)
    assert caught.value.exit_code == 3
    with pytest.raises(Unsupported, match="Q2_K, which needs importance"):
        choose("q2_k_s", listed, model)
    choose("q2_k", listed, model)
    choose("iq2_xs", listed, replace(model, importance=True))


@pytest.mark.parametrize(
    ("scheme", "role", "without", "given"),
    [
        ("q4_0", "ffn_down", "Q4_0", "Q4_1"),
        ("q5_0", "ffn_down", "Q5_0", "Q5_1"),
        ("iq4_xs", "ffn_down", "Q5_K", "IQ4_XS"),
    ],
)
def test_importance_changes_the_first_eighth(scheme: str, role: str, without: str, given: str) -> None:
    """llama-quant.cpp: with an importance matrix Q4_0 and Q5_0 guard the first ffn_down, IQ4 need not."""
    listed, model = matrices("grouped")
    for importance, expected in ((False, without), (True, given)):
        chosen = choose(scheme, listed, replace(model, importance=importance))
        assert [chosen[f"blk.{i}.{role}.weight"].type_name for i in (0, 1)] == [expected] * 2
        assert chosen["blk.2.ffn_down.weight"].type_name == scheme.upper()


def test_overrides_decide_first(to_file: Callable) -> None:
    checkpoint = open_checkpoint(EMBER)
    overrides = {r"blk\.0\.ffn_down": "q8_0", "ffn_": "f16"}
    plan, file = to_file(checkpoint, "q4_k_m", overrides=overrides)
    types = {n: t.type_name for n, t in read_gguf(file).tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == types["blk.0.ffn_up.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert any(t.reason == "override Q8_0" for t in plan.tensors)


def test_overrides_tell_letters_apart() -> None:
    """llama-quantize lowers patterns, so that `\\D` becomes a digit; ours are taken as they are."""
    listed, model = matrices("grouped")
    chosen = choose(
        "q4_k_m", listed, model, {r"blk\.\d+\.ATTN_Q": "q8_0", r"blk\.\D+": "q5_0", r"^\D+\.0\.attn_k": "q6_k"}
    )
    types = {name: choice.type_name for name, choice in chosen.items()}
    assert {types[f"blk.{i}.attn_q.weight"] for i in range(3)} == {"Q4_K"}
    assert (types["blk.0.attn_k.weight"], types["blk.1.attn_k.weight"]) == ("Q6_K", "Q4_K")


@pytest.mark.parametrize(
    ("scheme", "overrides", "message"),
    [
        ("q4_k_x", {}, "did you mean q4_k_"),
        ("q4_0", {"ffn": "q9_9"}, "type 'q9_9' is unknown"),
        ("q4_0", {"(": "q8_0"}, "not a regular expression"),
        (None, {"ffn": "q8_0"}, "belong to a scheme"),
    ],
)
def test_usage_errors(scheme: str | None, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GgufExporter().plan(open_checkpoint(EMBER), Target("gguf", scheme, {"overrides": overrides}))


@pytest.mark.parametrize("scheme", WHOLE_FILE)
def test_whole_files_are_those_of_llama_quantize(scheme: str, to_file: Callable, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    _, source = to_file(checkpoint)
    _, ours = to_file(checkpoint, scheme)
    assert ours.name == f"ember-{scheme.upper()}.gguf"
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(source, theirs, str(gguf_mixes.scheme(scheme)["file_type"]))
    first, second = read_gguf(ours), read_gguf(theirs)
    assert {n: t.type_name for n, t in first.tensors.items()} == {n: t.type_name for n, t in second.tensors.items()}
    assert ours.read_bytes() == theirs.read_bytes()
