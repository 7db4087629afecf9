"""Round to nearest: each tensor's own search (`Layout.quantize`), nothing else. Data-free, streamed.

A tensor goes through in runs of whole rows, each read, widened to float32 and solved on one of the threads: the working
memory is the result and for every thread a few times `_CHUNK`, and the tensor as stored where its source reads whole
tensors only. Rows that share parameters stay in one run (`Layout.rows_together`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.formats.threads import in_order
from tightship.layout import Arrays, Layout
from tightship.passes.base import Needs, Run
from tightship.passes.masks import finite
from tightship.passes.quantize import Matrix, Quantize, Solver
from tightship.weights import Dense, Quantized

_CHUNK = 1 << 19  # elements of a run of rows; a search holds about ten float32 arrays of that size


class RoundToNearest(Solver):
    """Data-free."""

    needs: ClassVar[Needs] = "nothing"
    per_tensor: ClassVar[bool] = True

    def solve(
        self,
        spec: Quantize,  # noqa: ARG002
        checkpoint: Checkpoint,  # noqa: ARG002
        matrices: Mapping[str, Matrix],
        run: Run,  # noqa: ARG002
    ) -> Mapping[str, Quantized]:
        return {name: lazily(name, matrix, None) for name, matrix in matrices.items()}


SOLVER = RoundToNearest()


def lazily(name: str, matrix: Matrix, importance: np.ndarray | None) -> Quantized:
    """The matrix in its layout, solved when read. `importance` is (cols,) float32 or None."""

    def read() -> Arrays:
        return quantize(name, matrix.weight, matrix.layout, importance)

    return Quantized(matrix.layout, matrix.shape, read)


def quantize(name: str, w: Dense, layout: Layout, importance: np.ndarray | None = None) -> Arrays:
    """Codes and parameters of `w` (rows, cols), of any float dtype, read and solved in runs of rows.

    Raises:
        Unsupported: naming the tensor; a value that the layout's scales cannot reach.
        Malformed: naming the tensor; it holds NaN or Inf, or the search made one.
    """
    rows, cols = w.shape
    specs = layout.array_specs((rows, cols))
    arrays = {key: np.empty(spec.shape, spec.dtype) for key, spec in specs.items()}
    together = layout.rows_together or rows
    step = max(1, _CHUNK // max(cols * together, 1)) * together
    read = w.rows()

    def solve(first: int) -> None:
        part = finite(name, read(first, min(first + step, rows)).astype(np.float32, copy=False))
        try:
            found = layout.quantize(part, importance)
        except Unsupported as error:
            error.tensor = name
            raise
        for key, values in found.items():
            arrays[key][first : first + step] = values

    for _ in in_order(solve, range(0, rows, step)):
        pass
    for key, values in arrays.items():
        if values.dtype.kind not in "iub":
            finite(f"{name} ({key})", values.astype(np.float32, copy=False))
    return arrays
