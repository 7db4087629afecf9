"""BPE over characters with byte fallback (`tokenizer.ggml.model` = llama), as SentencePiece makes it.

tokenizer.json orders merges by pair; llama.cpp joins any two pieces whose union is one, best score of the union first.
The two agree where the merges of one piece stand together and are all the ways to cut it in two; then the score is
minus the piece's place. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightship.errors import Unsupported
from tightship.exporters.gguf_tokenizer import (
    BYTE,
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
_BYTES = {f"<0x{i:02X}>" for i in range(256)}


def vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Tokens, scores and types.

    Raises:
        Unsupported: spaces are handled in a way that llama.cpp does not know, or merges have no scores.
    """
    model = files.table["model"]
    require(model.get("dropout"), (None, 0.0), "model.dropout")
    require(bool(model.get("ignore_merges", False)), (False,), "model.ignore_merges")
    missing = sorted(_BYTES - files.ids.keys())
    if missing:
        raise Unsupported(f"the vocabulary lacks byte tokens, such as {missing[0]}, which llama.cpp needs")
    prefix = space_prefix(files.table)
    types = token_types(files)
    unknown = model.get("unk_token")
    for text, number in files.ids.items():
        if text in _BYTES:
            types[number] = BYTE
        elif text == unknown:
            types[number] = UNKNOWN
    tokens = [text or "" for text in token_list(files)]
    scores = _scores(tokens, model["merges"])
    add_bos, add_eos = adds(files)
    fields = {
        "tokenizer.ggml.scores": Field("[f32]", scores + [-1e6] * (files.rows - len(scores))),
        "tokenizer.ggml.pre": Field("str", "default"),
        "tokenizer.ggml.add_bos_token": Field("bool", add_bos),
        "tokenizer.ggml.add_eos_token": Field("bool", add_eos),
        "tokenizer.ggml.add_space_prefix": Field("bool", prefix),
        "tokenizer.ggml.remove_extra_whitespaces": Field("bool", False),
    }
    meta = prefix and (files.table.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    note = "a text that starts with a space gets a second one in front by llama.cpp, not by the tokenizer"
    return Vocabulary("llama", tokens, types, fields, [note] if meta else [])


def space_prefix(table: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Spaces become U+2581 in every case.

    Raises:
        Unsupported: any other handling of spaces.
    """
    normalizer, pre = table.get("normalizer") or {}, table.get("pre_tokenizer")
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replaced = [
        p for p in parts if p["type"] == "Replace" and p["pattern"] == {"String": " "} and p["content"] == _SPACE
    ]
    prepended = [p for p in parts if p["type"] == "Prepend" and p["prepend"] == _SPACE]
    if len(replaced) == 1 and len(parts) == len(replaced) + len(prepended):
        kept = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        if pre in (None, kept):
            return bool(prepended)
    elif (
        not parts and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre.get("split", True)
    ):
        return pre.get("prepend_scheme", "always") != "never"
    raise Unsupported(f"llama.cpp has no tokenizer with normalizer {normalizer or None} and pre-tokenizer {pre}")


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the rank of each piece among the pieces that merges make; -1e6 for what no merge makes.

    Raises:
        Unsupported: the merges of one piece do not stand together, or one is missing.
    """
    ranks: dict[str, int] = {}
    ways: dict[str, int] = {}
    last = None
    for pair in merges:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        piece = left + right
        if piece != last and piece in ranks:
            raise Unsupported(f"the merges that make {piece!r} do not stand together, so no score says their order")
        last = piece
        ranks.setdefault(piece, len(ranks))
        ways[piece] = ways.get(piece, 0) + 1
    known = set(tokens)
    for piece, count in ways.items():
        possible = sum(piece[:i] in known and piece[i:] in known for i in range(1, len(piece)))
        if possible != count:
            raise Unsupported(f"{piece!r} is made by {count} merges, and llama.cpp would make it in {possible} ways")
    return [float(-ranks[t]) if t in ranks else -1e6 for t in tokens]
