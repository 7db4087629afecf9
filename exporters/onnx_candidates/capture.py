"""Graphs captured from transformers' own code by `torch.onnx.export(dynamo=True)`: slow, and right for most families.

No weight is read: parameters are views of one zero, and what each of them is on disk is noted by name. Inputs, axes and
dummies come from `export_configs`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import OPSET, name_contract, quiet, split_gemms
from tightship.exporters.onnx_candidates.skeleton import DECODER_TASKS, IMAGES, SEQ2SEQ, Feed, Skeleton, outputs_of
from tightship.exporters.onnx_candidates.tensor_views import meta_tensors, view_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_PREFIX = "model."  # of the module inside the wrapper


class CaptureCandidate:
    """torch.export of the family's transformers class, eager attention, flat KV cache."""

    rewrites = (
        "Gemm split into MatMul and Add",
        "constants folded, norms fused by onnxscript",
        "names of the contract",
    )

    @property
    def source(self) -> str:
        import torch

        return f"torch.onnx {torch.__version__} dynamo, opset {OPSET}"

    def build(
        self, config: Mapping[str, Any], architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
    ) -> Skeleton:
        if architecture.task == SEQ2SEQ:
            raise Unsupported("an encoder and its decoder are not captured")
        module = hollow_module(config, architecture)
        model = _export(module, architecture)
        feeds = _feeds(model, module, meta_tensors(architecture, config, shapes))
        for name in feeds:
            model.graph.initializers[name].const_value = None  # nothing may be folded from a zero
        split_gemms(model)
        _optimize(model)
        name_contract(model)
        return Skeleton(model, {name: feed for name, feed in feeds.items() if name in model.graph.initializers})


def hollow_module(config: Mapping[str, Any], architecture: Architecture) -> Any:
    """The transformers module with real buffers and parameters that take no memory.

    Raises:
        Unsupported: transformers has no such class.
    """
    import torch
    import transformers

    named = [c for c in config.get("architectures") or () if c in architecture.classes]
    kind = getattr(transformers, (named or list(architecture.classes))[0], None)
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"this transformers has no class for {config.get('model_type')!r}")
    resolved = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    resolved._attn_implementation = architecture.attention(config)
    with _parameters_on_meta():
        module = kind(resolved).eval()
        module.tie_weights()
    hollow: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:  # tied ones stay one
                zero = torch.zeros(()).expand(parameter.shape)
                part._parameters[name] = hollow.setdefault(id(parameter), torch.nn.Parameter(zero, requires_grad=False))
    return module


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside keep their buffers and put their parameters on the meta device."""
    import torch

    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        original(self, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is shared must stay the same object
            self._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def _export(module: Any, architecture: Architecture) -> ir.Model:
    import torch

    decoder = architecture.task in DECODER_TASKS
    heads = cache_heads(module) if decoder else []
    arguments, names, axes = _inputs(module, architecture.task, heads)
    if architecture.task == IMAGES:
        wrapper = _images(module)
    else:
        wrapper = _decoder(module) if decoder else _encoder(module, outputs_of(architecture))
    cache = [f"{i}.{part}" for i in range(len(heads)) for part in ("key", "value")]
    outputs = [*outputs_of(architecture), *(f"present.{name}" for name in cache)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), quiet("torch"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapper.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[*names, *(f"past_key_values.{name}" for name in cache)],
            output_names=outputs,
            dynamic_shapes=axes,
        )
    if program is None:
        raise Unsupported("torch.onnx gave no program")
    return program.model


def cache_heads(module: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((heads, size) of keys, (heads, size) of values) for each layer, asked of the module without computing."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        out = module(torch.zeros((1, 1), dtype=torch.long), use_cache=True)
        layers = out.past_key_values.layers
        return [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in ((x.keys, x.values) for x in layers)]


def _inputs(module: Any, task: str, heads: list[Any]) -> tuple[tuple[Any, ...], list[str], tuple[Any, ...]]:
    """Dummy arguments, names of those that are not cache, and dynamic axes."""
    from tightship.exporters.onnx_candidates.export_configs import DUMMY_SHAPES, export_config

    made = export_config(module.config.model_type, task)(module.config, **({"cache_heads": heads} if heads else {}))
    dummies = made.generate_dummy_inputs(framework="pt", **DUMMY_SHAPES)
    axes: dict[str, Any] = dict(made.inputs)
    if heads:
        axes["past_key_values"] = [(axes["past_key_values"],) * 2] * len(heads)
    names = [name for name in made.inputs if name != "past_key_values"]
    return tuple(dummies[name] for name in made.inputs), names, tuple(axes[name] for name in made.inputs)


def _decoder(module: Any) -> Any:
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):
        """logits and the grown cache; every layer keeps its whole past, windows are the mask's business."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
            cache = DynamicCache()
            for index, (key, value) in enumerate(past_key_values):
                cache.update(key, value, index)
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
            return (out.logits, *present)

    return Decoder()


def _images(module: Any) -> Any:
    import torch

    class Images(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).logits

    return Images()


def _encoder(module: Any, outputs: tuple[str, ...]) -> Any:
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            both = "logits" in outputs and "last_hidden_state" in outputs
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=both, **types)
            return tuple(out[name] if name in out else out.hidden_states[-1] for name in outputs)

    return Encoder()


def _feeds(model: ir.Model, module: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, Feed]:
    """What each parameter is on disk; a tied one goes by whichever of its names the checkpoint has."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name in list(model.graph.initializers):
        own = name.removeprefix(_PREFIX)
        if own not in parameters:
            continue
        on_disk = next((n for n in names[id(parameters[own])] if n in stored), None)
        if on_disk is None:
            raise Unsupported(f"transformers' parameter {own} is not stored under that name")
        feed = view_of(own, stored[on_disk], stored)
        if tuple(stored[on_disk].shape) != tuple(parameters[own].shape):
            raise Unsupported(f"transformers wants {own} as {tuple(parameters[own].shape)}, found another shape")
        found[name] = feed
    return found


def _optimize(model: ir.Model) -> None:
    """Fold constants (parameters are none by now), drop what nobody reads, put normalizations together."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.fusion import _rms_normalization

    with quiet("onnx_ir", "onnxscript"):
        optimizer.optimize_ir(model)
        rewriter.rewrite(model, pattern_rewrite_rules=_rms_normalization.rms_normalization_rules)
        optimizer.optimize_ir(model)
