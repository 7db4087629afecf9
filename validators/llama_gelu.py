"""The GELU that llama.cpp computes on CPUs: the tanh form, read from a table of float16.

`ggml_vec_gelu_f32`: x is rounded to float16, the function's float16 value at that point is the result; 0 below -10 and
x itself above 10. A model trained with the erf form differs from llama.cpp by this much, and not by an export error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def llama_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of float32 `x` of any shape, as llama.cpp's CPU backend computes it."""
    import torch

    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


@contextlib.contextmanager
def llama_gelus(module: Any) -> Iterator[None]:
    """Within this context every GELU activation of a transformers model is llama.cpp's."""
    import torch

    class LlamaGelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return llama_gelu(x)

    replaced = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if "gelu" in type(child).__name__.lower():
                replaced.append((parent, name, child))
                setattr(parent, name, LlamaGelu())
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
