"""Which GGML type each tensor gets under a scheme: the rules of llama-quantize, as data in gguf_mixes.json.

A scheme names a `type`, the type of the `output` (which also is a tied embedding's) and of an untied `token_embd`, and
`rules`: the first that fits a tensor decides. Then every fitting rule of the group named by `then` is applied.

| key of a rule       | holds where                                                                              |
|---------------------|------------------------------------------------------------------------------------------|
| role                | the tensor has this role (substrings in `roles`; fused qkv counts as attn_v)             |
| first: k            | it is among the first k of its role                                                      |
| from, below: [a, b] | its layer i of n has i >= a * n // b, or i < a * n // b                                  |
| count_below: [a, b] | as below, by count of the role instead of the layer's number (they differ with experts)  |
| more_bits           | the first and the last eighth, and every third layer between                             |
| shared_heads: k     | at least k query heads share a key head                                                  |
| experts(_from): k   | exactly (at least) k experts                                                             |
| importance          | importance data are given (true) or not (false)                                          |
| falcon, large       | the architecture is Falcon; the model is one of 80 layers (`large` says which)           |
| was: [types]        | the type so far is one of these                                                          |

A row that is no multiple of the type's block gets the type of `fallback`, or F16. Tensors whose name holds a word of
`never` and tensors of fewer than two dimensions keep what they have. Definition: src/llama-quant.cpp of llama.cpp.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tightship.errors import Unsupported, UsageError


@dataclass(frozen=True)
class Matrix:
    """What a rule may ask of one tensor of the file: its GGUF name and shape, (out, in) or (experts, out, in)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What a rule may ask of the whole model."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    importance: bool


@dataclass(frozen=True)
class Choice:
    """The type of one tensor and why, in one phrase."""

    type_name: str
    reason: str


@functools.cache
def tables() -> Mapping[str, Any]:
    """gguf_mixes.json."""
    data: Mapping[str, Any] = json.loads((resources.files("tightship.exporters") / "gguf_mixes.json").read_text())
    return data


def scheme(word: str) -> Mapping[str, Any]:
    """The entry of a scheme.

    Raises:
        UsageError: no such scheme; the message suggests the nearest.
    """
    known = tables()["schemes"]
    if word not in known:
        near = difflib.get_close_matches(word, known, n=3)
        raise UsageError(
            f"GGUF scheme {word!r} is unknown" + (f"; did you mean {', '.join(near)}?" if near else ""),
            hint="schemes are " + ", ".join(known),
        )
    found: Mapping[str, Any] = known[word]
    return found


def quantizable(matrix: Matrix) -> bool:
    """Whether a scheme touches this tensor at all."""
    return (
        sum(extent > 1 for extent in matrix.shape[:-1]) >= 1
        and matrix.name.endswith("weight")
        and not any(word in matrix.name for word in tables()["never"])
    )


def choose(
    word: str,
    matrices: Sequence[Matrix],
    model: Model,
    overrides: Mapping[str, str] | None = None,
    *,
    check: bool = True,
) -> dict[str, Choice]:
    """The type of every quantizable tensor. `matrices` are in the file's order: no block first, then by block and name.

    `overrides` maps patterns, searched in GGUF names, to type words; the first that is found decides. Without `check`
    the types are told even where importance data are missing.

    Raises:
        UsageError: unknown scheme or type, or a bad pattern.
        Unsupported: a type that needs importance data where there are none.
    """
    entry = scheme(word)
    patterns = _patterns(overrides or {})
    touched = [m for m in matrices if quantizable(m)]
    tied = not any(m.name == "output.weight" for m in matrices)
    counts = {role: sum(role_of(m.name) == role for m in touched) for role in tables()["roles"]}
    seen = dict.fromkeys(tables()["roles"], 0)
    choices: dict[str, Choice] = {}
    for matrix in touched:
        role = role_of(matrix.name)
        place = _Place(role, seen.get(role, 0), counts.get(role, 0), matrix, model)
        forced = next((name for pattern, name in patterns if pattern.search(matrix.name)), None)
        wanted = forced or _type(entry, matrix, place, tied)
        if not forced and role in seen:
            seen[role] += 1
        choices[matrix.name] = _fitting(wanted, matrix, f"override {forced}" if forced else f"{word}: {role}")
        if check:
            _check_importance(choices[matrix.name].type_name, entry, word, matrix, model)
    return choices


