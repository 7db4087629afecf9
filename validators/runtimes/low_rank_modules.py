"""Low rank in transformers: factored modules in place of linear ones, and LoRA beside them as PEFT computes it.

The artifact's layout is that of `exporters/safetensors_factors.py`; what is needed of it is read from its files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tightship.errors import Malformed


class LowRankLinear(torch.nn.Module):
    """left(right(x)) + bias: a linear module (out, in) of rank r, with (r, in) and (out, r) weights."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.right = torch.nn.Linear(inputs, rank, bias=False)
        self.left = torch.nn.Linear(rank, outputs, bias=False)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.left(self.right(x))
        return found if self.bias is None else found + self.bias


def factored(model: Any, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """`model` with factored modules where config.json's `low_rank` says so. `shapes` are of the tensors of the file.

    Raises:
        Malformed: the model has no such module, or the file no such factors.
    """
    for name, rank in ranks.items():
        try:
            old = model.get_submodule(name)
            (outputs, _), (_, inputs) = (shapes[f"{name}.{side}.weight"] for side in ("left", "right"))
        except (AttributeError, KeyError) as error:
            raise Malformed("low_rank in config.json names no such module", tensor=f"{name}.weight") from error
        model.set_submodule(name, LowRankLinear(inputs, outputs, rank, old.bias))
    return model


def with_adapter(model: Any, directory: Path) -> Any:
    """`model` whose modules add alpha / r * B A x, as PEFT does.

    Raises:
        Malformed: adapter_config.json does not fit the tensors, or the model has no such module.
    """
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model."
    found = {name.removeprefix(prefix).rpartition(".lora_")[0] for name in tensors}
    if found != set(config["target_modules"]) or len(tensors) != 2 * len(found):
        raise Malformed("adapter_config.json names other modules than the adapter has factors for")
    for name in sorted(found):
        a, b = (tensors[f"{prefix}{name}.lora_{side}.weight"].float() for side in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        if a.shape[0] != rank or b.shape[1] != rank:
            raise Malformed(f"the factors are of rank {a.shape[0]}, adapter_config.json says {rank}", tensor=name)
        scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank
        model.get_submodule(name).register_forward_hook(_Correction(a, b * scale))
    return model


class _Correction:
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._a, self._b = a, b

    def __call__(self, _module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return (output.float() + args[0].float() @ self._a.T @ self._b.T).to(output.dtype)
