"""Unigram, as SentencePiece makes it (`tokenizer.ggml.model` = t5): the cheapest way through a text by pieces' scores.

The loader applies SentencePiece's compiled table of replacements ("charsmap"), merges spaces, puts one in front and
searches the best path, as the tokenizers library does for the structure that transformers writes for T5. It has no byte
fallback: what no piece covers becomes one unknown token a run.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from tightship.errors import Malformed, Unsupported
from tightship.exporters.gguf_tokenizer import (
    UNKNOWN,
    TokenizerFiles,
    Vocabulary,
    adds,
    require,
    token_list,
    token_types,
)
from tightship.formats.gguf_file import Field

_SPACE = "\u2581"
_LEAST = -1e6  # for rows that no text leads to
_NOTES = [
    "a word that starts with U+2581 itself gets a second one in front by llama.cpp, not by the tokenizer",
    "transformers replaces whole graphemes, llama.cpp characters: accents behind replaced characters may differ",
]


def vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Tokens, scores, types and the table of replacements.

    Raises:
        Unsupported: byte fallback, or spaces that are handled in another way.
        Malformed: the table is not base64, or its length does not fit its contents.
    """
    model = files.table["model"]
    require(bool(model.get("byte_fallback", False)), (False,), "model.byte_fallback")
    table = charsmap(files.table)
    types = token_types(files)
    if model.get("unk_id") is not None:
        types[int(model["unk_id"])] = UNKNOWN
    scores = [float(score) for _, score in model["vocab"]]
    scores += [0.0] * (len(types) - len(scores)) + [_LEAST] * (files.rows - len(types))
    add_bos, add_eos = adds(files)
    fields = {
        "tokenizer.ggml.scores": Field("[f32]", scores),
        "tokenizer.ggml.pre": Field("str", "default"),
        "tokenizer.ggml.precompiled_charsmap": Field("[u8]", list(table)),
        "tokenizer.ggml.add_bos_token": Field("bool", add_bos),
        "tokenizer.ggml.add_eos_token": Field("bool", add_eos),
        "tokenizer.ggml.add_space_prefix": Field("bool", True),
        "tokenizer.ggml.remove_extra_whitespaces": Field("bool", True),
    }
    return Vocabulary("t5", [text or "" for text in token_list(files)], types, fields, list(_NOTES))


def charsmap(table: Mapping[str, Any]) -> bytes:
    """SentencePiece's table of replacements, after a look at how spaces are handled.

    Raises:
        Unsupported: any structure but the table, then words behind U+2581.
        Malformed: the table cannot be read.
    """
    normalizer, pre = table.get("normalizer") or {}, table.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    words = {"replacement": _SPACE, "prepend_scheme": "always"}
    spaced = [p.get("type") for p in parts] == ["WhitespaceSplit", "Metaspace"] and all(
        parts[1].get(key, value) == value for key, value in words.items()
    )
    if normalizer.get("type") != "Precompiled" or not spaced:
        shown = {**normalizer, "precompiled_charsmap": "..."} if "precompiled_charsmap" in normalizer else normalizer
        raise Unsupported(f"llama.cpp has no unigram tokenizer with normalizer {shown or None} and pre-tokenizer {pre}")
    try:
        data = base64.b64decode(normalizer["precompiled_charsmap"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise Malformed("tokenizer.json: normalizer.precompiled_charsmap is not base64") from error
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size + 4 >= len(data):
        raise Malformed(f"tokenizer.json: the charsmap of {len(data)} bytes says that its tree has {size}")
    return data
