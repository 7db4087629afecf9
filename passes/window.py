"""Sliding windows: every token attends to the `size` tokens up to itself (Longformer, arXiv:2004.05150; Mistral).

Weights stay as they are; config.json says the window, in the words that the family's class in transformers reads:

| family                                | what changes                                                                |
|---------------------------------------|-----------------------------------------------------------------------------|
| llama                                 | becomes mistral, the same tensors and arithmetic with a window              |
| mistral, mixtral, phi3, starcoder2    | sliding_window                                                              |
| qwen2, qwen3 and their mixtures       | use_sliding_window, sliding_window, max_window_layers; layer_types: all     |
| gemma2, gemma3                        | sliding_window; layer_types: all, or with `layers: listed` as they were     |
| longformer                            | attention_window of every layer (its tokens look half a window either way)  |
| bert, roberta                         | becomes longformer (`longformer.py`)                                        |

Where layers of two kinds alternate, `layers: listed` leaves those that see everything as they are: llama.cpp knows
Gemma in no other form, and Gemma 3 rotates its two kinds by different bases, so it takes nothing else.

Other families have no word for it and are refused. GGUF holds the result where llama.cpp's loader reads a window, and
is refused by its exporter elsewhere, unless the target's `context` is no longer than the window. Global tokens are a
matter of encoders: Longformer's classifiers choose the first (`global_tokens: 1`), its other classes read an input at
run time, which a checkpoint cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tightship.architecture import architecture_for
from tightship.checkpoint import Checkpoint
from tightship.errors import Unsupported, UsageError
from tightship.passes.base import Pass, Run
from tightship.passes.longformer import as_longformer

_PLAIN = ("mistral", "mixtral", "phi3", "starcoder2")
_BY_LAYER = ("gemma2", "gemma3_text")
_ENCODERS = ("bert", "roberta")
_TWO_BASES = ("gemma3_text",)
_QWEN = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class Window(Pass):
    """`size`: tokens that a token sees, itself included. `global_tokens`: how many of an encoder's see everything.

    `layers`: which layers look through the window, all or those that config.json lists as sliding.
    """

    name: ClassVar[str] = "window"
    per_tensor: ClassVar[bool] = True

    size: int
    global_tokens: int = 0
    layers: Literal["all", "listed"] = "all"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"window: size is at least 1 token, found {self.size}")

    def requires(self, checkpoint: Checkpoint) -> None:
        self.outline(checkpoint)

    def apply(self, checkpoint: Checkpoint, run: Run) -> Checkpoint:  # noqa: ARG002
        return self.outline(checkpoint)

    def outline(self, checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.architecture.family in _ENCODERS:
            return as_longformer(checkpoint, self.size, self.global_tokens)
        if self.global_tokens:
            raise Unsupported(
                f"window: a {checkpoint.architecture.family} model has no global tokens", hint="bert and roberta have"
            )
        config = windowed_config(checkpoint.config, int(checkpoint.hyper["layers"]), self.size, self.layers)
        return checkpoint.replace(config=config, architecture=architecture_for(config))


def windowed_config(config: Mapping[str, Any], layers: int, size: int, which: str = "all") -> dict[str, Any]:
    """config.json of the same model behind a window.

    Raises:
        Unsupported: the family has no word for a window.
        UsageError: a size that it cannot have.
    """
    family = str(config.get("model_type"))
    changed: dict[str, Any] = {"sliding_window": size}
    if family in _QWEN:
        changed |= {"use_sliding_window": True, "max_window_layers": 0}
    if which == "listed" and family not in _BY_LAYER:
        raise Unsupported(f"window: a {family} model lists no sliding layers", hint=f"{', '.join(_BY_LAYER)} do")
    if which == "all" and family in _TWO_BASES:
        raise Unsupported(f"window: {family} rotates sliding layers by another base", hint="layers: listed")
    if family in (*_QWEN, *_BY_LAYER):
        changed |= {"layer_types": ["sliding_attention"] * layers} if which == "all" else {}
    elif family == "llama":
        changed |= _as_mistral(config)
    elif family == "longformer":
        if size % 2:
            raise UsageError(f"window: Longformer's window has two equal halves, found {size}")
        changed = {"attention_window": [size] * layers}
    elif family not in _PLAIN:
        raise Unsupported(
            f"window: a {family} model has no word for a sliding window in its config.json",
            hint=f"families that have: llama, {', '.join((*_PLAIN, *_QWEN, *_BY_LAYER, *_ENCODERS))}, longformer",
        )
    return {**config, **changed}


def _as_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise Unsupported(f"window: Mistral, the windowed form of llama, has no {key}")
    classes = [str(name).replace("Llama", "Mistral") for name in config.get("architectures") or []]
    return {"model_type": "mistral", "architectures": classes}
