"""safetensors artifacts as their own readers see them: transformers and compressed-tensors, value by value."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target, TargetPlan
from tightship.weights import Alias, Dense, Quantized

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, "intermediate_size": 96}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**LLAMA, "head_dim": 32}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
}


def random_model(name: str, folder: Path) -> Checkpoint:
    """A model in which every parameter is random, saved by transformers."""
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def quantized(checkpoint: Checkpoint, layouts: dict[str, str]) -> Checkpoint:
    """Round-to-nearest by the layouts' own search."""
    changed: dict[str, Any] = {}
    for name, word in layouts.items():
        layout = parse_layout(word)
        changed[name] = Quantized.of(layout, layout.quantize(checkpoint.resolve(name).value()))
    return checkpoint.with_weights(changed)


def every_linear(checkpoint: Checkpoint, word: str) -> dict[str, str]:
    return {info.name: word for info in checkpoint.linears()}


def write(checkpoint: Checkpoint, folder: Path, **target: Any) -> tuple[TargetPlan, Exported]:
    folder.mkdir()
    exporter = SafetensorsExporter()
    plan = exporter.plan(checkpoint, Target("safetensors", **target))
    exported = exporter.export(checkpoint, plan, folder)
    weights = sum((folder / f).stat().st_size for f in exported.files if f.endswith(".safetensors"))
    assert plan.file_bytes == weights
    assert plan.file_bytes - sum(t.nbytes for t in plan.tensors) < 20_000 * len(exported.files)
    return plan, exported


def load(checkpoint: Checkpoint, folder: Path, **options: Any) -> Any:
    """The model in transformers, in float32, nothing missing and nothing unexpected."""
    model_class = getattr(transformers, checkpoint.config["architectures"][0])
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def dequantized(checkpoint: Checkpoint, folder: Path) -> Any:
    return load(checkpoint, folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))


def decompressed(checkpoint: Checkpoint, folder: Path) -> Any:
    """Loaded as it is; compressed-tensors decompresses the modules before their first forward pass."""
    model = load(checkpoint, folder)
    with torch.no_grad():
        model(torch.arange(4)[None])
    return model


def assert_same(checkpoint: Checkpoint, model: Any) -> None:
    """Every tensor of the module equals the checkpoint's value, bit for bit."""
    state = model.state_dict()
    infos = checkpoint.infos()
    for name in checkpoint.weights:
        value = checkpoint.resolve(name).value()
        expected = value.T if infos[name].rule.transposed else value
        np.testing.assert_array_equal(state[name].numpy(), expected, err_msg=name)


def test_carrying_a_float_checkpoint_gives_its_own_bytes(tmp_path: Path) -> None:
    """transformers wrote the source; what we write is the same file."""
    checkpoint = open_checkpoint(EMBER)
    _, exported = write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (EMBER / "model.safetensors").read_bytes()
    assert exported.details["sha256"] == {
        "model.safetensors": hashlib.sha256((EMBER / "model.safetensors").read_bytes()).hexdigest()
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (EMBER / name).read_bytes()
    assert exported.main == "model.safetensors"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "gemma3"])
def test_floats_are_loaded_as_they_were(name: str, tmp_path: Path) -> None:
    checkpoint = random_model(name, tmp_path / "in")
    write(checkpoint, tmp_path / "out")
    assert_same(checkpoint, load(checkpoint, tmp_path / "out"))
    original = json.loads((tmp_path / "in/config.json").read_text())
    again = type(load(checkpoint, tmp_path / "out").config).from_pretrained(tmp_path / "out").to_dict()
    for key in ("rope_parameters", "hidden_size", "tie_word_embeddings"):
        if key in original:
            assert again[key] == original[key]


