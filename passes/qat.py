"""Quantization-aware training: weights and scales learn where they will be rounded to; block by block, then as a whole.

1. Every matrix of the blocks gets a grid by `solver`.
2. Block by block, weights and scales are trained so that the rounded block puts out what the original block does on the
   original's stream (`blockwise.py`), while its inputs come through the blocks rounded before it. Weights begin as the
   original's, after `gptq` as what its codes stand for.
3. End to end, codes stay and scales are trained on KL(original || quantized) of the next token. Layouts without scales
   of their own to train (K-quants and tables keep their grid) train their weights through the rounding instead.

The two steps are those of EfficientQAT (arXiv:2407.11062), with the original's distribution in place of the text. What
is exported are the very integers that training computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.modelview import ModelView
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.blockwise import reconstruct
from tightship.passes.fake_quant import fake_quantized
from tightship.passes.leaves import Leaf
from tightship.passes.lessons import Batch, Lessons, lessons
from tightship.passes.objectives import Grading, mean_over
from tightship.passes.quantize import Quantize
from tightship.passes.teaching import soft_loss
from tightship.passes.trainee import Trainee
from tightship.passes.training import Training, fit
from tightship.weights import Quantized

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Qat(Training, Pass):
    """See the module, and `Training` for the options of the loop. `rate` is the blocks', `scale_rate` the whole's."""

    name: ClassVar[str] = "qat"
    needs: ClassVar[Needs] = "calibration"
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})
    destroys: ClassVar[frozenset[str]] = frozenset({"grid"})

    layout: str = "int4"
    solver: Literal["rtn", "importance", "gptq"] = "importance"
    propagate: float | None = None  # of `gptq`
    phases: tuple[Literal["blocks", "model"], ...] = ("blocks", "model")
    rate: float = 1e-4
    scale_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.phases or self.scale_rate <= 0:
            raise UsageError("qat: `phases` names blocks, model or both; `scale_rate` is above 0")
        self._grid()

    @property
    def inputs(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(), frozenset({"data"})

    def requires(self, checkpoint: Checkpoint) -> None:
        self._grid().requires(checkpoint)
        if "model" in self.phases:
            Grading(checkpoint, 0, "cpu")

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return self._grid().outline(checkpoint)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        quiet = replace(run, scratch=None, report=lambda *_: None)
        rounded = self._grid().apply(checkpoint, quiet)
        text = lessons(checkpoint, run, self)
        if "blocks" in self.phases:
            start = rounded if self.solver == "gptq" else checkpoint  # GPTQ's codes are not the nearest ones
            found = reconstruct(rounded, checkpoint, text, self, run, leaves=_leaves_from(start, codes=True))
            rounded = rounded.with_weights(found)
        return self._end_to_end(checkpoint, rounded, text, run) if "model" in self.phases else rounded

    def _grid(self) -> Quantize:
        return Quantize(solver=self.solver, layout=self.layout, propagate=self.propagate)

    def _end_to_end(self, original: Checkpoint, rounded: Checkpoint, text: Lessons, run: Run) -> Checkpoint:
        leaves = _leaves_from(rounded, codes=False)(rounded, run, lambda _: True)
        trainee = Trainee(rounded, leaves, run)
        teacher = ModelView(original, threads=run.threads, device=run.device).module().requires_grad_(False)
        grading = Grading(original, run.seed, run.device)

        def loss(batch: Batch) -> torch.Tensor:
            import torch

            shown = grading.inputs(batch)
            with torch.no_grad():
                wanted = grading.rows(teacher(**shown).logits, batch, labels=False)[0]
            return soft_loss(grading.rows(trainee(**shown).logits, batch, labels=False)[0], wanted, 1.0)

        figures = fit(
            trainee.tensors, lambda number: loss(text.batch(number)), replace(self, rate=self.scale_rate), text.steps,
            run, held_out=lambda: mean_over(text.exam(), loss), key="model",
        )  # fmt: skip
        run.report("model", figures)
        return rounded.with_weights(trainee.weights())


def _leaves_from(
    start: Checkpoint, *, codes: bool
) -> Callable[[Checkpoint, Run, Callable[[str], bool]], dict[str, Leaf]]:
    """Makes leaves of a rounded checkpoint's matrices, with the weights of `start`."""

    def leaves(rounded: Checkpoint, run: Run, wanted: Callable[[str], bool]) -> dict[str, Leaf]:
        found: dict[str, Leaf] = {}
        for info in rounded.linears():
            stored = rounded.weights[info.name]
            if wanted(info.name) and isinstance(stored, Quantized):
                w = np.array(start.resolve(info.name).value(), np.float32)
                found[info.name] = fake_quantized(stored, w, run.device, codes=codes)
        return found

    return leaves
