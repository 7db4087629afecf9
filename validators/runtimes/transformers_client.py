"""transformers as a client of the published safetensors: its own loader, every tensor accounted for.

Job: `artifact` (directory), `mode`, `threads`. `graph` loads in float32 with weights decompressed once and activations
left alone; `shipped` loads as a user would (`dtype="auto"`, activation quantization live). An adapter with corrections
is applied, factored modules take the place of linear ones. With `mapped`, `graph` keeps weights in their stored type
and widens those of one module at a time, while it runs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import architecture_for
from tightship.errors import Malformed, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Class-name suffix in config.json -> the Auto class a user would call; anything else loads as AutoModel.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
# quant_method -> the package that transformers needs to load it.
PACKAGES = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}
# quant_method -> what decodes it here, where transformers' own loader wants a GPU, or a package that is not installed.
# Names, config.json and the class are transformers' all the same.
DECODED = {"gptq": "onnxruntime-genai", "awq": "onnxruntime-genai", "fp8": "transformers' FP8 code"}
# Static scales of activations and caches: of no use where transformers decodes the weights on loading. Loaded as
# shipped, they must find their place.
_DROPPED = (".input_scale", ".input_zero_point", ".input_global_scale", ".k_scale", ".v_scale")
OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits")


def run(job: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Outputs for `input_ids` (b, s) int64 and optional `attention_mask`, or other named inputs, one row at a time.

    Raises:
        ImportError: the package that loads this quantization is not installed.
        Malformed: a tensor is missing, unexpected or of another shape for transformers.
    """
    directory = Path(job["artifact"])
    config = json.loads((directory / "config.json").read_text())
    if "quantization_config" in config:
        _require_package(str(config["quantization_config"].get("quant_method")))
    import torch

    torch.set_num_threads(int(job.get("threads", 1)))
    mode = str(job.get("mode", "graph"))
    model = load(directory, config, "mapped" if mode == "graph" and job.get("mapped") else mode)
    rows: list[dict[str, np.ndarray]] = []
    with torch.inference_mode():
        for index in range(len(next(iter(arrays.values())))):
            inputs = {key: torch.from_numpy(array[index : index + 1].copy()) for key, array in arrays.items()}
            if index == 0:
                # Under load a process's first pass came out some 1e-5 off (relative), all later ones bit for bit equal.
                _outputs(model, inputs)
            rows.append(_outputs(model, inputs))
    joined = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]} if rows else {}
    method = (config.get("quantization_config") or {}).get("quant_method")
    decoder = {"decoder": DECODED[method]} if method in DECODED else {}
    return {"class": type(model).__name__, "dtype": str(model.dtype), "version": _version(), **decoder}, joined


