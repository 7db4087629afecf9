"""Distillation: a student learns from a teacher's distributions, its inner states, or the text it writes.

1. The teacher is the input `teacher`, else the checkpoint that the pass is given; the student is cut from the latter
   (`student.py`). So `every: 2` twice in a recipe is a chain teacher -> assistant -> student (arXiv:1902.03393).
2. White box: `alpha`, `temperature`, `features` (`teaching.py`). Black box: `alpha: 0` and text of the teacher's, all
   of it where no text is given, else `written` tokens beside it; or the input `logprobs`, a file of stored
   log-probabilities (`tightship logprobs`), whose tokens are then the text.
3. What earlier passes made of the student is kept as in `recover`: zeros, grids, factors, ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tightship.checkpoint import Checkpoint
from tightship.errors import UsageError
from tightship.modelview import ModelView
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.lessons import Batch, lessons
from tightship.passes.logprobs import LogProbs
from tightship.passes.objectives import Grading, mean_over, own_loss
from tightship.passes.student import make_student
from tightship.passes.teaching import FEATURES, Features, LayerMap, soft_loss, stored_loss
from tightship.passes.trainee import Trainee, every_leaf
from tightship.passes.training import Training, fit
from tightship.weights import Alias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Distill(Training, Pass):
    """See the module, and `Training` for the options of the loop.

    Attributes:
        alpha: share of the soft loss; the rest is the text's own.
        features: weights of `hidden` and `attention`; `map` says which block learns from which.
        written: tokens of text that the teacher writes, beside the given text.
    """

    name: ClassVar[str] = "distill"
    needs: ClassVar[Needs] = "model"
    paths: ClassVar[frozenset[str]] = frozenset({"student"})

    alpha: float = 0.5
    temperature: float = 2.0
    student: str | Mapping[str, Any] | None = None
    features: Mapping[str, float] = field(default_factory=dict)
    map: tuple[int, ...] | None = None
    written: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or self.written < 0:
            raise UsageError("distill: alpha is a share, temperature is above 0, written a count of tokens")
        unknown = sorted(set(self.features) - set(FEATURES))
        if unknown:
            raise UsageError(f"distill: feature {unknown[0]!r} is unknown; features: {', '.join(FEATURES)}")

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.student is None else frozenset({"structure"})

    @property
    def destroys(self) -> frozenset[str]:  # type: ignore[override]
        """A student of another config is a new model."""
        cut = isinstance(self.student, Mapping) and "sizes" not in self.student
        return frozenset() if self.student is None or cut else frozenset({"mask", "grid", "factors", "ties"})

    @property
    def inputs(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(), frozenset({"teacher", "data", "logprobs"})

    def to_json(self) -> dict[str, Any]:
        """A config that is named by its file counts with its content."""
        said = super().to_json()
        if isinstance(self.student, str) and Path(self.student).is_file():
            said["with"]["student"] = Path(self.student).read_text(encoding="utf-8")
        return said

    def requires(self, checkpoint: Checkpoint) -> None:
        Grading(make_student(self.student, checkpoint, 0), 0, "cpu")

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return make_student(self.student, checkpoint, 0)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        student = make_student(self.student, checkpoint, run.seed)
        given = run.inputs.get("teacher", checkpoint)
        stored = _stored(run, self)
        teacher = None if stored is not None and "teacher" not in run.inputs else given
        if teacher is not None:
            _check_vocabulary(student, teacher)
        reader = student if run.texts or "data" in run.inputs else given  # who writes the text where there is none
        text = stored.lessons(self, run.seed) if stored is not None else lessons(reader, run, self)
        if self.written and stored is not None:
            raise UsageError("distill: `written` has no stored log-probabilities", hint="leave out one of the two")
        if self.written:
            text = text.and_more(lessons(teacher or given, run, replace(self, tokens=self.written), written=True))
        pupil = _Pupil(self, student, teacher, stored, run)
        figures = fit(
            pupil.tensors,
            lambda number: pupil.loss(text.batch(number)),
            self,
            text.steps,
            run,
            held_out=lambda: mean_over(text.exam(), pupil.measure),
        )
        run.report("student", {**figures, "parameters": _parameters(student), "teacher_parameters": _parameters(given)})
        return student.with_weights(pupil.trainee.weights())


class _Pupil:
    """A student in training, and all it is graded on."""

    def __init__(
        self, how: Distill, student: Checkpoint, teacher: Checkpoint | None, stored: LogProbs | None, run: Run
    ) -> None:
        self._how, self._stored = how, stored
        self.trainee = Trainee(student, every_leaf(student, run), run)
        self._grading = Grading(student, run.seed, run.device)
        self.tensors = dict(self.trainee.tensors)
        self._teacher = self._features = None
        if teacher is not None and (how.features or (how.alpha and stored is None)):
            self._teacher = ModelView(teacher, threads=run.threads, device=run.device).module().requires_grad_(False)
        if how.features:
            if teacher is None:
                raise UsageError("distill: features need the teacher itself", hint="inputs: {teacher: source}")
            layers = LayerMap.of(how.map, int(student.hyper["layers"]), int(teacher.hyper["layers"]))
            self._features = Features(how.features, layers, student, teacher, run)
            self.tensors |= {f"feature/{name}": tensor for name, tensor in self._features.tensors.items()}

    def loss(self, batch: Batch) -> torch.Tensor:
        """The whole loss of a micro-batch; see `teaching.py`."""
        import torch

        inputs = self._grading.inputs(batch)
        asked = self._features.asked if self._features else {}
        ours = self.trainee(**inputs, **asked)
        rows, targets = self._grading.rows(ours.logits, batch, labels=self._how.alpha < 1)
        total = torch.zeros((), device=rows.device)
        if self._how.alpha < 1:
            total = total + (1 - self._how.alpha) * torch.nn.functional.cross_entropy(rows, targets)
        theirs = None
        if self._teacher is not None:
            with torch.no_grad():
                theirs = self._teacher(**inputs, **asked)
        if self._how.alpha:
            total = total + self._how.alpha * self._soft(rows, batch, theirs)
        if self._features is not None:
            real = torch.from_numpy(batch.real).to(rows.device)
            total = total + self._features.loss(ours, theirs, real)
        return total

    def measure(self, batch: Batch) -> torch.Tensor:
        """What the student is measured by: the text alone; the teacher where the text has no labels."""
        if self._how.alpha == 1 and self.trainee.checkpoint.architecture.task == "text-classification":
            return self.loss(batch)
        return own_loss(self.trainee, self._grading, batch)

    def _soft(self, rows: torch.Tensor, batch: Batch, theirs: Any) -> torch.Tensor:
        if self._stored is not None:
            return stored_loss(rows, *self._stored.rows(batch, str(rows.device)), self._how.temperature)
        expected, _ = self._grading.rows(theirs.logits, batch, labels=False)
        return soft_loss(rows, expected, self._how.temperature)


def _stored(run: Run, how: Distill) -> LogProbs | None:
    given = run.inputs.get("logprobs")
    if given is None:
        return None
    if not isinstance(given, Path):
        raise UsageError("distill: the input `logprobs` is a .safetensors file", hint="tightship logprobs writes one")
    return LogProbs.read(given, how.temperature)


def _check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    ours, theirs = student.hyper.get("vocab"), teacher.hyper.get("vocab")
    if ours != theirs or student.architecture.task != teacher.architecture.task:
        raise UsageError(
            f"distill: a student for {student.architecture.task} with a vocabulary of {ours} cannot be compared with a "
            f"teacher for {teacher.architecture.task} with one of {theirs}",
            hint="teacher and student need one tokenizer and one task",
        )


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(w.shape) for w in checkpoint.weights.values() if not isinstance(w, Alias))
