"""Lint: our own artifacts are clean where they should be, and every fault that is put in is found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tightship.activations import Activations
from tightship.checkpoint import Checkpoint
from tightship.cli import main
from tightship.errors import UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.gguf_file import read_gguf
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.validators.lint import lint
from tightship.weights import Dense, Quantized

K = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def source(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


def artifact(
    source: Checkpoint, folder: Path, word: str = "int4-g32", inputs: str | None = None, **options: Any
) -> Path:
    layout = parse_layout(word)
    changed = {i.name: Quantized.of(layout, layout.quantize(source.resolve(i.name).value())) for i in source.linears()}
    said = {} if inputs is None else {n.removesuffix(".weight"): Activations(inputs, 0.5) for n in changed}
    made = source.with_weights(changed).replace(activations=said)
    exporter, target = SafetensorsExporter(), Target("safetensors", None, options)
    folder.mkdir()
    exporter.export(made, exporter.plan(made, target), folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Tensors and config.json changed in place."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def found(folder: Path, runtime: str) -> set[str]:
    """Rules that find more than a note."""
    return {f["rule"] for f in lint(folder, [runtime])["findings"] if f["effect"] != "note"}


def told(folder: Path, runtime: str) -> set[tuple[str, str]]:
    """Every finding, notes too, as (rule, where)."""
    return {(f["rule"], f["where"]) for f in lint(folder, [runtime])["findings"]}


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "tgi", "transformers"])
def test_our_plain_artifact_is_clean(runtime: str, source: Checkpoint, tmp_path: Path) -> None:
    assert found(artifact(source, tmp_path / "out"), runtime) == set()


def first_group(config: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]
    return group


def two_groups(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {**groups["group_0"]}
    groups["group_0"] = {**groups["group_0"], "targets": ["re:.*k_proj$"]}


def unquantized(tensors: dict[str, torch.Tensor], _config: dict[str, Any]) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{K}.{suffix}"]
    tensors[f"{K}.weight"] = torch.zeros(64, 64)


def tied(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = torch.zeros(4, 4)


def sparse(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["sparsity_config"] = {"targets": ["Linear"]}


def two_rope_types(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rope_scaling"] = {"type": "linear", "rope_type": "linear", "factor": 2.0}


def float_inputs(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    first_group(config)["input_activations"] = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}


FAULTS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "rope-both-forms": ("tgi", "int4-g32", lambda _t, c: c.pop("rope_theta")),
    "tied-head": ("vllm", "int4-g32", tied),
    "silu-only": ("vllm", "int4-g32", lambda _t, c: c.update(hidden_act="gelu")),
    "anchored-targets": ("vllm", "int4-g32", lambda _t, c: first_group(c).update(targets=["re:.*proj"])),
    "every-module-targeted": ("vllm", "int4-g32", lambda _t, c: first_group(c).update(targets=["re:.*q_proj$"])),
    "group-format": ("transformers", "int4-g32", lambda _t, c: first_group(c).pop("format")),
    "fused-one-group": ("vllm", "int4-g32", two_groups),
    "several-layouts": ("transformers", "int4-g32", two_groups),
    "fused-all-or-none": ("vllm", "int4-g32", unquantized),
    "plain-integers-need-inputs": ("vllm", "int4-g32", lambda _t, c: first_group(c).update(format="int-quantized")),
    "no-sparsity": ("vllm", "int4-g32", sparse),
    "attention-groups": ("vllm", "int4-g32", lambda _t, c: first_group(c).update(targets=["Qwen2Attention"])),
    "cache-fp8": ("vllm", "int4-g32", lambda _t, c: c["quantization_config"].update(kv_cache_scheme={"type": "int"})),
    "symmetric-only": ("sglang", "int4-g32-asym", lambda _t, _c: None),
    "tgi-formats": ("tgi", "int3-g32", lambda _t, _c: None),
    "trt-fp8-only": ("trt", "int4-g32", lambda _t, _c: None),
    "one-scale-a-shard": ("vllm", "fp8-e4m3", lambda _t, _c: None),
    "half-range": ("vllm", "int4-g32", lambda t, _c: t[f"{K}.weight_scale"].fill_(1e6)),
    "rope-one-type": ("vllm", "int4-g32", two_rope_types),
    "kernel-sizes": ("vllm", "int4-g32", lambda _t, c: first_group(c)["weights"].update(group_size=16)),
    "fp8-hardware": ("vllm", "int4-g32", float_inputs),
    "asymmetric-loading": ("transformers", "int4-g32", lambda _t, c: first_group(c)["weights"].update(symmetric=False)),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_faults_of_compressed_tensors(rule: str, source: Checkpoint, tmp_path: Path) -> None:
    runtime, word, change = FAULTS[rule]
    folder = artifact(source, tmp_path / "out", word)
    before = told(folder, runtime)
    edit(folder, change)
    changed = {name for name, _ in told(folder, runtime) - before}
    inherent = rule in ("symmetric-only", "tgi-formats", "trt-fp8-only", "one-scale-a-shard")  # the layout is the fault
    assert rule in ({name for name, _ in before} if inherent else changed)


def test_nvfp4_shards_that_are_fused_share_one_divisor(source: Checkpoint, tmp_path: Path) -> None:
    folder = artifact(source, tmp_path / "out", "nvfp4-scaled")
    edit(folder, lambda t, _c: [t[n].fill_(1.0) for n in t if n.endswith("weight_global_scale")] and None)
    assert "fp4-one-divisor" not in found(folder, "vllm")
    edit(folder, lambda t, _c: t[f"{K}.weight_global_scale"].fill_(2.0) and None)
    assert ("fp4-one-divisor", K.replace("k_proj", "q_proj")) in told(folder, "vllm")


WORDS: dict[str, tuple[str, str, str, Callable[..., None]]] = {
    "gptq-keys": ("tgi", "int4-g32", "gptq", lambda _t, c: c["quantization_config"].pop("desc_act")),
    "gptq-kinds": ("vllm", "int4-g32-asym", "gptq_v2", lambda _t, _c: None),
    "gptq-v2-zeros": ("vllm", "int4-g32-asym", "gptq_v2", lambda _t, _c: None),
    "gptq-zeros": ("vllm", "int4-g32", "gptq", lambda t, _c: t[f"{K}.qzeros"].add_(1)),
    "awq-kinds": ("sglang", "int4-g32-asym", "awq", lambda _t, c: c["quantization_config"].update(zero_point=False)),
    "substring-modules": (
        "vllm", "int4-g32-asym", "awq",
        lambda _t, c: c["quantization_config"].update(modules_to_not_convert=["layers.1"]),
    ),
    "fp8-blocks": ("vllm", "fp8-e4m3-block", "fp8", lambda _t, _c: None),
    "own-packages": ("transformers", "int4-g32", "gptq", lambda _t, _c: None),
    "gptq-order": ("trt", "int4-g32", "gptq", lambda _t, c: c["quantization_config"].update(desc_act=True)),
}  # fmt: skip


@pytest.mark.parametrize("rule", WORDS)
def test_faults_of_words(rule: str, source: Checkpoint, tmp_path: Path) -> None:
    runtime, word, form, change = WORDS[rule]
    folder = artifact(source, tmp_path / "out", word, format=form)
    edit(folder, change)
    assert rule in found(folder, runtime)


def test_symmetric_gptq_is_clean_in_vllm(source: Checkpoint, tmp_path: Path) -> None:
    assert found(artifact(source, tmp_path / "out", format="gptq"), "vllm") == set()


@pytest.fixture(scope="module")
def gguf_file(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    exporter, target = GgufExporter(), Target("gguf")
    exported = exporter.export(source, exporter.plan(source, target), folder, no_progress)
    return folder / exported.main


def test_our_gguf_is_clean(gguf_file: Path) -> None:
    assert found(gguf_file.parent, "llama.cpp") == set()
    assert found(gguf_file.parent, "ollama") == set()


GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "window-ignored": ("llama.cpp", {"qwen2.attention.sliding_window": 8}),
    "rope-factor-needs-type": ("llama.cpp", {"qwen2.rope.scaling.factor": 2.0, "qwen2.rope.scaling.type": None}),
    "rope-types": ("llama.cpp", {"qwen2.rope.scaling.type": "su"}),
    "yarn-keys": ("llama.cpp", {"qwen2.rope.scaling.yarn_beta_fast": 16.0}),
    "rope-said": ("llama.cpp", {"qwen2.rope.freq_base": None}),
    "window-pattern": ("llama.cpp", {"qwen2.attention.sliding_window_pattern": np.array([1], np.int32)}),
    "scales-unread": ("llama.cpp", {"qwen2.attention.scale": 0.5}),
    "expert-groups": ("llama.cpp", {"qwen2.expert_group_count": 4}),
    "pre-tokenizer": ("llama.cpp", {"tokenizer.ggml.pre": None}),
    "phi3-by-name": ("llama.cpp", {"general.name": "distilled-from-phi3"}),
    "bos-said": ("ollama", {"tokenizer.ggml.add_bos_token": None}),
    "soft-caps-said": ("llama.cpp", {"general.architecture": "gemma2", "gemma2.attn_logit_softcapping": 50.0}),
    "depth-decides": (
        "llama.cpp", {"general.architecture": "gemma3", "gemma3.embedding_length": 5376, "gemma3.block_count": 60},
    ),
    "defaults-that-switch-off": ("llama.cpp", {"general.architecture": "mpt"}),
    "attention-without-ffn": (
        "llama.cpp",
        {
            "general.architecture": "deci", "deci.attention.head_count": np.array([4, 4], np.int32),
            "deci.feed_forward_length": np.array([96, 0], np.int32),
        },
    ),
    "scalar-types": ("llama.cpp", {"qwen2.block_count": -2}),
    "unigram-keys": ("llama.cpp", {"tokenizer.ggml.model": "t5", "tokenizer.ggml.scores": [0.0]}),
    "erf-gelu": ("llama.cpp", {"general.architecture": "falcon"}),
}  # fmt: skip
TENSORS: dict[str, dict[str, np.ndarray]] = {
    "fused-biases": {"blk.0.attn_qkv.weight": np.zeros((6, 2)), "blk.0.attn_q.bias": np.zeros(2)},
    "second-scale": {"blk.0.ffn_up.weight": np.zeros((6, 2)), "blk.0.ffn_up.scale": np.ones(1)},
    "finite-scales": {"blk.0.ffn_up.weight": np.array([[1.0, np.inf]])},
}


@pytest.mark.parametrize("rule", GGUF)
def test_faults_of_gguf(rule: str, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file with other metadata, as the reader would give it."""
    runtime, changes = GGUF[rule]
    from tightship.validators.lint.artifact import Artifact

    whole = read_gguf(gguf_file)
    kept = {k: v for k, v in whole.metadata.items() if changes.get(k, "") is not None}
    metadata = kept | {k: v for k, v in changes.items() if v is not None}
    assert rule not in {name for name, _ in told(gguf_file.parent, runtime)}
    monkeypatch.setattr(Artifact, "gguf", type("File", (), {"metadata": metadata, "tensors": {}})())
    assert rule in {name for name, _ in told(gguf_file.parent, runtime)}


