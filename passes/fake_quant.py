"""A matrix that is trained as what it will be once it is rounded: fake quantization with learned scales.

Affine layouts (value = (code - zero) * scale) train the weights w and one scale a group:

    code = zero + round(clamp(w / scale, lo - zero, hi - zero))

The gradient passes straight through the rounding (arXiv:1308.3432): d value / d scale is code - zero - w / scale within
the range and the limit beyond it, as in LSQ (arXiv:1902.08153, equation 3). A scale is trained through its logarithm
relative to the first one, so that it keeps its sign, and is used as it will be stored. The codes that are exported are
those that the last pass computed with.

Every other layout keeps its grid, and only weights are trained (`leaves.Matrix`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tightship.dtypes import dtype
from tightship.formats.layouts.affine import Affine, round_up_significant
from tightship.passes.leaves import Leaf, Matrix
from tightship.weights import Quantized

if TYPE_CHECKING:
    import torch


def fake_quantized(stored: Quantized, w: np.ndarray, device: str, *, codes: bool) -> Leaf:
    """A leaf on the grid of `stored`, begun with weights `w` (out, in) float32; without `codes` only scales move."""
    if isinstance(stored.layout, Affine):
        return FakeAffine(stored, stored.layout, w, device, codes=codes)
    leaf = Matrix(stored, device, hold_zeros=False)
    leaf.start_from(w)
    return leaf


class FakeAffine(Leaf):
    """See the module."""

    def __init__(self, stored: Quantized, layout: Affine, w: np.ndarray, device: str, *, codes: bool) -> None:
        import torch

        arrays = stored.read()
        self._layout = layout
        self._scale = torch.from_numpy(arrays["scale"].astype(np.float32)).to(device)
        zero = arrays.get("zero_point")
        self._zero = (
            torch.zeros_like(self._scale) if zero is None else torch.from_numpy(zero.astype(np.float32)).to(device)
        )
        self._params = {"zero_point": zero} if zero is not None else {}
        self._fixed = None if codes else torch.from_numpy(arrays["codes"].astype(np.float32)).to(device)
        self.tensors = {"scale": torch.zeros_like(self._scale).requires_grad_()}
        if codes:
            self.tensors["w"] = torch.from_numpy(np.array(w, np.float32)).to(device).requires_grad_()

    def value(self) -> torch.Tensor:
        scale = self._stored_scale()
        steps = self._steps(scale)
        return (steps * scale[..., None]).flatten(1)

    def weight(self) -> Quantized:
        import torch

        with torch.no_grad():
            scale = self._stored_scale()
            codes = (self._steps(scale) + self._zero[..., None]).flatten(1)
        stored = scale.cpu().numpy().astype(dtype(self._layout.scale_dtype).numpy)
        arrays = {"codes": codes.cpu().numpy().astype(np.int8), "scale": stored, **self._params}
        return Quantized.of(self._layout, arrays)

    def _steps(self, scale: torch.Tensor) -> torch.Tensor:
        """code - zero, (out, groups, group); whole numbers with the gradient of the clamped quotient."""
        import torch

        zero = self._zero[..., None]
        if self._fixed is not None:
            return self._fixed.unflatten(1, (scale.shape[1], -1)) - zero
        grouped = self.tensors["w"].unflatten(1, (scale.shape[1], -1))
        safe = torch.where(scale == 0, 1.0, scale)[..., None]
        exact = torch.where(scale[..., None] == 0, 0.0, grouped / safe)
        clamped = torch.minimum(torch.maximum(exact, self._layout.lo - zero), self._layout.hi - zero)
        return clamped + (clamped.round() - clamped).detach()

    def _stored_scale(self) -> torch.Tensor:
        """(out, groups) float32: the scale as the layout stores it, with the gradient of the free one."""
        import torch

        free = self._scale * self.tensors["scale"].exp()
        said = free.detach().cpu().numpy()
        if not self._layout.symmetric and self._layout.bits < 8:  # keeps the offset exact in float16
            said = round_up_significant(said, 11 - self._layout.bits)
        said = said.astype(dtype(self._layout.scale_dtype).numpy).astype(np.float32)
        return free + (torch.from_numpy(said).to(free.device) - free).detach()
