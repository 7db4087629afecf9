"""Is everything there, and nothing else? Files, tensors, types, shapes, sizes, and the small files that runtimes read.

Read with the containers' own packages. A fault is a failed check that names the tensor or the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tightship.checkpoint import Checkpoint
from tightship.exporters.gguf_lora import RESIDUAL
from tightship.exporters.onnx_candidates.skeleton import graph_files
from tightship.formats.gguf_shards import file_names
from tightship.formats.packings.modules import PACKINGS
from tightship.report import Check, judge
from tightship.target import Exported, TargetPlan, TensorPlan, sorted_files, total_bytes
from tightship.validators.onnx_twin import twin_faults
from tightship.validators.stored import Stored
from tightship.weights import Alias, Sum

Fault = tuple[str | None, str]  # tensor or None, and a sentence

# GGUF key after the architecture -> hyper-parameter that it must equal.
_GGUF_KEYS = {
    "block_count": "layers",
    "embedding_length": "hidden",
    "feed_forward_length": "ffn",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_dim",
    "expert_count": "experts",
}
# Keys that exporters may write anew in config.json; every other key is the checkpoint's.
_CONFIG_EDITED = frozenset(
    {"dtype", "torch_dtype", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta",
     "rope_local_base_freq", "transformers.js_config"}
)  # fmt: skip


def structure_checks(
    checkpoint: Checkpoint, plan: TargetPlan, directory: Path, exported: Exported, stored: Stored
) -> list[Check]:
    """Every structural check of one artifact."""
    target = plan.target.id
    groups = {
        "files": list(_files(directory, exported)),
        "tensors": list(_tensors(checkpoint, plan, stored)),
        "config": list(_config(checkpoint, plan, directory, exported)),
    }
    return [*(_check(target, metric, faults) for metric, faults in groups.items()), _bytes(plan, directory, exported)]


def unreadable(target: str, error: BaseException) -> Check:
    """The check of an artifact that its own container's package cannot open."""
    what = f"{type(error).__name__}: {error}"
    return _check(target, "readable", [(getattr(error, "tensor", None), f"the artifact cannot be read: {what[:300]}")])


def _check(target: str, metric: str, faults: list[Fault]) -> Check:
    tensor, reason = faults[0] if faults else (None, None)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return judge(
        target=target,
        runtime="reader",
        kind="structure",
        metric=metric,
        value=len(faults),
        op="==",
        threshold=0,
        source="contract",
        reason=f"{reason}{more}" if reason else None,
        tensor=tensor,
    )


def _files(directory: Path, exported: Exported) -> Iterator[Fault]:
    present = sorted_files(directory)
    for name in sorted({*exported.files, exported.main} - set(present)):
        yield None, f"{name} is missing"
    for name in sorted(set(present) - set(exported.files)):
        yield None, f"{name} was not written by the exporter"
    for path in directory.rglob("*"):
        if path.is_symlink():
            yield None, f"{path.name} is a link"


def _tensors(checkpoint: Checkpoint, plan: TargetPlan, stored: Stored) -> Iterator[Fault]:
    if plan.target.container == "onnx":  # one weight becomes several initializers: the proof of values looks for each
        return
    found = stored.listing()
    for tensor in plan.tensors:
        if tensor.stored_as not in found:
            yield tensor.name, f"{tensor.name}: the file has no {tensor.stored_as}"
            continue
        word, shape = found[tensor.stored_as]
        if plan.target.container == "gguf" and word != tensor.storage:
            yield tensor.name, f"{tensor.name} is stored as {word}, planned as {tensor.storage}"
        if plan.target.container == "gguf" and not _fits(tensor, shape):
            yield tensor.name, f"{tensor.name} has shape {shape} in the file, expected {tensor.shape}"
    planned = {tensor.stored_as for tensor in plan.tensors}
    planned |= {f"{t.stored_as}.lora_{side}" for t in plan.tensors if _corrected(checkpoint, t) for side in "ab"}
    stems = tuple({_stem(tensor) for tensor in plan.tensors})
    for name in found:
        if name not in planned and not name.startswith(stems):
            yield name, f"the file holds {name}, which no plan lists"
    for name in checkpoint.infos():
        if name in checkpoint.weights and not _accounted(checkpoint, plan, name):
            yield name, f"{name} is not stored"


def _corrected(checkpoint: Checkpoint, tensor: TensorPlan) -> bool:
    return tensor.name in checkpoint.weights and isinstance(checkpoint.resolve(tensor.name), Sum)


def _stem(tensor: TensorPlan) -> str:
    """What all tensors of a quantized or low-rank module begin with; no other begins with that of a plain tensor."""
    several = " " in tensor.storage or tensor.storage in PACKINGS
    return tensor.name.removesuffix("weight") if several else f"{tensor.stored_as}\0"


def _fits(tensor: TensorPlan, shape: tuple[int, ...]) -> bool:
    """Equal, or a stack of experts of this shape."""
    return tensor.shape in (shape, shape[1:]) and math.prod(shape) > 0