@pytest.mark.parametrize("rule", TENSORS)
def test_faults_of_gguf_tensors(rule: str, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's metadata with other tensors."""
    from tightship.validators.lint.artifact import Artifact

    metadata = read_gguf(gguf_file).metadata
    held = {n: SimpleNamespace(weight=functools.partial(Dense.of, a.astype("f4"))) for n, a in TENSORS[rule].items()}
    monkeypatch.setattr(Artifact, "gguf", SimpleNamespace(metadata=metadata, tensors=held))
    assert found(gguf_file.parent, "llama.cpp") == {rule}
    monkeypatch.setattr(Artifact, "gguf", SimpleNamespace(metadata=metadata, tensors={}))
    assert found(gguf_file.parent, "llama.cpp") == set()


def onnx_directory(folder: Path, *, domain: str, axis: int | None, zero: int) -> Path:
    """DequantizeLinear in front of a MatMul, and an operator of `domain`."""
    from onnx import TensorProto, helper, numpy_helper, save

    attributes = {} if axis is None else {"axis": axis}
    codes, points = np.ones((4, 2), np.uint8 if zero == TensorProto.UINT8 else np.int8), np.zeros(2)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], **attributes),
        helper.make_node("MatMul" if not domain else "FusedMatMul", ["x", "d"], ["y"], domain=domain),
    ]
    values = {"w": codes, "s": np.ones(2, np.float32), "z": points.astype(codes.dtype)}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )  # fmt: skip
    folder.mkdir()
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), folder / "model.onnx")
    decoder = {"filename": "model.onnx"}
    model = {"type": "llama", "context_length": 64, "vocab_size": 100, "eos_token_id": 2, "decoder": decoder}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    return folder


