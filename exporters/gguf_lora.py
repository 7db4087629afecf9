"""LoRA adapters as GGUF files that llama.cpp loads beside a model, `--lora FILE`: PEFT's, and our own corrections.

| in the file                    | what                                                                            |
|--------------------------------|---------------------------------------------------------------------------------|
| `general.type`, `adapter.type` | "adapter", "lora"                                                               |
| `general.architecture`         | that of the model                                                               |
| `adapter.lora.alpha`           | f32; llama.cpp adds alpha / rank * B A, the rank being B's columns; 0: B A      |
| tensor `NAME.lora_a`           | A, (rank, in)                                                                   |
| tensor `NAME.lora_b`           | B, (out, rank); rows in the order of the model's file                           |

What llama.cpp does not compute is refused: DoRA, biases, fully trained modules, embeddings, a scale that differs
between matrices. Rank-stabilised LoRA (alpha / sqrt(rank)) is said by another alpha. Definition: src/llama-adapter.cpp.

The residuals of `Sum` weights go into such a file too, residual.gguf. Factors are written in F32: llama.cpp would round
what it multiplies with narrower ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported, UsageError
from tightship.exporters.gguf_metadata import gguf_section
from tightship.exporters.gguf_tensors import FileTensor, chunks, file_order, row_order
from tightship.formats.gguf_file import Field
from tightship.formats.gguf_writer import TensorToWrite, WrittenGguf, file_bytes, write_gguf
from tightship.formats.safetensors_file import read_header
from tightship.opening import table_name
from tightship.untrusted import strict_json
from tightship.weights import Alias, Dense, Sum

ADAPTER = "adapter.gguf"
RESIDUAL = "residual.gguf"
NO_MODELS = (ADAPTER, RESIDUAL, "imatrix.gguf")  # GGUF files that lie beside the model
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_REFUSED = {
    "use_dora": "llama.cpp has no DoRA",
    "modules_to_save": "fully trained modules belong into the model",
    "alpha_pattern": "llama.cpp knows one alpha for all matrices",
    "lora_bias": "llama.cpp adds no bias of an adapter",
    "fan_in_fan_out": "transposed matrices are not mapped",
}
_Pair = dict[str, Dense]


def write_adapter(base: Checkpoint, source: Path, target: Path) -> WrittenGguf:
    """Write the PEFT adapter in the directory `source`, made for `base`, as a GGUF file.

    Raises:
        UsageError: no adapter_config.json or adapter_model.safetensors.
        Unsupported: something that llama.cpp does not compute; the message names it.
        Malformed: tensors that are no pairs of factors of this model's matrices.
    """
    config = _config(source)
    infos = base.infos()
    pairs = {table_name(f"{module}.weight", infos, base.architecture): pair for module, pair in _pairs(source).items()}
    ranks = {name: pair["A"].shape[0] for name, pair in pairs.items()}
    return write_gguf(target, _fields(base, _alpha(config, ranks)), _tensors(base, pairs))


def write_residual(checkpoint: Checkpoint, target: Path) -> WrittenGguf:
    """Write the residuals of every `Sum` as one adapter.

    Raises:
        Unsupported: as `residual_bytes`.
    """
    return write_gguf(target, _fields(checkpoint, 0.0), _tensors(checkpoint, _residuals(checkpoint)))


def residual_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each matrix's residual by on-disk name, and of the rest of the file under ""; empty where none is.

    Raises:
        Unsupported: a residual that llama.cpp does not compute.
    """
    pairs = _residuals(checkpoint)
    if not pairs:
        return {}
    task = checkpoint.architecture.task
    if task != "text-generation":
        raise Unsupported(
            f"corrections of low rank in GGUF are proven for models that write text, not for {task}",
            tensor=next(iter(pairs)),
            hint="leave out `compensate`, or choose ONNX or safetensors",
        )
    sizes = {name: 4 * sum(math.prod(factor.shape) for factor in pair.values()) for name, pair in pairs.items()}
    whole = file_bytes(_fields(checkpoint, 0.0), _tensors(checkpoint, pairs))
    return {**sizes, "": whole - sum(sizes.values())}


def _residuals(checkpoint: Checkpoint) -> dict[str, _Pair]:
    """On-disk name of a matrix -> the factors of its residual."""
    found: dict[str, _Pair] = {}
    for name in checkpoint.weights:
        weight = checkpoint.resolve(name)
        if isinstance(weight, Sum):
            left, right = weight.residual.left, weight.residual.right
            if not isinstance(left, Dense) or not isinstance(right, Dense):
                raise Unsupported("llama.cpp applies float factors alone; this residual is quantized", tensor=name)
            found[name] = {"A": right, "B": left}
    return found


