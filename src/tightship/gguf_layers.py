"""Widths of single layers in a GGUF file: the inverse of `unlike_arch` of exporters/gguf_metadata.py.

llama.cpp's `deci` computes a family's graph with arrays, one entry a block, where the plain architecture has numbers:

| key                       | width      | 0 in llama.cpp                                                    |
|---------------------------|------------|-------------------------------------------------------------------|
| `feed_forward_length`     | `ffn`      | no feed-forward; an attention beside it is computed and discarded |
| `attention.head_count`    | `heads`    | no attention                                                      |
| `attention.head_count_kv` | `kv_heads` | one square matrix in the attention's place                        |

config.json says positive widths in `per_layer_config`; blocks without one of their parts it cannot say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.architecture import Architecture
from tightship.errors import Malformed, Unsupported
from tightship.per_layer import KEY

_KEYS = {"ffn": "feed_forward_length", "heads": "attention.head_count", "kv_heads": "attention.head_count_kv"}
_WITHOUT = {
    "ffn": "no feed-forward (llama.cpp discards the output of an attention beside it)",
    "heads": "no attention",
    "kv_heads": "a matrix in its attention's place",
}


def split_widths(architecture: Architecture, metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The metadata as those of a file of the plain architecture, and `per_layer_config` as an update of config.json.

    Where an array stood, the metadata have one number. The update is empty where all blocks are alike.

    Raises:
        Malformed: an array that is not one positive number a block, or heads that are no multiple of the key heads.
        Unsupported: a block without attention or feed-forward.
    """
    arch, plain = str(metadata["general.architecture"]), str((architecture.gguf or {})["arch"])
    if arch == plain:
        return metadata, {}
    widths = _arrays(arch, metadata)
    _check_groups(arch, metadata, widths)
    renamed = {re.sub(rf"^{re.escape(arch)}\.", f"{plain}.", key): value for key, value in metadata.items()}
    renamed |= {f"{plain}.{_KEYS[width]}": entries[0] for width, entries in widths.items()}
    if all(len(set(entries)) == 1 for entries in widths.values()):
        return renamed, {}
    blocks = range(len(next(iter(widths.values()))))
    table = {str(n): {architecture.keys(width)[0]: own[n] for width, own in widths.items()} for n in blocks}
    if "heads" in widths:
        stream, heads = _number(f"{arch}.embedding_length", metadata.get(f"{arch}.embedding_length")), widths["heads"]
        renamed = {f"{plain}.attention.key_length": stream // heads[0]} | renamed
        # transformers wants heads at the top level that divide the stream, though every block has its own.
        block = next((n for n, count in enumerate(heads) if stream % count == 0), None)
        both = (1, 1) if block is None else (heads[block], widths["kv_heads"][block])
        renamed |= {f"{plain}.{_KEYS[w]}": number for w, number in zip(("heads", "kv_heads"), both, strict=True)}
    return renamed, {KEY: table}


def _arrays(arch: str, metadata: Mapping[str, Any]) -> dict[str, list[int]]:
    """Width -> a number a block, of the widths that are arrays, and of key heads where heads are one."""
    found = {}
    for width, suffix in _KEYS.items():
        key = f"{arch}.{suffix}"
        if width == "kv_heads" and key not in metadata:  # then they are the heads
            key = f"{arch}.{_KEYS['heads']}"
        value = metadata.get(key)
        if isinstance(value, list | np.ndarray):
            found[width] = _numbers(key, value, metadata.get(f"{arch}.block_count"), _WITHOUT[width])
        elif width == "kv_heads" and "heads" in found:
            found[width] = [_number(key, value)] * len(found["heads"])
    return found


def _number(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise Malformed(f"{key} is {value!r}, not a positive number")
    return value


def _numbers(key: str, value: Any, layers: Any, without: str) -> list[int]:
    """An array's entries, one positive number a block."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        raise Malformed(f"{key} is no array of whole numbers")
    if not len(value) or len(value) != layers:
        raise Malformed(f"{key} has {len(value)} entries for {layers} blocks")
    entries = [int(entry) for entry in value]
    block = next((block for block, entry in enumerate(entries) if entry < 1), None)
    if block is None:
        return entries
    if entries[block]:
        raise Malformed(f"{key} is {entries[block]} for block {block}, which is no width")
    raise Unsupported(
        f"{key} is 0 for block {block}: {without}, which config.json cannot say", hint="start from the original"
    )


def _check_groups(arch: str, metadata: Mapping[str, Any], widths: Mapping[str, list[int]]) -> None:
    """Every block's heads are a multiple of its key heads."""
    key, groups = f"{arch}.{_KEYS['heads']}", widths.get("kv_heads", [])
    heads = widths.get("heads") or [_number(key, metadata.get(key)) for _ in groups]
    for block, (whole, part) in enumerate(zip(heads, groups, strict=True)):
        if whole % part:
            raise Malformed(f"{arch}: the {whole} heads of block {block} are no multiple of its {part} key heads")
