"""Rules about GPTQ, AWQ and fine-grained FP8 checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from tightship.formats.packings.gptq import unpack_gptq_zeros
from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import rule

Found = Iterator[tuple[str, str]]
_GPTQ = "vLLM auto_gptq.py@055e47c2"


def _is(artifact: Artifact, method: str) -> bool:
    return artifact.quantization.get("quant_method") == method


@rule("gptq-keys", "safetensors", "vllm sglang tgi", "loud", f"{_GPTQ}: bits, group_size, desc_act, sym are required")
def gptq_keys(artifact: Artifact) -> Found:
    """TGI fills in others: bits 4, group -1, sym false, desc_act false (utils/quantization.py)."""
    if _is(artifact, "gptq"):
        for key in ("bits", "group_size", "desc_act", "sym"):
            if key not in artifact.quantization:
                yield "quantization_config", f"lacks {key}"


@rule("gptq-kinds", "safetensors", "vllm", "loud", f"{_GPTQ}: only 4 and 8 bits, symmetric")
def gptq_kinds(artifact: Artifact) -> Found:
    """Older versions ran others through Exllama."""
    said = artifact.quantization
    if _is(artifact, "gptq") and (said.get("bits") not in (4, 8) or not said.get("sym")):
        yield "quantization_config", f"{said.get('bits')} bits, sym {said.get('sym')}"


@rule("gptq-zeros", "safetensors", "vllm sglang", "quiet", "vLLM marlin.py: qzeros of symmetric files are not read")
def gptq_zeros(artifact: Artifact) -> Found:
    """A file marked sym whose zero points are not the middle code is computed as if they were."""
    said = artifact.quantization
    if not (_is(artifact, "gptq") and said.get("sym")):
        return
    v2 = said.get("checkpoint_format") == "gptq_v2"
    for module in artifact.modules("qzeros"):
        zeros = artifact.read(f"{module}.qzeros")
        if unpack_gptq_zeros(zeros, said["bits"], artifact.shapes[f"{module}.scales"][1], v2=v2).any():
            yield module, "is marked sym, and its zero points are not the middle code"


@rule(
    "gptq-v2-zeros",
    "safetensors",
    "vllm",
    "quiet",
    "vLLM exllama.py: version 1 zero points, checkpoint_format not passed",
)
def gptq_v2_zeros(artifact: Artifact) -> Found:
    """Real zero points of version 2 are read as version 1."""
    said = artifact.quantization
    if _is(artifact, "gptq") and said.get("checkpoint_format") == "gptq_v2" and not said.get("sym"):
        yield "checkpoint_format", "the Exllama kernel reads zero points of version 1"


@rule("gptq-order", "safetensors", "trt", "loud", "TensorRT-LLM issues #2458, #3548: desc_act=false only")
def gptq_order(artifact: Artifact) -> Found:
    """Columns in the order of activations."""
    if _is(artifact, "gptq") and artifact.quantization.get("desc_act"):
        yield "desc_act", "is true"


@rule(
    "awq-kinds",
    "safetensors",
    "vllm sglang tgi",
    "loud",
    "vLLM auto_awq.py@0043d6b5: 4 bits; SGLang awq.py reads qzeros",
)
def awq_kinds(artifact: Artifact) -> Found:
    """Four bits, with zero points."""
    said = artifact.quantization
    if _is(artifact, "awq"):
        if said.get("bits", said.get("w_bit")) != 4:
            yield "bits", f"is {said.get('bits')}"
        if not said.get("zero_point"):
            yield "zero_point", "is not true"


@rule(
    "substring-modules",
    "safetensors",
    "vllm sglang",
    "quiet",
    "modules_to_not_convert is matched as a substring (awq.py)",
)
def substring_modules(artifact: Artifact) -> Found:
    """A skipped module's name inside a quantized one's leaves that in float too."""
    skipped = artifact.quantization.get("modules_to_not_convert") or []
    for module in artifact.modules("qweight"):
        hits = [name for name in skipped if name in module]
        if hits:
            yield module, f"is quantized, and its name holds {hits[0]}, which is to stay in float"


@rule("fp8-blocks", "safetensors", "vllm", "loud", "vLLM fp8.py: two numbers, dynamic, output partitions % block = 0")
def fp8_blocks(artifact: Artifact) -> Found:
    """Rows of merged layers must be whole blocks."""
    tile = artifact.quantization.get("weight_block_size")
    if not (_is(artifact, "fp8") and tile):
        return
    if artifact.quantization.get("activation_scheme") != "dynamic":
        yield "activation_scheme", "blocks need dynamic activations"
    for module in artifact.modules("weight_scale_inv"):
        rows = artifact.shapes[f"{module}.weight"][0]
        if rows % tile[0] and module.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            yield module, f"{rows} rows are no multiple of {tile[0]}"


@rule("own-packages", "safetensors", "transformers", "loud", "transformers 5.23 validate_environment of each quantizer")
def own_packages(artifact: Artifact) -> Found:
    """What must be installed to load the method."""
    needs = {"gptq": "gptqmodel", "awq": "gptqmodel", "fp8": "accelerate"}
    method = artifact.quantization.get("quant_method")
    import importlib.util

    if method in needs and importlib.util.find_spec(needs[method]) is None:
        yield "quant_method", f"{method} needs the package {needs[method]}"
