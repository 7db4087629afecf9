"""Structured pruning: a smaller dense model that unmodified runtimes load.

| option    | unit                                  | what goes, and how the rest adapts                      |
|-----------|---------------------------------------|---------------------------------------------------------|
| `experts` | an expert of a mixture                | `experts`: router statistics; `merge` averages instead  |
| `heads`   | a key head with its query heads       | `silence`: least squares on what reads the heads        |
| `ffn`     | a channel of the MLP (of each expert) | `silence`: least squares on what reads the channels     |
| `width`   | a direction of the hidden stream      | `slicing`: principal directions                         |

Each is the share to remove. Widths come in whole multiples of `multiple` (whole heads), so the share that is reached
can differ from the share asked for; `report.json` has both. A family's architecture file says which units it can lose.

Every block keeps as many as every other, or, with `uniform: false`, as many as it needs (`allotment`): heads and MLP
channels then differ from block to block under the same total, and config.json says so in `per_layer_config`. ONNX holds
such models, and GGUF where llama.cpp has a graph for them; transformers, and so safetensors, do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Needs, Pass, Run
from tightship.passes.hessian import DAMP
from tightship.passes.spaces import Space, check_unlike, counts_kept, space_of

_SHARES = ("experts", "heads", "ffn", "width")


@dataclass(frozen=True, kw_only=True)
class PruneStructured(Pass):
    """See the module. `damp`: share of the mean diagonal, as in `hessian`."""

    name: ClassVar[str] = "prune-structured"
    needs: ClassVar[Needs] = "calibration"
    makes: ClassVar[frozenset[str]] = frozenset({"structure"})
    destroys: ClassVar[frozenset[str]] = frozenset({"mask", "grid", "factors"})

    ffn: float = 0.0
    heads: float = 0.0
    width: float = 0.0
    experts: float = 0.0
    multiple: int = 32
    merge: bool = False
    uniform: bool = True
    damp: float = DAMP

    def __post_init__(self) -> None:
        if not any(self.shares.values()):
            raise UsageError(f"prune-structured: says nothing to remove; give a share of {', '.join(_SHARES)}")
        for name, share in self.shares.items():
            if not 0 <= share < 1:
                raise UsageError(f"prune-structured: {name} is a share between 0 and 1, found {share}")
        if self.multiple < 1:
            raise UsageError(f"prune-structured: multiple is a count of channels, found {self.multiple}")
        if self.merge and not self.experts:
            raise UsageError("prune-structured: merge is about experts; give a share of them")
        if not self.uniform and not (self.heads or self.ffn):
            raise UsageError("prune-structured: blocks may differ in heads and ffn; give a share of one of them")

    @property
    def shares(self) -> dict[str, float]:
        """What is asked for."""
        return {name: getattr(self, name) for name in _SHARES}

    def spaces(self, checkpoint: Checkpoint) -> dict[str, Space]:
        """The spaces that lose units.

        Raises:
            Unsupported: the family cannot lose such units.
        """
        return {name: space_of(checkpoint, name) for name, share in self.shares.items() if share}

    def requires(self, checkpoint: Checkpoint) -> None:
        self.counts(checkpoint)
        if not self.uniform:
            check_unlike(checkpoint, self.spaces(checkpoint).values(), self.multiple)
        for info in checkpoint.linears():
            if getattr(checkpoint.weights[info.name], "layout", None) is not None:
                raise Unsupported("lies on a grid already; prune before quantizing", tensor=info.name)
        if self.width:
            from tightship.passes.slicing import check_sliceable

            check_sliceable(checkpoint)

    def counts(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Units that every block keeps of each space.

        Raises:
            UsageError: rounding leaves nothing to remove.
        """
        shares = {n: s for n, s in self.shares.items() if s}
        return counts_kept(checkpoint, shares, self.multiple, uniform=self.uniform)

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        from tightship.passes.structural import narrowed

        return narrowed(checkpoint, self.counts(checkpoint), uniform=self.uniform)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:
        from tightship.passes.structural import smaller

        counts = self.counts(checkpoint)
        for name, space in self.spaces(checkpoint).items():
            run.report(name, self._figures(name, space, counts[name]))
        return smaller(self, checkpoint, counts, run)

    def _figures(self, name: str, space: Space, keep: int) -> Mapping[str, Any]:
        return {"asked": self.shares[name], "share": 1 - keep / space.units, "units": keep}
