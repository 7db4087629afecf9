"""Byte-level BPE (`tokenizer.ggml.model` = gpt2): how text is cut into words is named by `tokenizer.ggml.pre`.

llama.cpp has a fixed list of pre-tokenizers. The name is found from the structure of tokenizer.json (normalizer, cuts,
and whether merges are ignored for whole words), looked up in gguf_pretokenizers.json; nothing is guessed from hashes or
model names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from tightship.errors import Unsupported
from tightship.exporters.gguf_tokenizer import (
    TokenizerFiles,
    Vocabulary,
    adds,
    require,
    token_list,
    token_types,
)
from tightship.formats.gguf_file import Field


def vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Tokens, types, merges and the pre-tokenizer's name.

    Raises:
        Unsupported: a cut, normalizer or option that no pre-tokenizer of llama.cpp has.
    """
    model = files.table["model"]
    require(model.get("dropout"), (None, 0.0), "model.dropout")
    require(model.get("continuing_subword_prefix"), (None, ""), "model.continuing_subword_prefix")
    require(model.get("end_of_word_suffix"), (None, ""), "model.end_of_word_suffix")
    entry, notes = pre_tokenizer(files.table)
    add_bos, add_eos = adds(files)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    fields = {
        "tokenizer.ggml.merges": Field("[str]", merges),
        "tokenizer.ggml.pre": Field("str", entry["pre"]),
        "tokenizer.ggml.add_bos_token": Field("bool", add_bos),
        "tokenizer.ggml.add_eos_token": Field("bool", add_eos),
        "tokenizer.ggml.add_space_prefix": Field("bool", False),
    }
    tokens = [text or "" for text in token_list(files)]
    return Vocabulary("gpt2", tokens, token_types(files), fields, notes)


@functools.cache
def known() -> tuple[Mapping[str, Any], ...]:
    """The entries of gguf_pretokenizers.json."""
    text = (resources.files("tightship.exporters") / "gguf_pretokenizers.json").read_text("utf-8")
    return tuple(json.loads(text)["pre_tokenizers"])


def named(name: str) -> Mapping[str, Any] | None:
    """The entry that a file's `tokenizer.ggml.pre` stands for, if there is one."""
    return next((entry for entry in known() if name in (entry["pre"], *entry.get("also", ()))), None)


def pre_tokenizer(table: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The entry whose cuts, normalizer and handling of whole words are those of tokenizer.json, and notes.

    Raises:
        Unsupported: no entry fits; the message shows the structure.
    """
    cuts = steps(table.get("pre_tokenizer"))
    normalizer = _names(table.get("normalizer"))
    whole_words = bool(table["model"].get("ignore_merges", False))
    for entry in known():
        if entry["cuts"] == cuts and entry["ignore_merges"] == whole_words and normalizer in ([], entry["normalizer"]):
            notes = ["the tokenizer normalizes text to NFC first, llama.cpp does not"] if normalizer else []
            if entry.get("differs") == "marks":
                notes.append(
                    "llama.cpp cuts words before combining marks (Thai, Burmese, Hindi), the tokenizer does not"
                )
            return entry, notes
    shown = json.dumps({"cuts": cuts, "normalizer": normalizer, "ignore_merges": whole_words}, ensure_ascii=False)
    raise Unsupported(
        f"llama.cpp has no pre-tokenizer with this structure: {shown}",
        hint="if it has one by now, add a line to exporters/gguf_pretokenizers.json; a test proves every line",
    )


def steps(pre: Mapping[str, Any] | None) -> list[list[Any]]:
    """A pre-tokenizer as a flat list of what matters in each step."""
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for part in pre["pretokenizers"] for step in steps(part)]
    if pre["type"] == "Split":
        pattern = pre["pattern"]
        return [["split", pattern.get("Regex", pattern.get("String")), pre["behavior"].lower(), bool(pre["invert"])]]
    known_steps = {
        "ByteLevel": ["bytes", bool(pre.get("use_regex", True)), bool(pre.get("add_prefix_space", True))],
        "Digits": ["digits", bool(pre.get("individual_digits"))],
        "Punctuation": ["punctuation", pre.get("behavior", "Isolated").lower()],
    }
    return [known_steps.get(pre["type"], [pre["type"]])]


def pre_tokenizer_json(cuts: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The inverse of `steps`: a pre-tokenizer as tokenizer.json writes it."""
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "split": lambda regex, behavior, inverted: {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": behavior.capitalize(),
            "invert": inverted,
        },
        "bytes": lambda regex, space: {
            "type": "ByteLevel",
            "add_prefix_space": space,
            "trim_offsets": True,
            "use_regex": regex,
        },
        "digits": lambda individual: {"type": "Digits", "individual_digits": individual},
        "punctuation": lambda behavior: {"type": "Punctuation", "behavior": behavior.capitalize()},
    }
    parts = [makers[kind](*rest) for kind, *rest in cuts]
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def _names(normalizer: Mapping[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [name for part in normalizer["normalizers"] for name in _names(part)]
    return [normalizer["type"]]
