"""WordPiece (`tokenizer.ggml.model` = bert).

The loader wants pieces in its own spelling: `##ing` as `ing`, and a piece that starts a word with U+2581 in front.
It cleans the text, isolates CJK characters and surrounds it by [CLS] ... [SEP] whatever the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightship.errors import Unsupported
from tightship.exporters.gguf_tokenizer import (
    CONTROL,
    TokenizerFiles,
    Vocabulary,
    require,
    template,
    token_list,
    token_types,
)
from tightship.formats.gguf_file import Field

_WORD_START = "\u2581"


def vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Tokens in the loader's spelling and the normalizer's switches.

    Raises:
        Unsupported: a normalizer, cut or template other than BERT's own.
    """
    model = files.table["model"]
    require(model.get("continuing_subword_prefix"), ("##",), "model.continuing_subword_prefix")
    lowercase, strip = _switches(files.table.get("normalizer"))
    pre = files.table.get("pre_tokenizer") or {}
    require(pre.get("type"), ("BertPreTokenizer",), "pre_tokenizer")
    before, after = template(files.table.get("post_processor"))
    ends = [files.ids.get(t) for t in before + after]
    if len(before) != 1 or ends != [files.special("cls"), files.special("sep")]:
        raise Unsupported(f"the tokenizer surrounds a text by {before} {after}, and llama.cpp by the cls and sep token")
    types = token_types(files)
    tokens = [_spelled(text, kind) for text, kind in zip(token_list(files), types, strict=True)]
    fields = {
        "tokenizer.ggml.add_bos_token": Field("bool", True),
        "tokenizer.ggml.add_eos_token": Field("bool", False),
        "tokenizer.ggml.add_sep_token": Field("bool", True),
        "tokenizer.ggml.add_space_prefix": Field("bool", False),
        "tokenizer.ggml.normalizer.lowercase": Field("bool", lowercase),
        "tokenizer.ggml.normalizer.strip_accents": Field("bool", strip),
    }
    return Vocabulary("bert", tokens, types, fields, _notes(model, lowercase, strip))


def _notes(model: Mapping[str, Any], lowercase: bool, strip: bool) -> list[str]:
    longest = model.get("max_input_chars_per_word", 100)
    notes = [f"words of more than {longest} characters are one unknown token in transformers, not in llama.cpp"]
    if strip:
        notes.append("transformers drops combining marks and takes Hangul apart, llama.cpp does neither")
    if not (lowercase and strip):
        notes.append("a llama.cpp that does not read tokenizer.ggml.normalizer.* lower-cases and strips accents anyway")
    return notes


def _switches(normalizer: Mapping[str, Any] | None) -> tuple[bool, bool]:
    found = normalizer or {}
    require(found.get("type"), ("BertNormalizer",), "normalizer")
    require(found.get("clean_text", True), (True,), "normalizer.clean_text")
    require(found.get("handle_chinese_chars", True), (True,), "normalizer.handle_chinese_chars")
    lowercase = bool(found.get("lowercase", True))
    strip = found.get("strip_accents")
    return lowercase, lowercase if strip is None else bool(strip)


def _spelled(text: str | None, kind: int) -> str:
    if text is None or kind == CONTROL:
        return text or ""
    return text.removeprefix("##") if text.startswith("##") and len(text) > 2 else _WORD_START + text
