"""One artifact in a process of its own, so that its time and memory can be told: `python makers.py MAKER JOB.json`.

| maker          | what                                                                                              |
|----------------|---------------------------------------------------------------------------------------------------|
| ours           | passes and exporter of this project, without manifest and proof; `passes` of the job as a recipe's |
| llama-quantize | llama_model_quantize of the cyllama wheel, with the importance matrix of the calibration text      |
| ort            | onnxruntime's MatMulNBitsQuantizer on the float32 graph: `algorithm` default or k_quant            |
| genai-builder  | onnxruntime_genai's model builder, int4                                                           |
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]


def ours(job: Job) -> None:
    """`passes` one after the other, then the target; a target's scheme is solved as `with` says."""
    from tightship.exporters import exporter_for
    from tightship.opening import open_checkpoint
    from tightship.passes import pass_for
    from tightship.passes.base import Run
    from tightship.recipe import Recipe
    from tightship.stages import for_container, scheme_stage
    from tightship.target import Target, no_progress

    if job.get("shuffled"):
        _shuffle_moments()
    checkpoint = open_checkpoint(job["source"])
    figures: dict[str, Any] = {}
    run = Run(
        threads=job["threads"], texts=(Path(job["text"]).read_text(encoding="utf-8"),), tokens=job["tokens"],
        sequence=job["sequence"], report=lambda name, found: figures.__setitem__(name, dict(found)),
    )  # fmt: skip
    for step in job["passes"]:
        work = pass_for(step["use"], step.get("with", {}))
        work.requires(checkpoint)
        checkpoint = work.apply(checkpoint, run)
    target = Target(job["container"], job.get("scheme"), job.get("with", {}))
    exporter = _exporter(target.container, exporter_for)
    stage = scheme_stage(checkpoint, target, exporter, Recipe())
    if stage is not None and not job.get("floor"):
        checkpoint = stage.work.apply(checkpoint, run)
    if job.get("floor"):
        checkpoint, target = _floored(checkpoint, stage.work, run), Target(target.container)
    exporter.export(
        checkpoint, exporter.plan(checkpoint, for_container(target, Recipe())), Path(job["out"]), no_progress
    )
    Path(job["out"], "figures.txt").write_text(json.dumps(figures))


def _exporter(container: str, exporter_for: Callable[..., Any]) -> Any:
    if container != "onnx":
        return exporter_for(container)
    from tightship.validators.parity import judge

    return exporter_for(container, judge=judge)


def _floored(checkpoint: Any, scheme: Any, run: Any) -> Any:
    """Only what lies outside the blocks as the scheme has it, rounded to nearest; the blocks' matrices in Q8_0."""
    from tightship.passes.quantize import Quantize

    linears = {info.name for info in checkpoint.linears()}
    layouts = {name: "q8_0" if name in linears else layout for name, layout in scheme.layouts.items()}
    return Quantize(layouts=layouts).apply(checkpoint, run)


def _shuffle_moments() -> None:
    """Control: every matrix gets its moments with the channels mixed up, the same way each time."""
    from tightship.passes import calibration

    honest = calibration.MomentSums.of

    def mixed(self: Any, name: str, width: int) -> Any:
        found = honest(self, name, width)
        order = np.random.default_rng(0).permutation(width)
        return calibration.Moments(found.second[np.ix_(order, order)], found.tokens)

    calibration.MomentSums.of = mixed  # type: ignore[method-assign]


class _Entry(ctypes.Structure):
    """llama.h: struct llama_model_imatrix_data."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def llama_quantize(job: Job) -> None:
    """The wheel's parameters show the importance pointer but cannot set it; it stands 24 bytes behind `nthread`."""
    import cyllama.llama.llama_cpp as library
    import gguf

    library.disable_logging()
    tensors = {t.name: t.data for t in gguf.GGUFReader(job["imatrix"]).tensors}
    means = {
        name.removesuffix(".in_sum2"): data / tensors[name.replace(".in_sum2", ".counts")]
        for name, data in tensors.items()
        if name.endswith(".in_sum2")
    }
    entries = [_Entry(name.encode(), data.ctypes.data, data.size) for name, data in means.items()]
    table = (_Entry * (len(entries) + 1))(*entries)
    params = library.LlamaModelQuantizeParams()
    marker = 0x5EA5ABE
    params.nthread = marker
    memory = ctypes.string_at(id(params), type(params).__basicsize__)
    place = id(params) + memory.index(marker.to_bytes(4, "little"))
    params.nthread, params.ftype = job["threads"], int(gguf.LlamaFileType[f"MOSTLY_{job['scheme'].upper()}"])
    ctypes.c_void_p.from_address(place + 24).value = ctypes.addressof(table)
    library.model_quantize(str(job["float"]), str(Path(job["out"]) / "model.gguf"), params)


def ort(job: Job) -> None:
    """The head stays float, as in ours."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig, MatMulNBitsQuantizer

    graph = onnx.load(job["float"], load_external_data=False).graph
    inside = {n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and _in_block(n)}
    outside = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm", "Gather") and n.name not in inside]
    quantizer = MatMulNBitsQuantizer(
        job["float"], bits=job["bits"], block_size=job["group"], is_symmetric=job["symmetric"],
        nodes_to_exclude=outside,
        algo_config=KQuantWeightOnlyQuantConfig() if job["algorithm"] == "k_quant" else None,
    )  # fmt: skip
    quantizer.process()
    onnx.load_external_data_for_model(quantizer.model.model, str(Path(job["float"]).parent))
    onnx.save_model(quantizer.model.model, str(Path(job["out"]) / "model.onnx"))


def _in_block(node: Any) -> bool:
    return any(".layers." in name or ".h." in name for name in [node.name, *node.input])


def genai_builder(job: Job) -> None:
    """By its command line; head and embedding stay float, as in ours."""
    float_nodes = "/lm_head/MatMul,/model/embed_tokens/Gather"
    words = [f"block_size={job['group']}", "accuracy_level=0", f"nodes_to_exclude={float_nodes}"]
    out = Path(job["out"])
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", job["source"], "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache"), "--extra_options", *words]
    subprocess.run(command, check=True)
    _name_head_size(out, int(json.loads(Path(job["source"], "config.json").read_text())["head_dim"]))


def _name_head_size(out: Path, size: int) -> None:
    """The builder leaves the cache's last dimension symbolic; whoever makes an empty cache needs the number."""
    import onnx

    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if "key" in value.name or "value" in value.name:
            value.type.tensor_type.shape.dim[3].dim_value = size
    onnx.save_model(model, str(out / "model.onnx"))


MAKERS = {"ours": ours, "llama-quantize": llama_quantize, "ort": ort, "genai-builder": genai_builder}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
