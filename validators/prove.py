"""The proof of one artifact: structure, stored values, tokenizer, graph, runtime as shipped, loss.

Two error budgets, never mixed. *Fidelity*: the artifact against the compressed checkpoint (values, tokenizer, graph,
runtime). *Loss*: the artifact, as its users run it, against the original. Three numbers tell them apart: `graph` is the
container's error, `loss` of the runtime `torch` is the weights' (the compressed checkpoint against the original), and
`runtime` is the runtime's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.exporters.to_onnx import reference_graph
from tightship.report import Check, TargetReport, judge, not_run
from tightship.target import Exported, TargetPlan, total_bytes
from tightship.validators import tokenizers_check
from tightship.validators.fidelity import (
    DECODED,
    GELU,
    Run,
    compare,
    execute,
    failed_run,
    figure_with_its_gelu,
    figure_with_true_gelu,
    judged,
    runs_for,
    storage_word,
)
from tightship.validators.loss import loss_checks, loss_metrics, unjudged
from tightship.validators.references import Outputs, ProofSettings, References
from tightship.validators.runtimes.child import RuntimeDied, RuntimeMissing, run_child
from tightship.validators.stored import Stored, open_stored
from tightship.validators.structure import structure_checks, unreadable
from tightship.validators.tasks import task_check
from tightship.validators.values import ValuesProof, prove_values
from tightship.weights import Dense, Factored, Sum, Weight

_WEIGHT_FIGURES = ("rel_l2", "kl_mean", "top1", "cosine")


class Prover:
    """Proves artifacts of one compressed checkpoint.

    Args:
        original: the source, as opened.
        compressed: what the artifact must compute.
        settings: see `ProofSettings`.
        references: the original's outputs, shared between the targets of a build; made anew where not given.
    """

    def __init__(
        self,
        original: Checkpoint,
        compressed: Checkpoint,
        settings: ProofSettings,
        references: References | None = None,
    ) -> None:
        self.original = original
        self.compressed = compressed
        self.settings = settings
        self.references = references or References(original, settings)
        self._outputs: Outputs | None = None

    def prove(self, plan: TargetPlan, directory: Path, exported: Exported) -> TargetReport:
        """Every check of one artifact. What the artifact does wrong is in the checks, never an exception.

        Raises:
            UsageError, Malformed: the text to prove on cannot be read.
        """
        return _Proof(self, plan, directory, exported).run()

    @property
    def outputs(self) -> Outputs:
        """The compressed checkpoint's outputs on the windows."""
        if self._outputs is None:
            self._outputs = self.references.outputs_of(self.compressed)
        return self._outputs


