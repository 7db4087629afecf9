"""ONNX Runtime on the CPU as judge of an ONNX artifact.

Job: `artifact` (directory), `main` (file name), `mode`, `threads`, `want`:

| mode    | session                                                                                                  |
|---------|----------------------------------------------------------------------------------------------------------|
| graph   | every optimisation off, products at accuracy level 0 (float32 accumulation), activations never rounded   |
| shipped | the defaults of ONNX Runtime, attributes as stored                                                       |

| want    | computed                                                                                                 |
|---------|----------------------------------------------------------------------------------------------------------|
| outputs | one pass over the whole sequence, the past empty                                                         |
| decode  | a prefill of `prefill` tokens (default half), then one token at a time through the KV cache               |

Arrays in: `input_ids` (b, s) int64, optional `attention_mask`, `position_ids`, `token_type_ids` and
`global_attention_mask` of the same shape; or `pixel_values` (b, channels, height, width) float32. Of an encoder and its
decoder `input_ids` are the source's, and `decoder_input_ids` (b, t) int64 the target's (see onnx_pair.py).
Position ids default to the count of unmasked tokens before each token. Arrays out: those of the graph's `logits`,
`last_hidden_state`, `start_logits` and `end_logits` that there are, float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.exporters.onnx_candidates.skeleton import DECODER, ENCODER, KEPT
from tightship.validators.runtimes.fixed_shapes import fixed_axes, in_boxes

if TYPE_CHECKING:
    import onnxruntime as ort

    from tightship.validators.runtimes.onnx_pair import Pair

Arrays = dict[str, np.ndarray]
FLOAT32_LEVEL = 0
OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits")
_TYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}
_ZERO_UNLESS_GIVEN = ("token_type_ids", "global_attention_mask")
_ROWS_AT_ONCE = 8
_LEVELLED = ("MatMulNBits", "QMoE")
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear")


def run(job: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """See the module docstring. The dict names the version and what was computed.

    Raises:
        ImportError: onnxruntime is not installed.
        Malformed: the graph does not keep the contract of inputs and outputs.
    """
    import onnxruntime as ort

    path = Path(job["artifact"]) / job["main"]
    mapped = bool(job.get("mapped"))
    graph = open_graph(path, str(job.get("mode", "graph")), int(job.get("threads", 1)), mapped=mapped)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(next(iter(arrays.values()))), _ROWS_AT_ONCE):
        rows = {key: array[start : start + _ROWS_AT_ONCE] for key, array in arrays.items()}
        if job.get("want", "outputs") == "decode":
            length = rows.get("decoder_input_ids", rows["input_ids"]).shape[1]
            found = graph.decode(rows, int(job.get("prefill") or max(length // 2, 1)))
        else:
            found = graph.outputs(rows)
        for key, value in found.items():
            parts.setdefault(key, []).append(value)
    answer = {"version": ort.__version__, "mode": job.get("mode", "graph"), "want": job.get("want", "outputs")}
    return answer, {key: np.concatenate(values) for key, values in parts.items()}


def open_graph(path: Path, mode: str, threads: int = 1, *, mapped: bool = False) -> Graph | Pair:
    """The graph in a file, or a decoder with the encoder beside it; see the module docstring for `mode`."""
    from tightship.validators.runtimes.onnx_pair import Pair

    def opened(name: str) -> Graph:
        return Graph(open_session(path.parent / name, mode, threads, mapped=mapped))

    return Pair(opened(ENCODER), opened(DECODER)) if path.name == DECODER else opened(path.name)


def open_session(path: Path, mode: str, threads: int = 1, *, mapped: bool = False) -> ort.InferenceSession:
    """A CPU session on an ONNX file; see the module docstring for `mode`.

    With `mapped`, a `graph` session leaves weights where they lie in their file instead of packing copies of them.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised; the log would say it a second time
    source: str | bytes = str(path)
    if mode == "graph":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(FLOAT32_LEVEL))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        source = in_float32(path)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def in_float32(path: Path) -> bytes:
    """The graph, its weights left outside, with activations in float32.

    MatMulNBits and QMoE are told so by their attribute; what comes back from (Dynamic)QuantizeLinear is replaced by
    what went in.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _ROUNDING}
    plain = {n.output[0]: rounded[n.input[0]] for n in model.graph.node if n.input and n.input[0] in rounded}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            node.input[:] = [plain.get(name, name) for name in node.input]
    for node in model.graph.node:
        if node.op_type in _LEVELLED:
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", FLOAT32_LEVEL)])
    return model.SerializeToString()


class Graph:
    """A session by the contract of inputs and outputs: masks, positions and the KV cache."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.names = [o.name for o in session.get_outputs()]
        self.given = {i.name for i in session.get_overridable_initializers()}  # inputs with a default
        self.past = [name for name in self.inputs if name.startswith("past_")]
        self.present = [re.sub(r"^past(_key_values)?", "present", name) for name in self.past]
        missing = [name for name in self.present if name not in self.names]
        if missing:
            raise Malformed(f"the graph takes a past but gives no {missing[0]}")
        self.wanted = [name for name in OUTPUTS if name in self.names]
        if not self.wanted:
            raise Malformed(f"the graph gives none of {', '.join(OUTPUTS)}, but {', '.join(self.names[:4])}")

    def outputs(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """One pass, past empty."""
        given = self._complete(arrays)
        rows, tokens = fixed_axes(next(iter(self.inputs.values())).shape)
        if rows or tokens:
            return in_boxes(given, rows, tokens, lambda box: self.step(box, {})[0])
        return self.step(given, self.empty_past(len(next(iter(given.values())))))[0]

    def decode(self, arrays: Mapping[str, np.ndarray], prefill: int) -> Arrays:
        """`prefill` tokens at once, the rest one by one; outputs joined to the shape of one pass."""
        if not self.past:
            raise Unsupported("this graph has no KV cache to decode with")
        given = self._complete(arrays)
        length = given["input_ids"].shape[1]
        past = self.empty_past(len(given["input_ids"]))
        parts: dict[str, list[np.ndarray]] = {}
        for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
            window = {key: value[:, start:stop] for key, value in given.items()}
            window["attention_mask"] = given["attention_mask"][:, :stop]
            found, past = self.step(window, past)
            for key, value in found.items():
                parts.setdefault(key, []).append(value)
        return {key: np.concatenate(values, axis=1) for key, values in parts.items()}

    def greedy(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """(count,) int64 most likely tokens after a prompt (s,) int64, through the cache."""
        past = self.empty_past(1)
        total = len(prompt)
        step = self._complete({"input_ids": prompt[None].astype(np.int64)})
        found: list[int] = []
        while True:
            out, past = self.step(step, past)
            found.append(int(out["logits"][0, -1].argmax()))
            if len(found) == count:
                return np.array(found, np.int64)
            total += 1
            step = {
                "input_ids": np.array([[found[-1]]], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.array([[total - 1]], np.int64),
            }

    def begin(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """The past of a prompt."""
        return self.advance(arrays, self.empty_past(len(arrays["input_ids"])))[1]

    def advance(self, arrays: Mapping[str, np.ndarray], past: Arrays) -> tuple[Arrays, Arrays]:
        """Outputs of the tokens that follow a past, and the past with them in it."""
        return self.step(self._complete(arrays), past)

    def empty_past(self, batch: int) -> Arrays:
        """A cache of no tokens: keys and values of length 0, states of fixed size as zeros."""
        found = {}
        for name in self.past:
            sizes = list(self.inputs[name].shape[1:])
            if name.startswith("past_key_values."):  # heads, length, size
                sizes[1] = 0
            if not all(isinstance(size, int) for size in sizes):
                raise Malformed(f"{name} must be fixed but for batch and length, found {self.inputs[name].shape}")
            found[name] = np.zeros((batch, *sizes), _TYPES[self.inputs[name].type])
        return found

    def _complete(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        if "pixel_values" in arrays:
            return {"pixel_values": arrays["pixel_values"]}
        ids = arrays["input_ids"].astype(np.int64)
        mask = arrays.get("attention_mask", np.ones_like(ids)).astype(np.int64)
        positions = arrays.get("position_ids", np.maximum(mask.cumsum(axis=1) - 1, 0)).astype(np.int64)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        others = {name: arrays.get(name, np.zeros_like(ids)).astype(np.int64) for name in _ZERO_UNLESS_GIVEN}
        return {**given, **others}

    def step(self, given: Mapping[str, np.ndarray], past: Arrays) -> tuple[Arrays, Arrays]:
        """Outputs, and the grown cache, of those given inputs that the graph takes."""
        feeds = {
            name: value.astype(_TYPES[self.inputs[name].type]) for name, value in given.items() if name in self.inputs
        }
        if KEPT in self.given:
            feeds[KEPT] = np.zeros((), np.int64)  # all logits, not the last
        unfed = [name for name in self.inputs if name not in feeds and name not in past]
        if unfed:
            raise Malformed(f"the graph wants an input that nobody provides: {unfed[0]}")
        values = self.session.run([*self.wanted, *self.present], {**feeds, **past})
        found = {name: np.asarray(v, np.float32) for name, v in zip(self.wanted, values, strict=False)}
        return found, dict(zip(self.past, values[len(self.wanted) :], strict=True))
