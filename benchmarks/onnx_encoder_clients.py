"""What optimum computes with our encoders, and transformers with their weights.

    python benchmarks/onnx_encoder_clients.py --optimum PYTHON [CLASS ...] [--out DIR]

For each class of tests/data/onnx_models.json (by default one of every task) a random model is exported, opened by the
ORTModelFor... of its task in the interpreter PYTHON (transformers 4.57, optimum-onnx), and given a batch of texts of
different lengths, padded on the right. Written are the relative L2 distances of its outputs, at real tokens, from those
of transformers 5 in float32; none may exceed 1e-5. Writes onnx_encoder_clients.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx_clients import child, exported, random_model

LIMIT = 1e-5
LENGTHS = (11, 6, 9)
TASKS = {
    "ForMaskedLM": ("ORTModelForMaskedLM", ("logits",)),
    "ForSequenceClassification": ("ORTModelForSequenceClassification", ("logits",)),
    "ForTokenClassification": ("ORTModelForTokenClassification", ("logits",)),
    "ForQuestionAnswering": ("ORTModelForQuestionAnswering", ("start_logits", "end_logits")),
    "Model": ("ORTModelForFeatureExtraction", ("last_hidden_state",)),
}
CLASSES = ("BertForMaskedLM", "ModernBertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
           "BertForQuestionAnswering", "DistilBertForQuestionAnswering", "BertModel")  # fmt: skip
OPTIMUM = """
import json, sys, torch
import optimum.onnxruntime as o
from importlib.metadata import version
job = json.load(open(sys.argv[1]))
model = getattr(o, job["kind"]).from_pretrained(job["artifact"], use_io_binding=False, subfolder="onnx")
out = model(**{k: torch.tensor(v) for k, v in job["inputs"].items()})
versions = {n: version(n) for n in ("transformers", "optimum-onnx", "onnxruntime")}
print(json.dumps({"outputs": {n: out[n].tolist() for n in job["outputs"]}, "versions": versions}))
"""


def distances(kind: str, optimum: str) -> tuple[dict[str, float], dict[str, str]]:
    """Relative L2 of each output, and the client's versions."""
    import torch

    from tightship.modelview import ModelView

    small = random_model(kind)
    client, outputs = next(entry for suffix, entry in TASKS.items() if kind.endswith(suffix))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(5, int(small.hyper["vocab"]), mask.shape)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if small.config.get("type_vocab_size"):
        inputs["token_type_ids"] = np.zeros_like(ids)
    view = ModelView(small)
    module = view.module()
    with view.computing():
        expected = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    with tempfile.TemporaryDirectory() as folder:
        artifact = exported(small, Path(folder) / kind)
        job: dict[str, Any] = {"artifact": str(artifact), "kind": client, "outputs": outputs}
        job["inputs"] = {name: array.tolist() for name, array in inputs.items()}
        answer = child([optimum], OPTIMUM, ".py", job, None)
    pairs = {name: (np.array(answer["outputs"][name]), expected[name].numpy()) for name in outputs}
    return {name: _apart(got, want, mask) for name, (got, want) in pairs.items()}, answer["versions"]


def _apart(got: np.ndarray, want: np.ndarray, mask: np.ndarray) -> float:
    if want.shape[:2] == mask.shape:
        got, want = got[mask == 1], want[mask == 1]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("classes", nargs="*", default=CLASSES)
    parser.add_argument("--optimum", required=True, help="an interpreter with optimum-onnx")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    result: dict[str, Any] = {"limit": LIMIT, "classes": {}}
    for kind in options.classes:
        result["classes"][kind], result["versions"] = distances(kind, options.optimum)
        print(kind, result["classes"][kind], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "onnx_encoder_clients.json").write_text(json.dumps(result, indent=1) + "\n")
    worst = max(value for found in result["classes"].values() for value in found.values())
    if not worst <= LIMIT:
        raise SystemExit(f"an output is {worst:.1e} off, the limit is {LIMIT:g}")


if __name__ == "__main__":
    main()
