"""Adapters in llama.cpp against transformers with the factors merged into its weights, position by position."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tightship.errors import Malformed, TightshipError, Unsupported, UsageError
from tightship.exporters.gguf_lora import write_adapter
from tightship.exporters.to_gguf import GgufExporter
from tightship.opening import open_checkpoint
from tightship.target import Target
from tightship.validators.runtimes import llama_adapter, llama_cpp

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def logits(model: Path, adapter: Path | None, ids: np.ndarray) -> np.ndarray:
    """(s, vocab) of llama.cpp: float32 cache, no flash attention, the adapter at scale 1."""
    job = {"artifact": str(model.parent), "main": model.name, "mode": "graph"}
    if adapter is None:
        return llama_cpp.run(job, {"input_ids": ids[None]})[1]["logits"][0]
    return llama_adapter.run({**job, "adapter": adapter.name}, {"input_ids": ids[None]})[1]["logits"][0]


@pytest.fixture(scope="module")
def base(save_model: Callable[..., Path], byte_level: Path) -> Path:
    return save_model("LlamaForCausalLM", SIZES, byte_level)


def save_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int = 4, **config: Any) -> dict[str, Any]:
    """A random adapter as PEFT saves it; module -> (A, B)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    pairs = {
        m: (rng.normal(0, 0.1, (rank, cols)).astype("f4"), rng.normal(0, 0.1, (rows, rank)).astype("f4"))
        for m, (rows, cols) in shapes.items()
    }
    folder.mkdir()
    tensors = {
        f"base_model.model.{m}.lora_{side}.weight": w for m, p in pairs.items() for side, w in zip("AB", p, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 10, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return pairs


def shapes_of(base: Path, modules: tuple[str, ...] = MODULES) -> dict[str, tuple[int, int]]:
    weights = open_checkpoint(base).weights
    names = [f"model.layers.{block}.{module}" for block in range(2) for module in modules]
    return {name: weights[f"{name}.weight"].shape for name in names}


@pytest.mark.parametrize(("config", "scale"), [({}, 10 / 4), ({"use_rslora": True}, 10 / math.sqrt(4))])
def test_logits_are_those_of_merged_weights(base: Path, tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shapes = {**shapes_of(base), "lm_head": (512, 64)}
    pairs = save_adapter(tmp_path / "peft", shapes, **config)
    checkpoint, exporter = open_checkpoint(base), GgufExporter()
    target = Target("gguf", None, {"adapter": str(tmp_path / "peft")})
    plan = exporter.plan(checkpoint, target)
    (tmp_path / "out").mkdir()
    exported = exporter.export(checkpoint, plan, tmp_path / "out")
    assert "adapter.gguf" in exported.files
    assert any("without it" in note for note in plan.notes)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = np.random.default_rng(1).integers(3, 500, 40)
    with torch.no_grad():
        plain = model(torch.from_numpy(ids[None])).logits[0].numpy()
        for module, (a, b) in pairs.items():
            merged = b.astype(np.float64) @ a.astype(np.float64) * scale
            model.get_submodule(module).weight += torch.from_numpy(merged).float()
        expected = model(torch.from_numpy(ids[None])).logits[0].numpy()
    file = tmp_path / "out" / exported.main
    found = logits(file, tmp_path / "out" / "adapter.gguf", ids)
    norms = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(found - expected, axis=-1) / norms).max() <= 1e-5
    assert (np.linalg.norm(plain - expected, axis=-1) / norms).min() > 1e-2  # the adapter does something
    assert (np.linalg.norm(logits(file, None, ids) - plain, axis=-1) / norms).max() <= 1e-5


def test_what_the_file_says(base: Path, tmp_path: Path) -> None:
    pairs = save_adapter(tmp_path / "peft", shapes_of(base, ("mlp.up_proj",)))
    write_adapter(open_checkpoint(base), tmp_path / "peft", tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 10,
    }  # fmt: skip
    assert [t.name for t in reader.tensors] == [f"blk.{b}.ffn_up.weight.lora_{s}" for b in range(2) for s in "ab"]
    np.testing.assert_array_equal(reader.tensors[3].data, pairs["model.layers.1.mlp.up_proj"][1])


@pytest.mark.parametrize(
    ("config", "shapes", "error", "message"),
    [
        ({"use_dora": True}, {}, Unsupported, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, Unsupported, "fully trained"),
        ({"alpha_pattern": {"x": 2}}, {}, Unsupported, "one alpha"),
        ({"bias": "all"}, {}, Unsupported, "biases"),
        ({"peft_type": "IA3"}, {}, Unsupported, "only LoRA"),
        ({}, {"model.embed_tokens": (512, 64)}, Unsupported, "applies no LoRA"),
        ({}, {"model.layers.9.mlp.up_proj": (96, 64)}, Malformed, "does not have"),
        ({}, {"model.layers.0.mlp.up_proj": (96, 32)}, Malformed, "make a matrix"),
    ],
)
def test_what_is_refused(  # noqa: PLR0917 - one argument a column
    base: Path, tmp_path: Path, config: dict[str, Any], shapes: Any, error: Any, message: str
) -> None:
    save_adapter(tmp_path / "peft", shapes or {"model.layers.0.mlp.up_proj": (96, 64)}, **config)
    with pytest.raises(error, match=message):
        write_adapter(open_checkpoint(base), tmp_path / "peft", tmp_path / "a.gguf")
    assert issubclass(error, TightshipError)
    with pytest.raises(UsageError, match="holds no adapter"):
        write_adapter(open_checkpoint(base), tmp_path, tmp_path / "b.gguf")
