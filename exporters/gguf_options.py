"""What a target's options change beside types and sizes: pruned weights that must stay zero, template, metadata.

Zeros: a K-quant with a minimum, or a code book without 0.0, has no exact zero, so a pruned tensor would come back to
life. `sparse: refuse` (the default) says so; `sparse: steer` takes, of the types that keep zeros and whose blocks fit,
the one that is nearest in bits a weight; the larger of two that are equally near.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.exporters.gguf_mixes import Choice
from tightship.exporters.gguf_tensors import FileTensor
from tightship.formats.gguf_file import Field
from tightship.formats.layouts import parse_layout
from tightship.formats.packings.ggml import FLOAT_TYPES

KEEP_ZEROS = ("Q3_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0")
STEERED = "keeps the zeros of pruning"
_OURS = ("general.architecture", "general.type", "general.alignment", "general.quantization_version")
_KINDS = {bool: "bool", int: "i64", float: "f32", str: "str"}


def guarded(
    choices: Mapping[str, Choice], tensors: Sequence[FileTensor], checkpoint: Checkpoint, options: Mapping[str, Any]
) -> Mapping[str, Choice]:
    """The choices of a scheme, pruned tensors steered to types that keep zeros where the target says so.

    Raises:
        UsageError: `sparse` is neither `refuse` nor `steer`.
    """
    mode = options.get("sparse", "refuse")
    if mode not in ("refuse", "steer"):
        raise UsageError(f"sparse is refuse or steer, found {mode!r}")
    if mode == "refuse" or not any("mask" in step.get("makes", ()) for step in checkpoint.history):
        return choices
    linears = {info.name for info in checkpoint.linears()}
    pruned = {t.name: t for t in tensors if any(source.name in linears for source in t.sources)}
    return {
        name: _steered(choice, pruned[name].shape[-1]) if name in pruned else choice for name, choice in choices.items()
    }


def _steered(choice: Choice, cols: int) -> Choice:
    if choice.type_name in FLOAT_TYPES or parse_layout(choice.type_name.lower()).keeps_zero:
        return choice
    wanted = _bits(choice.type_name)
    fitting = [name for name in KEEP_ZEROS if cols % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0]
    nearest = min(fitting, key=lambda name: (abs(_bits(name) - wanted), -_bits(name)))
    return dataclasses.replace(
        choice, type_name=nearest, reason=f"{choice.reason}; {nearest} for {choice.type_name} {STEERED}"
    )


def _bits(type_name: str) -> float:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return 8 * nbytes / block


def with_template(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with the chat template of the file that `chat_template` names.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    path = options.get("chat_template")
    if path is None:
        return checkpoint
    try:
        text = Path(str(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template: {Path(str(path)).name} cannot be read as text: {error}") from error
    return checkpoint.replace(files={**checkpoint.files, "chat_template.jinja": text.encode()})


def with_metadata(fields: Mapping[str, Field], options: Mapping[str, Any]) -> dict[str, Field]:
    """The fields with those of `metadata` in their place, or behind them; null takes one away.

    Raises:
        UsageError: a key that follows from the weights, a value of no GGUF type, or another type than the key has.
    """
    wanted = options.get("metadata") or {}
    if not isinstance(wanted, Mapping):
        raise UsageError(f"metadata is a mapping of keys to values, found {wanted!r}")
    arch = str(fields["general.architecture"].value)
    changed = dict(fields)
    for key, value in wanted.items():
        if key in _OURS or (not key.startswith("general.") and key.startswith((f"{arch}.", "tokenizer.", "split."))):
            raise UsageError(
                f"metadata {key} follows from the model",
                hint="metadata is for general.* and for keys of your own; chat_template has an option of its own",
            )
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = _field(key, value, fields.get(key))
    return changed


def _field(key: str, value: Any, known: Field | None) -> Field:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        found = Field("[str]", list(value))
    elif type(value) in _KINDS:
        found = Field(_KINDS[type(value)], value)
    else:
        raise UsageError(f"metadata {key}: text, a number, true, false or a list of texts; found {value!r}")
    if known is None:
        return found
    if (known.kind == "str") != (found.kind == "str") or (known.kind[0] == "[") != (found.kind[0] == "["):
        raise UsageError(f"metadata {key} is {known.kind}, found {value!r}")
    return Field(known.kind, value)
