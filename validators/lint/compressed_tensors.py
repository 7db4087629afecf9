"""Rules about compressed-tensors sections and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tightship.validators.lint.artifact import Artifact
from tightship.validators.lint.rules import rule

Found = Iterator[tuple[str, str]]
_VLLM = "vLLM compressed_tensors.py@f14c4ffd"
_UTILS = "vLLM compressed_tensors/utils.py"
_MARLIN = "vLLM marlin_utils.py@007d5005"
_ROUNDED = ("int-quantized",)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SERVERS = "vllm sglang"


def quantized(artifact: Artifact) -> list[str]:
    """Modules that compressed-tensors quantizes in this file; none under another method."""
    if artifact.quantization.get("quant_method") != "compressed-tensors":
        return []
    return sorted({*artifact.modules("weight_packed"), *artifact.modules("weight_scale")})


def group_of(artifact: Artifact, module: str) -> str | None:
    """The first group that speaks of a module, as vLLM chooses: by name, expression or class."""
    for key, group in artifact.groups.items():
        for target in group.get("targets") or ():
            if target == module or (target == "Linear" and not module.endswith("lm_head")):
                return key
            if target.startswith("re:") and re.match(target[3:], module):
                return key
    return None


def fused(artifact: Artifact) -> Iterator[list[str]]:
    """Modules that vLLM makes one of."""
    modules = quantized(artifact)
    for parts in _FUSED:
        stems = sorted({m.rpartition(".")[0] for m in modules if m.endswith(parts)})
        for stem in stems:
            yield [f"{stem}.{part}" for part in parts]


def _inputs(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return group.get("input_activations") or {}


@rule("anchored-targets", "safetensors", _SERVERS, "quiet", f"{_UTILS}: re.match is anchored at the start alone")
def anchored_targets(artifact: Artifact) -> Found:
    """`re:.*mlp.gate` also takes gate_proj and gate_up_proj."""
    for key, group in artifact.groups.items():
        for target in group.get("targets") or ():
            if target.startswith("re:") and not target.endswith("$"):
                yield key, f"target {target} has no end anchor and may take more modules than meant"


@rule("every-module-targeted", "safetensors", "vllm sglang tgi", "loud", f"{_VLLM}: no target, built unquantized")
def every_module_targeted(artifact: Artifact) -> Found:
    """A packed tensor without a group has no parameter to go to; the class `Linear` does not take lm_head."""
    for module in quantized(artifact):
        if group_of(artifact, module) is None:
            yield module, "is quantized, and no target names it"


@rule(
    "group-format",
    "safetensors",
    "transformers",
    "quiet",
    "measured: transformers 5.23 guesses, and gives random weights",
)
def group_format(artifact: Artifact) -> Found:
    """The global format is ignored where a group's is missing."""
    for key, group in artifact.groups.items():
        if not group.get("format"):
            yield key, "has no `format` of its own"


@rule("fused-one-group", "safetensors", _SERVERS, "quiet", f"{_UTILS}, _match_fused_layer: the first shard's scheme")
def fused_one_group(artifact: Artifact) -> Found:
    """q/k/v and gate/up become one layer; other groups of equal shape are computed by the first one's scheme."""
    for modules in fused(artifact):
        keys = {group_of(artifact, m) for m in modules if f"{m}.weight_scale" in artifact.shapes}
        if len(keys) > 1:
            yield (
                modules[0],
                f"{', '.join(m.rpartition('.')[2] for m in modules)} lie in groups {sorted(map(str, keys))}",
            )


@rule("fused-all-or-none", "safetensors", _SERVERS, "loud", f"{_VLLM}, should_ignore_layer: different schemes found")
def fused_all_or_none(artifact: Artifact) -> Found:
    """Some of a fused layer's shards quantized, others not."""
    for modules in fused(artifact):
        missing = [
            m for m in modules if f"{m}.weight_scale" not in artifact.shapes and f"{m}.weight" in artifact.shapes
        ]
        if missing:
            yield missing[0], "is in float, and the modules it is fused with are quantized"


@rule("one-scale-a-shard", "safetensors", "vllm", "quiet", "vLLM fp8.py: requantize_with_max_scale over fused shards")
def one_scale_a_shard(artifact: Artifact) -> Found:
    """Per-tensor FP8 of q/k/v with different scales is rounded again to the largest."""
    for modules in fused(artifact):
        names = [f"{m}.weight_scale" for m in modules]
        if any(artifact.shapes.get(name) != (1,) for name in names):
            continue
        if len({float(artifact.read(name)[0]) for name in names}) > 1:
            yield modules[0], "the fused shards have different scales; weights are rounded again to the largest"


@rule(
    "fp4-one-divisor", "safetensors", "vllm", "quiet", "vLLM NVFP4: fused shards share one global scale (documentation)"
)
def fp4_one_divisor(artifact: Artifact) -> Found:
    """NVFP4's second scale of fused shards."""
    for modules in fused(artifact):
        names = [n for n in (f"{m}.weight_global_scale" for m in modules) if n in artifact.shapes]
        if len({float(artifact.read(name)[0]) for name in names}) > 1:
            yield modules[0], "the fused shards have different global scales"


