"""Run inside llm-compressor's environment: prune matrices with its SparseGPT and Wanda on moments that are given.

    python llmc_pruning.py IN.npz OUT.npz SPARSITY

IN holds `w:NAME` (out, in) float32 and `s:NAME` (in, in) float64, E[x x^T]; OUT gets `METHOD:NAME`, where METHOD is
`sparsegpt`, `wanda`, and both with 2:4.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight as sparsegpt
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight as wanda


def main() -> None:
    source, target, sparsity = sys.argv[1], sys.argv[2], float(sys.argv[3])
    given, found = np.load(source), {}
    for name in [key[2:] for key in given.files if key.startswith("w:")]:
        w, second = given[f"w:{name}"], given[f"s:{name}"]
        for suffix, share, (n, m) in (("", sparsity, (0, 0)), (" 2:4", 0.5, (2, 4))):
            module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            module.weight.data = torch.from_numpy(w.copy())
            hessian = torch.from_numpy(2 * second).float()
            with torch.no_grad():
                kept = sparsegpt(module, {module: hessian}, share, n, m, 128, 0.01, False)
                found[f"sparsegpt{suffix}:{name}"] = (kept[1] if isinstance(kept, tuple) else kept).numpy()
                scalars = torch.from_numpy(np.diagonal(second).copy()).float()
                found[f"wanda{suffix}:{name}"] = wanda(module, {module: scalars}, share, n, m).numpy()
    np.savez(target, **found)


if __name__ == "__main__":
    main()
