"""What a pruning stage did to each matrix, block by block: a table for `report.md` and the same as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightship.validators.plots import grid_plot

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*?)(?:\.weight)?$")
_EXPERT = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class LayerGrid:
    """Blocks downwards, matrices across; experts of a block are averaged.

    Attributes:
        title: of the stage.
        blocks: block numbers.
        matrices: names within a block.
        sparsity, loss: (blocks, matrices) float64, NaN where a block has no such matrix or nothing was measured.
    """

    title: str
    blocks: tuple[int, ...]
    matrices: tuple[str, ...]
    sparsity: np.ndarray
    loss: np.ndarray

    def cells(self) -> list[list[str]]:
        """`70.0 %, 0.012`: sparsity, and loss as a share of the outputs' energy."""
        return [[_cell(s, x) for s, x in zip(*row, strict=True)] for row in zip(self.sparsity, self.loss, strict=True)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""
        rows = [[str(block), *cells] for block, cells in zip(self.blocks, self.cells(), strict=True)]
        return ["block", *self.matrices], rows


def layer_grids(report: Mapping[str, Any]) -> list[LayerGrid]:
    """A grid for every stage whose figures have a sparsity for each matrix, in the order of the stages."""
    grids = []
    for stage in report.get("stages", ()):
        found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for name, figures in stage.get("figures", {}).items():
            match = _BLOCK.match(name)
            if match and "sparsity" in figures:
                key = int(match[2]), _EXPERT.sub(".*.", match[3])
                found.setdefault(key, []).append((figures["sparsity"], figures.get("loss", np.nan)))
        if found:
            grids.append(_grid(f"{stage['id']}: {stage['use']}", found))
    return grids


def picture(report: Mapping[str, Any]) -> str | None:
    """The last stage's grid as SVG, coloured by sparsity; None where nothing was pruned by calibration."""
    grids = layer_grids(report)
    if not grids:
        return None
    last = grids[-1]
    title = f"Sparsity and loss (share of the outputs' energy) after {last.title}"
    return grid_plot(title, last.matrices, [str(block) for block in last.blocks], last.sparsity, last.cells())


def _grid(title: str, found: Mapping[tuple[int, str], list[tuple[float, float]]]) -> LayerGrid:
    blocks = tuple(sorted({block for block, _ in found}))
    matrices = tuple(dict.fromkeys(name for _, name in found))
    values = np.full((2, len(blocks), len(matrices)), np.nan)
    for (block, name), pairs in found.items():
        values[:, blocks.index(block), matrices.index(name)] = np.mean(pairs, axis=0)
    return LayerGrid(title, blocks, matrices, values[0], values[1])


def _cell(sparsity: float, loss: float) -> str:
    if np.isnan(sparsity):
        return ""
    return f"{sparsity:.1%}" + ("" if np.isnan(loss) else f", {loss:.3g}")
