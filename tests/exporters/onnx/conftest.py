"""Artifacts of the embedded checkpoints, and what others make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from tightship.checkpoint import Checkpoint
from tightship.dtypes import dtype
from tightship.exporters.to_onnx import OnnxExporter
from tightship.opening import open_checkpoint
from tightship.target import Exported, Target, TargetPlan, no_progress
from tightship.validators.parity import judge
from tightship.validators.runtimes import onnx_runtime
from tightship.weights import Dense, Quantized, Weight

EXAMPLES = Path(__file__).parents[3] / "examples"


@dataclass(frozen=True)
class Lab:
    """Builds into `scratch`, and asks transformers and ONNX Runtime about what was built."""

    scratch: Path
    exporter: OnnxExporter

    def build(
        self, checkpoint: Checkpoint, scheme: str | None = None, **options: object
    ) -> tuple[Path, TargetPlan, Exported]:
        """Artifact directory, plan, what was exported; tensors are rounded to what the scheme wants first."""
        target = Target("onnx", scheme, options)
        solved = self.rounded(checkpoint, self.exporter.layout_for(checkpoint, target))
        directory = self.scratch / f"{target.id}-{len(list(self.scratch.iterdir()))}"
        directory.mkdir()
        plan = self.exporter.plan(solved, target)
        return directory, plan, self.exporter.export(solved, plan, directory, no_progress)

    def rounded(self, checkpoint: Checkpoint, layouts: dict[str, object]) -> Checkpoint:
        """Every tensor rounded to what the scheme wants."""
        changed: dict[str, Weight] = {}
        for name, layout in layouts.items():
            value = checkpoint.resolve(name).value()
            if isinstance(layout, str):
                changed[name] = Dense.of(value.astype(dtype(layout).numpy))
            else:
                changed[name] = Quantized.of(layout, layout.quantize(value))
        return checkpoint.with_weights(changed)

    def expected(self, checkpoint: Checkpoint, directory: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
        """transformers' own loader on the directory's files, decoded weights put in their place."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind = getattr(transformers, checkpoint.config["architectures"][0])
        model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name in checkpoint.weights:
                model.get_parameter(name).copy_(torch.from_numpy(np.array(checkpoint.resolve(name).value())))
            out = model(torch.from_numpy(ids), output_hidden_states=True)
        return {"logits": out.logits.numpy(), "last_hidden_state": out.hidden_states[-1].numpy()}

    def run(self, directory: Path, ids: np.ndarray, **job: object) -> dict[str, np.ndarray]:
        whole = {"artifact": str(directory), "main": "model.onnx", "mode": "graph", **job}
        return onnx_runtime.run(whole, {"input_ids": ids})[1]

    def check_logits(self, checkpoint: Checkpoint, source: Path, directory: Path, ids: np.ndarray) -> None:
        """Against transformers' loader on `source`, in one pass and through the cache, with optimisations off."""
        expected = self.expected(checkpoint, source, ids)["logits"]
        for want in ("outputs", "decode"):
            assert self.apart(self.run(directory, ids, want=want)["logits"], expected) <= 1e-5

    def apart(self, got: np.ndarray, expected: np.ndarray) -> float:
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    def nodes(self, directory: Path, op: str) -> list[tuple[str, dict[str, onnx.TensorProto], dict[str, int]]]:
        """(tensor name, operands, attributes) of each matrix that a node of a type multiplies with."""
        model = onnx.load(directory / "model.onnx")
        initializers = {i.name: i for i in model.graph.initializer}
        joined = {node.output[0]: list(node.input) for node in model.graph.node if node.op_type == "Concat"}
        found = []
        for node in (n for n in model.graph.node if n.op_type == op):
            for names in zip(*(joined.get(name, [name]) for name in node.input[1:]), strict=True):
                operands = {name: initializers[name] for name in names}
                attributes = {a.name: a.i for a in node.attribute} | {"N": initializers[names[0]].dims[0]}
                found.append((names[0].rsplit(".", 1)[0], operands, attributes))
        return found

    def optimized(self, directory: Path) -> list[str]:
        """Types of the nodes that ONNX Runtime runs."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(self.scratch / "optimized.onnx")
        ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return [
            node.op_type for node in onnx.load(self.scratch / "optimized.onnx", load_external_data=False).graph.node
        ]


@pytest.fixture(scope="module")
def ember() -> Checkpoint:
    return open_checkpoint(EXAMPLES / "ember")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, OnnxExporter(judge=judge))
