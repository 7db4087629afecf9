"""Prune and quantize in one sweep: SparseGPT whose feedback carries both errors (`sparsegpt.prune_and_round`).

Pruning first and rounding afterwards makes good for each error apart; here every column that follows makes good for
what zeroing and rounding did together. Options are those of `prune`, with a `layout` that can say zero. Rounding may
make more weights zero than were asked for; the report counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.layout import Layout
from tightship.passes.calibration import Moments
from tightship.passes.prune import Prune, PruneMethod
from tightship.passes.prune_sparsegpt import SparseGpt
from tightship.passes.quantize import layout_of, not_yet
from tightship.passes.sparsegpt import prune_and_round
from tightship.weights import Quantized


@dataclass(frozen=True, kw_only=True)
class PruneQuantize(Prune):
    """See the module."""

    name: ClassVar[str] = "prune-quantize"
    makes: ClassVar[frozenset[str]] = frozenset({"mask", "grid"})

    method: str = "sparsegpt"
    layout: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "sparsegpt":
            raise UsageError(
                f"prune-quantize: only sparsegpt zeroes and rounds in one sweep, found {self.method}",
                hint="use prune, then quantize",
            )
        if self.looped:
            raise UsageError(
                "prune-quantize: one sweep has no steps, and a grid takes no recovery; use prune before it"
            )
        if not isinstance(layout_of(self.layout), Layout):
            raise UsageError(f"prune-quantize: {self.layout} is an element type, not a grid")

    @property
    def grid(self) -> Layout:
        """The layout."""
        found = layout_of(self.layout)
        assert isinstance(found, Layout)
        return found

    @property
    def solver(self) -> PruneMethod:
        return JointSparseGpt()

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        return {**data, "with": {**data["with"], "layout": self.grid.name}}

    def requires(self, checkpoint: Checkpoint) -> None:
        super().requires(checkpoint)
        for name, weight in self.tensors(checkpoint).items():
            if not self.grid.keeps_zero or self.grid.code_width > 1:
                raise Unsupported(
                    f"layout {self.grid.name} has no exact zero in every block, or codes that span columns",
                    tensor=name,
                    hint="int layouts, q8_0 and q6_k do",
                )
            if isinstance(weight, Quantized):
                raise Unsupported(f"lies on the grid of {weight.layout.name} already", tensor=name)
            try:
                self.grid.array_specs((weight.shape[0], weight.shape[1]))
            except Unsupported as error:
                raise Unsupported(error.message, tensor=name, hint=error.hint) from error

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        shapes = {name: (w.shape[0], w.shape[1]) for name, w in self.tensors(checkpoint).items()}
        return checkpoint.with_weights({n: Quantized(self.grid, shape, not_yet) for n, shape in shapes.items()})


class JointSparseGpt(SparseGpt):
    """SparseGPT that leaves weights on the grid of its spec. Searches and surveys see pruning alone."""

    def solved(self, spec: Prune, w: np.ndarray, moments: Moments, zeros: int, device: str) -> Quantized:
        assert isinstance(spec, PruneQuantize)
        swept = prune_and_round(w, moments.second, zeros, spec.grid, self.sweep(spec, device))
        return Quantized.of(spec.grid, swept[0])
