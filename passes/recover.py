"""Recovery: train what earlier passes left, so that it gives back some of what they took.

| method    | what is trained                                             | against                               |
|-----------|-------------------------------------------------------------|---------------------------------------|
| full      | every tensor                                                | the text                              |
| norms     | norms and biases                                            | the text                              |
| lora      | a low-rank change of each matrix of the blocks, then merged | the text                              |
| blockwise | the tensors of one block at a time                          | the same block of the input `teacher` |

Zeros of the blocks' matrices, quantization grids, low-rank factors and shared tensors are kept (`leaves.py`).
Whole-model recovery against a teacher is `distill` without a `student`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import GateFailed, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.leaves import Leaf
from tightship.passes.lessons import lessons
from tightship.passes.objectives import Grading, mean_over, own_loss
from tightship.passes.trainee import Trainee, every_leaf
from tightship.passes.training import Training, fit
from tightship.weights import Alias, Dense, Quantized


@dataclass(frozen=True, kw_only=True)
class Recover(Training, Pass):
    """See the module, and `Training` for the options of the loop. `rank` is LoRA's."""

    name: ClassVar[str] = "recover"
    needs: ClassVar[Needs] = "model"

    method: Literal["full", "norms", "lora", "blockwise"] = "full"
    rank: int = 8

    @property
    def inputs(self) -> tuple[frozenset[str], frozenset[str]]:
        needed = {"teacher"} if self.method == "blockwise" else set()
        return frozenset(needed), frozenset(needed | {"data"})

    def requires(self, checkpoint: Checkpoint) -> None:
        if self.rank < 1:
            raise UsageError(f"recover: rank is at least 1, found {self.rank}")
        if self.method != "blockwise":
            Grading(checkpoint, 0, "cpu")

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        text = lessons(checkpoint, run, self)
        if self.method == "blockwise":
            from tightship.passes.blockwise import reconstruct

            return checkpoint.with_weights(reconstruct(checkpoint, run.inputs["teacher"], text, self, run))
        trainee = Trainee(checkpoint, self._leaves(checkpoint, run), run)
        grading = Grading(checkpoint, run.seed, run.device)
        figures = fit(
            trainee.tensors,
            lambda number: own_loss(trainee, grading, text.batch(number)),
            self,
            text.steps,
            run,
            held_out=lambda: mean_over(text.exam(), lambda batch: own_loss(trainee, grading, batch)),
        )
        run.report(self.method, figures)
        return checkpoint.with_weights(trainee.weights())

    def ensures(self, before: Checkpoint, after: Checkpoint) -> None:
        """Zeros of the blocks' matrices are still zero, and every weight has the form it had."""
        for info in before.linears():
            old, new = before.weights[info.name], after.weights[info.name]
            if type(old) is not type(new):
                raise GateFailed(f"recovery made {type(new).__name__} of {type(old).__name__}", tensor=info.name)
            if isinstance(old, Dense | Quantized) and not isinstance(new, Alias):
                revived = int(np.count_nonzero(new.value()[old.value() == 0]))
                if revived:
                    raise GateFailed(f"recovery revived {revived} pruned weights", tensor=info.name)

    def _leaves(self, checkpoint: Checkpoint, run: Run) -> dict[str, Leaf]:
        if self.method == "lora":
            return every_leaf(checkpoint, run, rank=self.rank)
        if self.method == "full":
            return every_leaf(checkpoint, run)
        infos = checkpoint.infos()
        small = {name for name, info in infos.items() if info.rule.kind in ("norm", "bias")}
        return every_leaf(checkpoint, run, small.__contains__)
