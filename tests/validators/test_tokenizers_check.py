"""GGUF vocabularies, faithful and with one thing wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.gguf_file import Field, GgufFile, read_gguf
from tightship.formats.gguf_writer import TensorToWrite, write_gguf
from tightship.opening import open_checkpoint
from tightship.report import Check
from tightship.target import Target
from tightship.validators import tokenizer_vocabulary, tokenizers_check
from tightship.validators.runtimes.child import Limits

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
LIMITS = Limits(seconds=120)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    folder = tmp_path_factory.mktemp("ember")
    ember, exporter = open_checkpoint(EMBER), GgufExporter()
    return read_gguf(folder / exporter.export(ember, exporter.plan(ember, Target("gguf")), folder).main)


def rewritten(exported: GgufFile, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file again with some metadata changed; `change` edits `{key after tokenizer.ggml.: list or scalar}`."""
    kinds = {key: field.kind for key, field in exported.fields.items()}
    metadata = {key: copy.copy(field.value) for key, field in exported.fields.items()}
    edited = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    edited["token_type"] = list(edited["token_type"])
    change(edited)
    fields = {}
    for key, kind in kinds.items():
        value = edited[key.removeprefix("tokenizer.ggml.")]
        fields[key] = Field(kind, np.array(value, np.int32) if key.endswith("token_type") else value)
    tensors = [
        TensorToWrite(t.name, t.type_name, t.shape, lambda t=t: [t.read_rows()]) for t in exported.tensors.values()
    ]
    write_gguf(path, fields, tensors)
    return path


def checkpoint(files: dict[str, bytes]) -> Any:
    return SimpleNamespace(files=files)


@pytest.fixture
def run(exported: GgufFile, tmp_path: Path) -> Callable[..., dict[str, Check]]:
    """change -> the checks of the changed file, by metric."""

    def make(change: Callable[[dict[str, Any]], Any] = dict.copy) -> dict[str, Check]:
        artifact = rewritten(exported, tmp_path / "model.gguf", change)
        source = checkpoint({"tokenizer.json": (EMBER / "tokenizer.json").read_bytes()})
        checks = tokenizers_check.gguf_checks(source, "gguf", artifact, ["It was the best of times,\n"], LIMITS)
        return {check.metric: check for check in checks}

    return make


def test_faithful_vocabulary_passes(run: Callable[..., dict[str, Check]]) -> None:
    checks = run()
    assert {m: c.value for m, c in checks.items()} == {
        "vocabulary_mismatches": 0, "merge_mismatches": 0, "encoding_mismatches": 0, "encoding_mismatches_unframed": 0,
    }  # fmt: skip
    assert checks["encoding_mismatches"].extra["strings"] > 150
    assert {c.verdict for c in checks.values()} == {"pass"}


def test_two_swapped_ids_are_named(run: Callable[..., dict[str, Check]]) -> None:
    def swap(v: dict[str, Any]) -> None:
        v["tokens"][300], v["tokens"][301] = v["tokens"][301], v["tokens"][300]

    checks = run(swap)
    assert checks["vocabulary_mismatches"].value == 2
    assert checks["vocabulary_mismatches"].reason.startswith("id 300: tokenizer.json says")
    assert checks["encoding_mismatches"].verdict == "fail"


def test_swapped_merges_are_named_by_rank(run: Callable[..., dict[str, Check]]) -> None:
    def swap(v: dict[str, Any]) -> None:
        v["merges"][0], v["merges"][500] = v["merges"][500], v["merges"][0]

    checks = run(swap)
    assert checks["merge_mismatches"].value == 2
    assert checks["merge_mismatches"].reason == "merge of rank 0 differs"
    assert checks["encoding_mismatches"].verdict == "fail"


def test_special_token_stored_as_ordinary_is_named(run: Callable[..., dict[str, Check]]) -> None:
    checks = run(lambda v: v["token_type"].__setitem__(0, 1))
    assert checks["vocabulary_mismatches"].reason == "id 0 ('<|endoftext|>'): token type 1, expected 3"


def test_another_pre_tokenizer_shows_in_the_first_string_that_differs(run: Callable[..., dict[str, Check]]) -> None:
    checks = run(lambda v: v.__setitem__("pre", "llama-bpe"))
    assert checks["vocabulary_mismatches"].verdict == "pass"
    assert checks["encoding_mismatches"].verdict == "fail"
    assert "llama.cpp [" in checks["encoding_mismatches"].reason


def test_wanted_and_unwanted_bos(run: Callable[..., dict[str, Check]]) -> None:
    checks = run(lambda v: v.__setitem__("add_bos_token", True))
    assert checks["encoding_mismatches"].verdict == "fail"
    assert checks["encoding_mismatches_unframed"].verdict == "pass"


def test_a_crashing_llama_cpp_is_a_failed_check(run: Callable[..., dict[str, Check]]) -> None:
    def fewer_types(v: dict[str, Any]) -> None:
        del v["token_type"][-5:]

    checks = run(fewer_types)
    assert checks["vocabulary_mismatches"].reason == "1024 pieces but 1019 token types"
    assert checks["encoding_mismatches"].verdict == "fail"


def test_files_must_be_the_sources(tmp_path: Path) -> None:
    source = checkpoint({"tokenizer.json": b"{}", "tokenizer_config.json": b"{ }", "config.json": b"x"})
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    (check,) = tokenizers_check.file_checks(source, "onnx", tmp_path)
    assert (check.verdict, check.value) == ("fail", 1)
    assert check.reason == "tokenizer_config.json is missing or differs from the source's"
    (tmp_path / "tokenizer_config.json").write_bytes(b"{ }")
    (check,) = tokenizers_check.file_checks(source, "onnx", tmp_path)
    assert check.verdict == "pass"


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    (check,) = tokenizers_check.file_checks(checkpoint({"config.json": b"{}"}), "onnx", tmp_path)
    assert check.verdict == "pass"
    assert "random ids" in check.extra["note"]


def test_wordpiece_and_sentencepiece_terms() -> None:
    wordpiece = {
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "play": 1, "##ing": 2, "[SEP]": 3}},
        "added_tokens": [
            {"id": 0, "content": "[UNK]", "special": True},
            {"id": 3, "content": "[SEP]", "special": True},
        ],
    }
    found = tokenizer_vocabulary.expected_vocabulary(wordpiece, "bert", 5)
    assert found.pieces == ["[UNK]", "▁play", "ing", "[SEP]", ""]
    assert found.types == [3, 1, 1, 3, 5]
    unigram = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["<0x0A>", -1.0], ["▁a", -2.5]]}}
    found = tokenizer_vocabulary.expected_vocabulary(unigram, "t5", 3)
    assert found.types == [2, 6, 1]
    assert found.scores == [0.0, -1.0, -2.5]


def test_probe_strings_exercise_every_pre_tokenizer_rule() -> None:
    """A GPT-2 and a Llama-3 split of the probes must differ, or the probes would not tell them apart."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(tokenizers_check.probe_strings(), trainers.BpeTrainer(vocab_size=400))
    gpt2 = [w for s in tokenizers_check.probe_strings() for w, _ in trained.pre_tokenizer.pre_tokenize_str(s)]
    assert len(tokenizers_check.probe_strings()) == len(set(tokenizers_check.probe_strings()))
    assert len(set(gpt2)) > 400
