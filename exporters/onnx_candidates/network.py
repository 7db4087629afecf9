"""A small language for graphs: tensors by role, operators by name, no data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import Architecture
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.graph_edits import OPSET
from tightship.exporters.onnx_candidates.skeleton import BATCH, PAST, SEQUENCE, TOTAL, Feed, Skeleton

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _INT64 = 1, 7
# Operators whose output has the shape of their first input.
_ELEMENTWISE = ("Add", "Mul", "Div", "Tanh", "Sigmoid", "Relu", "Gelu")
_ALIKE = (*_ELEMENTWISE, "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Attention")
_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Network:
    """Collects inputs, nodes, initializers and outputs of one graph.

    Args:
        config: config.json.
        architecture: roles of the tensors.
        shapes: of the stored tensors, matrices (out, in).
        plus_one: norms multiply by 1 + weight.
        norm_eps: of norms where the config has no key for it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        plus_one: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.shapes = shapes
        self.plus_one = plus_one
        self.norm_eps = norm_eps
        self.hyper = architecture.hyper(config)
        self.feeds: dict[str, Feed] = {}
        self._names: dict[tuple[int | None, str], dict[str, str]] = {}
        for name, info in architecture.lookup(config).items():
            if name in shapes:
                part = "bias" if name.endswith("bias") else "weight"
                self._names.setdefault((info.block, info.rule.role), {}).setdefault(part, name)
        self._values: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._cache: dict[int, tuple[Any, ...]] = {}
        self._present: list[tuple[str, ir.Value, tuple[Any, ...]]] = []

    # What the model is

    @property
    def vocabulary(self) -> int:
        """Rows of the token table."""
        return self.rows(None, "token_embd")

    @cached_property
    def resolved(self) -> Any:
        """transformers' config object."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.config["model_type"]].from_dict(dict(self.config))

    def rotary(self) -> Any:
        """transformers' rotary embedding of this config: frequencies and scaling."""
        import transformers

        kind = getattr(transformers, self.architecture.classes[0])
        module = sys.modules[kind.__module__]
        found = [name for name in vars(module) if name.endswith("RotaryEmbedding")]
        if len(found) != 1:
            raise Unsupported(f"{kind.__name__} has {len(found)} rotary embeddings")
        return getattr(module, found[0])(self.resolved)

    def has(self, block: int | None, role: str) -> bool:
        """Whether the checkpoint has a weight of this role."""
        return "weight" in self._names.get((block, role), {})

    def rows(self, block: int | None, role: str) -> int:
        """Outputs of a linear, or entries of a table."""
        return self.shapes[self._name(block, role, "weight")][0]

    def _name(self, block: int | None, role: str, part: str) -> str:
        found = self._names.get((block, role), {}).get(part)
        if found is None:
            raise Unsupported(f"the checkpoint has no {role} {part}" + ("" if block is None else f" in block {block}"))
        return found

    # Layers

    def lookup(self, role: str, indices: ir.Value) -> ir.Value:
        """Rows of a table."""
        import onnx_ir as ir

        table = self._fed(self._name(None, role, "weight"))
        found = self.op("Gather", table, indices, axis=0)
        width = self.shapes[self._name(None, role, "weight")][1]
        found.shape, found.type = ir.Shape([*(indices.shape or (SEQUENCE,)), width]), table.type
        return found

    def linear(
        self,
        x: ir.Value,
        block: int | None,
        role: str,
        *,
        rows: tuple[int, int] | None = None,
        tied: str | None = None,
    ) -> ir.Value:
        """x @ weight.T + bias; `rows` of a fused matrix; the table of role `tied` where the role has no matrix."""
        name = (
            self._name(None, tied, "weight")
            if tied and not self.has(block, role)
            else self._name(block, role, "weight")
        )
        y = self.op("MatMul", x, self._fed(name, rows, transpose=True))
        bias = self._names.get((block, role), {}).get("bias")
        return y if bias is None else self.op("Add", y, self._fed(bias, rows))

    def norm(self, x: ir.Value, block: int | None, role: str) -> ir.Value:
        """LayerNormalization where there is a bias, RMSNormalization where there is none."""
        scale = self._fed(self._name(block, role, "weight"))
        if self.plus_one:
            scale = self.op("Add", scale, self.number(1.0))
        epsilon = float(self.hyper.get("norm_eps", self.norm_eps))
        bias = self._names[block, role].get("bias")
        if bias is None:
            return self.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon)
        return self.op("LayerNormalization", x, scale, self._fed(bias), axis=-1, epsilon=epsilon)

    def activation(self, x: ir.Value) -> ir.Value:
        """The config's activation."""
        word = str(self.hyper["activation"])
        if word in ("silu", "swish"):
            return self.op("Mul", x, self.op("Sigmoid", x))
        if word == "gelu":
            return self.op("Gelu", x)
        if word in _TANH_GELUS:
            return self.op("Gelu", x, approximate="tanh")
        if word == "relu":
            return self.op("Relu", x)
        raise Unsupported(f"activation {word!r} is not written down here")

    # Cache

    def past(self, block: int, heads: int, size: int) -> tuple[ir.Value, ir.Value]:
        """The cache of a block as it comes in."""
        axes = (BATCH, heads, PAST, size)
        key, value = (self.input(f"past_key_values.{block}.{part}", axes, _FLOAT) for part in ("key", "value"))
        self._cache[block] = (BATCH, heads, TOTAL, size)
        return key, value

    def keep(self, block: int, grown: Sequence[ir.Value]) -> None:
        """The cache of a block as it goes out."""
        names = (f"present.{block}.key", f"present.{block}.value")
        self._present += [(name, v, self._cache[block]) for name, v in zip(names, grown, strict=True)]

    def present(self) -> None:
        """Make the grown cache an output."""
        for name, value, axes in self._present:
            self.output(name, value, axes)

    # Graph

    def input(self, name: str, axes: Sequence[int | str], kind: int = _INT64) -> ir.Value:
        """A graph input."""
        if name not in self._values:
            self._inputs.append(self._value(name, axes, kind))
        return self._values[name]

    def output(self, name: str, value: ir.Value, axes: Sequence[int | str]) -> None:
        """Name a value as a graph output."""
        import onnx_ir as ir

        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(axes)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a node."""
        return self.ops(kind, *inputs, **attributes)[0]

    def ops(self, kind: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Sequence[ir.Value]:
        """All outputs of a node; shapes are noted where they follow from the first input."""
        import onnx_ir as ir

        node = ir.node(kind, list(inputs), attributes, num_outputs=outputs)
        node.name = f"{kind}_{len(self._nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = node.name if not index else f"{node.name}.{index}"
        first = inputs[0]
        if first.shape is not None and (kind in _ALIKE or kind == "MatMul"):
            axes: list[Any] = list(first.shape)
            if kind == "MatMul":
                axes[-1] = inputs[1].shape[-1] if inputs[1].shape is not None else None
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(axes), first.type
        self._nodes.append(node)
        return node.outputs

    def number(self, value: float) -> ir.Value:
        """A float scalar."""
        return self.constant(f"float.{value!r}", np.asarray(value, np.float32))

    def integer(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(f"int.{value}", np.asarray(value, np.int64))

    def integers(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant("ints." + ".".join(map(str, values)), np.asarray(values, np.int64))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer with data."""
        import onnx_ir as ir

        if name not in self._values:
            value = self._value(name, array.shape, ir.DataType.from_numpy(array.dtype).value)
            value.const_value = ir.tensor(array, name=name)
        return self._values[name]

    def skeleton(self) -> Skeleton:
        """The finished graph."""
        import onnx_ir as ir

        initializers = [v for n, v in self._values.items() if n in self.feeds or v.const_value is not None]
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=initializers,
            opset_imports={"": OPSET},
            name="main",
        )
        return Skeleton(ir.Model(graph, ir_version=10), self.feeds)

    def _fed(self, name: str, rows: tuple[int, int] | None = None, *, transpose: bool = False) -> ir.Value:
        shape = self.shapes[name] if rows is None else (rows[1] - rows[0], *self.shapes[name][1:])
        key = name + (f".rows{rows[0]}-{rows[1]}" if rows else "") + (".t" if transpose else "")
        self.feeds[key] = Feed(name, rows, transpose)
        return self._values.get(key) or self._value(key, shape[::-1] if transpose else shape, _FLOAT)

    def _value(self, name: str, axes: Sequence[int | str], kind: int) -> ir.Value:
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(ir.DataType(kind)), shape=ir.Shape(axes))
        self._values[name] = value
        return value
