"""Adapters in llama.cpp against transformers with the factors merged into its weights, position by position."""

from __future__ import annotations

import ctypes
import json
import math
import struct
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


class _Batch(ctypes.Structure):
    """llama.h: struct llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class _Params(ctypes.Structure):
    """Parameters by value, longer than llama.h's: the callee takes what it knows from the front."""

    _fields_ = (("data", ctypes.c_uint8 * 512),)

    def put(self, place: int, value: int, expected: int) -> None:
        """Set a 32-bit field whose default is known; another default means another llama.h."""
        if struct.unpack_from("<i", self.data, place)[0] != expected:
            pytest.skip("the wheel was built with another llama.h")
        struct.pack_into("<i", self.data, place, value)


def logits(model: Path, adapter: Path | None, ids: np.ndarray) -> np.ndarray:
    """(s, vocab) of llama.cpp in the xllamacpp wheel: float32 cache, no flash attention, the adapter at scale 1."""
    package = pytest.importorskip("xllamacpp")
    lib = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("*.so"))))
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init", "llama_get_logits"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_context_default_params.restype = lib.llama_model_default_params.restype = _Params
    lib.llama_batch_init.restype = _Batch
    lib.llama_backend_init()
    loaded = ctypes.c_void_p(lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params()))
    assert loaded.value
    params = lib.llama_context_default_params()
    for place, value, expected in ((0, 128, 512), (4, 128, 2048), (52, 0, -1), (104, 0, 1), (108, 0, 1)):
        params.put(place, value, expected)
    context = ctypes.c_void_p(lib.llama_init_from_model(loaded, params))
    assert context.value
    if adapter is not None:
        lora = lib.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert lora, "llama.cpp does not load the adapter"
        assert lib.llama_set_adapters_lora(context, (ctypes.c_void_p * 1)(lora), 1, (ctypes.c_float * 1)(1.0)) == 0
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    assert lib.llama_decode(context, batch) == 0
    found = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    copy = np.ctypeslib.as_array(found, (len(ids), SIZES["vocab_size"])).copy()
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    return copy


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
