"""What a structured pass can take out of a family, and how many of it, from config.json and the architecture file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.architecture import TensorInfo
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.structure import Kept, places, runs_through
from tightship.per_layer import has_unlike_layers


@dataclass(frozen=True)
class Space:
    """Units of one kind, `units` of them in every block (or expert).

    Attributes:
        name: the option: `ffn`, `heads`, `width`, `experts`.
        widths: hyper-parameter -> how many of it a unit holds: a key head goes with its query heads.
        channels: columns that a unit holds of whatever reads it; 0 where nothing is counted in channels.
    """

    name: str
    units: int
    widths: dict[str, int]
    channels: int

    def kept(self, units: np.ndarray) -> Kept:
        """The units as numbers of each hyper-parameter."""
        return {w: (units[:, None] * n + np.arange(n)).reshape(-1) for w, n in self.widths.items()}

    def readers(self, checkpoint: Checkpoint) -> list[TensorInfo]:
        """Linears of the blocks whose inputs are these units, table order."""
        read = list(self.widths)[-1]
        return [info for info in checkpoint.linears() if runs_through(info.rule.shape[-1], read)]

    def columns(self, info: TensorInfo, hyper: Mapping[str, Any]) -> np.ndarray:
        """(units, channels) int64: which columns of a reader belong to each unit."""
        axis = info.rule.shape[-1]
        return np.stack([places(axis, hyper, self.kept(np.array([unit]))) for unit in range(self.units)])

    def step(self, multiple: int) -> int:
        """The least number of units whose channels are a multiple of `multiple`."""
        return multiple // math.gcd(self.channels, multiple)

    def sizes(self, count: int) -> dict[str, int]:
        """Hyper-parameters where `count` units stay."""
        return {width: count * n for width, n in self.widths.items()}


def space_of(checkpoint: Checkpoint, name: str) -> Space:
    """The space of an option.

    Raises:
        Unsupported: the family's file does not list it; the message says what it lists.
    """
    architecture, hyper = checkpoint.architecture, checkpoint.hyper
    listed = architecture.prunable
    if name not in listed:
        able = ", ".join(sorted(listed)) or "nothing but whole layers"
        raise Unsupported(
            f"prune-structured: a {architecture.family} model cannot lose {name}: its config.json has no width of its "
            f"own for them, or its graph ties them to others; it can lose {able}",
            hint="drop-layers works on every decoder",
        )
    if name != "width" and has_unlike_layers(checkpoint.config):
        raise Unsupported(
            f"prune-structured: {name}: the layers of this model have widths of their own already",
            hint="ask for all shares in one pass",
        )
    return _MAKERS[name](hyper, listed[name])


def _ffn(hyper: Any, width: Any) -> Space:
    return Space("ffn", int(hyper[width]), {width: 1}, 1)


def _heads(hyper: Any, _rule: Any) -> Space:
    groups = int(hyper["kv_heads"])
    queries = int(hyper["heads"]) // groups
    return Space("heads", groups, {"kv_heads": 1, "heads": queries}, queries * int(hyper["head_dim"]))


def _width(hyper: Any, _rule: Any) -> Space:
    return Space("width", int(hyper["hidden"]), {"hidden": 1}, 1)


def _experts(hyper: Any, _rule: Any) -> Space:
    return Space("experts", int(hyper["experts"]), {"experts": 1}, 0)


_MAKERS: dict[str, Callable[[Any, Any], Space]] = {
    "ffn": _ffn,
    "heads": _heads,
    "width": _width,
    "experts": _experts,
}


def counts_kept(
    checkpoint: Checkpoint, shares: Mapping[str, float], multiple: int, *, uniform: bool = True
) -> dict[str, int]:
    """Units of each space that stay where `shares` of them are to go: the nearest numbers that are allowed.

    Where blocks may differ (not `uniform`) these are means, and config.json keeps its number of heads.

    Raises:
        Unsupported: see `space_of`.
        UsageError: the nearest allowed number is all of them.
    """
    hyper, counts = checkpoint.hyper, dict[str, int]()
    for name, share in shares.items():
        space = space_of(checkpoint, name)
        allowed = [n for n in range(1, space.units + 1) if n * space.channels % multiple == 0]
        if name == "experts":
            allowed = [n for n in allowed if n >= int(hyper["experts_used"])]
        # transformers refuses heads that do not divide the stream, although the config has a head size of its own
        divisor = checkpoint.architecture.prunable.get("heads") == "divisor"
        if name == "heads" and divisor and uniform and "width" not in shares:
            allowed = [n for n in allowed if int(hyper["hidden"]) % (n * space.widths["heads"]) == 0]
        if name == "width" and divisor:
            queries = int(hyper["heads"]) // int(hyper["kv_heads"])
            heads = (counts["heads"] if uniform and "heads" in counts else int(hyper["kv_heads"])) * queries
            allowed = [n for n in allowed if n % heads == 0]
        counts[name] = _nearest(space, allowed, share, multiple)
    return counts


def check_unlike(checkpoint: Checkpoint, spaces: Iterable[Space], multiple: int) -> None:
    """Refuse what cannot differ from block to block.

    Raises:
        Unsupported: the experts of a mixture.
        UsageError: units that are no whole number of steps.
    """
    if "experts" in checkpoint.hyper:
        raise Unsupported("prune-structured: the blocks of a mixture of experts cannot differ", hint="uniform: true")
    for space in spaces:
        if space.channels and space.name != "width" and space.units % space.step(multiple):
            raise UsageError(
                f"prune-structured: {space.name}: {space.units} units are no whole number of steps of {multiple} "
                "channels, so blocks cannot differ by such steps",
                hint="a smaller `multiple`",
            )


def _nearest(space: Space, allowed: list[int], share: float, multiple: int) -> int:
    wanted = (1 - share) * space.units
    found = min([*allowed, space.units], key=lambda n: (abs(n - wanted), n))
    if found == space.units:
        smaller = [f"{1 - n / space.units:.3g}" for n in reversed(allowed) if n < space.units][:4]
        raise UsageError(
            f"prune-structured: {space.name}: {share:g} of {space.units} units rounds to none in steps of {multiple} "
            "channels",
            hint=f"nearest shares: {', '.join(smaller)}" if smaller else "a smaller `multiple`",
        )
    return found
