"""What a training pass may change of a checkpoint, and what it must keep: one leaf a stored tensor.

A leaf holds tensors for the optimizer and says, differentiably, which matrix the model computes with. Whatever has to
survive training is part of that map, so that no step can break it:

| kept    | how                                                                                          |
|---------|----------------------------------------------------------------------------------------------|
| mask    | zeros of a matrix of the blocks are multiplied by 0                                          |
| grid    | values are rounded to the stored scales; the gradient passes straight through (arXiv:1308.3432) |
| factors | left and right are trained, each for itself                                                  |
| ties    | names that share data share one leaf                                                         |

With a rank, a matrix is W + B A and only A and B are trained (LoRA, arXiv:2106.09685); the sum is masked and rounded,
so that merging it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tightship.dtypes import dtype
from tightship.layout import AffineGrid, nearest
from tightship.weights import Dense, Factored, Quantized, Stored, Sum

if TYPE_CHECKING:
    import torch


class Leaf:
    """One stored tensor in training.

    Attributes:
        tensors: float32 leaves that require gradients, by a name of their own.
    """

    tensors: dict[str, torch.Tensor]

    def value(self) -> torch.Tensor:
        """What the model computes with, (out, in) or as stored, float32, differentiable."""
        raise NotImplementedError

    def weight(self) -> Stored:
        """What the checkpoint goes on with: `value()` in the stored form."""
        raise NotImplementedError


class Matrix(Leaf):
    """A dense or quantized tensor, trained whole or, with `rank`, through a low-rank change."""

    def __init__(
        self, stored: Dense | Quantized, device: str, *, hold_zeros: bool, rank: int | None = None, seed: int = 0
    ) -> None:
        import torch

        self._stored = stored
        start = torch.from_numpy(np.array(stored.value(), np.float32)).to(device)
        self._keep = (start != 0).float() if hold_zeros else None
        self._round = rounder(stored, device) if isinstance(stored, Quantized) else None
        if rank is None:
            self.tensors = {"w": start.requires_grad_()}
            return
        self._base = start
        rng = np.random.default_rng(seed)
        right = (rng.standard_normal((rank, start.shape[1])) / np.sqrt(start.shape[1])).astype(np.float32)
        self.tensors = {
            "a": torch.from_numpy(right).to(device).requires_grad_(),
            "b": torch.zeros(start.shape[0], rank, device=device).requires_grad_(),
        }

    def start_from(self, w: np.ndarray) -> None:
        """Begin with other weights (out, in) float32 on the same grid."""
        import torch

        with torch.no_grad():
            self.tensors["w"].copy_(torch.from_numpy(w))

    def value(self) -> torch.Tensor:
        w = self._free()
        if self._round is not None:
            w = w + (self._round(w.detach()) - w.detach())
        return w if self._keep is None else w * self._keep

    def weight(self) -> Stored:
        w = self._free().detach()
        if self._keep is not None:
            w = w * self._keep
        found = w.cpu().numpy()
        if isinstance(self._stored, Dense):
            return Dense.of(found.astype(dtype(self._stored.dtype).numpy))
        params = {key: array for key, array in self._stored.read().items() if key != "codes"}
        codes = nearest(self._stored.layout.grid(params), found)
        return Quantized.of(self._stored.layout, {"codes": codes, **params})

    def _free(self) -> torch.Tensor:
        """The matrix before it is masked and rounded."""
        if "w" in self.tensors:
            return self.tensors["w"]
        return self._base + self.tensors["b"] @ self.tensors["a"]


class Product(Leaf):
    """A `Factored` weight: each factor is a leaf."""

    def __init__(self, left: Leaf, right: Leaf) -> None:
        self._left, self._right = left, right
        self.tensors = {
            f"{side}.{name}": tensor
            for side, leaf in (("left", left), ("right", right))
            for name, tensor in leaf.tensors.items()
        }

    def value(self) -> torch.Tensor:
        return self._left.value() @ self._right.value()

    def weight(self) -> Stored:
        return Factored(self._left.weight(), self._right.weight())  # type: ignore[arg-type]


class Corrected(Leaf):
    """A `Sum`: the base stays, its low-rank correction is trained."""

    def __init__(self, stored: Sum, residual: Product, device: str) -> None:
        import torch

        self._stored, self._residual = stored, residual
        self._base = torch.from_numpy(np.array(stored.base.value(), np.float32)).to(device)
        self.tensors = residual.tensors

    def value(self) -> torch.Tensor:
        return self._base + self._residual.value()

    def weight(self) -> Stored:
        return Sum(self._stored.base, self._residual.weight())  # type: ignore[arg-type]


def rounder(stored: Quantized, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds a float32 matrix to the nearest values of the scales that `stored` has, as `layout.nearest` does."""
    import torch

    grid = stored.layout.grid(stored.read())
    scale = torch.from_numpy(np.array(np.broadcast_to(grid.scale, stored.shape), np.float32)).to(device)
    if isinstance(grid, AffineGrid):
        offset = torch.from_numpy(np.array(np.broadcast_to(grid.offset, stored.shape), np.float32)).to(device)
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        return lambda w: ((w - offset) * inverse).round().clamp(grid.lo, grid.hi) * scale + offset
    table = torch.from_numpy(np.asarray(grid.table, np.float32)).to(device)
    return lambda w: scale * table[(w[..., None] - scale[..., None] * table).abs().argmin(dim=-1)]


def leaf_of(stored: Stored, device: str, *, hold_zeros: bool, rank: int | None = None, seed: int = 0) -> Leaf:
    """The leaf of a stored tensor. `rank` asks for a low-rank change of a dense or quantized matrix."""
    if isinstance(stored, Sum):
        return Corrected(stored, _product(stored.residual, device), device)
    if isinstance(stored, Factored):
        return _product(stored, device)
    return Matrix(stored, device, hold_zeros=hold_zeros, rank=rank, seed=seed)


def _product(stored: Factored, device: str) -> Product:
    return Product(*(Matrix(part, device, hold_zeros=False) for part in (stored.left, stored.right)))
