"""Low-rank error compensation: what rounding took from a matrix, given back as far as a product of low rank can.

    Sum(rounded, left right)        left (out, r), right (r, in), in the element type of the source

The product is the one of rank r that leaves the least output error over the calibration tokens: the best approximation
of W - rounded in the metric of the moments (`factorize.py`, svd-llm's). Known from LQER (arXiv:2402.02446), with the
metric of EoRA (arXiv:2410.21271).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.passes.calibration import Figures, Moments
from tightship.passes.factorize import Metric, spectrum, whitening
from tightship.passes.hessian import DAMP, loss
from tightship.passes.quantize import Matrix, not_yet
from tightship.weights import Dense, Factored, Quantized, Sum, Weight


def compensated(matrix: Matrix, rounded: Quantized, moments: Moments, rank: int, device: str) -> tuple[Sum, Figures]:
    """The rounded matrix with its correction of `rank`, and its loss relative to the output energy."""
    w = matrix.weight.value().astype(np.float64)
    metric = whitening(moments.second, DAMP) if moments.tokens else Metric()
    factors = spectrum(w - rounded.value(), metric, device).factors(min(rank, *matrix.shape))
    target = dtype(matrix.weight.dtype).numpy
    left, right = (Dense.of(factor.astype(target)) for factor in factors)
    found = Sum(rounded, Factored(left, right))
    energy = loss(w, moments.second) or 1.0
    return found, {"rank": left.shape[1], "loss_compensated": loss(found.value() - w, moments.second) / energy}


def outlined(checkpoint: Checkpoint, matrices: Mapping[str, Matrix], rank: int) -> dict[str, Weight]:
    """The linears of the blocks as `compensated` will leave them, without data."""
    linears = {info.name for info in checkpoint.linears()}
    found: dict[str, Weight] = {}
    for name in matrices.keys() & linears:
        matrix = matrices[name]
        (out, cols), word = matrix.shape, matrix.weight.dtype
        kept = min(rank, out, cols)
        residual = Factored(Dense((out, kept), word, not_yet), Dense((kept, cols), word, not_yet))
        found[name] = Sum(Quantized(matrix.layout, matrix.shape, not_yet), residual)
    return found