def role_of(name: str) -> str:
    """The role that rules speak of, or `other`."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    for role, words in tables()["roles"].items():
        if any(word in name for word in words):
            return str(role)
    return "other"


@dataclass(frozen=True)
class _Place:
    """A tensor among those of its role."""

    role: str
    count: int
    of_role: int
    matrix: Matrix
    model: Model

    @property
    def layers(self) -> int:
        return self.model.layers if self.role.startswith("ffn") else self.of_role

    @property
    def layer(self) -> int:
        """With experts the name tells the layer, else the count does: llama-quantize's way."""
        if self.model.experts > 1 and self.role.startswith("ffn"):
            return int(self.matrix.name.split(".")[1])
        return self.count


def _type(entry: Mapping[str, Any], matrix: Matrix, place: _Place, tied: bool) -> str:
    default = str(entry["type"])
    if "output" not in entry:  # a plain float type
        return default
    if place.role == "output" or (tied and place.role == "token_embd"):
        ill_shaped = matrix.shape[-1] % _block(default) != 0
        return "Q8_0" if ill_shaped or place.model.arch == "falcon" else str(entry["output"])
    if "stack" in entry:
        return str(entry["stack"]) if len(matrix.shape) > 2 else default
    if place.role == "token_embd":
        return str(entry.get("token_embd", default))
    chosen = next((str(r["type"]) for r in entry.get("rules", ()) if _fits(r, place, default)), default)
    for rule in tables()["groups"].get(entry.get("then"), ()):
        if _fits(rule, place, chosen):
            chosen = str(rule["type"])
    return chosen


def _fits(rule: Mapping[str, Any], place: _Place, so_far: str) -> bool:
    return all(_HOLDS[key](value, place, so_far) for key, value in rule.items() if key != "type")


_HOLDS: dict[str, Any] = {
    "role": lambda v, p, _: p.role == v,
    "first": lambda v, p, _: p.count < v,
    "from": lambda v, p, _: p.layer >= v[0] * p.layers // v[1],
    "below": lambda v, p, _: p.layer < v[0] * p.layers // v[1],
    "count_below": lambda v, p, _: p.count < v[0] * p.layers // v[1],
    "more_bits": lambda v, p, _: _more_bits(p.layer, p.layers) == v,
    "shared_heads": lambda v, p, _: p.model.heads // max(p.model.kv_heads, 1) >= v,
    "experts": lambda v, p, _: p.model.experts == v,
    "experts_from": lambda v, p, _: p.model.experts >= v,
    "importance": lambda v, p, _: p.model.importance == v,
    "falcon": lambda v, p, _: (p.model.arch == "falcon") == v,
    "large": lambda v, p, _: _large(p.model) == v,
    "was": lambda v, _, so_far: so_far in v,
}


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _large(model: Model) -> bool:
    kind = tables()["large"].get(model.arch)
    return model.layers == 80 and kind is not None and (kind == "any" or model.heads != model.kv_heads)


def _fitting(type_name: str, matrix: Matrix, reason: str) -> Choice:
    cols = matrix.shape[-1]
    if cols % _block(type_name) == 0:
        return Choice(type_name, reason)
    fallback = tables()["fallback"].get(type_name)
    if fallback is None or cols % _block(fallback):
        fallback = "F16"
    return Choice(fallback, f"{reason}; {type_name} needs rows in blocks of {_block(type_name)}, found {cols}")


def _check_importance(type_name: str, entry: Mapping[str, Any], word: str, matrix: Matrix, model: Model) -> None:
    needy = (*tables()["needs_importance"], *entry.get("needs_importance", ()))
    if type_name in needy and not model.importance and role_of(matrix.name) not in ("output", "token_embd"):
        raise Unsupported(
            f"scheme {word} puts {matrix.name} into {type_name}, which needs importance data",
            hint="give a calibration text, or choose a scheme with more bits",
        )


def _patterns(overrides: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    found = []
    for pattern, word in overrides.items():
        name = str(word).upper()
        if name not in GGMLQuantizationType.__members__:
            raise UsageError(f"override {pattern!r}: GGML type {word!r} is unknown")
        try:
            found.append((re.compile(pattern), name))
        except re.error as error:
            raise UsageError(f"override {pattern!r} is not a regular expression: {error}") from error
    return found


def _block(type_name: str) -> int:
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0])
