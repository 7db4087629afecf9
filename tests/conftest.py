"""Tiny models with every parameter random, written by transformers and opened as checkpoints."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint, Source
from tightship.formats.gguf_file import Field, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, write_gguf
from tightship.weights import Dense

STRINGS = Path(__file__).parent / "data" / "tokenizer_strings.txt"
PIECES = 2028  # of the unigram tokenizer

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when OpenMP is loaded
os.environ.pop("HF_HUB_OFFLINE", None)  # hub ids are tested against a server on the loopback interface


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the pages of docs that tests hold current")


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": ("BertForMaskedLM", SIZES),
    "bert-encoder": ("BertModel", SIZES),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "decoder_start_token_id": 6,
    "forced_eos_token_id": None,
}
TWO_STACKS = {
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 5}),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3},
    ),
    "bart": ("BartForConditionalGeneration", {**BART, "decoder_layers": 1, "decoder_attention_heads": 2}),
    "mbart": ("MBartForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART),
    "pegasus": ("PegasusForConditionalGeneration", BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART),
}
STRINGS = Path(__file__).parent / "data" / "tokenizer_strings.txt"
QWEN = {
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
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> directory of a random model as `save_pretrained` writes it; made once a session."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            class_name, config = {**FAMILIES, **TWO_STACKS}[family]
            model_class = getattr(transformers, class_name)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**config))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.3)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny(tiny_directory: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    """family -> its checkpoint, Conv1D matrices turned as opening turns them."""

    def open_tiny(family: str) -> Checkpoint:
        directory = tiny_directory(family)
        config = json.loads((directory / "config.json").read_text())
        architecture = architecture_for(config)
        infos = architecture.lookup(config)
        weights = {}
        for name, array in load_file(directory / "model.safetensors").items():
            turned = name in infos and infos[name].rule.transposed
            weights[name] = Dense.of(array.T if turned else array)
        return Checkpoint(family, config, weights, {}, architecture, Source(family, None, ()))

    return open_tiny


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 whose every parameter counts, as a directory; all matrices of the blocks are 64 x 64."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN))
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
def rewritten() -> Callable[..., Path]:
    """(GGUF file, new path, fields) -> a copy with metadata replaced (None: left out), a tensor left out, or added."""

    def copy(path: Path, target: Path, fields: Mapping[str, Field | None], without: str = "", more: int = 0) -> Path:
        file = read_gguf(path)
        kept = {key: field for key, field in (dict(file.fields) | fields).items() if field is not None}
        tensors = [
            TensorToWrite(t.name, t.type_name, t.shape, lambda t=t: [t.read_rows()])
            for t in file.tensors.values()
            if t.name != without
        ]
        tensors += [TensorToWrite(f"more{i}", "F32", (1,), lambda: [np.ones(1, np.float32)]) for i in range(more)]
        write_gguf(target, kept, tensors)
        return target

    return copy


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def strings() -> list[str]:
    return [json.loads(line) for line in STRINGS.read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def unigram(strings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a unigram tokenizer as transformers writes T5's, and NFKC of single characters as its table."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    words = {"replacement": "\u2581", "prepend_scheme": "always"}
    ours = Tokenizer(models.Unigram())
    ours.normalizer = normalizers.Precompiled(charsmap(replacements(strings)))
    ours.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**words)])
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    ours.train_from_iterator([text for text in strings[::2] if "<" not in text], trainer)
    ours.decoder = decoders.Metaspace(**words)
    ours.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ours.add_special_tokens(["<extra_id_0>"])
    table = json.loads(ours.to_str())
    # SentencePiece's scores are float32, and sums of float64 ones would end in other ties.
    table["model"]["vocab"] = [[piece, float(np.float32(score))] for piece, score in table["model"]["vocab"]]
    folder = tmp_path_factory.mktemp("unigram")
    (folder / "tokenizer.json").write_text(json.dumps(table))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))
    return folder


def replacements(strings: list[str]) -> dict[str, str]:
    """Characters of the strings that NFKC changes, and white space, which becomes a space."""
    found = {}
    spaces = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    for char in sorted({*"".join(strings), *spaces} - {" ", "\0"}):
        plain = " " if char.isspace() else unicodedata.normalize("NFKC", char)
        if plain != char:
            found[char] = plain
    return found


def charsmap(rules: Mapping[str, str]) -> bytes:
    """SentencePiece's compiled table: the size of a double array, the array, and texts that end in NUL.

    A unit is a label (bits 0-7), whether a text ends here (bit 8), and the offset to its children (bits 10-30), which
    stand at position ^ offset ^ label; the text's place stands at label 0, bit 31 set. Each node has a block of 256
    units of its own here.
    """
    texts, places = b"", {}
    for text in sorted(set(rules.values())):
        places[text] = len(texts)
        texts += text.encode() + b"\0"
    nodes = sorted({key.encode()[:n] for key in rules for n in range(len(key.encode()) + 1)}, key=lambda k: (len(k), k))
    blocks = {key: 256 * (number + 1) for number, key in enumerate(nodes)}
    units = np.zeros(256 * (len(nodes) + 1), np.uint32)
    ends = {key.encode(): places[text] for key, text in rules.items()}
    for key, block in blocks.items():
        place = blocks[key[:-1]] ^ key[-1] if key else 0
        units[place] = (key[-1] if key else 0) | (key in ends) << 8 | (place ^ block) << 10
        if key in ends:
            units[block] = ends[key] | 1 << 31
    return np.uint32(units.nbytes).tobytes() + units.tobytes() + texts