def _fields(base: Checkpoint, alpha: float) -> dict[str, Field]:
    return {
        "general.architecture": Field("str", str(gguf_section(base)["arch"])),
        "general.type": Field("str", "adapter"),
        "adapter.type": Field("str", "lora"),
        "adapter.lora.alpha": Field("f32", alpha),
    }


def _tensors(base: Checkpoint, pairs: Mapping[str, _Pair]) -> list[TensorToWrite]:
    """The factors in the file's order. `pairs` are by on-disk name of the matrix."""
    infos = base.infos()
    tensors: list[FileTensor] = []
    for name, pair in pairs.items():
        info = infos.get(name)
        if info is None or name not in base.weights:
            raise Malformed("the adapter changes a matrix that the model does not have", tensor=name)
        _check(base, info, pair)
        stored = str(info.rule.gguf).format(i=info.block)
        factors = {"a": pair["A"], "b": _in_file_order(pair["B"], info, base)}
        tensors += [FileTensor(f"{stored}.lora_{side}", (info,), (factor,)) for side, factor in factors.items()]
    return [_f32(tensor) for tensor in sorted(tensors, key=lambda t: file_order(t.name))]


def _f32(tensor: FileTensor) -> TensorToWrite:
    return TensorToWrite(tensor.name, "F32", tensor.shape, lambda: chunks(tensor, "F32"))


def _config(source: Path) -> Mapping[str, Any]:
    path = source / "adapter_config.json"
    if not path.is_file() or not (source / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"{source.name} holds no adapter: adapter_config.json and adapter_model.safetensors are expected",
            hint="save the adapter with PEFT's save_pretrained (safetensors)",
        )
    config: Mapping[str, Any] = strict_json(path.read_bytes(), path.name)
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"{path.name}: only LoRA adapters go into GGUF, found {config.get('peft_type')!r}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise Unsupported(f"{path.name}: {key} is {config[key]!r}; {why}", hint="merge the adapter into the model")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{path.name}: trained biases ({config['bias']}) have no place in a GGUF adapter")
    return config


def _pairs(source: Path) -> dict[str, _Pair]:
    """Module -> its factors A and B."""
    header = read_header(source / "adapter_model.safetensors")
    pairs: dict[str, _Pair] = {}
    for name in header.entries:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise Unsupported("is no factor of a LoRA matrix", tensor=name, hint="merge the adapter into the model")
        pairs.setdefault(match["module"], {})[match["side"]] = header.dense(name)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"} or any(len(w.shape) != 2 for w in pair.values()):
            raise Malformed("both factors of a LoRA matrix are needed, two-dimensional", tensor=module)
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise Malformed(f"factors of shapes {pair['A'].shape} and {pair['B'].shape} do not meet", tensor=module)
    if not pairs:
        raise Malformed("the adapter holds no matrices")
    return pairs


def _check(base: Checkpoint, info: TensorInfo, pair: _Pair) -> None:
    if info.rule.gguf is None or info.expert is not None or info.rule.kind not in ("linear", "head"):
        raise Unsupported("llama.cpp applies no LoRA to this matrix", tensor=info.name)
    if isinstance(base.weights[info.name], Alias):
        raise Unsupported("an adapted head that is tied to the embedding has no tensor in GGUF", tensor=info.name)
    found = (pair["B"].shape[0], pair["A"].shape[1])
    if found != tuple(info.shape):
        raise Malformed(f"the factors make a matrix of {found}, the model has {tuple(info.shape)}", tensor=info.name)


def _in_file_order(b: Dense, info: TensorInfo, base: Checkpoint) -> Dense:
    """B with its rows where the exporter puts those of the matrix."""
    if info.rule.transform is None:
        return b
    order = row_order(info.rule.transform, b.shape[0], base.hyper)
    return Dense(b.shape, b.dtype, lambda: b.read()[order])


def _alpha(config: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    alpha = float(config["lora_alpha"]) if "lora_alpha" in config else 8.0  # PEFT's default
    if not config.get("use_rslora"):
        return alpha
    if len(set(ranks.values())) > 1:
        raise Unsupported("rank-stabilised LoRA of several ranks has no single alpha", hint="merge it into the model")
    return alpha * math.sqrt(next(iter(ranks.values())))
