"""An encoder and its decoder as an artifact: every kind of scheme, what both graphs read, how clients find things."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.to_onnx import OnnxExporter
from tightship.exporters.to_safetensors import SafetensorsExporter
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target
from tightship.validators.bench import subjects
from tightship.validators.parity import judge, relative_l2
from tightship.validators.runtimes import transformers_client
from tightship.validators.runtimes.onnx_runtime import open_graph
from tightship.validators.stored_onnx import OnnxStored
from tightship.weights import Dense, Quantized

EXPORTER = OnnxExporter(judge=judge)
TABLE = "shared.weight"
LIMIT = 1e-5
TOKENS = 64
FLOATS = {"f32": np.float32, "f16": np.float16}
Export = Callable[..., tuple[Checkpoint, Path, Exported]]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("t5")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=128, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def export(t5: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Export:
    def make(scheme: str, **options: object) -> tuple[Checkpoint, Path, Exported]:
        target = Target("onnx", scheme, options)
        changed = {}
        for name, layout in EXPORTER.layout_for(t5, target).items():
            value = t5.resolve(name).value()
            rounded = isinstance(layout, str)
            changed[name] = (
                Dense.of(value.astype(FLOATS[layout])) if rounded else Quantized.of(layout, layout.quantize(value))
            )
        solved = t5.with_weights(changed)
        folder = tmp_path_factory.mktemp(scheme)
        return solved, folder, EXPORTER.export(solved, EXPORTER.plan(solved, target), folder)

    return make


@pytest.mark.parametrize(
    ("scheme", "include"),
    [
        ("fp16", []),
        ("int4", ["embeddings"]),
        ("int4-portable", ["embeddings"]),
        ("int8-portable", []),
        ("int8-dynamic", []),
    ],
)
def test_every_scheme_computes_its_weights_and_steps_are_one_pass(
    export: Export, scheme: str, include: list[str]
) -> None:
    """Exactly in graph mode; as shipped, with the kernels' rounding, the cache changes nothing."""
    solved, folder, exported = export(scheme, **({"include": include} if include else {}))
    rng = np.random.default_rng(0)
    arrays = {"input_ids": rng.integers(2, 128, (3, 9)), "decoder_input_ids": rng.integers(2, 128, (3, 7))}
    arrays["attention_mask"] = (np.arange(9) >= np.array([[0], [3], [5]])).astype(np.int64)
    view = ModelView(solved)
    expected = view.outputs(arrays["input_ids"], arrays["attention_mask"], None, arrays["decoder_input_ids"])["logits"]
    assert relative_l2(open_graph(folder / exported.main, "graph").decode(arrays, 2)["logits"], expected) <= LIMIT
    shipped = open_graph(folder / exported.main, "shipped")
    once = shipped.outputs(arrays)["logits"]
    assert relative_l2(shipped.decode(arrays, 2)["logits"], once) <= LIMIT
    assert relative_l2(once, expected) < 0.2
    stored = OnnxStored(solved, folder / exported.main)
    for name in (TABLE, "encoder.block.1.layer.0.SelfAttention.q.weight"):
        np.testing.assert_array_equal(stored.value(name), solved.resolve(name).value())


def varied(checkpoint: Checkpoint) -> Checkpoint:
    """A random model says one token over and over, unless its last token and place outweigh what is always the same."""
    words = {
        "t5": {TABLE: 16, "relative_attention_bias.weight": 8},
        "bart": {
            "decoder.embed_positions.weight": 8,
            ".bias": 0,
            "norm.weight": 4,
            "fc2.weight": 0.1,
            "out_proj.weight": 0.1,
        },
    }
    changed = {}
    for ending, factor in words[checkpoint.architecture.family].items():
        for name in (name for name in checkpoint.weights if name.endswith(ending)):
            changed[name] = Dense.of(checkpoint.resolve(name).value() * np.float32(factor))
    if checkpoint.architecture.family == "bart":
        return checkpoint.with_weights(changed)
    head = np.random.default_rng(1).normal(0, 1, checkpoint.resolve(TABLE).shape).astype(np.float32)
    config = {**checkpoint.config, "tie_word_embeddings": False}
    return checkpoint.replace(config=config).with_weights({**changed, "lm_head.weight": Dense.of(head)})


@pytest.mark.parametrize("word", ["int4", "int4-asym", "int8"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_greedy_text_is_that_of_the_safetensors_twin(
    family: str, word: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """One solve, two artifacts: 64 tokens of our loop over both graphs, and of transformers' own generation."""
    checkpoint = varied(tiny(family))
    layout = parse_layout(word)
    rounded = {i.name: layout.quantize(checkpoint.weights[i.name].value()) for i in checkpoint.linears()}
    solved = checkpoint.with_weights({name: Quantized.of(layout, arrays) for name, arrays in rounded.items()})
    folders = {}
    for exporter in (EXPORTER, SafetensorsExporter()):
        container = exporter.container
        folders[container] = tmp_path / container
        folders[container].mkdir()
        exporter.export(solved, exporter.plan(solved, Target(container)), folders[container])
    config = json.loads((folders["safetensors"] / "config.json").read_text())
    model = transformers_client.load(folders["safetensors"], config, "graph")
    source = np.random.default_rng(1).integers(7, 96, 12)
    written = model.generate(
        torch.from_numpy(source[None]), do_sample=False, num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        eos_token_id=None, forced_bos_token_id=None, forced_eos_token_id=None,
    )[0].numpy()  # fmt: skip
    assert len(set(written.tolist())) > TOKENS // 4
    pair = open_graph(folders["onnx"] / "decoder_model_merged.onnx", "graph")
    np.testing.assert_array_equal(pair.greedy(source, TOKENS, int(written[0])), written[1:])


def test_what_both_graphs_read_is_stored_once_and_found_by_clients(export: Export, t5: Checkpoint) -> None:
    _, folder, exported = export("fp32")
    assert exported.main == "decoder_model_merged.onnx"
    assert not (folder / "genai_config.json").exists()
    weights = sum(4 * np.prod(weight.shape) for weight in t5.weights.values() if hasattr(weight, "value"))
    assert (folder / "model.onnx_data").stat().st_size < weights + 64 * 100
    names = [value.name for value in onnx.load(folder / exported.main, load_external_data=False).graph.input]
    caches = [f"past_key_values.{i}.{s}.{p}" for i in (0, 1) for s in ("decoder", "encoder") for p in ("key", "value")]
    assert names == ["input_ids", *caches, "encoder_attention_mask", "encoder_hidden_states"]
    assert [subject.main for subject in subjects(folder)] == ["decoder_model_merged.onnx"]


def test_graphs_that_read_other_bytes_are_caught(export: Export, t5: Checkpoint, tmp_path: Path) -> None:
    _, folder, exported = export("fp32")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    encoder = onnx.load(broken / "encoder_model.onnx", load_external_data=False)
    table = next(tensor for tensor in encoder.graph.initializer if tensor.name == TABLE)
    place = next(entry for entry in table.external_data if entry.key == "offset")
    place.value = str(int(place.value) + 64)
    onnx.save(encoder, broken / "encoder_model.onnx")
    with pytest.raises(Malformed, match="in the encoder and in the decoder") as caught:
        OnnxStored(t5, broken / exported.main).value(TABLE)
    assert caught.value.tensor == TABLE


def test_axes_of_a_decoder_that_writes_stay_open(t5: Checkpoint) -> None:
    with pytest.raises(Unsupported, match="grows with every token"):
        EXPORTER.plan(t5, Target("onnx", None, {"shapes": {"batch_size": 1}}))
