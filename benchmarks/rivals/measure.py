"""Figures of one artifact, and how two artifacts compare."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 3  # windows that are drawn together: neighbours in a book are alike
DRAWS = 4000
NOISE = 1e-6  # nats: where both compute the same function, ratios are those of float32's last bits


def kl_by_window(original: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(windows,) float64: mean KL(original || found) in nats of logits (windows, positions, vocabulary)."""
    return np.array([_kl(a, b) for a, b in zip(original, found, strict=True)])


def _kl(original: np.ndarray, found: np.ndarray) -> float:
    p, q = (_log_softmax(x.astype(np.float64)) for x in (original, found))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def ratio(ours: np.ndarray, peer: np.ndarray) -> tuple[float, float, float]:
    """Ratio of mean KL, with the 2.5 % and 97.5 % points of a bootstrap over blocks of paired windows."""
    starts = np.arange(0, len(ours), BLOCK)
    sums = np.array([[x[s : s + BLOCK].sum() for s in starts] for x in (ours, peer)])
    drawn = np.random.default_rng(0).integers(0, len(starts), (DRAWS, len(starts)))
    ratios = sums[0][drawn].sum(axis=1) / sums[1][drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(ours.sum() / peer.sum()), float(low), float(high)


def artifact_bytes(container: str, out: Path) -> int:
    """GGUF: the file. Elsewhere: codes, scales and zero points of quantized matrices (0 where there are none)."""
    if container == "gguf":
        return next(out.glob("*.gguf")).stat().st_size
    if container == "onnx":
        return _onnx_bytes(out / "model.onnx")
    from safetensors import safe_open

    total = 0
    for file in sorted(out.rglob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name.endswith(("weight_packed", "weight_scale", "weight_zero_point", "qweight", "scales", "qzeros")):
                    found = tensors.get_slice(name)
                    total += int(np.prod(found.get_shape())) * _SIZES[found.get_dtype()]
    return total


_SIZES = {"I32": 4, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


def _onnx_bytes(path: Path) -> int:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    used = {name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input[1:]}
    sizes = {t.name: int(np.prod(t.dims)) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
             for t in graph.initializer if t.name in used}  # fmt: skip
    return sum(sizes.values())


def table(report: dict[str, Any], about: str) -> str:
    """One table a cell group: mean KL over slices, ratio to the peer with its interval, bytes, time, memory."""
    lines = [
        "# Rivals",
        "",
        about.split("\n\n")[2].replace("\n", " "),
        "",
        about.split("\n\n")[3].replace("\n", " "),
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in report["settings"].items()]
    lines += [
        "",
        "| cell | maker | KL by slice | ratio to the peer | 95 % | bytes | CPU s | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lost = []
    for cell in dict.fromkeys(row["cell"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["cell"] == cell]
        peer = rows[0]["maker"]
        for maker in dict.fromkeys(row["maker"] for row in rows):
            lines.append(_line(cell, [r for r in rows if r["maker"] == maker], [r for r in rows if r["maker"] == peer]))
        lost += _lost(cell, rows)
    lines += ["", f"Rows of ours that lose to a rival of their cell: {', '.join(lost) or 'none'}."]
    return "\n".join(lines) + "\n"


def _lost(cell: str, rows: list[dict[str, Any]]) -> list[str]:
    """Rows of ours above a rival's by more than the interval, on the slices that both were made from."""
    found = []
    makers = list(dict.fromkeys(row["maker"] for row in rows))
    mine = [maker for maker in makers if maker.startswith("ours")]
    for ours, theirs in itertools.product(mine, [m for m in makers if not m.startswith(("ours", "control", "floor"))]):
        sides = [{row["subset"]: row["kl"] for row in rows if row["maker"] == maker} for maker in (ours, theirs)]
        both = [subset for subset in sides[0] if subset in sides[1]]
        values = [np.concatenate([side[subset] for subset in both]) for side in sides]
        if np.mean(values[1]) > NOISE and ratio(*values)[1] > 1:
            found.append(f"{cell}, {ours} ({ratio(*values)[0]:.2f} of {theirs})")
    return found


def _line(cell: str, rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    against = {row["subset"]: row["kl"] for row in peers}
    paired = [(row["kl"], against.get(row["subset"], peers[0]["kl"])) for row in rows]
    ours, theirs = (np.concatenate([pair[side] for pair in paired]) for side in (0, 1))
    by_slice = ", ".join(f"{np.mean(row['kl']):.3g}" for row in rows)
    compared = ["", ""]
    if np.mean(theirs) > NOISE:
        found, low, high = ratio(ours, theirs)
        compared = [f"{found:.3f}", f"{low:.3f} to {high:.3f}"]
    told = sorted((row for row in rows if row["seconds"] is not None), key=lambda row: row["seconds"])
    costs = [f"{told[len(told) // 2][key]:.0f}" for key in ("seconds", "peak_mib")] if told else ["", ""]
    words = [cell, rows[0]["maker"], by_slice, *compared, str(rows[0]["bytes"])]
    return "| " + " | ".join([*words, *costs]) + " |"
