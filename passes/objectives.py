"""What a model is graded on: which rows of its logits, against which targets; and the loss of its own training.

| task                | rows                                              | targets         |
|---------------------|---------------------------------------------------|-----------------|
| text-generation     | every position that has a next token              | the next token  |
| fill-mask           | a seeded 15 % of the positions, shown as the mask | the token there |
| text-classification | one a text                                        | its label       |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.passes.lessons import Batch
from tightship.passes.trainee import Trainee

if TYPE_CHECKING:
    import torch

MASKED = 0.15


@dataclass(frozen=True)
class Grading:
    """How the outputs of a model of `checkpoint`'s kind are graded.

    Raises:
        Unsupported: the task has no loss of its own.
    """

    checkpoint: Checkpoint
    seed: int
    device: str

    def __post_init__(self) -> None:
        task = self.checkpoint.architecture.task
        if task not in ("text-generation", "fill-mask", "text-classification"):
            raise Unsupported(
                f"a {self.checkpoint.architecture.family} model for {task} has no loss of its own to train with",
                hint="text generation, masked words and classification can be trained",
            )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is shown: the batch, for masked language models with some tokens hidden."""
        given = batch.inputs(self.device)
        if self.checkpoint.architecture.task == "fill-mask":
            given["input_ids"] = given["input_ids"].masked_fill(self._hidden(batch), mask_token(self.checkpoint))
        return given

    def rows(self, logits: torch.Tensor, batch: Batch, *, labels: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The graded rows (n, classes), float32, and their targets (n,); a classifier's are empty without `labels`.

        Raises:
            Unsupported: a classifier's batch has no labels.
        """
        import torch

        task = self.checkpoint.architecture.task
        ids = torch.from_numpy(batch.ids).to(self.device)
        if task == "fill-mask":
            hidden = self._hidden(batch)
            return logits[hidden].float(), ids[hidden]
        if task == "text-classification":
            if not labels:
                return logits.float(), ids[:0, 0]
            if batch.labels is None:
                raise Unsupported("a classifier is trained on labels", hint="JSON lines with `text` and `label`")
            return logits.float(), torch.from_numpy(batch.labels).to(self.device)
        real = torch.from_numpy(batch.real[:, 1:]).to(self.device)
        return logits[:, :-1][real].float(), ids[:, 1:][real]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        import torch

        rng = np.random.default_rng([self.seed, 1, batch.number % (1 << 32)])
        return torch.from_numpy(hidden_tokens(batch.real, rng)).to(self.device)


def own_loss(trainee: Trainee, grading: Grading, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the graded rows, in nats."""
    import torch

    logits, targets = grading.rows(trainee(**grading.inputs(batch)).logits, batch)
    return torch.nn.functional.cross_entropy(logits, targets)


def mean_over(batches: Sequence[Batch], loss: Any) -> float:
    """Mean of `loss(batch)` weighted by the tokens of each batch, without gradients."""
    import torch

    with torch.no_grad():
        weighted = [(float(loss(batch)), int(batch.real.sum())) for batch in batches]
    return sum(value * count for value, count in weighted) / max(sum(count for _, count in weighted), 1)


def hidden_tokens(real: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which of the `real` positions (rows, length) a masked language model has to guess: 15 %, at least one a row."""
    hidden = (rng.random(real.shape) < MASKED) & real
    hidden[np.arange(len(real)), real.sum(axis=1) // 2] = True
    return hidden


def mask_token(checkpoint: Checkpoint) -> int:
    """The id of the mask token.

    Raises:
        Unsupported: the tokenizer has none.
    """
    from tokenizers import Tokenizer

    raw = checkpoint.files.get("tokenizer.json")
    for word in ("[MASK]", "<mask>"):
        found = Tokenizer.from_buffer(raw).token_to_id(word) if raw is not None else None
        if found is not None:
            return int(found)
    raise Unsupported("the tokenizer has no mask token ([MASK] or <mask>)")
