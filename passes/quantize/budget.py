"""Mixed precision: which of a container's types each matrix of the blocks gets, so that all fit a budget of bytes.

How much a type hurts a matrix is estimated from two measurements, both on calibration text:

    ablation  KL(original || model with this matrix alone rounded), for the coarsest candidate
    Fisher    sum over weights of E[g^2] (w - rounded)^2, for every candidate, g the gradient of the training loss

`both` (the default) takes the level from the ablation and the ratio between candidates from Fisher; `fisher` takes
Fisher alone, which needs no ablation. Estimates of different matrices are added up; `allocation` finds the least sum.

Matrices that a file or loader holds as one get one type: the experts of a stack, and in safetensors also whatever is
fed the same norm (vLLM fuses query, key and value, gate and up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.formats.layouts import parse_layout
from tightship.formats.layouts.affine import Affine
from tightship.formats.packings.compressed_tensors import packed_specs
from tightship.formats.packings.ggml import ggml_type_for, row_bytes
from tightship.formats.packings.matmul_nbits import nbits_for
from tightship.layout import Layout
from tightship.passes.allocation import Choice, allocate
from tightship.passes.base import Run
from tightship.passes.calibration import calibration_windows
from tightship.passes.folding import folds_of
from tightship.passes.gradients import mean_over_windows
from tightship.passes.kept import kept
from tightship.passes.masks import finite
from tightship.passes.stand_ins import StandIns
from tightship.target import Refused

if TYPE_CHECKING:
    from tightship.passes.quantize import Quantize

CANDIDATES = {
    "gguf": ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k"),
    "onnx": ("int2", "int4", "int8"),
    "safetensors": ("int2", "int3", "int4", "int5", "int6", "int8"),
}
Costs = dict[str, dict[str, int]]
"""Matrix -> candidate -> bytes in the container's file."""


def stored_bytes(layout: Layout, shape: tuple[int, int], container: str) -> int | None:
    """Bytes of a matrix in a container's file, scales included; None where the container has no such type."""
    rows, cols = shape
    try:
        layout.blocks_per_row(cols)
    except Unsupported:
        return None
    if container == "gguf":
        word = ggml_type_for(layout)
        return None if word is None else rows * row_bytes(word, cols)
    if container == "onnx":
        found = nbits_for(layout, cols)
        return None if isinstance(found, Refused) else found.nbytes(rows)
    return sum(spec.nbytes for spec in packed_specs(layout, shape).values()) if isinstance(layout, Affine) else None


def spent(spec: Quantize, checkpoint: Checkpoint, run: Run) -> Quantize:
    """`spec` with the budget spent: every linear's layout by name. Tells the report what was chosen and why."""
    costs, budget = _costs(spec, checkpoint)
    teams = _teams(checkpoint, costs, spec.container)
    harms = kept(run, "sensitivity.json", lambda: _harms(checkpoint, run, costs, spec.sensitivity))
    choices = {team: _together(members, costs, harms) for team, members in teams.items()}
    chosen = allocate(choices, budget)
    for team, choice in chosen.items():
        run.report(f"{team} (bytes)", _figures(choices[team], choice))
    return _with(spec, {name: chosen[team].word for team, members in teams.items() for name in members})


def uniform(spec: Quantize, checkpoint: Checkpoint) -> list[Quantize]:
    """`spec` with each candidate that fits the budget given to every linear that can have it, smallest first.

    Raises:
        UsageError: no candidate fits.
        Unsupported: no candidate fits a matrix.
    """
    costs, budget = _costs(spec, checkpoint)
    fitting = []
    for word in spec.candidates or CANDIDATES[spec.container]:
        layouts = {name: word if word in sized else min(sized, key=sized.__getitem__) for name, sized in costs.items()}
        size = sum(costs[name][chosen] for name, chosen in layouts.items())
        fitting += [(size, word, layouts)] if size <= budget else []
    if not fitting:
        raise UsageError(f"quantize: no candidate fits {budget} bytes")
    return [_with(spec, layouts) for _, _, layouts in sorted(fitting, key=lambda entry: entry[:2])]


def _with(spec: Quantize, layouts: Mapping[str, str]) -> Quantize:
    return replace(spec, layouts={**spec.layouts, **layouts}, bytes=None, candidates=())


