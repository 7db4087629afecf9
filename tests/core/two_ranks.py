"""A build without its proof, to be started alone or under torchrun; run as a program by test_ranks.py.

Usage: two_ranks.py SOURCE OUTPUT WORK
"""

from __future__ import annotations

import sys

import tightship
from tightship import pipeline
from tightship.report import TargetReport

HOW = {"tokens": 1024, "sequence": 32, "batch": 4, "accumulate": 2, "rate": 1e-3}
RECIPE = {
    "passes": [
        {"use": "prune", "with": {"sparsity": 0.5}},
        {"use": "recover", "with": HOW},
        {"use": "distill", "inputs": {"teacher": "source"}, "with": {**HOW, "tokens": 512, "alpha": 1.0}},
    ],
    "targets": [{"to": "safetensors"}],
}


def unproven(_: pipeline.Proofs, artifact: pipeline.Artifact) -> TargetReport:
    """The proof is not what is tested here."""
    return TargetReport(artifact.plan.target.id, 0, artifact.plan.bits_per_weight, 0.0, None, [])


if __name__ == "__main__":
    pipeline.Proofs.of = unproven
    recipe = tightship.Recipe.from_json(RECIPE)
    tightship.build(sys.argv[1], output=sys.argv[2], recipe=recipe, work=sys.argv[3], threads=1)
