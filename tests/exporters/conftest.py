"""Random tiny models with tokenizers trained on the committed strings, as directories and as GGUF files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
VOCAB = 512


@pytest.fixture(scope="session")
def train(strings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(pre-tokenizer JSON, model options) -> directory with a byte-level BPE's tokenizer files, vocabulary of VOCAB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def make(pre: Mapping[str, Any] | None = None, **options: Any) -> Path:
        ours = Tokenizer(models.BPE(ignore_merges=options.get("ignore_merges", False)))
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        table = json.loads(ours.to_str())
        table["pre_tokenizer"] = pre or level
        table["normalizer"] = options.get("normalizer")
        ours = Tokenizer.from_str(json.dumps(table))
        ours.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB - 2,
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        ours.train_from_iterator(strings[::5], trainer)
        ours.add_tokens(["<tool_call>"])
        folder = tmp_path_factory.mktemp("tokenizer")
        ours.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture(scope="session")
def byte_level(train: Callable[..., Path]) -> Path:
    return train()


@pytest.fixture(scope="session")
def word_piece(strings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """lower-casing or not -> directory with BERT's tokenizer files."""
    from tokenizers import BertWordPieceTokenizer

    def make(lowercase: bool) -> Path:
        ours = BertWordPieceTokenizer(lowercase=lowercase)
        ours.train_from_iterator(strings[::2], vocab_size=4 * VOCAB, min_frequency=1, show_progress=False)
        folder = tmp_path_factory.mktemp("wordpiece")
        vocab = ours.get_vocab()
        ours = BertWordPieceTokenizer(vocab, lowercase=lowercase)
        ours.save(str(folder / "tokenizer.json"))
        names = {f"{k}_token": f"[{k.upper()}]" for k in ("unk", "sep", "pad", "cls", "mask")}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))
        return folder

    return make


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(class, config, tokenizer directory) -> directory of a model whose every parameter is random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(class_name: str, config: Mapping[str, Any], tokenizer: Path | None, *, std: float = 0.1) -> Path:
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config))
        with torch.no_grad():
            for name, parameter in model.state_dict(keep_vars=True).items():
                parameter.normal_(1 if "norm" in name.lower() and name.endswith("weight") else 0, std)
        folder = tmp_path_factory.mktemp(class_name)
        model.save_pretrained(folder)
        for file in tokenizer.iterdir() if tokenizer else ():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make


@pytest.fixture
def to_file(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """(checkpoint, scheme, options) -> (plan, file); a scheme's layouts are solved by rounding first."""
    from tightship.exporters.to_gguf import GgufExporter
    from tightship.target import Target, no_progress

    def make(checkpoint: Any, scheme: str | None = None, **options: Any) -> tuple[Any, Path]:
        exporter, target = GgufExporter(), Target("gguf", scheme, options)
        solved = solve(checkpoint, exporter.layout_for(checkpoint, target))
        plan = exporter.plan(solved, target)
        folder = tmp_path / f"gguf-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        exported = exporter.export(solved, plan, folder, no_progress)
        return plan, folder / exported.main

    return make


STEEP = 2.0**12


@pytest.fixture(scope="session")
def steep() -> Callable[[Any], Any]:
    """checkpoint -> the same, FFN inputs times 4096 and outputs divided by it.

    Outside -10 to 10 llama.cpp's table of GELU is 0 or x itself, so what is left to differ is the graph.
    """
    return _steep


def _steep(checkpoint: Any) -> Any:
    from tightship.weights import Dense

    gated = any(rule.role == "ffn_gate" for rule in checkpoint.architecture.tensors)
    changed = {}
    for name, info in checkpoint.infos().items():
        role, weight = info.rule.role.removeprefix("dec_"), checkpoint.weights.get(name)
        if not isinstance(weight, Dense) or info.rule.kind not in ("linear", "bias"):
            continue
        values = weight.value()
        if role == ("ffn_gate" if gated else "ffn_up"):
            changed[name] = Dense.of(values * np.float32(STEEP))
        elif role == "ffn_gate_up":  # what GELU sees stands first
            seen, other = np.split(values, 2)
            changed[name] = Dense.of(np.concatenate([seen * np.float32(STEEP), other]))
        elif role == "ffn_down" and info.rule.kind == "linear":
            changed[name] = Dense.of(values / np.float32(STEEP))
    assert len(changed) >= 2 * checkpoint.hyper["layers"]
    return checkpoint.with_weights(changed)


@pytest.fixture
def rounded() -> Callable[..., Any]:
    """(checkpoint, scheme) -> the checkpoint with every weight as the file of `to_file` holds it."""
    from tightship.exporters.to_gguf import GgufExporter
    from tightship.target import Target

    return lambda checkpoint, scheme: solve(checkpoint, GgufExporter().layout_for(checkpoint, Target("gguf", scheme)))


def solve(checkpoint: Any, layouts: Mapping[str, Any]) -> Any:
    """Round every tensor to its layout, as a data-free build does."""
    from tightship.layout import Context
    from tightship.weights import Alias, Quantized

    changed = {}
    for name, layout in layouts.items():
        if isinstance(layout, str) or isinstance(checkpoint.weights[name], Alias):
            continue
        w = checkpoint.resolve(name).value()
        context = Context(row_mean_square=np.mean(w.astype(np.float32) ** 2, axis=1))
        changed[name] = Quantized.of(layout, layout.quantize(w, None, context))
    return checkpoint.with_weights(changed)


@pytest.fixture(scope="session")
def in_llama_cpp() -> Callable[..., dict[str, np.ndarray]]:
    """(file, ids, job keys) -> arrays that llama.cpp computes."""
    pytest.importorskip("cyllama")
    from tightship.validators.runtimes import llama_cpp

    def run(path: Path, ids: np.ndarray, mask: np.ndarray | None = None, **job: Any) -> dict[str, np.ndarray]:
        arrays = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        whole = {"artifact": str(path.parent), "main": path.name, "mode": "graph", "threads": 1, **job}
        return llama_cpp.run(whole, arrays)[1]

    return run
