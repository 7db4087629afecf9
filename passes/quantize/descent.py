"""Coordinate descent on codes: each column in turn takes the values that are best given all others.

With D the error of the matrix and S its (damped) moments, G = D S says how the loss tr(D S D^T) changes. The best value
for column j, all others fixed, is w_j's present value - G_j / S_jj; rounded to the grid, it can only lower the loss.
After GPTQ, which never looks back at a column, one sweep takes some 5 to 15 % off its loss at 2 to 4 bits. Parameters
stay as they are. The idea is known from QuantEase (arXiv:2309.01885) and CDQuant (arXiv:2406.17542).

Arithmetic is float64.
"""

from __future__ import annotations

import numpy as np

from tightship.layout import Arrays, Layout
from tightship.passes.hessian import damped_tensor
from tightship.passes.quantize.columns import TOGETHER, Columns


def descend(
    arrays: Arrays, w: np.ndarray, second: np.ndarray, layout: Layout, *, damp: float, keep_zeros: bool,
    device: str = "cpu", sweeps: int = 1,
) -> Arrays:  # fmt: skip
    """`arrays` with codes improved by up to `sweeps` sweeps; fewer where nothing changes any more.

    `w` (rows, cols) float32 is the original, `second` (cols, cols) float64 its moments. With `keep_zeros`, weights
    that are 0.0 in `w` keep their code.
    """
    import torch

    params = {key: value for key, value in arrays.items() if key != "codes"}
    grid = Columns.of(layout.grid(params), w.shape, device)
    moments = damped_tensor(second, damp, device)
    # Transposed, (cols, rows), so that a column lies in one piece.
    values = torch.from_numpy(np.ascontiguousarray(layout.values(arrays).T)).to(device)
    codes = torch.from_numpy(arrays["codes"].T.astype(np.float64, order="C")).to(device)
    fixed = torch.from_numpy(np.ascontiguousarray(w.T == 0)).to(device) if keep_zeros else None
    slope = moments @ (values - torch.from_numpy(w.T.astype(np.float64, order="C")).to(device))
    for _ in range(sweeps):
        moved = False
        for first in range(0, w.shape[1], TOGETHER):
            run = slice(first, min(first + TOGETHER, w.shape[1]))
            kept = None if fixed is None else fixed[run]
            change = grid.descend(
                first, values[run], codes[run], slope=slope[run], moments=moments[run, run], fixed=kept
            )
            slope.addmm_(moments[:, run], change)
            moved = moved or bool(change.any())
        if not moved:
            break
    return {**arrays, "codes": np.ascontiguousarray(codes.cpu().numpy().T).astype(arrays["codes"].dtype)}
