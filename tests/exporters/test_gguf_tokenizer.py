"""Token ids of llama.cpp against the tokenizers library on the committed strings, for every mapped structure."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.exporters import gguf_vocab_bpe
from tightship.exporters.gguf_tokenizer import tokenizer_fields
from tightship.exporters.gguf_tokenizer_files import tokenizer_files
from tightship.exporters.to_gguf import GgufExporter
from tightship.opening import open_checkpoint
from tightship.target import Target, no_progress
from tightship.weights import Dense

EMBER = Path(__file__).parents[2] / "examples" / "ember"


def with_tokenizer(folder: Path, rows: int = 512, **edits: Any) -> Checkpoint:
    """Ember with another tokenizer and vocabulary size; `edits` replace keys of tokenizer_config.json."""
    ember = open_checkpoint(EMBER)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    settings = json.loads(files.get("tokenizer_config.json", b"{}")) | edits
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    embedding = Dense.of(np.zeros((rows, 256), np.float16))
    ours = ember.replace(files=files, config={**ember.config, "vocab_size": rows})
    return ours.with_weights({"model.embed_tokens.weight": embedding})


def with_table(folder: Path, rows: int = 512, **edits: Any) -> Checkpoint:
    """Ember with another tokenizer whose tokenizer.json is edited."""
    checkpoint = with_tokenizer(folder, rows)
    table = json.loads(checkpoint.files["tokenizer.json"]) | edits
    return checkpoint.replace(files={**checkpoint.files, "tokenizer.json": json.dumps(table).encode()})


def llama_ids(checkpoint: Checkpoint, texts: Sequence[str], folder: Path, **job: Any) -> list[list[int]]:
    pytest.importorskip("cyllama")
    from tightship.validators.runtimes import llama_cpp

    exporter = GgufExporter()
    plan = exporter.plan(checkpoint, Target("gguf"))
    exported = exporter.export(checkpoint, plan, folder, no_progress)
    whole = {"artifact": str(folder), "main": exported.main, "want": "tokenize", "texts": list(texts), **job}
    return llama_cpp.run(whole, {})[0]["ids"]


def compare(checkpoint: Checkpoint, texts: Sequence[str], folder: Path, *, special: bool = False) -> None:
    ours = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    expected = [e.ids for e in ours.encode_batch(list(texts), add_special_tokens=special)]
    found = llama_ids(checkpoint, texts, folder, add_special=special)
    wrong = [(t, f, e) for t, f, e in zip(texts, found, expected, strict=True) if f != e]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first: {wrong[0]!r}"


def test_there_are_enough_strings(strings: list[str]) -> None:
    assert len(set(strings)) >= 2000


def test_ember(strings: list[str], tmp_path: Path) -> None:
    compare(open_checkpoint(EMBER), strings, tmp_path)


@pytest.mark.parametrize("entry", gguf_vocab_bpe.known(), ids=lambda e: e["pre"])
def test_every_known_pre_tokenizer(entry: dict[str, Any], train: Callable, strings: list[str], tmp_path: Path) -> None:
    folder = train(gguf_vocab_bpe.pre_tokenizer_json(entry["cuts"]), ignore_merges=entry["ignore_merges"])
    checkpoint = with_tokenizer(folder)
    fields, notes = tokenizer_fields(checkpoint)
    assert fields["tokenizer.ggml.pre"].value == entry["pre"]
    if entry.get("differs") == "marks":
        assert "combining marks" in notes[0]
        strings = [text for text in strings if not has(text, "M")]
    assert len(strings) > 1700
    compare(checkpoint, strings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in gguf_vocab_bpe.known() if "also" in e], ids=lambda e: e["pre"])
def test_other_names_of_a_pre_tokenizer(
    entry: dict[str, Any], train: Callable, strings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp gives the same ids whichever of the names the file says."""
    folder = train(gguf_vocab_bpe.pre_tokenizer_json(entry["cuts"]), ignore_merges=entry["ignore_merges"])
    checkpoint = with_tokenizer(folder)
    texts = [text for text in strings if not has(text, "M")][::20]
    for name in entry["also"]:
        monkeypatch.setattr(gguf_vocab_bpe, "known", lambda name=name: ({**entry, "pre": name},))
        (tmp_path / name).mkdir()
        compare(checkpoint, texts, tmp_path / name)


@pytest.mark.parametrize(
    ("model", "pre", "said", "expected"),
    [
        ("gpt2", "llama-bpe", {}, True),
        ("gpt2", "llama3", {}, True),
        ("gpt2", "llama-bpe", {"add_bos_token": False}, False),
        ("gpt2", "qwen2", {}, False),
        ("gpt2", None, {}, False),
        ("llama", None, {}, True),
    ],
)
def test_what_a_silent_file_means(model: str, pre: str | None, said: dict[str, bool], expected: bool) -> None:
    """llama-vocab.cpp: pre-tokenizers of Llama 3's kind and SentencePiece put BOS in front unless told."""
    metadata = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"]}
    metadata |= {"tokenizer.ggml.merges": [], "tokenizer.ggml.scores": [0.0] * 4, "tokenizer.ggml.bos_token_id": 1}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    files = tokenizer_files(metadata | ({} if pre is None else {"tokenizer.ggml.pre": pre}))
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is expected
    assert (json.loads(files["tokenizer.json"])["post_processor"] is not None) is expected