def _costs(spec: Quantize, checkpoint: Checkpoint) -> tuple[Costs, int]:
    """Bytes of every candidate of every linear that is to be solved, and the budget."""
    whole = replace(spec, layout=spec.layout or (None if spec.layouts else "int8"), bytes=None, candidates=())
    linears = {info.name for info in checkpoint.linears()}
    shared = {name: matrix for name, matrix in whole.jobs(checkpoint)[0].items() if name in linears}
    words = spec.candidates or CANDIDATES[spec.container]
    costs: Costs = {}
    for name, matrix in shared.items():
        sized = {word: stored_bytes(parse_layout(word), matrix.shape, spec.container) for word in words}
        costs[name] = {word: size for word, size in sized.items() if size is not None}
        if not costs[name]:
            raise Unsupported(f"none of {', '.join(words)} fits shape {matrix.shape} in {spec.container}", tensor=name)
    if spec.bytes != "same":
        return costs, int(spec.bytes or 0)
    taken = {name: stored_bytes(matrix.layout, matrix.shape, spec.container) for name, matrix in shared.items()}
    alien = next((name for name, size in taken.items() if size is None), None)
    if alien is not None:
        raise UsageError(f"quantize: `bytes: same` needs layouts that {spec.container} has; {alien} has another")
    return costs, sum(size or 0 for size in taken.values())


def _teams(checkpoint: Checkpoint, names: Mapping[str, object], container: str) -> dict[str, list[str]]:
    """Matrices that get one type, by the team's name."""
    team = {name: name for name in names}
    if container == "safetensors":
        team |= {name: fold.name for fold in folds_of(checkpoint) if fold.norm for name in fold.consumers}
    for info in checkpoint.linears():
        if info.expert is not None and team.get(info.name) == info.name:
            team[info.name] = info.rule.disk.format(i=info.block, e="*")
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(team[name], []).append(name)
    return found


def _together(members: Sequence[str], costs: Costs, harms: Mapping[str, Mapping[str, float]]) -> list[Choice]:
    """A team's candidates, smallest first: those that all members have, sizes and harms added up."""
    words = [word for word in costs[members[0]] if all(word in costs[name] for name in members)]
    found = [Choice(w, sum(costs[n][w] for n in members), sum(harms[n][w] for n in members)) for w in words]
    return sorted(found, key=lambda choice: (choice.size, choice.word))


def _harms(checkpoint: Checkpoint, run: Run, costs: Costs, how: str) -> dict[str, dict[str, float]]:
    """How much each candidate is expected to hurt each matrix; see the module."""
    windows = calibration_windows(checkpoint, run)
    fisher = mean_over_windows(checkpoint, run, windows, lambda gradient: gradient.square())
    stand_ins = StandIns(checkpoint, windows, run) if how == "both" else None
    found: dict[str, dict[str, float]] = {}
    for done, (name, sized) in enumerate(costs.items()):
        run.progress("sensitivities", done, len(costs))
        w = finite(name, checkpoint.resolve(name).value())
        rounded = {word: _rounded(w, word) for word in sorted(sized, key=lambda word: (sized[word], word))}
        found[name] = {word: _weighed(fisher[name], w - values) for word, values in rounded.items()}
        if stand_ins is not None:
            coarsest = next(iter(rounded))
            level = stand_ins.hurt(name, rounded[coarsest]) / (found[name][coarsest] or 1.0)
            found[name] = {word: level * harm for word, harm in found[name].items()}
    return found


def _rounded(w: np.ndarray, word: str) -> np.ndarray:
    layout = parse_layout(word)
    return layout.values(layout.quantize(w)).astype(np.float32)


def _weighed(fisher: np.ndarray, difference: np.ndarray) -> float:
    return float((fisher * np.square(difference, dtype=np.float64)).sum())


def _figures(options: Sequence[Choice], chosen: Choice) -> dict[str, float | int | str]:
    """What was chosen, and what the next smaller and larger candidate would have done."""
    at = options.index(chosen)
    found: dict[str, float | int | str] = {"layout": chosen.word, "bytes": chosen.size, "harm": chosen.harm}
    for word, index in (("smaller", at - 1), ("larger", at + 1)):
        if 0 <= index < len(options):
            found |= {word: options[index].word, f"harm_if_{word}": options[index].harm}
    return found