def load(directory: Path, config: dict[str, Any], mode: str) -> PreTrainedModel:
    """The model as transformers loads it from `directory`, in eval mode. See the module docstring for `mode`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quantization = config.get("quantization_config")
    narrow = mode == "shipped" or (mode == "mapped" and not quantization)
    options: dict[str, Any] = {"dtype": "auto" if narrow else torch.float32}
    if config.get("low_rank") or (quantization and quantization["quant_method"] in DECODED):
        return _from_decoded(directory, config, options["dtype"])
    if quantization and quantization["quant_method"] == "compressed-tensors" and _dequantize(config, mode):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    auto = getattr(transformers, auto_class(config))
    model, info = auto.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation=architecture_for(config).attention(config),
        output_loading_info=True,
        **options,
    )
    check_loading(info, dropped=_DROPPED if "quantization_config" in options else ())
    model = _corrected(model, directory)
    return widened_in_use(model.eval()) if mode == "mapped" and narrow else model.eval()


def _from_decoded(directory: Path, config: dict[str, Any], dtype: Any) -> PreTrainedModel:
    """The class of config.json with weights that `DECODED` decoded; every tensor accounted for, as in `load`."""
    import torch
    import transformers

    from tightship.validators.stored_safetensors import SafetensorsFiles

    files = SafetensorsFiles(directory)
    settings = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    settings.__dict__.pop("quantization_config", None)
    state = {name: torch.from_numpy(np.ascontiguousarray(files.decoded(name))) for name in files.weights()}
    auto = getattr(transformers, auto_class(config))
    kind = getattr(transformers, (config.get("architectures") or [auto.__name__])[0], auto)
    options = {
        "attn_implementation": architecture_for(config).attention(config),
        "dtype": settings.dtype if dtype == "auto" else dtype,
    }
    if config.get("low_rank"):
        return _corrected(
            _factored(kind._from_config(settings, **options), config["low_rank"], state), directory
        ).eval()
    model, info = kind.from_pretrained(None, config=settings, state_dict=state, output_loading_info=True, **options)
    check_loading(info)
    return _corrected(model, directory).eval()


def _factored(model: Any, ranks: dict[str, int], state: dict[str, Any]) -> Any:
    """The model with factored modules and the tensors of `state`, all of them and no others."""
    from tightship.validators.runtimes.low_rank_modules import factored

    narrow = model.dtype
    model = factored(model, ranks, {name: tuple(tensor.shape) for name, tensor in state.items()}).to(narrow)
    keys = model.load_state_dict(state, strict=False)
    tied = set(model.get_expanded_tied_weights_keys())
    check_loading({"missing_keys": set(keys.missing_keys) - tied, "unexpected_keys": keys.unexpected_keys})
    return model


def _corrected(model: Any, directory: Path) -> Any:
    """The model with the adapter that lies beside it, if there is one."""
    from tightship.validators.runtimes.low_rank_modules import with_adapter

    adapter = directory / "adapter"
    return with_adapter(model, adapter) if adapter.is_dir() else model


def widened_in_use(model: PreTrainedModel) -> PreTrainedModel:
    """The model computing in float32, while no more than one module's parameters at a time are float32.

    A module's own parameters are widened, exactly, when it is called, and put back when it returns.
    """
    narrow: dict[int, list[tuple[Any, Any]]] = {}

    def widen(module: Any, _args: Any) -> None:
        narrow[id(module)] = [(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()]
        for parameter, data in narrow[id(module)]:
            parameter.data = data.float()

    def restore(module: Any, _args: Any, _result: Any) -> None:
        for parameter, data in narrow.pop(id(module)):
            parameter.data = data

    for module in model.modules():
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(restore)
    return model


def _dequantize(config: dict[str, Any], mode: str) -> bool:
    """Whether to decode on loading: transformers 5.23 loads asymmetric weights and families with a `packed_note` in no
    other way, and decodes all by one group where there are several (docs/formats/compressed-tensors.md). Otherwise they
    are decoded before they are used. Decoding also leaves activations alone, so all but `shipped` needs it where they
    would be quantized.
    """
    groups = list(config["quantization_config"].get("config_groups", {}).values())
    symmetric = all((group.get("weights") or {}).get("symmetric", True) for group in groups)
    live = mode != "shipped" and any(group.get("input_activations") for group in groups)
    noted = architecture_for(config).packed_note is not None
    return len(groups) == 1 and (mode == "graph" or live or not symmetric or noted)


def auto_class(config: dict[str, Any]) -> str:
    """Name of the Auto class for the first of config.json's `architectures`."""
    name = str((config.get("architectures") or [""])[0])
    return next((auto for suffix, auto in AUTO_CLASSES.items() if name.endswith(suffix)), "AutoModel")


def check_loading(info: dict[str, Any], *, dropped: tuple[str, ...] = ()) -> None:
    """Demand that transformers found every tensor and used every tensor but those whose names end in `dropped`.

    transformers gives a missing tensor random values and goes on; that must not pass.

    Raises:
        Malformed: names the first tensor at fault.
    """
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "not used"),
        ("mismatched_keys", "of wrong shape"),
    ):
        names = sorted(str(entry) for entry in info.get(key) or ())
        if key == "unexpected_keys":
            names = [name for name in names if not name.endswith(dropped)]
        if names:
            raise Malformed(f"{len(names)} tensors are {what} for transformers, first {names[0]}", tensor=names[0])
    if info.get("error_msgs"):
        raise Malformed(f"transformers could not load the weights: {info['error_msgs'][0]}")


def _require_package(method: str) -> None:
    if method in DECODED:
        return
    package = PACKAGES.get(method)
    if package is None:
        raise Unsupported(f"no client here loads quant_method {method!r}; known: {', '.join(PACKAGES)}")
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"transformers needs the package {package} to load quant_method {method!r}")


def _outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    masked = type(model).__name__.endswith("ForMaskedLM")
    extra = {"output_hidden_states": True} if masked else {}
    out = model(**inputs, **extra)
    found = {key: out[key].float().numpy() for key in OUTPUTS if out.get(key) is not None}
    if masked:
        found["last_hidden_state"] = out.hidden_states[-1].float().numpy()
    return found


def _version() -> str:
    import transformers

    return str(transformers.__version__)
