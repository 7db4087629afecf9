"""Turn activations so that no channel stands out, folded into the weights: unmodified runtimes load the result.

| space  | what is turned                       | folded into                                                         |
|--------|--------------------------------------|---------------------------------------------------------------------|
| stream | the residual stream                  | embeddings and its readers and writers; gains go into the readers   |
| values | what attention sums up, head by head | value rows (and bias) and the columns of attention's output         |

1. `spaces` names them; without it every space that the family has is turned. A stream with a norm between embedding and
   first block, or behind what writes to it, cannot be turned (Gemma 2, BLOOM); naming it is then an error.
2. Where a norm subtracts the mean (LayerNorm) the stream's turn keeps the vector of ones; its bias stays behind the
   norm, turned as well.
3. A head tied to the embedding becomes a tensor of its own, since only the head gets the last norm's gain: the file
   grows by that, and config.json says so.
4. Results are float32. Nothing is turned while the model runs: activations between up and down stay as they are.

QuaRot, arXiv:2404.00456 (stage 1a), and SpinQuant, arXiv:2405.16406 (R1 and R2). The mean: our own derivation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.expressions import holds
from tightship.passes.base import Pass, Run
from tightship.passes.folding import Fold, adds_one, folds_of, plain
from tightship.passes.rotation import Kind, Rotation
from tightship.weights import Alias, Dense

SPACES = ("stream", "values")
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """See the module. `kind`: `hadamard` with random signs, or a `random` orthogonal matrix."""

    name: ClassVar[str] = "rotate"
    destroys: ClassVar[frozenset[str]] = frozenset({"grid", "mask", "factors"})

    kind: Kind = "hadamard"
    spaces: tuple[Literal["stream", "values"], ...] = ()

    def requires(self, checkpoint: Checkpoint) -> None:
        self._turned(checkpoint, 0)

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        return self._turned(checkpoint, 0)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        for space in SPACES:
            reason = self._obstacle(checkpoint, space)
            run.report(space, {"turned": int(self._wants(checkpoint, space)), **({"reason": reason} if reason else {})})
        return self._turned(checkpoint, run.seed)

    def _turned(self, checkpoint: Checkpoint, seed: int) -> Checkpoint:
        """Everything but reading: each changed weight is computed when it is read."""
        found = {space: self._wants(checkpoint, space) for space in SPACES}
        if not any(found.values()):
            raise Unsupported(f"rotate: {self._obstacle(checkpoint, 'stream')}; {self._obstacle(checkpoint, 'values')}")
        if found["values"]:
            checkpoint = turn_values(checkpoint, self.kind, np.random.default_rng([seed, 1]))
        return turn_stream(checkpoint, self.kind, np.random.default_rng([seed, 0])) if found["stream"] else checkpoint

    def _wants(self, checkpoint: Checkpoint, space: str) -> bool:
        """Whether a space is to be turned.

        Raises:
            Unsupported: it is named, and cannot be.
        """
        reason = self._obstacle(checkpoint, space)
        if reason is not None and space in self.spaces:
            raise Unsupported(f"rotate: {reason}", hint="leave it out of `spaces`")
        return reason is None and (not self.spaces or space in self.spaces)

    def _obstacle(self, checkpoint: Checkpoint, space: str) -> str | None:
        """Why a space cannot be turned; None where it can."""
        family = checkpoint.architecture.family
        if space == "values":
            return (
                None if _value_folds(checkpoint) else f"nothing is known to lie between values and output of {family}"
            )
        stream = checkpoint.architecture.stream
        if stream is None or not holds(stream.get("when", {}), checkpoint.config):
            return f"the residual stream of this {family} model has norms whose gains cannot be folded"
        width = int(checkpoint.hyper["hidden"])
        ends = [i for i in checkpoint.infos().values() if i.rule.role in (*stream["inputs"], "output")]
        if any(i.shape[1] != width for i in ends) or not any(i.rule.role == "output" for i in ends):
            return f"the residual stream of this {family} model does not run from an embedding to a head"
        return None


def turn_values(checkpoint: Checkpoint, kind: Kind, rng: np.random.Generator) -> Checkpoint:
    """Every block's values turned, all heads of a block alike."""
    size = int(checkpoint.hyper["head_dim"])
    changes: dict[str, Change] = {}
    for fold in _value_folds(checkpoint):
        rotation = Rotation.draw(size, kind, rng)
        for name in (fold.producer, fold.bias):
            if name is not None:
                changes[name] = _rows_by_head(rotation, fold.rows)
        changes[fold.consumers[0]] = _columns_by_head(rotation)
    return _changed(checkpoint, changes)


