"""Each layout's search with the importance of its input channels taken from a file. Data-free, streamed.

What llama-quantize does with `--imatrix`, bit by bit for GGML's layouts: a tensor that the file does not know is
rounded without importance, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tightship.checkpoint import Checkpoint
from tightship.passes.base import Needs, Run
from tightship.passes.imatrix import importance_of
from tightship.passes.quantize import Matrix, Quantize, Solver
from tightship.passes.quantize.rtn import lazily
from tightship.weights import Quantized


class ImportanceFile(Solver):
    """Solver `importance` where `imatrix` names a file."""

    needs: ClassVar[Needs] = "nothing"
    per_tensor: ClassVar[bool] = True

    def check_all(self, spec: Quantize, checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> None:
        super().check_all(spec, checkpoint, matrices)
        importance_of(checkpoint, matrices, str(spec.imatrix))

    def solve(
        self, spec: Quantize, checkpoint: Checkpoint, matrices: Mapping[str, Matrix], run: Run
    ) -> Mapping[str, Quantized]:
        known = importance_of(checkpoint, matrices, str(spec.imatrix))
        for name in matrices:
            if name not in known:
                run.report(name, {"solver": "rtn", "reason": "the importance matrix does not know this tensor"})
        return {name: lazily(name, matrix, known.get(name)) for name, matrix in matrices.items()}


SOLVER = ImportanceFile()
