"""Parameters refitted to codes: each scale, minimum and zero point in turn becomes what is best given all else.

The search of a layout knows neither the codes that GPTQ chose nor that channels are correlated. With D the error of the
matrix, S its (damped) moments, G = D S, and p one stored entry, of which the values of its columns are a linear
function with slope t, the loss tr(D S D^T) changes by

    2 e (G t) + e^2 (t S t^T)        when p becomes p + e,

so that e = -(G t) / (t S t^T), brought to what can be stored, is best; it is taken where the loss falls. Blocks go from
left to right, one parameter after the other (`Layout.refittable`). Together with `descent` this is coordinate descent
on codes and parameters alike. A float16 step never changes sign nor becomes zero: codes would lose their meaning.

Arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tightship.layout import Arrays, Layout
from tightship.passes.hessian import damped_tensor

if TYPE_CHECKING:
    import torch


def refit(
    arrays: Arrays, w: np.ndarray, second: np.ndarray, layout: Layout, *, damp: float, keep_zeros: bool,
    device: str = "cpu",
) -> Arrays:  # fmt: skip
    """`arrays` with parameters refitted once, codes as they are; the damped loss never grows.

    `w` (rows, cols) float32 is the original, `second` (cols, cols) float64 its moments. With `keep_zeros`, no entry
    moves that the value of a weight that is 0.0 in `w` depends on.
    """
    import torch

    if not layout.refittable:
        return arrays
    moments = damped_tensor(second, damp, device)
    found = dict(arrays)
    job = _Job(layout, moments, torch.from_numpy(layout.values(found) - w).to(device) @ moments)
    for key in layout.refittable:
        slope = _slope(layout, found, key)
        movable = ~((w == 0) & (slope != 0)) if keep_zeros else np.ones_like(w, bool)
        found[key] = job.refitted(key, found[key], torch.from_numpy(slope).to(device), movable)
    return found


def _slope(layout: Layout, arrays: Arrays, key: str) -> np.ndarray:
    """(rows, cols) float64: how values change with the parameter."""
    one, none = (layout.values({**arrays, key: np.full_like(arrays[key], entry)}) for entry in (1, 0))
    return one - none


@dataclass
class _Job:
    """One matrix on its way; `gradient`, (rows, cols), is D S and follows every change."""

    layout: Layout
    moments: torch.Tensor
    gradient: torch.Tensor

    def refitted(self, key: str, entries: np.ndarray, slope: torch.Tensor, movable: np.ndarray) -> np.ndarray:
        """The new entries, (rows, blocks); an entry whose columns are not all `movable` stays."""
        import torch

        entries = entries.copy()
        width = slope.shape[1] // entries.shape[1]
        for block in range(entries.shape[1]):
            run = slice(block * width, (block + 1) * width)
            t, before = slope[:, run], entries[:, block]
            first = (self.gradient[:, run] * t).sum(dim=1).cpu().numpy()
            curve = ((t @ self.moments[run, run]) * t).sum(dim=1).cpu().numpy()
            step = np.divide(-first, curve, out=np.zeros_like(first), where=curve > 0)
            after = self.layout.stored(key, before.astype(np.float64) + step)
            change = after.astype(np.float64) - before.astype(np.float64)
            better = (change * (2 * first + change * curve) < 0) & movable[:, run].all(axis=1)
            if before.dtype.kind not in "iu":
                better &= np.sign(before) == np.sign(after)
            entries[better, block] = after[better]
            moved = torch.from_numpy(np.where(better, change, 0.0)).to(self.gradient.device)
            self.gradient.addmm_(moved[:, None] * t, self.moments[run])
        return entries
