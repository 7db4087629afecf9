"""Vocabularies in GGUF terms: what a tokenizer.json demands, and what a published file says.

The expectation is derived here from `tokenizer.json` alone, apart from the exporter's code.

| tokenizer.json model     | GGUF model | piece stored                          | scores          | merges        |
|--------------------------|------------|---------------------------------------|-----------------|---------------|
| BPE, byte level          | gpt2       | as it is                              | -               | rank by rank  |
| BPE, byte fallback       | llama      | as it is                              | order of merges | -             |
| Unigram                  | t5, llama  | as it is                              | as they are     | -             |
| WordPiece                | bert       | `##x` as `x`, word starts behind `▁`  | -               | -             |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORD_START = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """One entry per id; `types` are llama.cpp's token types; `scores` and `merges` are None where not stored."""

    model: str
    pieces: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None

    @functools.cached_property
    def special(self) -> list[str]:
        """Pieces that are found whole in a text."""
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        return [piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind in kinds]


def expected_vocabulary(source: Mapping[str, Any], gguf_model: str, size: int) -> Vocabulary:
    """What a GGUF of `gguf_model` with `size` ids must say, from a parsed tokenizer.json.

    Ids that tokenizer.json does not name (padding of the embedding) are expected to be unused.
    """
    model = source["model"]
    by_id = _pieces_by_id(model)
    added = {int(entry["id"]): entry for entry in source.get("added_tokens") or ()}
    unknown = _unknown_id(model, by_id)
    pieces, types = [], []
    for index in range(size):
        if index in added:
            pieces.append(added[index]["content"])
            types.append(CONTROL if added[index]["special"] else USER_DEFINED)
        elif index in by_id:
            pieces.append(_stored_piece(by_id[index], gguf_model))
            types.append(NORMAL)
        else:
            pieces.append("")
            types.append(UNUSED)
        if gguf_model in ("llama", "t5"):
            types[-1] = _sentencepiece_type(types[-1], pieces[-1], index == unknown)
    scores = [float(entry[1]) for entry in model["vocab"]] if model.get("type") == "Unigram" else None
    merges = [_merge(entry) for entry in model["merges"]] if gguf_model == "gpt2" else None
    return Vocabulary(gguf_model, pieces, types, scores, merges)


def read_gguf_vocabulary(artifact: Path) -> Vocabulary:
    """The vocabulary as gguf's own reader finds it in the published file."""
    from gguf import GGUFReader

    fields = GGUFReader(artifact).fields

    def contents(key: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    return Vocabulary(
        str(contents("model")),
        list(contents("tokens") or ()),
        list(contents("token_type") or ()),
        contents("scores"),
        contents("merges"),
    )


def _pieces_by_id(model: Mapping[str, Any]) -> dict[int, str]:
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {index: str(entry[0]) for index, entry in enumerate(vocab)}
    return {int(index): piece for piece, index in vocab.items()}


def _unknown_id(model: Mapping[str, Any], by_id: Mapping[int, str]) -> int | None:
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return next((i for i, piece in by_id.items() if piece == model.get("unk_token")), None)


def _stored_piece(piece: str, gguf_model: str) -> str:
    if gguf_model != "bert":
        return piece
    return piece[2:] if piece.startswith("##") else WORD_START + piece


def _sentencepiece_type(kind: int, piece: str, is_unknown: bool) -> int:
    if is_unknown:
        return UNKNOWN
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return BYTE if is_byte and kind == NORMAL else kind


def _merge(entry: str | Sequence[str]) -> str:
    return entry if isinstance(entry, str) else " ".join(entry)