@pytest.mark.parametrize("word", ["int2-g32", "int3", "int4-channel", "int5-g16", "int6", "int7-channel", "int8"])
def test_integers_are_decoded_to_the_same_values(word: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    checkpoint = quantized(checkpoint, every_linear(checkpoint, word))
    write(checkpoint, tmp_path / "out")
    assert_same(checkpoint, decompressed(checkpoint, tmp_path / "out"))
    assert_same(checkpoint, dequantized(checkpoint, tmp_path / "out"))


@pytest.mark.parametrize("word", ["int4", "int3-channel-asym", "int6-g16-asym"])
def test_the_librarys_own_decompressor_agrees_on_every_tensor(word: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    checkpoint = quantized(checkpoint, every_linear(checkpoint, word))
    write(checkpoint, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(section).config_groups["group_0"]
    for info in checkpoint.linears():
        prefix = info.name.removesuffix("weight")
        local = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        weight = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
        np.testing.assert_array_equal(weight.numpy(), checkpoint.resolve(info.name).value())
        assert stored[prefix + "weight_scale"].dtype == torch.float32
    assert set(section["ignore"]) == {"lm_head"}
    assert section["format"] == section["config_groups"]["group_0"]["format"] == "pack-quantized"


def test_compressed_and_dequantized_loading_compute_the_same(tmp_path: Path) -> None:
    checkpoint = random_model("llama", tmp_path / "in")
    checkpoint = quantized(checkpoint, every_linear(checkpoint, "int4") | {"lm_head.weight": "int4"})
    write(checkpoint, tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        packed = load(checkpoint, tmp_path / "out")(ids).logits
        plain = dequantized(checkpoint, tmp_path / "out")(ids).logits
    assert torch.equal(packed, plain)


def test_experts_survive_the_fusing_loader(tmp_path: Path) -> None:
    """transformers stacks the experts; each slice must be the value of our integers."""
    checkpoint = random_model("mixtral", tmp_path / "in")
    checkpoint = quantized(checkpoint, every_linear(checkpoint, "int4"))
    write(checkpoint, tmp_path / "out")
    state = dequantized(checkpoint, tmp_path / "out").state_dict()
    for block in range(2):
        for expert in range(3):
            prefix = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
            w1, w2, w3 = (checkpoint.resolve(f"{prefix}.{w}.weight").value() for w in ("w1", "w2", "w3"))
            fused = f"model.layers.{block}.mlp.experts"
            np.testing.assert_array_equal(state[f"{fused}.gate_up_proj"][expert].numpy(), np.concatenate([w1, w3]))
            np.testing.assert_array_equal(state[f"{fused}.down_proj"][expert].numpy(), w2)


def test_mixed_layouts_become_anchored_groups(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    words = {i.name: "int8" if i.rule.role == "ffn_down" else "int4" for i in checkpoint.linears()}
    words["model.layers.1.self_attn.o_proj.weight"] = "int8"
    del words["model.layers.0.self_attn.o_proj.weight"]
    checkpoint = quantized(checkpoint, words)
    plan, _ = write(checkpoint, tmp_path / "out")
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    eight = next(g for g in section["config_groups"].values() if g["weights"]["num_bits"] == 8)
    assert eight["targets"] == [
        r"re:^model\.layers\.\d+\.mlp\.down_proj$",
        r"re:^model\.layers\.1\.self_attn\.o_proj$",
    ]
    assert "model.layers.0.self_attn.o_proj" in section["ignore"]
    assert_same(checkpoint, decompressed(checkpoint, tmp_path / "out"))
    assert any("several layouts" in note for note in plan.notes)
    assert {t.layout for t in plan.tensors} == {"bf16", "int4-g32", "int8-g32"}


def test_asymmetric_layouts_load_dequantized(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    checkpoint = quantized(checkpoint, every_linear(checkpoint, "int4-asym"))
    plan, _ = write(checkpoint, tmp_path / "out")
    assert_same(checkpoint, dequantized(checkpoint, tmp_path / "out"))
    assert any("needs dequantize=True" in note for note in plan.notes)


def test_what_no_loader_decodes_rightly_is_refused(tmp_path: Path) -> None:
    ember = open_checkpoint(EMBER)
    words = every_linear(ember, "int4") | {"model.layers.1.mlp.up_proj.weight": "int4-asym"}
    with pytest.raises(Unsupported, match="one is asymmetric") as caught:
        SafetensorsExporter().plan(quantized(ember, words), Target("safetensors"))
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"
    mixtral = random_model("mixtral", tmp_path / "in")
    words = every_linear(mixtral, "int4") | {"model.layers.1.block_sparse_moe.experts.2.w1.weight": "int8"}
    with pytest.raises(Unsupported, match="decodes all experts by one layout, found int4-g32, int8-g32"):
        SafetensorsExporter().plan(quantized(mixtral, words), Target("safetensors"))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_families_that_are_decoded_on_loading_get_one_layout(scheme: str, tmp_path: Path) -> None:
    """T5's rows of 64 and 96 would have groups of 64 and 32; the latter serve all."""
    t5 = random_model("t5", tmp_path / "in")
    wanted = SafetensorsExporter().layout_for(t5, Target("safetensors", scheme))
    assert {layout.group_size for layout in wanted.values()} == {32}  # type: ignore[union-attr]
    solved = quantized(t5, {name: layout.name for name, layout in wanted.items()})  # type: ignore[union-attr]
    write(solved, tmp_path / "out", scheme=scheme)
    assert_same(solved, dequantized(solved, tmp_path / "out"))
    several = quantized(t5, {n: "int4" if n.endswith("wo.weight") else "int4-g64" for n in wanted})
    with pytest.raises(Unsupported, match="decoded on loading, all by one layout, and here are int4-g32, int4-g64"):
        SafetensorsExporter().plan(several, Target("safetensors"))


def test_attention_and_experts_may_differ(tmp_path: Path) -> None:
    checkpoint = random_model("mixtral", tmp_path / "in")
    words = {i.name: "int4" if i.expert is not None else "int8" for i in checkpoint.linears()}
    checkpoint = quantized(checkpoint, words)
    write(checkpoint, tmp_path / "out")
    state = decompressed(checkpoint, tmp_path / "out").state_dict()
    for name in ("self_attn.q_proj", "self_attn.o_proj"):
        full = f"model.layers.1.{name}.weight"
        np.testing.assert_array_equal(state[full].numpy(), checkpoint.resolve(full).value())
    w2 = checkpoint.resolve("model.layers.1.block_sparse_moe.experts.2.w2.weight").value()
    np.testing.assert_array_equal(state["model.layers.1.mlp.experts.down_proj"][2].numpy(), w2)


def test_fused_neighbours_with_two_layouts_are_noted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    words = {i.name: "int8" if i.rule.role == "attn_v" else "int4" for i in checkpoint.linears()}
    plan, _ = write(quantized(checkpoint, words), tmp_path / "out")
    assert any("attn_q, attn_k, attn_v of block 0" in note for note in plan.notes)


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    checkpoint = quantized(checkpoint, every_linear(checkpoint, "int4"))
    _, exported = write(checkpoint, tmp_path / "out", options={"shard_size": "300KB"})
    index = json.loads((tmp_path / "out" / exported.main).read_text())
    shards = [f for f in exported.files if f.endswith(".safetensors")]
    assert len(shards) > 2
    stored = {name: shard for shard in shards for name in load_file(tmp_path / "out" / shard)}
    assert index["weight_map"] == stored
    total = sum(t.nbytes for shard in shards for t in load_file(tmp_path / "out" / shard).values())
    assert index["metadata"]["total_size"] == total
    for module in {name.rpartition(".")[0] for name in stored if name.endswith("weight_packed")}:
        assert len({stored[name] for name in stored if name.startswith(module + ".weight")}) == 1
    assert_same(checkpoint, dequantized(checkpoint, tmp_path / "out"))


def test_shards_of_floats_are_opened_again(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    write(checkpoint, tmp_path / "out", options={"shard_size": "1MB"})
    again = open_checkpoint(tmp_path / "out")
    assert set(again.weights) == set(checkpoint.weights)
    for name in checkpoint.weights:
        assert again.resolve(name).value().tobytes() == checkpoint.resolve(name).value().tobytes()


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    checkpoint = quantized(checkpoint, every_linear(checkpoint, "int5"))
    contents = []
    for run in ("a", "b"):
        write(checkpoint, tmp_path / run)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()})
    assert contents[0] == contents[1]


def test_schemes_ask_for_what_they_say() -> None:
    checkpoint = open_checkpoint(EMBER)
    exporter = SafetensorsExporter()
    linears = {i.name for i in checkpoint.linears()}

    def words(scheme: str, **options: Any) -> set[Any]:
        wanted = exporter.layout_for(checkpoint, Target("safetensors", scheme, options))
        assert set(wanted) == linears
        return {getattr(layout, "name", layout) for layout in wanted.values()}

    assert words("w4a16") == {"int4-g128"}
    assert words("w8a16", group="channel") == {"int8-channel"}
    assert words("w3a16", group=64, asym=True) == {"int3-g64-asym"}
    floats = exporter.layout_for(checkpoint, Target("safetensors", "f16"))
    assert set(floats.values()) == {"f16"}
    assert set(floats) == {n for n, w in checkpoint.weights.items() if not isinstance(w, Alias)}
    assert exporter.layout_for(checkpoint, Target("safetensors")) == {}


def test_element_type_of_a_float_scheme_is_in_the_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    half = {
        name: Dense.of(checkpoint.resolve(name).value().astype(np.float16))
        for name, weight in checkpoint.weights.items()
        if not isinstance(weight, Alias)
    }
    write(checkpoint.with_weights(half), tmp_path / "out", scheme="f16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}


def test_a_checkpoint_that_does_not_fit_the_scheme_is_exit_2() -> None:
    checkpoint = open_checkpoint(EMBER)
    with pytest.raises(UsageError, match="wants int4-g128, and the tensor is bf16"):
        SafetensorsExporter().plan(checkpoint, Target("safetensors", "w4a16"))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Target("safetensors", "w9a16"), UsageError, "did you mean"),
        (Target("safetensors", "fp8", {"granularity": "word"}), UsageError, "granularity 'word' is unknown"),
        (Target("safetensors", None, {"format": "exl2"}), UsageError, "format 'exl2' is unknown"),
        (Target("safetensors", "w4a16", {"groups": 32}), UsageError, "did you mean 'group'"),
        (Target("safetensors", "w4a16", {"group": 0}), UsageError, "number of columns"),
        (Target("safetensors", "w4a16", {"include": ["embeddings"]}), UsageError, "include knows"),
        (Target("safetensors", "f16", {"group": 32}), UsageError, "belongs to"),
        (Target("safetensors", None, {"shard_size": "5 apples"}), UsageError, "not a size"),
    ],
)
def test_wrong_words_are_refused(target: Target, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SafetensorsExporter().plan(open_checkpoint(EMBER), target)


def test_what_the_container_cannot_say_is_refused(tmp_path: Path) -> None:
    exporter, target = SafetensorsExporter(), Target("safetensors")
    ember = open_checkpoint(EMBER)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(Unsupported, match="q4_1") as caught:
        exporter.plan(quantized(ember, {name: "q4_1"}), target)
    assert caught.value.tensor == name
    assert "int4-g32-asym" in (caught.value.hint or "")
    with pytest.raises(Unsupported, match="packed embedding"):
        exporter.plan(quantized(ember, {"model.embed_tokens.weight": "int8"}), target)
    gpt2 = random_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(Unsupported, match="Conv1D"):
        exporter.plan(quantized(gpt2, every_linear(gpt2, "int4")), target)


def test_a_matrix_that_blocks_share_is_written_for_each(tmp_path: Path) -> None:
    """transformers knows no ties between blocks, so it reads a copy for each."""
    owner, borrower = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    whole = quantized(random_model("llama", tmp_path / "in"), {f"{owner}.weight": "int4"})
    shared = whole.with_weights({f"{borrower}.weight": Alias(f"{owner}.weight")})
    write(shared, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        assert torch.equal(stored[f"{owner}.{part}"], stored[f"{borrower}.{part}"])


def test_nan_is_exit_5_and_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    values = checkpoint.resolve("model.norm.weight").value().copy()
    values[3] = np.nan
    broken = checkpoint.with_weights({"model.norm.weight": Dense.of(values)})
    with pytest.raises(Malformed, match="flat index 3") as caught:
        write(broken, tmp_path / "out")
    assert caught.value.tensor == "model.norm.weight"