def has(text: str, category: str) -> bool:
    return any(unicodedata.category(c).startswith(category) for c in text)


def test_word_piece(word_piece: Callable, strings: list[str], tmp_path: Path) -> None:
    """llama.cpp keeps combining marks that BERT drops, and Hangul syllables that it takes apart."""
    kept = [t for t in strings if not has(t, "Mn") and not any("\uac00" <= c <= "\ud7a3" for c in t)]
    assert len(kept) > 1600
    compare(with_tokenizer(word_piece(True), rows=2048), kept, tmp_path, special=True)


def test_cased_word_piece(word_piece: Callable, strings: list[str], tmp_path: Path) -> None:
    """The wheel's llama.cpp lower-cases and strips accents in any case; the file says what newer ones read."""
    checkpoint = with_tokenizer(word_piece(False), rows=2048)
    fields, notes = tokenizer_fields(checkpoint)
    assert fields["tokenizer.ggml.normalizer.lowercase"].value is False
    assert fields["tokenizer.ggml.normalizer.strip_accents"].value is False
    assert "lower-cases" in notes[-1]
    same = [t for t in strings if t == t.lower() and t == unicodedata.normalize("NFD", t) and not has(t, "Mn")]
    assert len(same) > 500
    compare(checkpoint, same, tmp_path, special=True)


def test_bos_and_eos_are_added_as_transformers_adds_them(byte_level: Path, tmp_path: Path) -> None:
    for flags, expected in (({"add_bos_token": True}, [0]), ({"add_bos_token": False}, []), ({}, [])):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        found = llama_ids(with_tokenizer(byte_level, **flags), ["a"], folder)[0]
        assert found[:-1] == expected


