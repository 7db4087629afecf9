"""Static scales for activations: what range the inputs of each linear, and the keys and values of a cache, really have.

The solved checkpoint is walked block by block, so that ranges are those behind compressed weights. For each tensor we
keep its exact extremes and a histogram of `BINS` bins on [-R, R), R a power of two that doubles (two bins become one)
when a value reaches beyond. From these:

| method     | range                                                                                               |
|------------|-----------------------------------------------------------------------------------------------------|
| minmax     | the extremes                                                                                        |
| percentile | what holds that share of the values, both tails cut alike                                           |
| entropy    | the extremes shrunk by the factor whose 8-bit histogram has the least KL divergence from the full one |

Entropy is the calibration of TensorRT (Migacz, "8-bit Inference with TensorRT", GTC 2017), for signed ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tightship.activations import Activations, fixed
from tightship.blocks import BlockWalk
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.modelview import ModelView
from tightship.passes.base import Run
from tightship.passes.calibration import calibration_windows

BINS = 4096
LEVELS = 256
SHRINKS = np.arange(1.0, 0.195, -0.01)
Method = Literal["minmax", "percentile", "entropy"]
_KV_WORD = "fp8-static"
_PROBE = "tightship-kv-ranges"


@dataclass
class Ranges:
    """Extremes and histogram of one tensor; `reach` is R."""

    low: float = 0.0
    high: float = 0.0
    reach: float = 2.0**-20
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, x: np.ndarray) -> None:
        """More values, float32 of any shape.

        Raises:
            Unsupported: NaN or infinity.
        """
        low, high = float(x.min(initial=0.0)), float(x.max(initial=0.0))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise Unsupported("the activations of this matrix are not finite; no static scale fits them")
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(-low, high) >= self.reach:
            self.reach *= 2
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, BINS // 4)
        places = np.floor((x.reshape(-1) / np.float32(self.reach) + 1) * (BINS // 2)).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    def span(self, method: Method, share: float, *, symmetric: bool) -> tuple[float, float]:
        """[low, high] by `method`; `share` (0..1) is the percentile's."""
        low, high = self.low, self.high
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if method == "percentile":
            return self._percentile(share, low, high, symmetric=symmetric)
        if method == "entropy":
            factor = min(SHRINKS, key=lambda s: _divergence(self.counts, self._bin(low * s), self._bin(high * s)))
            return low * float(factor), high * float(factor)
        return low, high

    def _bin(self, value: float) -> int:
        return int(np.clip(np.floor((value / self.reach + 1) * (BINS // 2)), 0, BINS - 1))

    def _percentile(self, share: float, low: float, high: float, *, symmetric: bool) -> tuple[float, float]:
        """Outer edges of the bins where the share is reached, never beyond [low, high]."""
        step = 2 * self.reach / BINS
        if symmetric:
            both = self.counts[BINS // 2 :] + self.counts[: BINS // 2][::-1]
            edge = (int(np.searchsorted(both.cumsum(), share * both.sum())) + 1) * step
            return max(-edge, low), min(edge, high)
        total, tail = self.counts.cumsum(), (1 - share) / 2
        first = int(np.searchsorted(total, tail * total[-1], side="right"))
        last = int(np.searchsorted(total, (1 - tail) * total[-1]))
        return max(first * step - self.reach, low), min((last + 1) * step - self.reach, high)


def _divergence(counts: np.ndarray, first: int, last: int) -> float:
    """KL divergence of the histogram from its form in `LEVELS` levels on bins [first, last], outliers at the edges."""
    inside = counts[first : last + 1].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last + 1 :].sum()
    level = np.arange(len(inside)) * LEVELS // len(inside)
    filled = inside > 0
    mass = np.bincount(level, inside, LEVELS)
    spread = np.where(filled, mass[level] / np.maximum(np.bincount(level, filled, LEVELS)[level], 1), 0.0)
    p, q = clipped / max(clipped.sum(), 1), spread / max(spread.sum(), 1)
    known = p > 0
    # A bin that only outliers fill has no mass in q: it counts as a millionth.
    return float(np.sum(p[known] * np.log(p[known] / np.maximum(q[known], 1e-6))))


def static_activations(
    checkpoint: Checkpoint, words: Mapping[str, str], run: Run, method: Method, share: float, *, cache: bool
) -> dict[str, Activations]:
    """Static parameters for the inputs of matrices, by module; with `cache` also of every block's keys and values.

    `words` maps on-disk names to static words of `tightship.activations`. A matrix that no token reached (a thin
    expert) gets scale 1, and the report says so.

    Raises:
        Unsupported: activations that are not finite; attention that cannot be observed.
    """
    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    walk = BlockWalk(view, calibration_windows(checkpoint, run))
    seen: dict[str, Ranges] = {}

    def note(names: tuple[str, ...], x: Any) -> None:
        values = x.detach().float().cpu().numpy()
        for name in names:
            seen.setdefault(name, Ranges()).add(values)

    cached: dict[str, Ranges] = {}
    for step in walk.steps(outside=words):
        run.progress("ranges of activations", step.index, len(walk.blocks))
        prefix = walk.prefixes[step.index] if step.index < len(walk.prefixes) else ""
        with _attention(walk.module, prefix, cached if cache and prefix else None):
            step.observe(note)
    found = {}
    for name, word in words.items():
        ranges = seen.get(name, Ranges())
        if name not in seen:
            run.report(name, {"activations": "no token reached this matrix: scale 1"})
        symmetric = not word.endswith("-asym")
        found[name.removesuffix(".weight")] = fixed(word, *ranges.span(method, share, symmetric=symmetric))
    for name, ranges in cached.items():
        found[name] = fixed(_KV_WORD, *ranges.span(method, share, symmetric=True))
    return found


@contextmanager
def _attention(module: Any, prefix: str, cached: dict[str, Ranges] | None) -> Iterator[None]:
    """Keys (rotated) and values, as they go into the cache, noted under `{attention module}.k_scale` and `.v_scale`.

    Raises:
        Unsupported: no attention of the block went through transformers' table of attention functions.
    """
    if cached is None:
        yield
        return
    import sys

    from transformers import AttentionInterface

    names = {id(child): name for name, child in module.named_modules()}
    before = len(cached)

    def probe(attention: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        for word, tensor in (("k_scale", key), ("v_scale", value)):
            ranges = cached.setdefault(f"{names[id(attention)]}.{word}", Ranges())
            ranges.add(tensor.detach().float().cpu().numpy())
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        return eager(attention, query, key, value, *args, **kwargs)

    AttentionInterface.register(_PROBE, probe)
    kept = module.config._attn_implementation
    module.config._attn_implementation = _PROBE
    try:
        yield
    finally:
        module.config._attn_implementation = kept
    if len(cached) == before:
        raise Unsupported(f"the attention of {prefix} cannot be observed, so its cache gets no scales")
