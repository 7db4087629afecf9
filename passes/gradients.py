"""Gradients of the model's own training loss with respect to each linear, window by window.

Decoders: mean cross-entropy of the next token; behind an encoder of the same text, of each of its tokens. Masked
language models: cross-entropy of a seeded 15 % of the tokens, shown as the mask token. The whole model and one gradient
of it are in memory, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tightship.addresses import skeleton
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported
from tightship.modelview import ModelView, shifted
from tightship.passes.base import Run
from tightship.passes.objectives import hidden_tokens, mask_token


def mean_over_windows(
    checkpoint: Checkpoint, run: Run, windows: Sequence[np.ndarray], of: Callable[[Any], Any]
) -> dict[str, np.ndarray]:
    """Mean of `of(gradient)` over windows, (out, in) float32 by on-disk name, for every linear of the blocks.

    Raises:
        Unsupported: the model has no loss of its own (an encoder without a vocabulary).
    """
    import torch

    view = ModelView(checkpoint, threads=run.threads, device=run.device)
    module, places, infos = view.module(), skeleton(checkpoint)[1], checkpoint.infos()
    module.requires_grad_(False)
    names = [info.name for info in checkpoint.linears()]
    parameters = {places[name].parameter: module.get_parameter(places[name].parameter) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    rng = np.random.default_rng(run.seed)
    for done, window in enumerate(windows):
        run.progress("gradients", done, len(windows))
        with view.computing(), torch.enable_grad():
            _loss(view, module, window, rng).backward()
        for key, parameter in parameters.items():
            sums[key].add_(of(parameter.grad))
            parameter.grad = None
    found = {}
    for name in names:
        place = places[name]
        region = sums[place.parameter][place.index]
        flipped = place.turned != infos[name].rule.transposed
        found[name] = (region.T if flipped else region).cpu().numpy() / len(windows)
    return found


def _loss(view: ModelView, module: Any, window: np.ndarray, rng: np.random.Generator) -> Any:
    import torch

    architecture = view.checkpoint.architecture
    ids = torch.from_numpy(window[None]).to(view.device)
    if architecture.task == "text-generation":
        logits = module(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    if architecture.task == "text2text-generation":
        behind = torch.from_numpy(shifted(window[None], view.checkpoint.config)).to(view.device)
        return torch.nn.functional.cross_entropy(
            module(ids, decoder_input_ids=behind, use_cache=False).logits[0], ids[0]
        )
    if architecture.task == "fill-mask" and module.get_output_embeddings() is not None:
        hidden = torch.from_numpy(hidden_tokens(np.ones(ids.shape, bool), rng)).to(view.device)
        shown = ids.masked_fill(hidden, mask_token(view.checkpoint))
        return torch.nn.functional.cross_entropy(module(shown).logits[hidden], ids[hidden])
    raise Unsupported(
        f"a {architecture.family} model without a vocabulary has no loss to take gradients of",
        hint="use magnitude, wanda or sparsegpt",
    )
