"""A narrower hidden stream: rotate it to its principal directions and leave out the least.

With Q (hidden, k) the first k eigenvectors of the covariance of what flows between blocks, every matrix that reads the
stream becomes W diag(g) Q (g the gain of the norm before it), every matrix that writes to it Q^T W, embeddings E Q. The
stream's energy stays, as far as Q spans it, but its mean is now taken over k channels, so gains become sqrt(hidden / k)
and the norms' epsilon is multiplied by hidden / k.

SliceGPT (arXiv:2401.15024) with one rotation for all blocks: rotations of their own for each block would need a matrix
on every residual connection, which no runtime has. Root-mean-square norms only: a LayerNorm's mean is not rotated with
the stream. A head that is tied to the embedding and follows a norm with a gain is untied, since the gain goes into it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.errors import Unsupported
from tightship.passes.base import Run
from tightship.passes.observed import passed_blocks
from tightship.passes.structure import resized, runs_through
from tightship.weights import Alias, Dense, Stored, Weight


def principal_directions(checkpoint: Checkpoint, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(hidden, hidden) float64 orthogonal columns and their shares of the energy, descending.

    Every token counts the same, whatever its norm, at every boundary between blocks: norms scale it to one anyway.
    """
    hidden = int(checkpoint.hyper["hidden"])
    total = np.zeros((hidden, hidden))
    for step in passed_blocks(checkpoint, run, "principal directions"):
        for entering, leaving in step.passages():
            for states in (entering, leaving) if step.index == 0 else (leaving,):
                rows = states.reshape(-1, hidden).double().cpu().numpy()
                rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
                total += rows.T @ rows
    energy, directions = np.linalg.eigh(total)
    return directions[:, ::-1].copy(), energy[::-1] / energy.sum()


def sliced(checkpoint: Checkpoint, rotation: np.ndarray) -> Checkpoint:
    """The checkpoint with `rotation` (hidden, k) float64, orthonormal columns, folded in.

    Raises:
        Unsupported: see `check_sliceable`.
    """
    check_sliceable(checkpoint)
    hidden, width = rotation.shape
    whole = _untied(checkpoint)
    gains = _gains(whole)
    gain = np.sqrt(hidden / width)
    changed: dict[str, Weight] = {}
    for name, info in whole.infos().items():
        weight = whole.weights.get(name)
        if weight is None or isinstance(weight, Alias) or not _on_stream(info):
            continue
        assert isinstance(weight, Dense)
        if info.rule.kind == "norm":
            changed[name] = Dense.of(np.full(width, gain).astype(dtype(weight.dtype).numpy))
        else:
            change = _rotated(info, rotation, gains.get(name))
            axes = zip(info.rule.shape, info.shape, strict=True)
            shape = tuple(width if axis == "hidden" else size for axis, size in axes)
            changed[name] = Dense(shape, weight.dtype, _lazily(weight, change))
    config = resized(checkpoint, {"hidden": width})
    for key in checkpoint.architecture.keys("norm_eps"):
        if key in config:
            config[key] = config[key] * hidden / width
    if whole is not checkpoint:
        config["tie_word_embeddings"] = False
    return whole.with_weights(changed).replace(config=config)


def check_sliceable(checkpoint: Checkpoint) -> None:
    """Refuse what one rotation of the stream would change.

    Raises:
        Unsupported: naming the tensor.
    """
    for name, info in checkpoint.infos().items():
        weight = checkpoint.weights.get(name)
        if weight is None or not any(runs_through(axis, "hidden") for axis in info.rule.shape):
            continue
        if not _on_stream(info):
            raise Unsupported(f"an axis of {info.rule.shape} mixes the hidden stream with other things", tensor=name)
        if not isinstance(weight, Dense | Alias):
            raise Unsupported("only dense tensors can be sliced", tensor=name, hint="slice before quantizing")


def _on_stream(info: TensorInfo) -> bool:
    return "hidden" in info.rule.shape


def _gains(checkpoint: Checkpoint) -> dict[str, Stored]:
    """On-disk name of what reads a norm -> the norm's gain, (hidden,).

    Raises:
        Unsupported: a norm of the stream that no fold group names.
    """
    infos = {name: info for name, info in checkpoint.infos().items() if name in checkpoint.weights}
    groups = {fold["norm"]: fold["linears"] for fold in checkpoint.architecture.folds if fold["norm"]}
    groups["output_norm"] = ["output"]
    found: dict[str, Stored] = {}
    for name, info in infos.items():
        if info.rule.kind != "norm" or not _on_stream(info):
            continue
        if info.rule.role not in groups:
            raise Unsupported("this norm's gain has nowhere to go, so the stream cannot be rotated", tensor=name)
        for reader, other in infos.items():
            if other.block == info.block and other.rule.role in groups[info.rule.role] and other.rule.kind != "bias":
                found[reader] = checkpoint.resolve(name)
    return found


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """A head that shares the embedding's data, apart, so that the last norm's gain can go into it."""
    for head, owner in checkpoint.architecture.ties:
        shared = isinstance(checkpoint.weights.get(head), Alias) or head not in checkpoint.weights
        norm = next((n for n, i in checkpoint.infos().items() if i.rule.role == "output_norm"), None)
        if shared and norm is not None and head in checkpoint.infos():
            config = {**checkpoint.config, "tie_word_embeddings": False}
            return checkpoint.with_weights({head: checkpoint.resolve(owner)}).replace(config=config)
    return checkpoint


def _rotated(info: TensorInfo, rotation: np.ndarray, gain: Stored | None) -> Callable[[np.ndarray], np.ndarray]:
    """What happens to a tensor's values (float64)."""

    def change(values: np.ndarray) -> np.ndarray:
        if info.rule.shape[-1] == "hidden" and values.ndim == 2:  # reads the stream, or is a table of it
            values = (values if gain is None else values * gain.value()) @ rotation
        if info.rule.shape[0] == "hidden":
            values = rotation.T @ values
        return values

    return change


def _lazily(weight: Dense, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        found: np.ndarray = change(weight.value().astype(np.float64)).astype(dtype(weight.dtype).numpy)
        return found

    return read
