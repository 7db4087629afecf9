"""GGUF files opened as checkpoints: what went in comes out, and goes in again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import Field, read_gguf
from tightship.formats.layouts import parse_layout
from tightship.modelview import ModelView
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.weights import Alias, Quantized

EMBER = Path(__file__).parents[2] / "examples" / "ember"
STRINGS = Path(__file__).parents[1] / "data" / "tokenizer_strings.txt"


def written(checkpoint: Checkpoint, folder: Path, **options: Any) -> Path:
    exporter = GgufExporter()
    folder.mkdir()
    exported = exporter.export(
        checkpoint, exporter.plan(checkpoint, Target("gguf", None, options)), folder, no_progress
    )
    return folder / exported.main


def assert_equal_weights(first: Checkpoint, second: Checkpoint) -> None:
    assert set(first.weights) == set(second.weights)
    for name, weight in first.weights.items():
        other = second.weights[name]
        assert isinstance(weight, Alias) == isinstance(other, Alias), name
        if isinstance(weight, Quantized):
            assert other.layout == weight.layout
            arrays = other.read()
            assert all(np.array_equal(arrays[key], value) for key, value in weight.read().items()), name
        elif not isinstance(weight, Alias):
            assert np.array_equal(weight.value(), other.value()), name


def test_ember_comes_back(tmp_path: Path) -> None:
    original = open_checkpoint(EMBER)
    back = open_checkpoint(written(original, tmp_path / "a"))
    assert back.architecture.family == "llama"
    assert_equal_weights(original, back)
    assert back.hyper == original.hyper
    assert (back.name, back.source.identity) == ("ember", "ember.gguf")
    ids = np.random.default_rng(0).integers(0, 1000, (1, 24))
    np.testing.assert_array_equal(ModelView(back).outputs(ids)["logits"], ModelView(original).outputs(ids)["logits"])


def test_its_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    original = open_checkpoint(EMBER)
    back = open_checkpoint(written(original, tmp_path / "a"))
    texts = [json.loads(line) for line in STRINGS.read_text("utf-8").splitlines()]
    first, second = (Tokenizer.from_str(c.files["tokenizer.json"].decode()) for c in (original, back))
    assert [e.ids for e in first.encode_batch(texts)] == [e.ids for e in second.encode_batch(texts)]
    assert [first.decode(e.ids) for e in first.encode_batch(texts)] == [
        second.decode(e.ids) for e in second.encode_batch(texts)
    ]


@pytest.mark.parametrize("word", ["int4", "q4_k", "int8-channel"])
def test_codes_stay_as_they_are(word: str, tmp_path: Path) -> None:
    original, layout = open_checkpoint(EMBER), parse_layout(word)
    changed = {
        info.name: Quantized.of(layout, layout.quantize(original.resolve(info.name).value()))
        for info in original.linears()
    }
    compressed = original.with_weights(changed)
    file = written(compressed, tmp_path / "a")
    back = open_checkpoint(file)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(back.weights[query], Quantized)
    assert np.array_equal(back.weights[query].value(), compressed.weights[query].value())
    if word != "int8-channel":  # its scales come back one for every block of 32
        assert_equal_weights(compressed, back)
    again = written(back, tmp_path / "b")
    first, second = read_gguf(file), read_gguf(again)
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.read_rows(), second.tensors[name].read_rows()), name
    differing = {k for k, v in first.fields.items() if not np.array_equal(v.value, second.metadata[k])}
    assert differing <= {"tightship.source.identity", "tightship.source.sha256"}


def test_shards_are_opened_together(tmp_path: Path) -> None:
    original = open_checkpoint(EMBER)
    first = written(original, tmp_path / "a", shard_bytes=400_000)
    assert first.name.startswith("ember-00001-of-")
    back = open_checkpoint(first)
    assert_equal_weights(original, back)
    assert len(back.source.files) == len(list(first.parent.glob("*.gguf"))) > 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"fields": {"general.architecture": Field("str", "rwkv7")}}, Unsupported, "'rwkv7' cannot be opened"),
        ({"fields": {"llama.block_count": None}}, Malformed, "lack llama.block_count"),
        ({"fields": {"llama.feed_forward_length": Field("[i32]", [1, 2])}}, Unsupported, "differs by layer"),
        ({"fields": {"llama.block_count": Field("u32", 2**32 - 1)}}, Malformed, "more than the file has tensors"),
        ({"fields": {"llama.attention.head_count": Field("str", "4")}}, Malformed, "not a count"),
        ({"fields": {"llama.rope.scaling.type": Field("str", "longrope")}}, Malformed, "longrope needs its factors"),
        ({"fields": {"llama.rope.scaling.type": Field("str", "su")}}, Unsupported, "'su' of a GGUF file"),
        ({"fields": {"tokenizer.ggml.pre": Field("str", "tiny_aya")}}, Unsupported, "tiny_aya"),
        ({"fields": {"tokenizer.ggml.model": Field("str", "rwkv")}}, Unsupported, "'rwkv'"),
        ({"fields": {"tokenizer.ggml.merges": Field("[str]", ["ab"])}}, Malformed, "two pieces"),
        ({"fields": {"tokenizer.ggml.token_type": Field("[i32]", [1])}}, Malformed, "1 types"),
        ({"fields": {"llama.embedding_length": Field("u32", 128)}}, Malformed, "where config.json says"),
        ({"fields": {}, "without": "token_embd.weight"}, Malformed, "no token_embd.weight"),
        ({"fields": {}, "without": "blk.1.ffn_up.weight"}, Malformed, "missing"),
        ({"fields": {}, "more": 2}, Malformed, "2 tensors mean nothing"),
    ],
)
def test_files_that_are_no_checkpoint(
    changes: dict[str, Any], kind: type[Exception], message: str, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    path = written(open_checkpoint(EMBER), tmp_path / "a")
    broken = rewritten(path, tmp_path / "x.gguf", **changes)
    with pytest.raises(kind, match=message):
        open_checkpoint(broken)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("../../etc/passwd", "etc-passwd"), ("a\0b\\c d", "a-b-c-d"), ("...", "model"), ("n" * 300, "n" * 96)],
)
def test_the_name_in_the_file_is_no_path(
    name: str, expected: str, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    path = written(open_checkpoint(EMBER), tmp_path / "a")
    renamed = rewritten(path, tmp_path / "x.gguf", {"general.name": Field("str", name)})
    assert open_checkpoint(renamed).name == expected
