"""Rules about ONNX directories: onnxruntime-genai, and TensorRT's parser."""

from __future__ import annotations

from collections.abc import Iterator

from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import rule

Found = Iterator[tuple[str, str]]
_GENAI = "onnxruntime-genai a0c04eb1 src/config.cpp"
_TRT = "onnx-tensorrt 96e7811 onnxOpImporters.cpp::QuantDequantLinearHelper (10.1)"
_UINT8 = 2


@rule("genai-config", "onnx", "genai", "loud", f"{_GENAI}: type, context_length, vocab_size, decoder.filename")
def genai_config(artifact: Artifact) -> Found:
    """What the loader demands."""
    model = artifact.json("genai_config.json").get("model")
    if model is None:
        yield "genai_config.json", "is missing"
        return
    for key in ("type", "context_length", "vocab_size"):
        if not model.get(key):
            yield f"model.{key}", "is missing"
    name = (model.get("decoder") or {}).get("filename")
    if not name or not (artifact.directory / name).is_file():
        yield "model.decoder.filename", f"names {name!r}, which is not here"


@rule("genai-eos", "onnx", "genai", "quiet", "onnxruntime-genai a0c04eb1 src/config.h: eos falls back to pad, pad to 0")
def genai_eos(artifact: Artifact) -> Found:
    """Generation then ends at token 0."""
    model = artifact.json("genai_config.json").get("model") or {}
    ends = model.get("eos_token_id", model.get("pad_token_id"))
    if ends is None:
        yield "model.eos_token_id", "is missing, and so is pad_token_id: generation ends at token 0"
    for end in ends if isinstance(ends, list) else [ends]:
        if isinstance(end, int) and end >= model.get("vocab_size", end + 1):
            yield "model.eos_token_id", f"{end} lies outside the vocabulary"


@rule("genai-bos", "onnx", "genai", "note", "onnxruntime-genai a0c04eb1 model.cpp::Tokenizer: add_special_tokens=false")
def genai_bos(artifact: Artifact) -> Found:
    """No BOS is ever added to raw text."""
    if artifact.json("tokenizer_config.json").get("add_bos_token"):
        yield "tokenizer_config.json", "raw prompts get no BOS; the chat template must hold it"


@rule("vendor-operators", "onnx", "trt", "loud", "onnx-tensorrt docs/operators.md: no com.microsoft operators")
def vendor_operators(artifact: Artifact) -> Found:
    """Use a -portable scheme."""
    nodes = [node for graph in artifact.graphs for node in graph.node]
    for kind in sorted({node.op_type for node in nodes if node.domain == "com.microsoft"}):
        yield kind, "is not in the parser's list; build with a -portable scheme"


@rule("zero-point-types", "onnx", "trt", "quiet", f"{_TRT}: UINT8 zero points are treated as INT8")
def zero_point_types(artifact: Artifact) -> Found:
    """Zero points of Q/DQ."""
    for graph in artifact.graphs:
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            linear = node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
            if linear and types.get(node.input[2]) == _UINT8:
                yield node.input[2], "an UINT8 zero point is read as INT8"


@rule("axis-said", "onnx", "trt", "quiet", f"{_TRT}: a missing axis is 0, ONNX says 1")
def axis_said(artifact: Artifact) -> Found:
    """Scales by channel."""
    for graph in artifact.graphs:
        sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        for node in graph.node:
            by_channel = node.op_type == "DequantizeLinear" and sizes.get(node.input[1])
            if by_channel and not any(attribute.name == "axis" for attribute in node.attribute):
                yield node.input[1], "has several scales and no axis"
