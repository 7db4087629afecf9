"""What is compared with what: one cell a format, in it every maker that can make it, the peer first. Data, no code."""

from __future__ import annotations

from typing import Any

Cell = dict[str, Any]

GGUF = ("q2_k", "q3_k_m", "q4_k_m", "iq4_xs", "q5_k_m")
ONNX = ((32, True), (32, False), (128, False))
SAFETENSORS = ((3, 128), (4, 128), (2, 32), (4, 32))
CONTROLLED = ("q3_k_m",)
SUBSETS = ("first", "second", "third")


def _ours(layout: str, **options: Any) -> list[dict[str, Any]]:
    return [{"use": "quantize", "with": {"layout": layout, "solver": "gptq", **options}}]


def _trained(layout: str, times: int) -> list[dict[str, Any]]:
    """GPTQ's codes, then so many times as much text as calibration takes: AutoRound's kind of work."""
    return [
        {
            "use": "qat",
            "with": {"layout": layout, "solver": "gptq", "propagate": 0.5, "tokens": times * 8192, "rate": 5e-4},
        }
    ]


def gguf_cells() -> list[Cell]:
    cells = []
    for scheme in GGUF:
        ours = {"maker": "ours", "passes": [], "scheme": scheme}
        makers = {
            "llama-quantize": {"maker": "llama-quantize", "scheme": scheme},
            "ours": {**ours, "with": {"solver": "gptq"}},
            "ours, mixed": {**ours, "with": {"solver": "gptq", "bytes": "same"}},
            "floor": {**ours, "floor": True, "data_free": True},
        }
        if scheme in CONTROLLED:
            makers["control: moments shuffled"] = {**makers["ours"], "shuffled": True}
            makers["control: the other text"] = {**makers["ours"], "other": True}
        cells.append({"cell": f"gguf {scheme}", "container": "gguf", "makers": makers})
    return cells


def onnx_cells() -> list[Cell]:
    """The same bytes: float32 scales on both sides, zero points of 4 bits; the builder's integers are symmetric."""
    cells = []
    for group, symmetric in ONNX:
        layout = f"int4-g{group}" + ("" if symmetric else "-asym")
        theirs = {"maker": "ort", "bits": 4, "group": group, "symmetric": symmetric, "data_free": True}
        makers: dict[str, Any] = {"ort default": {**theirs, "algorithm": "default"}}
        if symmetric:
            makers["genai builder"] = {"maker": "genai-builder", "group": group, "data_free": True}
        else:
            makers["ort k_quant"] = {**theirs, "algorithm": "k_quant"}
        makers["ours"] = {"maker": "ours", "passes": _ours(layout), "with": {"accuracy_level": 0}}
        cells.append({"cell": f"onnx {layout}", "container": "onnx", "makers": makers})
    return cells


def safetensors_cells() -> list[Cell]:
    cells = []
    for bits, group in SAFETENSORS:
        layout = f"int{bits}-g{group}"
        theirs = {"bits": bits, "group": group, "symmetric": True}
        makers = {
            "llm-compressor": {"maker": "llm-compressor", **theirs},
            "autoround, light": {"maker": "autoround", "iterations": 50, **theirs},
            "autoround": {"maker": "autoround", "iterations": 200, **theirs},
            "ours": {"maker": "ours", "passes": _ours(layout)},
            "ours, trained": {"maker": "ours", "passes": _trained(layout, 8), "trained": True},
            "ours, trained longer": {"maker": "ours", "passes": _trained(layout, 32), "trained": True},
        }
        cells.append({"cell": f"safetensors {layout}", "container": "safetensors", "makers": makers})
    return cells


def lossless_cells() -> list[Cell]:
    """Control: layouts that lose nothing."""
    words = (("gguf", "f32"), ("onnx", "fp32"), ("safetensors", "f32"))
    makers = {
        c: {"maker": "ours", "container": c, "passes": [], "scheme": word, "data_free": True} for c, word in words
    }
    return [{"cell": "lossless", "container": "gguf", "makers": makers}]


def all_cells() -> list[Cell]:
    """Every cell, in the order of the table."""
    return [*gguf_cells(), *safetensors_cells(), *onnx_cells(), *lossless_cells()]
