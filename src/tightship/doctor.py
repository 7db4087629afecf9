"""What is installed, what is missing, which target that costs. Reads package metadata only, imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Need:
    """A package, the oldest version that is safe or works, and what it is for."""

    package: str
    floor: str
    purpose: str
    targets: tuple[str, ...]


# Floors with a security reason: torch 2.10 (weights_only unpickler), transformers 5.3 (code from config), onnx 1.21
# (external data containment).
NEEDS = (
    Need("numpy", "2.0", "arrays", ("gguf", "onnx", "safetensors")),
    Need("numba", "0.60", "search kernels", ("gguf", "onnx", "safetensors")),
    Need("gguf", "0.17", "GGUF names and a second decoder", ("gguf",)),
    Need("cyllama", "0.2.18", "proof in llama.cpp", ("gguf",)),
    Need("torch", "2.10", "reference model, calibrated passes", ("gguf", "onnx", "safetensors")),
    Need("transformers", "5.3", "reference model", ("gguf", "onnx", "safetensors")),
    Need("onnx", "1.21", "ONNX files", ("onnx",)),
    Need("onnx-ir", "1.0", "ONNX graphs", ("onnx",)),
    Need("onnxscript", "0.6", "graph capture", ("onnx",)),
    Need("mobius-onnx", "0.1", "direct graph construction", ("onnx",)),
    Need("onnxruntime", "1.24", "proof of every artifact", ("gguf", "onnx", "safetensors")),
    Need("onnxruntime-genai", "0.10", "proof of decoders in ONNX", ("onnx",)),
    Need("compressed-tensors", "0.15", "proof of quantized safetensors", ("safetensors",)),
    Need("safetensors", "0.6", "a second reader", ("safetensors",)),
    Need("scikit-learn", "1.5", "task metrics", ()),
    Need("sacrebleu", "2.4", "BLEU", ()),
)


def examine() -> dict[str, Any]:
    """Packages with version and state, targets with what they lack, the machine.

    Returns:
        `{"packages": [...], "targets": {container: [missing]}, "machine": {...}, "healthy": bool}`.
    """
    packages = [_package(need) for need in NEEDS]
    targets = {
        container: [
            p["package"] for p, n in zip(packages, NEEDS, strict=True) if container in n.targets and p["state"] != "ok"
        ]
        for container in ("gguf", "onnx", "safetensors")
    }
    return {
        "packages": packages,
        "targets": targets,
        "machine": _machine(),
        "healthy": not any(targets.values()),
    }


def _package(need: Need) -> dict[str, str]:
    try:
        version = importlib.metadata.version(need.package)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version:
        state = "missing"
    else:
        state = "ok" if _numbers(version) >= _numbers(need.floor) else f"older than {need.floor}"
    return {"package": need.package, "version": version or "-", "state": state, "purpose": need.purpose}


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+", maxsplit=1)[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts[:3])


def _machine() -> dict[str, Any]:
    # available memory, not total: what a build may use now
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "free_memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }
