"""Low rank in safetensors: factored modules in the model's own file, corrections as a PEFT adapter beside it.

| weight of module X | tensors                                                   | file                             |
|--------------------|-----------------------------------------------------------|----------------------------------|
| Factored, rank r   | X.right.weight (r, in), X.left.weight (out, r)            | factored.safetensors             |
| Sum: its base      | as without a residual                                     | model.safetensors                |
| Sum: its residual  | base_model.model.X.lora_A.weight (r, in), lora_B (out, r) | adapter/adapter_model.safetensors |

A factored module computes left(right(x)) + bias; config.json says `low_rank: {X: r}`. transformers has no such module
and would fill X.weight with random numbers, so the file has a name that it does not open. The adapter is LoRA as PEFT
saves it, with adapter_config.json beside it and alpha = r, so that X(x) + B A x comes out. Either factor may be
quantized, a residual may not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported
from tightship.exporters.ct_config import module
from tightship.formats.safetensors_file import SafetensorsWriter, Spec, file_size
from tightship.weights import Alias, Dense, Factored, Quantized, Stored, Sum, check_finite

STEM = "model"
FACTORED_STEM = "factored"
ADAPTER = "adapter"
_SIDES = ("right", "left")
_TASKS = {"text-generation": "CAUSAL_LM", "text-classification": "SEQ_CLS"}
_HINT = "with: {merge: true} for this target, or ONNX"


@dataclass(frozen=True)
class Part:
    """A matrix or vector of the model's own file. `owner` is the checkpoint's name for the weight that it belongs to.

    `info` is the table's entry, that of a factor with the factor's name and shape.
    """

    owner: str
    name: str
    weight: Dense | Quantized
    info: TensorInfo | None


def parts(checkpoint: Checkpoint) -> list[Part]:
    """What the model's file stores, in the order of the checkpoint; tensors that config.json ties are stored once.

    Raises:
        Unsupported: low rank where transformers has no module that could hold it.
    """
    infos = checkpoint.infos()
    borrowers = {borrower for borrower, _ in checkpoint.architecture.ties}
    found: list[Part] = []
    for name in checkpoint.weights:
        if name in borrowers and isinstance(checkpoint.weights[name], Alias):
            continue  # transformers ties it by itself; what blocks share it does not know, so each gets a copy
        weight, info = checkpoint.resolve(name), infos.get(name)
        if isinstance(weight, Factored | Sum):
            _check(checkpoint, name, weight, info)
        if isinstance(weight, Factored):
            found += [_factor(name, side, getattr(weight, side), info) for side in _SIDES]
        else:
            found.append(Part(name, name, _plain(weight.base if isinstance(weight, Sum) else weight), info))
    return found


def residuals(checkpoint: Checkpoint) -> dict[str, Factored]:
    """Module -> its correction."""
    weights = {name: checkpoint.resolve(name) for name in checkpoint.weights}
    return {module(name): weight.residual for name, weight in weights.items() if isinstance(weight, Sum)}


def ranks(checkpoint: Checkpoint) -> dict[str, int]:
    """Module -> rank, of factored ones: `low_rank` in config.json."""
    weights = {name: checkpoint.resolve(name) for name in checkpoint.weights}
    return {module(name): weight.rank for name, weight in weights.items() if isinstance(weight, Factored)}


def adapter_bytes(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> int:
    """Size of the adapter's file, 0 without corrections."""
    tensors = _adapter_tensors(checkpoint)
    return file_size(_specs(tensors), metadata) if tensors else 0


def write_adapter(checkpoint: Checkpoint, directory: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write the PEFT adapter with the corrections, if there are any; sha256 of its file by name.

    Raises:
        Malformed: NaN or infinity.
    """
    tensors = _adapter_tensors(checkpoint)
    if not tensors:
        return {}
    (directory / ADAPTER).mkdir()
    (directory / ADAPTER / "adapter_config.json").write_bytes(_adapter_config(checkpoint))
    name = f"{ADAPTER}/adapter_model.safetensors"
    with SafetensorsWriter(directory / name, _specs(tensors), metadata) as writer:
        for tensor in writer.order:
            writer.write(tensor, check_finite(tensor, tensors[tensor].read()))
    return {name: writer.sha256}


def _adapter_tensors(checkpoint: Checkpoint) -> dict[str, Dense]:
    found: dict[str, Dense] = {}
    for name, residual in residuals(checkpoint).items():
        for side, factor in (("A", residual.right), ("B", residual.left)):
            if not isinstance(factor, Dense):
                raise Unsupported("PEFT has no quantized factors", tensor=f"{name}.weight")
            found[f"base_model.model.{name}.lora_{side}.weight"] = factor
    return found


def _specs(tensors: Mapping[str, Dense]) -> dict[str, Spec]:
    return {name: Spec(dtype(weight.dtype), weight.shape) for name, weight in tensors.items()}


def _adapter_config(checkpoint: Checkpoint) -> bytes:
    """adapter_config.json; alpha equals the rank of every module, so that PEFT scales by 1."""
    widths = {name: residual.rank for name, residual in residuals(checkpoint).items()}
    most = max(widths.values())
    pattern = {name: rank for name, rank in widths.items() if rank != most}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(checkpoint.architecture.task),
        "base_model_name_or_path": "..",
        "target_modules": sorted(widths),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _factor(name: str, side: str, weight: Stored, info: TensorInfo | None) -> Part:
    stored = f"{module(name)}.{side}.weight"
    if info is not None:
        disk = f"{module(info.rule.disk)}.{side}.weight"
        rule = dataclasses.replace(info.rule, disk=disk, transposed=False)
        info = dataclasses.replace(info, name=stored, rule=rule, shape=tuple(weight.shape))
    return Part(name, stored, _plain(weight), info)


def _plain(weight: Stored) -> Dense | Quantized:
    assert isinstance(weight, Dense | Quantized)
    return weight


def _check(checkpoint: Checkpoint, name: str, weight: Factored | Sum, info: TensorInfo | None) -> None:
    if info is None or info.rule.kind != "linear" or not name.endswith(".weight"):
        raise Unsupported("low rank in safetensors is for linear modules", tensor=name, hint=_HINT)
    if info.expert is not None:
        raise Unsupported("transformers keeps experts in one stack, which has no factors", tensor=name, hint=_HINT)
    if isinstance(weight, Sum) and info.rule.transposed:
        raise Unsupported("it lies in a Conv1D; a correction is for torch.nn.Linear", tensor=name, hint=_HINT)
    if module(name) in checkpoint.activations:
        raise Unsupported("rounded activations and low rank do not go together here", tensor=name)
