"""Stored values: every tensor of the published files, decoded by others, against the compressed checkpoint.

Exact, element by element: float tensors must be the checkpoint's cast to the stored type, quantized ones its integers
times its scales. What the file holds is never taken from memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tightship import dtypes
from tightship.checkpoint import Checkpoint
from tightship.errors import TightshipError
from tightship.report import Check, judge
from tightship.target import Progress, TargetPlan, TensorPlan, no_progress
from tightship.validators import integers
from tightship.validators.stored import Stored
from tightship.validators.tolerances import tolerances
from tightship.weights import Alias, Dense, Factored, Quantized, Sum, Weight

_NAMED = 16


@dataclass
class ValuesProof:
    """What was found.

    Attributes:
        checks: the verdicts.
        sparsity: share of exact zeros among the linears of the blocks (all matrices where there are none).
        digests: tensor name -> digest of integers and scales, read back from the file.
    """

    checks: list[Check] = field(default_factory=list)
    sparsity: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class _Tally:
    """Running sums over the tensors of one artifact."""

    stored: Stored
    linears: set[str]
    elements: int = 0
    wrong: int = 0
    non_finite: int = 0
    largest: float = 0.0
    zeros: int = 0
    counted: int = 0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    poisoned: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def prove_values(
    checkpoint: Checkpoint, plan: TargetPlan, stored: Stored, progress: Progress = no_progress
) -> ValuesProof:
    """Compare every planned tensor. Whatever a file holds is a failed check that names the tensor, no exception."""
    linears = {info.name for info in checkpoint.linears()} or {t.name for t in plan.tensors if len(t.shape) > 1}
    tally = _Tally(stored, linears)
    for index, tensor in enumerate(plan.tensors):
        progress(f"values of {plan.target.id}", index, len(plan.tensors))
        if tensor.name not in checkpoint.weights:  # computed from the config (rotary factors): the graph proves it
            if not _compare_static(tally, checkpoint, tensor):
                tally.computed.append(tensor.name)
            continue
        for part, weight in parts_of(checkpoint.resolve(tensor.name)):
            try:
                _compare(tally, tensor, part, weight)
            except TightshipError as error:
                tally.faults[tensor.name] = (int(np.prod(tensor.shape)), str(error))
            except Exception as error:  # a damaged tensor may make its decoder raise anything
                what = f"cannot be decoded: {type(error).__name__}: {str(error)[:200]}"
                tally.faults[tensor.name] = (int(np.prod(tensor.shape)), what)
    progress(f"values of {plan.target.id}", len(plan.tensors), len(plan.tensors))
    checks = [*_value_checks(plan.target.id, tally), *_integer_checks(plan.target.id, tally)]
    return ValuesProof(checks, tally.zeros / max(tally.counted, 1), tally.digests)


def parts_of(weight: Weight, prefix: str = "") -> Iterator[tuple[str, Dense | Quantized]]:
    """The matrices that a weight is stored as, with the suffix of each; an alias is stored elsewhere."""
    if isinstance(weight, Factored):
        yield from parts_of(weight.right, f"{prefix}.right")
        yield from parts_of(weight.left, f"{prefix}.left")
    elif isinstance(weight, Sum):
        yield from parts_of(weight.base, f"{prefix}.base")
        yield from parts_of(weight.residual, f"{prefix}.residual")
    elif not isinstance(weight, Alias):
        yield prefix, weight


def expected_value(
    weight: Dense | Quantized, stored_type: str, changed: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """float32 of what must be stored: decoded codes, or floats cast to `stored_type` (nearest, ties to even).

    `changed` is what the container does to floats before the cast (Gemma's norms in GGUF: one is added).
    """
    if isinstance(weight, Quantized):
        return weight.value()
    data = weight.read()
    data = changed(data) if changed else data
    if stored_type in dtypes.BY_NAME and dtypes.dtype(stored_type).is_float and dtypes.of_array(data).is_float:
        with np.errstate(over="ignore"):
            data = data.astype(dtypes.dtype(stored_type).numpy)
    return data.astype(np.float32)


def _compare(tally: _Tally, plan: TensorPlan, part: str, weight: Dense | Quantized) -> None:
    found = tally.stored.value(plan.name, part)
    expected = expected_value(weight, plan.layout, functools.partial(tally.stored.changed, plan.name))
    tally.elements += expected.size
    if plan.name in tally.linears:
        tally.zeros += int(np.count_nonzero(found == 0))
        tally.counted += found.size
    bad = int(np.count_nonzero(~np.isfinite(found)))
    if bad:
        tally.non_finite += bad
        tally.poisoned.append(plan.name)
    wrong, reason, largest = difference(expected, found)
    if wrong:
        tally.wrong += wrong
        tally.largest = max(tally.largest, largest)
        tally.faults[plan.name] = (wrong, reason)
    if isinstance(weight, Quantized):
        read_back = tally.stored.integers(plan.name, part)
        if read_back is None:
            tally.faults.setdefault(plan.name, (expected.size, "is stored as floats, not as integers"))
            return
        tally.digests[plan.name + part] = integers.digest(read_back)
        if tally.digests[plan.name + part] != integers.digest(integers.pieces_of(weight.layout, weight.read())):
            tally.moved.append(plan.name)


def _compare_static(tally: _Tally, checkpoint: Checkpoint, plan: TensorPlan) -> bool:
    """Compare a static scale or zero point of activations; False if the tensor is none."""
    place, _, suffix = plan.name.rpartition(".")
    known = checkpoint.activations.get(plan.name) or checkpoint.activations.get(place)
    if known is None:
        return False
    expected = known.zero_point if suffix == "input_zero_point" else known.scale
    found = tally.stored.value(plan.name).reshape(-1).tolist()
    tally.elements += 1
    if expected is None or found != [expected]:
        tally.wrong += 1
        tally.faults[plan.name] = (1, f"is {found}, and the activations were calibrated to {expected}")
    return True


def difference(expected: np.ndarray, found: np.ndarray) -> tuple[int, str, float]:
    """Elements that differ, a sentence about how, and the largest distance."""
    if expected.shape != found.shape:
        return expected.size, f"has shape {found.shape}, expected {expected.shape}", float("inf")
    unequal = ~((expected == found) | (np.isnan(expected) & np.isnan(found)))
    wrong = int(np.count_nonzero(unequal))
    if not wrong:
        return 0, "", 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.max(np.abs(expected - found)[unequal], initial=0.0))
    how = f"{wrong} of {expected.size} elements differ, by up to {largest:.3g}"
    if not found.any():
        how += "; all that is stored are zeros"
    elif expected.ndim == 2 and expected.shape[0] == expected.shape[1] and np.array_equal(expected.T, found):
        how += "; it is stored transposed"
    return wrong, how, largest


def _value_checks(target: str, tally: _Tally) -> Iterator[Check]:
    rules = tolerances().values
    names = list(tally.faults)
    figures: dict[str, Any] = {"elements": tally.elements, "max_error": tally.largest}
    if tally.computed:
        figures |= {"computed": tally.computed}
    for name in names[:_NAMED]:
        wrong, reason = tally.faults[name]
        yield rules["mismatches"].check(
            target=target, runtime="reader", kind="values", value=wrong, tensor=name, reason=f"{name}: {reason}"
        )
    if len(names) != 1:
        more = f"{len(names)} tensors differ, first {names[0]}" if names else None
        total = sum(wrong for wrong, _ in tally.faults.values())
        yield rules["mismatches"].check(
            target=target, runtime="reader", kind="values", value=total, reason=more, extra=figures
        )
    yield rules["non_finite"].check(
        target=target,
        runtime="reader",
        kind="values",
        value=tally.non_finite,
        tensor=tally.poisoned[0] if tally.poisoned else None,
        reason=f"NaN or Inf in {', '.join(tally.poisoned[:4])}" if tally.poisoned else None,
    )


def _integer_checks(target: str, tally: _Tally) -> Iterator[Check]:
    if not tally.digests:
        return
    yield judge(
        target=target,
        runtime="reader",
        kind="values",
        metric="integers",
        value=len(tally.moved),
        op="==",
        threshold=0,
        source="contract",
        tensor=tally.moved[0] if tally.moved else None,
        reason=f"integers or scales differ in {', '.join(tally.moved[:4])}" if tally.moved else None,
        extra={"tensors": len(tally.digests), "sha256": integers.digest_all(tally.digests)},
    )
