"""`tolerances.toml`, checked and typed: the one place where a threshold of the proof comes from.

Unknown sections, runtimes, storages, metrics or keys are errors, and so is asking for a tolerance that is not there.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tightship.errors import Malformed, Unsupported
from tightship.report import Check, Kind, judge
from tightship.target import TargetPlan

SOURCE = "tolerances.toml"
RUNTIMES = ("onnxruntime", "llama.cpp", "transformers", "onnxruntime-genai")
STORAGES = ("f32", "f16", "bf16", "quantized", "activations", "half", "gelu")
METRICS = ("rel_l2", "max_abs", "cosine", "top1", "kl_mean", "kl_max", "mismatches", "non_finite")
_FLAT = ("values", "loss", "parity")
_SPLIT = ("graph", "runtime")


@dataclass(frozen=True)
class Tolerance:
    """One threshold.

    Attributes:
        metric: what is compared, one of METRICS.
        op: `<=`, `>=`, or `report` for a figure that is never judged.
        threshold: None with `report`.
        why: the reason, one line.
    """

    metric: str
    op: str
    threshold: float | None
    why: str

    def check(
        self,
        *,
        target: str,
        runtime: str,
        kind: Kind,
        value: float | None,
        tensor: str | None = None,
        reason: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Check:
        """The check of a measured value against this threshold."""
        return judge(
            target=target,
            runtime=runtime,
            kind=kind,
            metric=self.metric,
            value=value,
            op=self.op,
            threshold=self.threshold,
            source=SOURCE,
            tensor=tensor,
            reason=reason,
            extra=extra,
        )


Entries = Mapping[str, Tolerance]


@dataclass(frozen=True)
class Tolerances:
    """The whole file. `graph` and `runtime` are keyed by (runtime, storage); all values by metric."""

    values: Entries
    loss: Entries
    parity: Entries
    graph: Mapping[tuple[str, str], Entries]
    runtime: Mapping[tuple[str, str], Entries]

    def for_run(self, kind: str, runtime: str, storage: str) -> Entries:
        """Tolerances of a run in a runtime; `kind` is `graph` or `runtime`.

        Raises:
            Unsupported: nothing is written down for this pair. No run is judged by a threshold made up on the spot.
        """
        table = {"graph": self.graph, "runtime": self.runtime}[kind]
        found = table.get((runtime, storage))
        if found is None:
            known = ", ".join(f"{r} {s}" for r, s in sorted(table))
            raise Unsupported(f"{SOURCE} has no {kind} tolerance for {runtime} with {storage} weights; it has: {known}")
        return found


@functools.cache
def tolerances() -> Tolerances:
    """The packaged file."""
    return parse((resources.files("tightship.validators") / SOURCE).read_text(encoding="utf-8"))


def parse(text: str) -> Tolerances:
    """Read and check the text of a tolerance file.

    Raises:
        Malformed: naming the first key that does not belong, is missing, or has no finite threshold.
    """
    data = tomllib.loads(text)
    _only(data, (*_FLAT, *_SPLIT), "the file", required=True)
    flat = {name: _entries(data[name], name) for name in _FLAT}
    return Tolerances(**flat, graph=_split(data["graph"], "graph"), runtime=_split(data["runtime"], "runtime"))


def _split(section: Any, name: str) -> dict[tuple[str, str], Entries]:
    _only(section, RUNTIMES, name, required=True)
    found = {}
    for runtime, storages in section.items():
        _only(storages, STORAGES, f"{name}.{runtime}")
        for storage, entries in storages.items():
            found[runtime, storage] = _entries(entries, f"{name}.{runtime}.{storage}")
    return found


def _entries(section: Any, where: str) -> Entries:
    _only(section, METRICS, where)
    return {metric: _entry(metric, entry, f"{where}.{metric}") for metric, entry in section.items()}


def _entry(metric: str, entry: Any, where: str) -> Tolerance:
    _only(entry, ("max", "min", "report", "why"), where)
    why = entry.get("why")
    if not isinstance(why, str) or not why.strip():
        raise Malformed(f"{SOURCE}: {where} does not say why")
    said = [key for key in ("max", "min", "report") if key in entry]
    if len(said) != 1:
        raise Malformed(f"{SOURCE}: {where} needs one of max, min or report, found {', '.join(said) or 'none'}")
    value = entry[said[0]]
    if said == ["report"]:
        if value is not True:
            raise Malformed(f"{SOURCE}: {where}.report can only be true")
        return Tolerance(metric, "report", None, why)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Malformed(f"{SOURCE}: {where}.{said[0]} is {value!r}, needs a finite number")
    return Tolerance(metric, {"max": "<=", "min": ">="}[said[0]], value, why)


def _only(section: Any, known: Collection[str], where: str, *, required: bool = False) -> None:
    if not isinstance(section, Mapping) or not section:
        raise Malformed(f"{SOURCE}: {where} needs a table with some of {', '.join(known)}")
    unknown = [key for key in section if key not in known]
    if unknown:
        raise Malformed(f"{SOURCE}: {where} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
    missing = [key for key in known if required and key not in section]
    if missing:
        raise Malformed(f"{SOURCE}: {where} lacks {missing[0]!r}")


def storage_of(plan: TargetPlan) -> str:
    """How an artifact's matrices are stored, as the tolerances know it: the coarsest layout of any matrix decides."""
    layouts = {tensor.layout for tensor in plan.tensors if len(tensor.shape) > 1}
    if layouts - {"f32", "f16", "bf16"}:
        return "quantized"
    return next((name for name in ("bf16", "f16") if name in layouts), "f32")
