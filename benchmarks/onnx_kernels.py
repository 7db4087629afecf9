"""One matrix product in ONNX Runtime's CPU kernels, each way that our ONNX artifacts store a matrix, against float32.

    python benchmarks/onnx_kernels.py [--size 2048] [--seconds 0.3] [--out DIR]

A square matrix is multiplied with 1, 16 and 128 rows (decoding, a few, a prompt), one thread, weights written by our
packings. The figure is the processor time of a float32 MatMul over that of the kernel, both the fastest of interleaved
runs: above 1 the kernel is faster than float32. `exporters/onnx_speed.py` holds what `plan` tells of it.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from tightship.formats.layouts import parse_layout
from tightship.formats.packings import matmul_nbits, onnx_blocked

ROWS = (1, 16, 128)
CASES = [(bits, block, level) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256) for level in (0, 4)]


def model(nodes: list[Any], weights: dict[str, tuple[int, tuple[int, ...], np.ndarray]]) -> ort.InferenceSession:
    initializers = [
        helper.make_tensor(name, kind, shape, array.tobytes(), raw=True)
        for name, (kind, shape, array) in weights.items()
    ]
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(onnx.ModelProto.SerializeToString(proto), options, providers=["CPUExecutionProvider"])


def plain(w: np.ndarray) -> ort.InferenceSession:
    weights = {"w": (TensorProto.FLOAT, w.T.shape, np.ascontiguousarray(w.T))}
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], weights)


def nbits(w: np.ndarray, bits: int, block: int, level: int) -> ort.InferenceSession:
    layout = parse_layout(f"int{bits}-g{block}")
    spec = matmul_nbits.NBits(bits, block, w.shape[1], zero_points=False)  # also those that we do not write
    arrays = matmul_nbits.pack(layout, layout.quantize(w), spec)
    kinds = {"B": TensorProto.UINT8, "scales": TensorProto.FLOAT}
    weights = {key: (kinds[key], arrays[key].shape, arrays[key]) for key in kinds}
    attributes = {"K": w.shape[1], "N": w.shape[0], "bits": bits, "block_size": block, "accuracy_level": level}
    return model([helper.make_node("MatMulNBits", ["x", *kinds], ["y"], domain="com.microsoft", **attributes)], weights)


def rounded(w: np.ndarray, nodes: list[Any], codes: str = "UINT8") -> ort.InferenceSession:
    """Integer kernels: `nodes` make `r` of x; both are multiplied to `p` or, without more nodes, to `y`."""
    layout = parse_layout("int8-channel")
    shapes = onnx_blocked.channel_shapes(*w.shape)
    arrays = onnx_blocked.pack_channels(layout.quantize(w))
    weights = {key: (*shapes[key], arrays[key]) for key in shapes}
    if codes == "INT8":
        signed = (arrays["codes"] ^ np.uint8(128)).view(np.int8)
        weights = {"codes": (TensorProto.INT8, signed.shape, signed), "scales": weights["scales"]}
    for name, value in {"share": 1 / 127, "tiny": 2.0**-100, "one": 1.0}.items():
        weights[name] = (TensorProto.FLOAT, (), np.asarray(value, np.float32))
    weights["zero"] = (TensorProto.UINT8, (), np.asarray(128, np.uint8))
    weights["last"] = (TensorProto.INT64, (1,), np.asarray([-1], np.int64))
    operands = [key for key in ("codes", "scales", "zero_points") if key in weights]
    nodes = [helper.make_node("DequantizeLinear", operands, ["d"], axis=1), *nodes]
    read = {name for node in nodes for name in node.input}
    return model(nodes, {name: held for name, held in weights.items() if name in read})


def by_tensor(w: np.ndarray, codes: str) -> ort.InferenceSession:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        helper.make_node("MatMul", ["r", "d"], ["y"]),
    ]
    return rounded(w, nodes, codes)


def by_token(w: np.ndarray, codes: str) -> ort.InferenceSession:
    """As `exporters/onnx_activations.py` writes it."""
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", "last"], ["m"]),
        helper.make_node("Mul", ["m", "share"], ["s0"]),
        helper.make_node("Max", ["s0", "tiny"], ["s"]),
        helper.make_node("Div", ["x", "s"], ["u"]),
        helper.make_node("QuantizeLinear", ["u", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["r"]),
        helper.make_node("MatMul", ["r", "d"], ["p"]),
        helper.make_node("Mul", ["p", "s"], ["y"]),
    ]
    return rounded(w, nodes, codes)


INTEGERS = {
    "int8-dynamic, by token, UINT8 weights": lambda w: by_token(w, "UINT8"),
    "not offered: by token, INT8 weights": lambda w: by_token(w, "INT8"),
    "not offered: by tensor, UINT8 weights": lambda w: by_tensor(w, "UINT8"),
    "not offered: by tensor, INT8 weights": lambda w: by_tensor(w, "INT8"),
}


def fastest(sessions: list[ort.InferenceSession], x: np.ndarray, seconds: float) -> list[float]:
    """Processor seconds of the fastest run of each, taking turns."""
    best = [np.inf] * len(sessions)
    end = time.perf_counter() + seconds * len(sessions)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for index, session in enumerate(sessions):
            start = time.process_time()
            session.run(None, {"x": x})
            best[index] = min(best[index], time.process_time() - start)
    return best


def instructions() -> str:
    """What MLAS chooses its kernels by."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return " ".join(word for word in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if word in flags)


def typical_error(session: ort.InferenceSession, x: np.ndarray, w: np.ndarray) -> float:
    """The median over tokens of the relative L2 distance to the product in float32."""
    expected = x @ w.T
    off = np.linalg.norm(session.run(None, {"x": x})[0] - expected, axis=1)
    return float(np.median(off / np.linalg.norm(expected, axis=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    w = rng.standard_normal((options.size, options.size)).astype(np.float32)
    base = plain(w)
    kernels = {f"{bits} bit, block {block}, level {level}": (bits, block, level) for bits, block, level in CASES}
    found: dict[str, dict[int, float]] = {}
    errors: dict[str, float] = {}
    for name in [*kernels, *INTEGERS]:
        session = nbits(w, *kernels[name]) if name in kernels else INTEGERS[name](w)
        found[name] = {}
        for rows in ROWS:
            x = rng.standard_normal((rows, options.size)).astype(np.float32)
            x *= rng.lognormal(0, 1, (rows, 1)).astype(np.float32)  # tokens differ in size
            theirs, ours = fastest([base, session], x, options.seconds)
            found[name][rows] = round(theirs / ours, 2)
        errors[name] = round(typical_error(session, x, w), 4)
    result = {"size": options.size, "instructions": instructions(), "onnxruntime": version("onnxruntime")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "onnx_kernels.json").write_text(
        json.dumps({**result, "speed": found, "error": errors}, indent=1) + "\n"
    )
    lines = [f"# MatMul of {options.size} x {options.size} against float32, onnxruntime {result['onnxruntime']}", ""]
    lines += [f"One thread, {result['instructions']}; error: relative L2 of a token, the median over 128.", ""]
    lines += ["| weights | 1 row | 16 rows | 128 rows | error of a token |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(f"{v}x" for v in rows.values()) + f" | {errors[name]} |"
        for name, rows in found.items()
    ]
    (options.out / "onnx_kernels.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
