"""The way back: tokenizer.json and tokenizer_config.json of a GGUF file's metadata.

BPE of both kinds, unigram and WordPiece; what gguf_tokenizer writes is read again with the same ids. A file from
elsewhere may use a pre-tokenizer whose structure we do not know: Unsupported, naming it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.exporters import gguf_vocab_bpe
from tightship.exporters.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED

_SPACE = "\u2581"
_IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
Metadata = Mapping[str, Any]


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """File name -> bytes: tokenizer.json, tokenizer_config.json and chat templates; empty without a vocabulary.

    Raises:
        Unsupported: a kind of tokenizer or pre-tokenizer that we cannot write down.
        Malformed: token list, types and merges do not fit together.
    """
    model = metadata.get("tokenizer.ggml.model", "no_vocab")
    if model in ("no_vocab", "none"):
        return {}
    writers = {"gpt2": _byte_level, "llama": _sentence_piece, "bert": _word_piece, "t5": _unigram}
    if model not in writers:
        raise Unsupported(f"the GGUF tokenizer {model!r} cannot be turned into tokenizer.json")
    metadata = {**_silent(metadata, model), **metadata}
    tokens, types = _tokens(metadata)
    table = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens, types)}
    table |= writers[model](metadata, tokens, types)
    files = {"tokenizer.json": _json(table), "tokenizer_config.json": _json(_settings(metadata, tokens))}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _silent(metadata: Metadata, model: str) -> dict[str, Any]:
    """What llama.cpp takes where a file of this kind says nothing."""
    entry = gguf_vocab_bpe.named(metadata.get("tokenizer.ggml.pre", "default")) or {}
    assumed: dict[str, dict[str, Any]] = {
        "llama": {"add_bos_token": True, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
        "t5": {"add_eos_token": True, "eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0},
        "gpt2": {"add_bos_token": bool(entry.get("bos"))},
    }
    return {f"tokenizer.ggml.{key}": value for key, value in assumed.get(model, {}).items()}


def _tokens(metadata: Metadata) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        raise Malformed("the metadata have no tokenizer.ggml.tokens")
    kinds = [1] * len(tokens) if types is None else [int(t) for t in types]
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise Malformed(f"{len(tokens)} tokens ({len(set(tokens))} different) have {len(kinds)} types")
    return tokens, kinds


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, **flags, "special": kind != USER_DEFINED}
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _settings(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in _IDS.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    if metadata.get("tokenizer.ggml.model") == "bert":
        settings["cls_token"] = settings.pop("bos_token", "[CLS]")
        settings.pop("eos_token", None)
        return settings
    for flag in ("add_bos_token", "add_eos_token"):
        settings[flag] = bool(metadata.get(f"tokenizer.ggml.{flag}", False))
    return settings


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Tokens of the model proper: padding rows are left out."""
    return {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def _template(metadata: Metadata, tokens: list[str]) -> dict[str, Any] | None:
    def special(name: str) -> list[str]:
        on = metadata.get(f"tokenizer.ggml.add_{name}_token")
        return [tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]] if on else []

    before, after = special("bos"), special("eos")
    return processor(before, after, tokens) if before or after else None


def processor(before: list[str], after: list[str], tokens: list[str]) -> dict[str, Any]:
    """A post-processor that puts special tokens around a text."""

    def pieces(kind: str, number: int) -> list[dict[str, Any]]:
        around = [[{"SpecialToken": {"id": t, "type_id": number}} for t in part] for part in (before, after)]
        return [*around[0], {"Sequence": {"id": kind, "type_id": number}}, *around[1]]

    special = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in {*before, *after}}
    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": pieces("A", 0) + pieces("B", 1),
        "special_tokens": dict(sorted(special.items())),
    }


def _byte_level(metadata: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    entry = gguf_vocab_bpe.named(name)
    if entry is None:
        raise Unsupported(
            f"the pre-tokenizer {name!r} of this file has no structure in exporters/gguf_pretokenizers.json",
            hint="start from the original checkpoint",
        )
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "normalizer": None,
        "pre_tokenizer": gguf_vocab_bpe.pre_tokenizer_json(entry["cuts"]),
        "post_processor": _template(metadata, tokens),
        "decoder": {"type": "ByteLevel", **level},
        "model": _bpe(_vocab(tokens, types), [m.split(" ") for m in _merges(metadata)], entry["ignore_merges"], None),
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]], ignore: bool, unknown: str | None) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": unknown is not None,
        "ignore_merges": ignore,
        "vocab": vocab,
        "merges": merges,
    }


def _merges(metadata: Metadata) -> list[str]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or any(" " not in merge[1:] for merge in merges):
        raise Malformed("tokenizer.ggml.merges must be strings of two pieces")
    return merges


def _sentence_piece(metadata: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        raise Malformed("tokenizer.ggml.scores must have a number for every token")
    vocab = _vocab(tokens, types)
    special = {t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN, BYTE, USER_DEFINED)}
    pieces = sorted((t for t in vocab if t not in special), key=lambda t: (-float(scores[vocab[t]]), vocab[t]))
    merges: list[list[str]] = []
    for piece in pieces:
        cuts = [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += sorted(cuts, key=lambda c: (vocab[c[0]], vocab[c[1]]))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": normalizer if prefix else replace,
        "pre_tokenizer": None,
        "post_processor": _template(metadata, tokens),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocab, merges, False, unknown),
    }


def _unigram(metadata: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores, charsmap = metadata.get("tokenizer.ggml.scores"), metadata.get("tokenizer.ggml.precompiled_charsmap")
    if scores is None or len(scores) < len(tokens) or charsmap is None:
        raise Malformed("a t5 tokenizer needs tokenizer.ggml.scores for every token, and a precompiled_charsmap")
    last = max(i for i, kind in enumerate(types) if kind != UNUSED) + 1
    words = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    table = base64.b64encode(bytes(np.asarray(charsmap, np.uint8))).decode()
    return {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, words]},
        "post_processor": _template(metadata, tokens),
        "decoder": words,
        "model": {
            "type": "Unigram",
            "unk_id": int(metadata.get("tokenizer.ggml.unknown_token_id", 2)),
            "vocab": [[text, float(score)] for text, score in zip(tokens[:last], scores[:last], strict=True)],
            "byte_fallback": False,
        },
    }


def _word_piece(metadata: Metadata, tokens: list[str], types: list[int]) -> dict[str, Any]:
    lowercase = bool(metadata.get("tokenizer.ggml.normalizer.lowercase", True))
    strip = bool(metadata.get("tokenizer.ggml.normalizer.strip_accents", lowercase))
    vocab = {
        _word_piece_text(text, kind): number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED
    }
    first, last = (tokens[metadata[f"tokenizer.ggml.{k}_token_id"]] for k in ("bos", "seperator"))
    switches = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": strip, "lowercase": lowercase}
    return {
        "normalizer": {"type": "BertNormalizer", **switches},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": processor([first], [last], tokens),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokens[metadata.get("tokenizer.ggml.unknown_token_id", 100)],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def _word_piece_text(text: str, kind: int) -> str:
    """A piece in BERT's spelling: the loader's mark of a word's start becomes the absence of `##`."""
    if kind == CONTROL:
        return text
    return text[1:] if text.startswith(_SPACE) and len(text) > 1 else f"##{text}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