def _accounted(checkpoint: Checkpoint, plan: TargetPlan, name: str) -> bool:
    left_out = plan.target.container == "gguf" and checkpoint.infos()[name].rule.gguf is None
    return left_out or isinstance(checkpoint.weights[name], Alias) or any(t.name == name for t in plan.tensors)


def _config(checkpoint: Checkpoint, plan: TargetPlan, directory: Path, exported: Exported) -> Iterator[Fault]:
    if plan.target.container == "gguf":
        yield from _gguf_config(checkpoint, directory / exported.main)
        return
    published = json.loads((directory / "config.json").read_text("utf-8"))
    for key, value in checkpoint.config.items():
        if key not in _CONFIG_EDITED and published.get(key) != value:
            yield None, f"config.json says {key} = {published.get(key)!r}, the checkpoint {value!r}"
    if plan.target.container == "onnx":
        for path in graph_files(directory / exported.main):
            yield from _onnx_config(checkpoint, directory, path)
    else:
        yield from _index(directory)


def _gguf_config(checkpoint: Checkpoint, path: Path) -> Iterator[Fault]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    arch = fields.get("general.architecture")
    hyper = dict(checkpoint.hyper)
    if "head_dim" in hyper:
        hyper.setdefault("v_dim", hyper["head_dim"])
    for key, name in _GGUF_KEYS.items():
        found, wanted = fields.get(f"{arch}.{key}"), hyper.get(name)
        if isinstance(found, list) and name in hyper:  # one a layer
            wanted = checkpoint.widths(name)
        if name in hyper and found is not None and found != wanted:
            yield None, f"{arch}.{key} is {found}, config.json says {wanted}"
    tokens = fields.get("tokenizer.ggml.tokens")
    table = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if tokens is not None and table is not None and len(tokens) != int(table.shape[1]):
        yield "token_embd.weight", f"{len(tokens)} tokens for {int(table.shape[1])} rows of the embedding"


def _onnx_config(checkpoint: Checkpoint, directory: Path, path: Path) -> Iterator[Fault]:
    import onnx

    model = onnx.load(path, load_external_data=False)
    data = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    for name in sorted(data):
        if not (path.parent / name).is_file() or Path(name).name != name:
            yield None, f"{path.name} wants its data in {name}, which is not beside it"
    domains = {opset.domain for opset in model.opset_import}
    if domains <= {"", "ai.onnx"}:  # the checker knows no contributed operators
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            yield None, f"onnx.checker refuses {path.name}: {str(error).splitlines()[0]}"
    genai = directory / "genai_config.json"
    if genai.is_file():
        config = json.loads(genai.read_text("utf-8"))["model"]
        yield from _genai_config(config, checkpoint, model)
        opened = directory / config["decoder"]["filename"]
        if opened != path:
            yield from twin_faults(path, opened)


def _genai_config(config: Mapping[str, Any], checkpoint: Checkpoint, model: Any) -> Iterator[Fault]:
    hyper = checkpoint.hyper
    decoder = config["decoder"]
    pairs = {"vocab_size": (config.get("vocab_size"), "vocab")}
    for key, name in (("num_hidden_layers", "layers"), ("hidden_size", "hidden"), ("num_attention_heads", "heads")):
        pairs[key] = (decoder.get(key), name)
    for key, (found, name) in pairs.items():
        if name in hyper and found != hyper[name]:
            yield None, f"genai_config.json says {key} = {found}, config.json {hyper[name]}"
    wanted = {decoder["inputs"]["input_ids"], decoder["inputs"].get("attention_mask", "attention_mask")}
    missing = wanted - {i.name for i in model.graph.input}
    if missing:
        yield None, f"genai_config.json names the input {min(missing)}, which the graph lacks"


def _index(directory: Path) -> Iterator[Fault]:
    path = next(directory.glob("*.safetensors.index.json"), None)
    if path is None:
        return
    from safetensors import safe_open

    listed = json.loads(path.read_text("utf-8"))["weight_map"]
    places = {}
    for file in sorted(directory.glob("*.safetensors")):
        places.update(dict.fromkeys(safe_open(file, "np").keys(), file.name))
    for name in sorted({*listed, *places}):
        if listed.get(name) != places.get(name):
            yield name, f"{name} lies in {places.get(name)}, the index says {listed.get(name)}"


def _bytes(plan: TargetPlan, directory: Path, exported: Exported) -> Check:
    """Bytes of the weight files beyond the plan's; ONNX adds its graph, so there it is only reported."""
    if plan.target.container == "gguf":
        weights = [*file_names(exported.main), RESIDUAL]
    else:
        endings = {"safetensors": (".safetensors",), "onnx": (".onnx", ".onnx_data")}
        weights = [name for name in exported.files if name.endswith(endings[plan.target.container])]
    present = [name for name in weights if (directory / name).is_file()]
    exact = plan.target.container != "onnx"
    return judge(
        target=plan.target.id,
        runtime="reader",
        kind="structure",
        metric="bytes_beyond_plan",
        value=total_bytes(directory, present) - plan.file_bytes,
        op="==" if exact else "report",
        threshold=0 if exact else None,
        source="plan",
    )
