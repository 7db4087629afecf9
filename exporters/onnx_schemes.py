"""What the words of `--to onnx:SCHEME` and the recipe's `with` mean.

| scheme               | matrices of the blocks              | the rest             |
|----------------------|-------------------------------------|----------------------|
| (none)               | as the passes left them             | as the source has it |
| fp32, fp16, bf16     | that type, computed in float32      | that type            |
| fp16-compute         | float16, computed in float16        | float16              |
| int4, int8, int2     | affine integers, symmetric          | as the source has it |
| int8-dynamic         | int8, one scale a row               | as the source has it |
| int8-static          | int8, one scale a row               | as the source has it |
| any with `-portable` | the same, standard operators only   |                      |

`fp16-compute` keeps norms, softmax, the residual sum and logits in float32 (`onnx_half`). There is no `bf16-compute`:
ONNX Runtime's CPU has no bfloat16 kernels, so that such a graph could not be proven.

`int8-dynamic` rounds activations to 8 bits in front of each matrix, by the range each token has at that moment: the
fastest form for long prompts. `int8-static` does so by calibrated ranges (options of the solver: `activations:
int8-static` for symmetric ones, `activation_range`, `percentile`). Both have standard operators only in any case. A
`quantize` pass with `activations` gives the same, without a scheme.

Options: `profile: portable`, `layout` (another affine layout for the integers), `include: [embeddings, head]`,
`accuracy_level` (of MatMulNBits as shipped; 4, the default, quantizes activations to int8, 0 and 1 do not),
`folder: onnx` (the graph lies in `onnx/`, where transformers.js and sentence-transformers look on a model hub),
`experts: qmoe` (the experts of a block are one node, where all of them are symmetric integers of 4 bits: faster for
single tokens, slower for prompts),
`logits` (of a decoder; without it model.onnx gives those of every token, and genai.onnx those of a prompt's last one;
`all`: onnxruntime-genai opens model.onnx, too; `last`: model.onnx gives the last ones, unless it is asked for more),
`shapes: {batch_size: 1, sequence_length: 128}` (of an encoder; either axis alone, too; open axes take any size).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.onnx_activations import in_integers
from tightship.exporters.onnx_candidates.skeleton import DECODER_TASKS, SEQ2SEQ
from tightship.exporters.onnx_storage import Style, by_channel
from tightship.formats.layouts import parse_layout
from tightship.layout import Layout
from tightship.target import Target
from tightship.weights import Alias, Quantized

HALF = "fp16-compute"
FLOATS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", HALF: "f16"}
_NO_KERNELS = "bf16-compute"
INTEGERS = ("int4", "int8", "int2")
DYNAMIC = "int8-dynamic"
STATIC = "int8-static"
ROUNDED = {STATIC: "int8-static-asym"}  # scheme -> the word for its activations
_WORDS = (DYNAMIC, "int8-static", "int8-static-asym")  # for activations
OPTIONS = ("profile", "layout", "include", "accuracy_level", "folder", "shapes", "experts", "logits")
PORTABLE = "-portable"
FIXABLE = ("batch_size", "sequence_length")
_INCLUDABLE = {"embeddings": "embedding", "head": "head"}


def style_of(target: Target) -> Style:
    """How a target stores what it gets.

    Raises:
        UsageError: an unknown option or value.
    """
    options = _options(target)
    scheme = (target.scheme or "").removesuffix(PORTABLE)
    standard = (target.scheme or "").endswith(PORTABLE) or scheme in (DYNAMIC, STATIC)
    portable = standard or options.get("profile") == "portable"
    if portable and "experts" in options:
        raise UsageError("experts: qmoe is ONNX Runtime's own operator", hint="leave `portable` out, or `experts`")
    level, one_node, last = int(options.get("accuracy_level", 4)), "experts" in options, options.get("logits") == "last"
    return Style(portable, level, scheme == DYNAMIC, half=scheme == HALF, one_node=one_node, last=last)


def style_for(checkpoint: Checkpoint, target: Target) -> Style:
    """The same for one checkpoint: inputs of matrices are rounded in the graph as a pass has said.

    Raises:
        Unsupported: 8-bit activations of a matrix that the integer kernel does not take.
    """
    inputs = in_integers(checkpoint)
    style = dataclasses.replace(style_of(target), rounded=bool(inputs))
    for module, activations in inputs.items():
        if activations.scheme not in _WORDS:
            raise Unsupported(
                f"ONNX has no {activations.scheme} activations",
                tensor=module,
                hint=f"quantize with activations: {' or '.join(_WORDS)}",
            )
        weight = checkpoint.weights.get(f"{module}.weight")
        if weight is not None and not (isinstance(weight, Quantized) and by_channel(weight, style)):
            raise Unsupported(
                f"ONNX multiplies {activations.scheme} activations by symmetric 8-bit matrices of one scale a row only",
                tensor=f"{module}.weight",
                hint="layout: int8-channel, or leave `activations` out: accuracy level 4 rounds them by block",
            )
    return style


def layouts_of(checkpoint: Checkpoint, target: Target) -> dict[str, Layout | str]:
    """What a scheme wants of each tensor; empty without one. See the module docstring.

    Raises:
        UsageError: unknown scheme or option.
        Unsupported: a type that nothing computes in.
    """
    options = _options(target)
    if target.scheme is None:
        return {}
    scheme = target.scheme.removesuffix(PORTABLE)
    stored = {name: w for name, w in checkpoint.weights.items() if not isinstance(w, Alias)}
    if scheme in FLOATS:
        return dict.fromkeys(stored, FLOATS[scheme])
    if scheme == _NO_KERNELS:
        raise Unsupported(
            "ONNX Runtime's CPU has no bfloat16 kernels of MatMul, Attention and GroupQueryAttention",
            hint="bf16 stores weights so and computes in float32; fp16-compute computes in float16",
        )
    if scheme not in (*INTEGERS, DYNAMIC, STATIC):
        known = (*FLOATS, *INTEGERS, DYNAMIC, STATIC)
        raise UsageError(
            f"onnx has no scheme {target.scheme!r}", hint=f"known: {', '.join(known)}, each also with {PORTABLE}"
        )
    kinds = {"linear", *(_INCLUDABLE[word] for word in options.get("include", ()))}
    chosen = [i for i in checkpoint.infos().values() if i.rule.kind in kinds and i.name in stored]
    return {i.name: _layout(scheme, options, tuple(stored[i.name].shape)[-1]) for i in chosen}


def _layout(scheme: str, options: Mapping[str, Any], cols: int) -> Layout:
    """Groups of 32; of 16, or one a row, where rows are no multiple of that."""
    if "layout" in options:
        return parse_layout(str(options["layout"]))
    if scheme in (DYNAMIC, STATIC):
        return parse_layout("int8-channel")
    group = next((f"g{size}" for size in (32, 16) if cols % size == 0), "channel")
    return parse_layout(f"{scheme}-{group}")


def _options(target: Target) -> Mapping[str, Any]:
    allowed: dict[str, tuple[Any, ...]] = {
        "profile": ("portable", "ort"),
        "accuracy_level": (0, 1, 4),
        "folder": ("onnx",),
        "experts": ("qmoe",),
        "logits": ("last", "all"),
    }
    for key, value in target.options.items():
        if key not in (*OPTIONS, "solver"):
            raise UsageError(f"onnx has no option {key!r}", hint=f"known: {', '.join(OPTIONS)}")
        if key in allowed and value not in allowed[key]:
            raise UsageError(f"onnx option {key} = {value!r}", hint=f"allowed: {', '.join(map(str, allowed[key]))}")
    unknown = [word for word in target.options.get("include", ()) if word not in _INCLUDABLE]
    if unknown:
        raise UsageError(f"include knows no {unknown[0]!r}", hint=f"known: {', '.join(_INCLUDABLE)}")
    for axis, size in dict(target.options.get("shapes", {})).items():
        if axis not in FIXABLE or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"onnx option shapes: {axis} = {size!r}", hint=f"axes: {', '.join(FIXABLE)}, each a number from 1"
            )
    return target.options


def fixed_shapes(checkpoint: Checkpoint, target: Target) -> dict[str, int]:
    """Axes that the recipe fixes, by name; empty for a graph that takes any size.

    Raises:
        Unsupported: for a decoder, whose cache grows with every token, or a length that the model has no positions for.
    """
    sizes = dict(_options(target).get("shapes", {}))
    if sizes and checkpoint.architecture.task in (*DECODER_TASKS, SEQ2SEQ):
        raise Unsupported(
            "fixed shapes are for encoders and images: a decoder's cache grows with every token",
            hint="leave `shapes` out; a session may fix an axis with add_free_dimension_override_by_name",
        )
    context = int(checkpoint.hyper.get("context", 0))
    if context < int(sizes.get("sequence_length", 0)):
        raise Unsupported(f"sequence_length = {sizes['sequence_length']}: this model has {context} positions")
    return sizes