class _Proof:
    """One artifact under proof."""

    def __init__(self, prover: Prover, plan: TargetPlan, directory: Path, exported: Exported) -> None:
        self.prover = prover
        self.settings = prover.settings
        self.plan = plan
        self.target = plan.target.id
        self.directory = directory
        self.exported = exported
        self.checks: list[Check] = []
        self.ran: dict[str, tuple[Run, Outputs]] = {}

    def run(self) -> TargetReport:
        values = self._files()
        self._runs()
        self._loss()
        present = [name for name in self.exported.files if (self.directory / name).is_file()]
        return TargetReport(
            id=self.target,
            bytes=total_bytes(self.directory, present),
            bits_per_weight=self.plan.bits_per_weight,
            sparsity=values.sparsity,
            graph_source=self.exported.graph_source,
            checks=self.checks,
        )

    # What lies in the files

    def _files(self) -> ValuesProof:
        values = ValuesProof()
        try:
            stored = open_stored(self.prover.compressed, self.plan, self.directory, self.exported)
            self.checks += structure_checks(self.prover.compressed, self.plan, self.directory, self.exported, stored)
            values = prove_values(self.prover.compressed, self.plan, stored, self.settings.progress)
            self.checks += [*values.checks, *self._same_integers(values)]
            self.checks += self._tokenizer()
            self._graph_source()
            self._decoded(stored)
        except UsageError:
            raise
        except Exception as error:  # damaged files make their readers raise anything
            self.checks.append(unreadable(self.target, error))
        return values

    def _same_integers(self, values: ValuesProof) -> list[Check]:
        """Targets that carry what the passes left hold the same integers, tensor by tensor."""
        if self.plan.target.scheme is not None or not values.digests:
            return []
        others = {t: d for t, d in self.prover.references.digests.items() if t != self.target}
        self.prover.references.digests[self.target] = values.digests
        if not others:
            return []
        wrong = [
            (name, other)
            for other, digests in others.items()
            for name, value in values.digests.items()
            if digests.get(name, value) != value
        ]
        reason = f"{wrong[0][0]} holds other integers or scales than in {wrong[0][1]}" if wrong else None
        return [
            judge(
                target=self.target, runtime="reader", kind="values", metric="integers_unlike_other_targets",
                value=len(wrong), op="==", threshold=0, source="contract", reason=reason,
                tensor=wrong[0][0] if wrong else None,
                extra={"targets": sorted(others), "tensors": len(values.digests)},
            )
        ]  # fmt: skip

    def _tokenizer(self) -> list[Check]:
        compressed = self.prover.compressed
        if self.plan.target.container != "gguf":
            return tokenizers_check.file_checks(compressed, self.target, self.directory)
        texts = self.prover.references.strings
        path = self.directory / self.exported.main
        return tokenizers_check.gguf_checks(compressed, self.target, path, texts, self.prover.references.limits)

    def _graph_source(self) -> None:
        """How far the chosen graph was off on a random model, and why others were refused; judged before the export."""
        *refused, chosen = self.exported.details.get("candidates") or [None]
        if chosen:
            reasons = {candidate["source"]: candidate["reason"] for candidate in refused}
            self.checks.append(
                judge(
                    target=self.target, runtime="onnxruntime", kind="graph", metric="random_model_rel_l2",
                    value=chosen["margin"], extra={"refused": reasons},
                )
            )  # fmt: skip

    # What the runtimes compute

    def _decoded(self, stored: Stored) -> None:
        """ONNX Runtime on the reference graph, with the weights that the published file holds."""
        if self.plan.target.container == "onnx":
            return
        with tempfile.TemporaryDirectory(prefix="tightship-reference-", dir=self.settings.scratch) as folder:
            try:
                graph = reference_graph(
                    decoded_checkpoint(self.prover.compressed, self.plan, stored), Path(folder), self.settings.judge
                )
            except Unsupported as error:
                self.checks.append(
                    not_run(
                        target=self.target, runtime=DECODED.runtime, kind=DECODED.kind, metric="outputs",
                        reason=f"there is no reference graph: {error}",
                    )
                )  # fmt: skip
                return
            self._measure(DECODED, Path(folder), graph.name)

    def _runs(self) -> None:
        for run in runs_for(self.plan, self.prover.compressed):
            self._measure(run, self.directory, self.exported.main)

    def _measure(self, run: Run, directory: Path, main: str) -> None:
        windows = self.prover.references.windows
        reference = self.prover.outputs
        self.settings.progress(f"{run.runtime}, {run.mode}, {self.target}", 0, 1)
        try:
            outputs, about = execute(run, directory, main, windows, self.prover.references.limits)
            figures = compare(reference, outputs, windows)
        except (RuntimeDied, RuntimeMissing, ValueError) as error:
            self.checks.append(failed_run(run, self.target, error))
            return
        storage = storage_word(self.plan, self.prover.compressed, run)
        if storage == GELU:  # judged against a reference that reads the same table; the plain one is shown
            exact = self.prover.references.outputs_of(self.prover.compressed, with_llama_gelu=True)
            self.checks.append(figure_with_its_gelu(exact, outputs, windows, self.target))
            self.checks.append(figure_with_true_gelu(figures, self.target))
            figures = compare(exact, outputs, windows)
        self.checks += judged(run, figures, self.target, storage, about.get("version"))
        if not run.decode:
            self.ran[f"{run.runtime}/{run.kind}"] = (run, outputs)

    # How far it is from the original

    def _loss(self) -> None:
        references, gates = self.prover.references, self.settings.gates
        windows = references.windows
        self.checks += self._weights_loss()
        own = runs_for(self.plan, self.prover.compressed)
        # As its users run it; where that did not run, the nearest thing that did.
        order = [run for run in own if run.kind == "runtime"] + [run for run in own if run.kind == "graph"] + [DECODED]
        found = next((self.ran[k] for k in (f"{r.runtime}/{r.kind}" for r in order) if k in self.ran), None)
        if found is None:
            reason = "no runtime ran this artifact, so its loss is not known"
            self.checks.append(
                not_run(target=self.target, runtime=own[0].runtime, kind="loss", metric="outputs", reason=reason)
            )
            return
        run, outputs = found
        checks = loss_checks(references.outputs, outputs, windows, gates, self.target, run.runtime)
        _, decoded = self.ran.get(f"{DECODED.runtime}/{DECODED.kind}", (DECODED, {}))
        if "logits" not in outputs and "logits" in decoded:  # llama.cpp gives hidden states of masked language models
            checks += loss_checks(references.outputs, decoded, windows, gates, self.target, DECODED.runtime)
        checks += self._task(run)
        self.checks += [*checks, *unjudged(checks, gates, windows, self.target)]

    def _weights_loss(self) -> list[Check]:
        """The compressed checkpoint against the original, in the same module: never judged, always shown."""
        references = self.prover.references
        metrics = loss_metrics(references.outputs, self.prover.outputs, references.windows)
        figures = metrics.figures() if metrics is not None else {}
        text = {"text": references.windows.note}
        return [
            judge(target=self.target, runtime="torch", kind="loss", metric=name, value=figures[name], extra=text)
            for name in _WEIGHT_FIGURES
            if name in figures
        ]

    def _task(self, run: Run) -> list[Check]:
        gate = self.settings.gates.task
        if gate is None:
            return []

        def of_artifact(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            directory, main = self.directory, self.exported.main
            job = {"artifact": str(directory), "main": main, "mode": run.mode, "threads": self.settings.threads}
            return run_child(run.module, job, _inputs(run, ids, mask), limits=self.prover.references.limits)[1][
                "logits"
            ]

        try:
            original = self.prover.references.logits
            place: dict[str, Any] = {"target": self.target, "runtime": run.runtime}
            return [task_check(gate, self.prover.compressed, original=original, artifact=of_artifact, **place)]
        except (RuntimeDied, RuntimeMissing, KeyError) as error:
            reason = f"the task could not be run: {error}"
            return [judge(**place, kind="loss", metric=gate.metric, value=None, source="recipe", reason=reason)]


def _inputs(run: Run, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids} if run.module == "genai" else {"input_ids": ids, "attention_mask": mask}


def decoded_checkpoint(checkpoint: Checkpoint, plan: TargetPlan, stored: Stored) -> Checkpoint:
    """The checkpoint with every planned weight replaced by what the published files hold, decoded by others."""

    def decoded(name: str, weight: Weight, part: str = "") -> np.ndarray:
        if isinstance(weight, Factored):
            left, right = decoded(name, weight.left, f"{part}.left"), decoded(name, weight.right, f"{part}.right")
            return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
        if isinstance(weight, Sum):
            return decoded(name, weight.base, f"{part}.base") + decoded(name, weight.residual, f"{part}.residual")
        return stored.restored(name, stored.value(name, part))

    def dense(name: str) -> Dense:
        weight = checkpoint.resolve(name)
        return Dense(tuple(weight.shape), "f32", lambda: decoded(name, weight))

    planned = {t.name: dense(t.name) for t in plan.tensors if t.name in checkpoint.weights}
    return checkpoint.with_weights(planned)
