"""Every layout, by name. Adding one: a file here, and its module in `_MODULES`."""

from __future__ import annotations

import difflib
import importlib
import re

from tightship.errors import UsageError
from tightship.formats.layouts.ggml_base import GgmlLayout
from tightship.layout import Layout

_MODULES = ("affine", "ggml_affine", "k_quants", "iq4", "ternary", "mx", "iq_grid", "float8", "codebook")
for _module in _MODULES:
    importlib.import_module(f"tightship.formats.layouts.{_module}")

_INT = re.compile(r"int(?P<bits>[2-8])(?:-(?:g(?P<group>[1-9]\d*)|(?P<channel>channel)))?(?P<asym>-asym)?")
_CODEBOOK = re.compile(r"codebook-([2-9]|1[0-6])")
_FLOAT8 = {"": (0, 0), "-channel": (1, 0), "-block": (128, 128)}


def _named() -> dict[str, dict[str, object]]:
    """Fixed words of the grammar. GGML names that an affine layout says exactly are that layout."""
    return {
        "q8_0": {"kind": "affine", "bits": 8},
        "q5_0": {"kind": "affine", "bits": 5},
        "q4_0": {"kind": "affine", "bits": 4},
        "mxfp8": {"kind": "mxfp8"},
        **{
            f"fp8-e4m3{word}": {"kind": "float8", "tile_rows": rows, "group_size": cols}
            for word, (rows, cols) in _FLOAT8.items()
        },
    } | {kind: {"kind": kind} for kind, layout in Layout.registry.items() if issubclass(layout, GgmlLayout)}


def parse_layout(word: str) -> Layout:
    """The layout of a word of the contract's grammar (`int4-g32-asym`, `q4_k`, ...).

    Raises:
        UsageError: no such layout; the message suggests the nearest names.
    """
    text = word.strip().lower()
    if _CODEBOOK.fullmatch(text):
        return Layout.from_json({"kind": "codebook", "size": int(text.removeprefix("codebook-"))})
    match = _INT.fullmatch(text)
    if match:
        group = 0 if match["channel"] else int(match["group"] or 32)
        return Layout.from_json(
            {"kind": "affine", "bits": int(match["bits"]), "group_size": group, "symmetric": not match["asym"]}
        )
    named = _named()
    if text in named:
        return Layout.from_json(named[text])
    near = difflib.get_close_matches(text, [*named, "int4", "int8", "int4-g32-asym"], n=3)
    raise UsageError(
        f"layout {word!r} is unknown" + (f"; did you mean {', '.join(near)}?" if near else ""),
        hint="layouts are int2..int8[-gN|-channel][-asym], codebook-2..codebook-16 and " + ", ".join(named),
    )
