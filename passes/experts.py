"""Fewer experts: those that the router gives least stay out, or are averaged into their nearest neighbour.

For expert e of a block, over all calibration tokens,

    saliency_e = sum of its routing weight * root mean square of its output,

the router-weighted activity of REAP (arXiv:2510.13999, equation 5) with the root mean square of an expert's outputs in
place of each token's norm. Merging averages an expert that goes into the kept one whose router row is nearest by
cosine, both weighted by saliency (Li et al., arXiv:2310.01334, without aligning hidden units).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.blocks import BlockStep
from tightship.checkpoint import Checkpoint
from tightship.passes.base import Run
from tightship.passes.calibration import Moments
from tightship.passes.observed import observed_blocks
from tightship.passes.structure import Kept, cut, resized, runs_through
from tightship.weights import Dense, Weight


class RoutingWeights:
    """Sums what a router gives each expert; an observer.

    `rows` is the router's matrix (experts, hidden); `renormalized`: the shares of the chosen ones add up to 1.
    """

    def __init__(self, name: str, rows: np.ndarray, used: int, *, renormalized: bool) -> None:
        import torch

        self._name, self._used, self._renormalized = name, used, renormalized
        self._rows = torch.from_numpy(rows)
        self.total = np.zeros(len(rows))

    def __call__(self, names: tuple[str, ...], x: Any) -> None:
        import torch

        if self._name not in names:
            return  # a block may have further routers
        logits = x.reshape(-1, x.shape[-1]) @ self._rows.T.to(x.device)
        weights, chosen = torch.softmax(logits, dim=-1).topk(self._used, dim=-1)
        if self._renormalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self.total += np.bincount(
            chosen.cpu().numpy().reshape(-1), weights.cpu().numpy().reshape(-1), minlength=len(self.total)
        )


def saliencies(checkpoint: Checkpoint, run: Run) -> list[np.ndarray]:
    """(experts,) float64 of every block."""
    found = []
    outputs = {info.name for info in checkpoint.linears() if _puts_out(info)}
    for step, known in observed_blocks(checkpoint, run, "router statistics", outputs):
        found.append(_of_block(checkpoint, step, known))
        figures = {f"expert {e}": float(value) for e, value in enumerate(found[-1])}
        run.report(f"router of block {step.index}", figures)
    return found


def _of_block(checkpoint: Checkpoint, step: BlockStep, known: Mapping[str, Moments]) -> np.ndarray:
    router = router_of(checkpoint, step.index)
    rows = checkpoint.resolve(router.name).value()
    used = int(checkpoint.hyper["experts_used"])
    weights = RoutingWeights(router.name, rows, used, renormalized=renormalizes(checkpoint))
    step.observe_routers(weights)
    norms, infos = np.zeros(len(rows)), checkpoint.infos()
    for name, moments in known.items():
        w = step.read(name).astype(np.float64)
        norms[int(infos[name].expert or 0)] = np.sqrt(np.einsum("ij,jk,ik->", w, moments.second, w))
    return weights.total * norms


def renormalizes(checkpoint: Checkpoint) -> bool:
    """Whether the shares of a token's experts add up to 1: always in some families, by a config key in others."""
    word = checkpoint.architecture.prunable["experts"]
    return word == "always" or bool(checkpoint.config.get(word, False))


def router_of(checkpoint: Checkpoint, block: int) -> TensorInfo:
    """The matrix that chooses among the experts of a block."""
    return next(i for i in checkpoint.infos().values() if i.block == block and runs_through(i.rule.shape[0], "experts"))


def _puts_out(info: TensorInfo) -> bool:
    """Whether it is the linear that puts out an expert's result."""
    written, read = info.rule.shape[0], info.rule.shape[-1]
    return info.expert is not None and runs_through(written, "hidden") and not runs_through(read, "hidden")


def with_fewer_experts(checkpoint: Checkpoint, keep: int, run: Run, *, merge: bool) -> Checkpoint:
    """`keep` experts a block, renumbered in their order."""
    stay, merged = {}, dict[str, Weight]()
    for block, saliency in enumerate(saliencies(checkpoint, run)):
        stay[block] = np.sort(np.argsort(-saliency, kind="stable")[:keep])
        if merge:
            merged |= _merged(checkpoint, block, saliency, stay[block])
    return fewer_experts(checkpoint.with_weights(merged), stay)


def fewer_experts(checkpoint: Checkpoint, stay: dict[int, np.ndarray]) -> Checkpoint:
    """Only the experts of `stay`, block by block; their names are renumbered, router rows cut."""
    names = {(i.rule.disk, i.block, i.expert): name for name, i in checkpoint.infos().items()}
    renamed, gone = dict[str, Weight](), []
    for name, info in checkpoint.infos().items():
        if info.expert is None or info.block is None or name not in checkpoint.weights:
            continue
        gone.append(name)
        place = np.flatnonzero(stay[info.block] == info.expert)
        if len(place):
            renamed[names[info.rule.disk, info.block, int(place[0])]] = checkpoint.weights[name]
    keep = len(next(iter(stay.values())))
    kept: dict[tuple[int, int | None], Kept] = {(block, None): {"experts": n} for block, n in stay.items()}
    config = resized(checkpoint, {"experts": keep})
    return cut(checkpoint, kept, config).with_weights(renamed, dropped=set(gone) - renamed.keys())


def _merged(checkpoint: Checkpoint, block: int, saliency: np.ndarray, stay: np.ndarray) -> dict[str, Weight]:
    """The kept experts' weights with those that go averaged in."""
    rows = checkpoint.resolve(router_of(checkpoint, block).name).value().astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = stay[np.argmax(rows @ rows[stay].T, axis=1)]
    nearest[stay] = stay
    tensors = [(name, i) for name, i in checkpoint.infos().items() if i.block == block and i.expert is not None]
    found: dict[str, Weight] = {}
    for name, info in tensors:
        if info.expert not in stay:
            continue
        group = np.flatnonzero(nearest == info.expert)
        share = saliency[group] / max(float(saliency[group].sum()), np.finfo(float).tiny)
        alike = [n for n, i in tensors if i.rule.disk == info.rule.disk and i.expert in group]
        values = sum(s * checkpoint.resolve(n).value() for s, n in zip(share, alike, strict=True))
        weight = checkpoint.resolve(name)
        assert isinstance(weight, Dense)
        found[name] = Dense.of(np.asarray(values).astype(weight.read().dtype))
    return found