def turn_stream(checkpoint: Checkpoint, kind: Kind, rng: np.random.Generator) -> Checkpoint:
    """The residual stream turned, norms left without gain."""
    stream: Mapping[str, Any] = checkpoint.architecture.stream or {}
    rotation = Rotation.draw(int(checkpoint.hyper["hidden"]), kind, rng, keeps_mean=stream["norm"] == "layer")
    checkpoint, head = _own_head(checkpoint)
    infos = checkpoint.infos()
    changes: dict[str, Change] = {}
    for name in checkpoint.weights:
        role = infos[name].rule.role if name in infos else None
        if role in stream["inputs"]:
            changes[name] = rotation.rows
        elif role in stream["writers"]:
            changes[name] = rotation.columns
    for fold in [*(fold for fold in folds_of(checkpoint) if fold.norm), _last_fold(checkpoint, stream["last"], head)]:
        changes |= _behind_norm(checkpoint, fold, rotation)
    return _changed(checkpoint, changes)


def _value_folds(checkpoint: Checkpoint) -> list[Fold]:
    infos = checkpoint.infos()
    return [f for f in folds_of(checkpoint) if not f.norm and infos[f.consumers[0]].rule.role == "attn_output"]


def _own_head(checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """The head's name, once it shares nothing with the embedding."""
    head = next(i.name for i in checkpoint.infos().values() if i.rule.role == "output")
    if isinstance(checkpoint.weights.get(head), Alias):
        own = checkpoint.resolve(head)
        config = {**checkpoint.config, "tie_word_embeddings": False}
        checkpoint = checkpoint.with_weights({head: own}).replace(config=config)
    return checkpoint, head


def _last_fold(checkpoint: Checkpoint, role: str, head: str) -> Fold:
    made = {i.rule.kind: i.name for i in checkpoint.infos().values() if i.rule.role == role}
    made = {kind: name for kind, name in made.items() if name in checkpoint.weights}
    whole = np.arange(int(checkpoint.hyper["hidden"]))
    return Fold(-1, True, made.get("norm"), made.get("bias"), whole, (head,), whole)


def _behind_norm(checkpoint: Checkpoint, fold: Fold, rotation: Rotation) -> dict[str, Change]:
    """The norm's gain moved into the matrices behind it, its bias divided by it, and all of them turned."""
    if fold.producer is None:
        return dict.fromkeys(fold.consumers, rotation.rows)
    name, one = fold.producer, float(adds_one(checkpoint.infos()[fold.producer]))

    def gain() -> np.ndarray:
        return checkpoint.resolve(name).value().astype(np.float64) + one

    def bias(values: np.ndarray) -> np.ndarray:
        if not gain().all():
            raise Unsupported("rotate: the norm has a bias behind a gain of 0, which cannot be folded", tensor=name)
        return rotation.rows(values / gain())

    changes: dict[str, Change] = dict.fromkeys(fold.consumers, lambda w: rotation.rows(w * gain()))
    if fold.bias is not None:
        changes[fold.bias] = bias
    return {**changes, name: lambda values: np.full_like(values, 1.0 - one)}


def _rows_by_head(rotation: Rotation, rows: np.ndarray) -> Change:
    """Turns the given rows of a matrix (or elements of a bias), a head's worth at a time."""

    def change(w: np.ndarray) -> np.ndarray:
        heads = w[rows].reshape(-1, len(rotation.signs), *w.shape[1:])
        w[rows] = np.stack([rotation.columns(head) for head in heads]).reshape(-1, *w.shape[1:])
        return w

    return change


def _columns_by_head(rotation: Rotation) -> Change:
    return lambda w: rotation.rows(w.reshape(len(w), -1, len(rotation.signs))).reshape(w.shape)


def _changed(checkpoint: Checkpoint, changes: Mapping[str, Change]) -> Checkpoint:
    """The checkpoint with `changes` made, in float64, when a weight is read; float32 afterwards.

    Raises:
        Unsupported: see `plain`.
    """
    weights = plain(checkpoint, changes)
    return checkpoint.with_weights({name: _later(weight, changes[name]) for name, weight in weights.items()})


def _later(weight: Dense, change: Change) -> Dense:
    return Dense(weight.shape, "f32", lambda: change(weight.value().astype(np.float64)).astype(np.float32))