def test_rules_of_onnx(tmp_path: Path) -> None:
    clean = onnx_directory(tmp_path / "clean", domain="", axis=1, zero=3)
    assert found(clean, "trt") == found(clean, "genai") == set()
    faulty = onnx_directory(tmp_path / "faulty", domain="com.microsoft", axis=None, zero=2)
    assert found(faulty, "trt") == {"vendor-operators", "zero-point-types", "axis-said"}
    config = json.loads((faulty / "genai_config.json").read_text())
    del config["model"]["eos_token_id"], config["model"]["type"]
    (faulty / "genai_config.json").write_text(json.dumps(config))
    assert found(faulty, "genai") == {"genai-config", "genai-eos"}
    (clean / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert told(clean, "genai") == {("genai-bos", "tokenizer_config.json")}


@pytest.mark.parametrize(("encoder", "decoder"), [("clean", "faulty"), ("faulty", "clean")])
def test_both_graphs_of_two_stacks_are_read(encoder: str, decoder: str, tmp_path: Path) -> None:
    made = {
        "clean": onnx_directory(tmp_path / "clean", domain="", axis=1, zero=3),
        "faulty": onnx_directory(tmp_path / "faulty", domain="com.microsoft", axis=None, zero=2),
    }
    both = tmp_path / "both"
    both.mkdir()
    (made[encoder] / "model.onnx").rename(both / "encoder_model.onnx")
    (made[decoder] / "model.onnx").rename(both / "decoder_model_merged.onnx")
    assert found(both, "trt") == {"vendor-operators", "zero-point-types", "axis-said"}


def test_the_command_line(source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artifact(source, tmp_path / "out")
    assert main(["lint", str(folder), "--for", "vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["checked"] == ["out"]
    edit(folder, two_groups)
    assert main(["lint", str(folder), "--for", "vllm"]) == 1
    assert "fused-one-group" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no rules for 'vlm'; did you mean"):
        lint(folder, ["vlm"])
    with pytest.raises(UsageError, match=r"holds nothing that llama.cpp loads"):
        lint(folder, ["llama.cpp"])
