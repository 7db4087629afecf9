"""What a student is graded on beside the text: the teacher's distribution, its hidden states, its attention.

    L = alpha * L_soft + (1 - alpha) * L_hard + sum of weight * L_feature           (Hinton et al., arXiv:1503.02531)

- L_soft = T^2 * KL(softmax(t / T) || softmax(s / T)), mean over the graded rows, in nats. T^2 makes its gradient as
  large as L_hard's whatever T is (their section 2.1).
- from stored log-probabilities: the same over the k stored classes and one more that holds the rest of both. That is
  never above the whole divergence, and lies below it by the stored rest times the divergence within the rest.
- hidden states: mean squared difference over the teacher's mean square, after a learned matrix where the widths differ
  (TinyBERT, arXiv:1909.10351). Attention: the same of the probabilities, heads mixed by a learned matrix where their
  numbers differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.passes.base import Run

if TYPE_CHECKING:
    import torch

FEATURES = ("hidden", "attention")
_LEAST = 1e-12


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of logits (n, classes), mean over n."""
    import torch

    ours = torch.log_softmax(student / temperature, dim=-1)
    theirs = torch.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def stored_loss(student: torch.Tensor, classes: torch.Tensor, stored: torch.Tensor, temperature: float) -> torch.Tensor:
    """`soft_loss` from log-probabilities at this temperature: `stored` (n, k) of `classes` (n, k); the rest is one."""
    import torch

    ours = torch.log_softmax(student / temperature, dim=-1).gather(1, classes)
    theirs_left, ours_left = (_rest(values) for values in (stored, ours))
    known = (stored.exp() * (stored - ours)).sum(dim=1)
    rest = theirs_left * (theirs_left.clamp_min(_LEAST).log() - ours_left.clamp_min(_LEAST).log())
    return temperature**2 * (known + rest).mean()


def _rest(logarithms: torch.Tensor) -> torch.Tensor:
    """Probability that the stored classes leave, (n,), not below 0."""
    rest: torch.Tensor = (1 - logarithms.exp().sum(dim=1)).clamp_min(0)
    return rest


@dataclass(frozen=True)
class LayerMap:
    """Which of the teacher's blocks each of the student's blocks is compared with; entries are block numbers."""

    pairs: tuple[int, ...]

    @classmethod
    def of(cls, given: Sequence[int] | None, student: int, teacher: int) -> LayerMap:
        """The given map, or an even one: the last block learns from the last.

        Raises:
            UsageError: the map has not one block of the teacher for each block of the student.
        """
        pairs = tuple(given) if given is not None else tuple((i + 1) * teacher // student - 1 for i in range(student))
        if len(pairs) != student or not all(0 <= block < teacher for block in pairs):
            raise UsageError(
                f"distill: `map` needs one of the teacher's blocks 0 to {teacher - 1} for each of the student's "
                f"{student} blocks, found {list(pairs)}"
            )
        return cls(pairs)


class Features:
    """Compares hidden states and attention block by block. `tensors` are what it learns itself."""

    def __init__(
        self, weights: Mapping[str, float], layers: LayerMap, student: Checkpoint, teacher: Checkpoint, run: Run
    ) -> None:
        import torch

        self.weights = weights
        self._layers = layers
        self.tensors: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(run.seed)
        for word, key in (("hidden", "hidden"), ("attention", "heads")):
            ours, theirs = int(student.hyper[key]), int(teacher.hyper[key])
            if word in weights and ours != theirs:
                for block in range(len(layers.pairs)):
                    drawn = torch.randn(theirs, ours, generator=generator) / ours
                    self.tensors[f"{word}-{block}"] = drawn.to(run.device).requires_grad_()

    @property
    def asked(self) -> dict[str, bool]:
        """What the models have to put out for it."""
        words = {"hidden": "output_hidden_states", "attention": "output_attentions"}
        return {words[word]: True for word in self.weights}

    def loss(self, student: Any, teacher: Any, real: torch.Tensor) -> torch.Tensor:
        """Weighted sum of both models' outputs; `real` (rows, length) bool leaves out what was filled up."""
        import torch

        total = torch.zeros((), device=real.device)
        for block, other in enumerate(self._layers.pairs):
            if "hidden" in self.weights:
                ours = student.hidden_states[block + 1]
                matrix = self.tensors.get(f"hidden-{block}")
                ours = ours if matrix is None else ours @ matrix.T
                difference = _relative(ours[real], teacher.hidden_states[other + 1][real])
                total = total + self.weights["hidden"] * difference / len(self._layers.pairs)
            if "attention" in self.weights:
                ours = student.attentions[block]
                matrix = self.tensors.get(f"attention-{block}")
                ours = ours if matrix is None else torch.einsum("ts,bsqk->btqk", matrix, ours)
                rows = real[:, None, :, None]
                difference = _relative(ours * rows, teacher.attentions[other] * rows)
                total = total + self.weights["attention"] * difference / len(self._layers.pairs)
        return total


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(_LEAST)