def test_specials_are_parsed_on_request_and_user_tokens_always(byte_level: Path, tmp_path: Path) -> None:
    checkpoint = with_tokenizer(byte_level)
    texts = ["<|im_start|>", "<tool_call>"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parsed = llama_ids(checkpoint, texts, tmp_path / "a", parse_special=True)
    plain = llama_ids(checkpoint, texts, tmp_path / "b", parse_special=False)
    assert [len(ids) for ids in parsed] == [1, 1]
    assert len(plain[0]) > 1
    assert len(plain[1]) == 1


def test_rows_after_the_vocabulary_are_padded(byte_level: Path) -> None:
    fields, _ = tokenizer_fields(with_tokenizer(byte_level, rows=600))
    tokens, types = (fields[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == len(set(tokens)) == 600
    assert types[-1] == 5
    assert tokens[-1] == "[PAD599]"


def test_a_vocabulary_larger_than_the_embedding_is_malformed(byte_level: Path) -> None:
    with pytest.raises(Malformed, match="outside the embedding of 400 rows"):
        tokenizer_fields(with_tokenizer(byte_level, rows=400))


def test_jinja_files_win_over_the_config(byte_level: Path) -> None:
    checkpoint = with_tokenizer(byte_level, chat_template="from config")
    assert tokenizer_fields(checkpoint)[0]["tokenizer.chat_template"].value == "from config"
    files = {**checkpoint.files, "chat_template.jinja": b"from file"}
    assert tokenizer_fields(checkpoint.replace(files=files))[0]["tokenizer.chat_template"].value == "from file"


def test_named_templates_are_sorted(byte_level: Path) -> None:
    named = [{"name": n, "template": f"t-{n}"} for n in ("tool_use", "default", "rag")]
    fields, _ = tokenizer_fields(with_tokenizer(byte_level, chat_template=named))
    found = {key: field.value for key, field in fields.items() if "chat_template" in key}
    assert found == {
        "tokenizer.chat_template": "t-default",
        "tokenizer.chat_template.rag": "t-rag",
        "tokenizer.chat_template.tool_use": "t-tool_use",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "'WordLevel'"),
        ({"post_processor": {"type": "Mystery"}}, "Mystery"),
    ],
)
def test_unknown_structures_are_shown(byte_level: Path, edits: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        tokenizer_fields(with_table(byte_level, **edits))
    assert caught.value.exit_code == 3


def test_nfc_is_noted(train: Callable, strings: list[str], tmp_path: Path) -> None:
    checkpoint = with_tokenizer(train(normalizer={"type": "NFC"}))
    assert "NFC" in tokenizer_fields(checkpoint)[1][0]
    compare(checkpoint, strings, tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACES = {
    "llama-2": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}, None),
    "llama-2-new": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "gemma": (
        REPLACE,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    ),
}


def sentence_piece(strings: list[str], spaces: str, folder: Path, *, complete: bool = True) -> Path:
    """A BPE over characters with byte fallback whose merges are written as SentencePiece's are."""
    from tokenizers import models, trainers

    raw = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=1200, limit_alphabet=700, show_progress=False)
    words = [word for text in strings for word in ("▁" + text).replace(" ", " ▁").split(" ") if "<" not in word]
    raw.train_from_iterator(words, trainer)
    model = json.loads(raw.to_str())["model"]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *sorted(model["vocab"], key=model["vocab"].get),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for left, right in model["merges"]:
        piece = left + right
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += sorted(cuts, key=lambda c: (vocab[c[0]], vocab[c[1]])) if complete else [(left, right)]
    normalizer, pre = SPACES[spaces]
    table = json.loads(raw.to_str())
    table["model"] |= {"vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    table |= {"normalizer": normalizer, "pre_tokenizer": pre}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    table["added_tokens"] = [{"id": i, "content": t, **special} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("spaces", SPACES)
def test_sentence_piece(spaces: str, strings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    checkpoint = with_tokenizer(sentence_piece(strings, spaces, folder), rows=1460)
    ours = [text for text in strings if text and not any(t in text for t in ("<unk>", "<s>", "</s>"))]
    if spaces == "llama-2-new":
        assert "starts with a space" in tokenizer_fields(checkpoint)[1][0]
        ours = [text for text in ours if text[0] not in " ▁"]
    compare(checkpoint, ours, tmp_path)


def test_merges_that_scores_cannot_say_are_refused(strings: list[str], tmp_path: Path) -> None:
    checkpoint = with_tokenizer(sentence_piece(strings, "gemma", tmp_path, complete=False), rows=1460)
    with pytest.raises(Unsupported, match="ways"):
        tokenizer_fields(checkpoint)


def test_unigram(unigram: Path, strings: list[str], tmp_path: Path) -> None:
    checkpoint = with_tokenizer(unigram, rows=2048)
    fields, _ = tokenizer_fields(checkpoint)
    assert fields["tokenizer.ggml.model"].value == "t5"
    ours = [text for text in strings if not any(word[0] == "\u2581" for word in text.split())]
    assert len(ours) > 2300
    compare(checkpoint, ours, tmp_path, special=True)


def test_unigram_comes_back(unigram: Path, strings: list[str]) -> None:
    checkpoint = with_tokenizer(unigram, rows=2048)
    files = tokenizer_files({key: field.value for key, field in tokenizer_fields(checkpoint)[0].items()})
    first, second = (Tokenizer.from_str(f["tokenizer.json"].decode()) for f in (checkpoint.files, files))
    assert [e.ids for e in first.encode_batch(strings)] == [e.ids for e in second.encode_batch(strings)]


@pytest.mark.parametrize(
    ("edits", "kind", "message"),
    [
        ({"normalizer": None}, Unsupported, "normalizer None"),
        ({"normalizer": {"type": "NFKC"}}, Unsupported, "NFKC"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, Unsupported, "WhitespaceSplit"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, Malformed, "not base64"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/wAAAA=="}}, Malformed, "tree has 255"),
    ],
)
def test_unigram_structures_that_llama_cpp_lacks(
    edits: dict[str, Any], kind: type[Exception], message: str, unigram: Path
) -> None:
    with pytest.raises(kind, match=message):
        tokenizer_fields(with_table(unigram, rows=2048, **edits))


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}MARK{% endif %}"
)


@pytest.mark.parametrize("placed", ["config", "file", "both", "named", "folder"])
def test_templates_render_as_in_transformers(placed: str, byte_level: Path, tmp_path: Path) -> None:
    """transformers opens the directory and chooses; what the file holds must render to the same text."""
    from transformers import AutoTokenizer

    texts = {name: CHAT.replace("MARK", name) for name in ("config", "file", "default", "rag")}
    folder = tmp_path / "tokenizer"
    shutil.copytree(byte_level, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if placed in ("config", "both", "folder"):
        settings["chat_template"] = texts["config"]
    if placed == "named":
        settings["chat_template"] = [{"name": name, "template": texts[name]} for name in ("rag", "default")]
    if placed in ("file", "both", "folder"):
        (folder / "chat_template.jinja").write_text(texts["file"])
    if placed == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text(texts["rag"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ember = open_checkpoint(EMBER)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fields, _ = tokenizer_fields(ember.replace(files=files, config={**ember.config, "vocab_size": 512}))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rendered(**options: Any) -> str:
        return tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, **options)

    assert rendered(chat_template=fields["tokenizer.chat_template"].value) == rendered()
    if placed in ("named", "folder"):
        assert fields["tokenizer.chat_templates"].value == ["rag"]
        named = rendered(chat_template=fields["tokenizer.chat_template.rag"].value)
        assert named == rendered(chat_template="rag") != rendered()
