"""The float32 reference module (eager attention) on a checkpoint opened from disk."""

from __future__ import annotations

from typing import Any

import numpy as np


def run(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Outputs of the checkpoint at `job["artifact"]` for `input_ids` (b, s) int64 and optional `attention_mask`."""
    import torch

    from tightship.modelview import ModelView
    from tightship.opening import open_checkpoint

    torch.set_num_threads(int(job.get("threads", 1)))
    view = ModelView(open_checkpoint(job["artifact"]))
    outputs = view.outputs(arrays["input_ids"], arrays.get("attention_mask"))
    return {"version": str(torch.__version__)}, outputs