@rule("plain-integers-need-inputs", "safetensors", "vllm", "loud", f"{_VLLM}: int-quantized without input_activations")
def plain_integers_need_inputs(artifact: Artifact) -> Found:
    """Weight-only integers are written pack-quantized."""
    for key, group in artifact.groups.items():
        integers = (group.get("weights") or {}).get("type") == "int"
        if integers and group.get("format") in ("int-quantized", "naive-quantized") and not _inputs(group):
            yield key, f"weight-only integers in the format {group['format']} have no scheme; use pack-quantized"


@rule("symmetric-only", "safetensors", "sglang", "loud", "SGLang compressed_tensors (2025): WNA16 must be symmetric")
def symmetric_only(artifact: Artifact) -> Found:
    """Asymmetric packed integers."""
    for key, group in artifact.groups.items():
        if group.get("format") == "pack-quantized" and not (group.get("weights") or {}).get("symmetric", True):
            yield key, "asymmetric weights"


@rule(
    "tgi-formats", "safetensors", "tgi", "loud", "TGI db931fcf layers/compressed_tensors/loader.py: unknown ones raise"
)
def tgi_formats(artifact: Artifact) -> Found:
    """4 and 8 bit packed, INT8 and FP8."""
    for key, group in artifact.groups.items():
        bits, kind = (group.get("weights") or {}).get("num_bits"), group.get("format")
        if bits not in (4, 8) or kind not in ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"):
            yield key, f"{bits} bits in the format {kind}"


@rule("trt-fp8-only", "safetensors", "trt", "loud", "TensorRT-LLM PR #10796: compressed-tensors of FP8 alone")
def trt_fp8_only(artifact: Artifact) -> Found:
    """Other strategies raise."""
    for key, group in artifact.groups.items():
        weights = group.get("weights") or {}
        if weights.get("type") != "float" or weights.get("num_bits") != 8 or weights.get("strategy") == "group":
            yield key, "only FP8 by tensor, channel or block is read"


@rule("kernel-sizes", "safetensors", _SERVERS, "note", f"{_MARLIN}: out % 64, in % 128, groups of -1, 32, 64, 128")
def kernel_sizes(artifact: Artifact) -> Found:
    """Recent versions pad; older ones refuse."""
    sizes = {
        (g.get("weights") or {}).get("group_size")
        for g in artifact.groups.values()
        if g.get("format") == "pack-quantized"
    }
    for size in sorted(s for s in sizes if s not in (None, -1, 32, 64, 128)):
        yield "group_size", f"groups of {size} have no Marlin kernel"
    for module in artifact.modules("weight_shape"):
        rows, cols = (int(n) for n in artifact.read(f"{module}.weight_shape"))
        if rows % 64 or cols % 128:
            yield module, f"{rows} x {cols} is no multiple of 64 x 128"


@rule("no-sparsity", "safetensors", "vllm", "loud", f"{_VLLM}: a sparsity_config with targets raises (PR #36799)")
def no_sparsity(artifact: Artifact) -> Found:
    """Sparse compressors are gone."""
    if (artifact.quantization.get("sparsity_config") or {}).get("targets"):
        yield "sparsity_config", "has targets"


@rule(
    "attention-groups",
    "safetensors",
    "vllm",
    "quiet",
    f"{_VLLM}: a group whose only target ends in Attention is skipped",
)
def attention_groups(artifact: Artifact) -> Found:
    """Such a group only warns."""
    for key, group in artifact.groups.items():
        targets = group.get("targets") or [""]
        if len(targets) == 1 and targets[0].endswith("Attention"):
            yield key, f"its only target {targets[0]} is skipped"


@rule(
    "cache-fp8", "safetensors", "vllm", "quiet", "vLLM kv_cache.py: other types ran as FP8; missing scales become 1.0"
)
def cache_fp8(artifact: Artifact) -> Found:
    """kv_cache_scheme: float, 8 bits, tensor or attn_head, with scales in the file."""
    scheme = artifact.quantization.get("kv_cache_scheme")
    if not scheme:
        return
    if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8) or scheme.get("strategy") not in (
        "tensor",
        "attn_head",
    ):
        yield "kv_cache_scheme", f"is {scheme.get('type')} {scheme.get('num_bits')} by {scheme.get('strategy')}"
    if not artifact.modules("k_scale"):
        yield "kv_cache_scheme", "there are no k_scale tensors: every scale becomes 1.0"


@rule(
    "fp8-hardware", "safetensors", "vllm", "note", f"{_VLLM}: below compute capability 8.9 weight-only, inputs ignored"
)
def fp8_hardware(artifact: Artifact) -> Found:
    """FP8 activations need Ada or Hopper."""
    if any(_inputs(g).get("type") == "float" for g in artifact.groups.values()):
        yield "input_activations", "on GPUs below 8.9 inputs stay in float"


@rule(
    "asymmetric-loading", "safetensors", "transformers", "note", "measured: transformers 5.23, compressed-tensors 0.20"
)
def asymmetric_loading(artifact: Artifact) -> Found:
    """Packed zero points load only with dequantize=True."""
    for key, group in artifact.groups.items():
        packed = group.get("format") == "pack-quantized"
        if packed and not (group.get("weights") or {}).get("symmetric", True):
            yield key, "load it with CompressedTensorsConfig(dequantize=True)"


@rule("several-layouts", "safetensors", "transformers", "quiet", "measured: dequantize=True decodes every group by one")
def several_layouts(artifact: Artifact) -> Found:
    """Several groups, decoded on loading."""
    if len(artifact.groups) > 1:
        yield "config_groups", "with dequantize=True all groups are decoded by one; load it plainly"
