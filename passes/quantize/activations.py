"""What the `quantize` pass says of activations: of the inputs of the matrices it solves, and of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightship.activations import Activations, scheme_of
from tightship.checkpoint import Checkpoint
from tightship.layout import Layout
from tightship.passes.base import Run

if TYPE_CHECKING:
    from tightship.passes.quantize import Quantize

CACHE = "fp8-static"
_MULTIPLIED = ("linear", "head")
_KEYS = ("attn_k", "attn_qkv")


def outline(spec: Quantize, checkpoint: Checkpoint) -> dict[str, Activations]:
    """Every entry that `found` will make, static scales still unknown."""
    known = {_module(name): Activations(word) for name, word in _words(spec, checkpoint).items()}
    if spec.kv_cache is None:
        return known
    modules = {i.name.rsplit(".", 2)[0] for i in checkpoint.linears() if i.rule.role in _KEYS}
    cache = {f"{module}.{word}": Activations(CACHE) for module in modules for word in ("k_scale", "v_scale")}
    return known | cache


def found(spec: Quantize, solved: Checkpoint, run: Run) -> dict[str, Activations]:
    """Activations of the matrices that the pass solved, static ones calibrated on `solved`, and those of the cache.

    Raises:
        Unsupported: see `tightship.passes.activation_ranges`.
    """
    words = _words(spec, solved)
    static = {name: word for name, word in words.items() if scheme_of(word).static}
    known = {_module(name): Activations(word) for name, word in words.items() if name not in static}
    if not spec.measures_activations:
        return known
    from tightship.passes.activation_ranges import static_activations

    cache, share = spec.kv_cache is not None, spec.percentile / 100
    return known | static_activations(solved, static, run, spec.activation_range, share, cache=cache)


def _words(spec: Quantize, checkpoint: Checkpoint) -> dict[str, str]:
    """On-disk name of each matrix that is solved and multiplied -> the word for its inputs."""
    if spec.activations is None:
        return {}
    infos = checkpoint.infos()
    return {
        name: spec.activations
        for name, layout in spec.wanted(checkpoint).items()
        if isinstance(layout, Layout) and infos[name].rule.kind in _MULTIPLIED
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")
