"""Tiny Qwen2 (biases, square matrices) with a trained tokenizer, its artifacts, and where each tensor lies in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tightship.checkpoint import Checkpoint
from tightship.exporters import exporter_for
from tightship.formats.gguf_file import read_gguf
from tightship.formats.layouts import parse_layout
from tightship.formats.safetensors_file import read_header
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target, TargetPlan, no_progress
from tightship.weights import Quantized

STRINGS = Path(__file__).parents[1] / "data" / "tokenizer_strings.txt"
CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 whose every parameter counts, as a directory; all matrices of the blocks are 64 x 64."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2)
    model.save_pretrained(folder)
    ours = Tokenizer(models.BPE())
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ours.train_from_iterator([json.loads(line) for line in STRINGS.read_text("utf-8").splitlines()], trainer)
    ours.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def original(qwen: Path) -> Checkpoint:
    return open_checkpoint(qwen)


def quantized(checkpoint: Checkpoint, word: str) -> Checkpoint:
    """Every linear of the blocks rounded to a layout."""
    layout = parse_layout(word)
    changed = {}
    for info in checkpoint.linears():
        weight = checkpoint.resolve(info.name).value()
        changed[info.name] = Quantized.of(layout, layout.quantize(weight))
    return checkpoint.with_weights(changed)


@dataclass
class Artifact:
    """One exported target. `compressed` is what it must say."""

    compressed: Checkpoint
    plan: TargetPlan
    directory: Path
    exported: Exported

    @property
    def container(self) -> str:
        return self.plan.target.container

    def place(self, name: str) -> tuple[Path, int, int]:
        """File, offset and size of the tensor that is called `name` in the file."""
        path = self.directory / self.exported.main
        if self.container == "gguf":
            tensor = read_gguf(path).tensors[name]
            return path, tensor.offset, tensor.nbytes
        if self.container == "safetensors":
            entry = read_header(path).entries[name]
            return path, entry.begin, entry.end - entry.begin
        import onnx

        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        data = {entry.key: entry.value for entry in tensor.external_data}
        if data:
            return self.directory / data["location"], int(data["offset"]), int(data["length"])
        assert path.read_bytes().count(tensor.raw_data) == 1
        return path, path.read_bytes().index(tensor.raw_data), len(tensor.raw_data)

    def edit(self, name: str, change: Callable[[np.ndarray], np.ndarray], dtype: Any = np.uint8) -> None:
        """Rewrite a tensor's bytes in place; `change` maps its 1-D array to one of the same size."""
        path, offset, size = self.place(name)
        data = bytearray(path.read_bytes())
        array = np.frombuffer(bytes(data[offset : offset + size]), dtype).copy()
        changed = np.ascontiguousarray(change(array)).astype(dtype).tobytes()
        assert len(changed) == size
        assert changed != bytes(data[offset : offset + size])
        data[offset : offset + size] = changed
        path.write_bytes(data)


@pytest.fixture(scope="session")
def exports(
    original: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str | None, str | None], Artifact]:
    """(container, layout, profile) -> an artifact of the tiny Qwen2, made once; not to be changed."""
    from tightship.validators.parity import judge

    made: dict[tuple[str, str | None, str | None], Artifact] = {}

    def make(container: str, layout: str | None = None, profile: str | None = None) -> Artifact:
        key = (container, layout, profile)
        if key not in made:
            checkpoint = quantized(original, layout) if layout else original
            exporter = exporter_for(container, **({"judge": judge} if container == "onnx" else {}))
            plan = exporter.plan(checkpoint, Target(container, None, {"profile": profile} if profile else {}))
            folder = tmp_path_factory.mktemp("artifact")
            made[key] = Artifact(checkpoint, plan, folder, exporter.export(checkpoint, plan, folder, no_progress))
        return made[key]

    return make


@pytest.fixture
def staged(exports: Callable[..., Artifact], tmp_path: Path) -> Callable[..., Artifact]:
    """As `exports`, a copy that a test may damage."""

    def make(container: str, layout: str | None = None, profile: str | None = None) -> Artifact:
        whole = exports(container, layout, profile)
        folder = tmp_path / f"{container}-{layout}-{profile}"
        shutil.copytree(whole.directory, folder)
        return Artifact(whole.compressed, whole.plan, folder, whole.exported)

    return make
