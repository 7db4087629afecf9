"""The layers of a model for the graph builder: tensors by role, norms, linears, activations, the KV cache."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.architecture import Architecture, TensorInfo
from tightship.errors import Unsupported
from tightship.exporters.onnx_candidates.families import Family
from tightship.exporters.onnx_candidates.graph_builder import FLOAT, GraphBuilder
from tightship.exporters.onnx_candidates.skeleton import BATCH, PAST, SEQUENCE, TOTAL, Feed
from tightship.per_layer import layer_config, shared_config

if TYPE_CHECKING:
    import onnx_ir as ir

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


class Network(GraphBuilder):
    """One graph of one model.

    Args:
        config: config.json.
        architecture: roles of the tensors.
        shapes: of the stored tensors, matrices (out, in).
        family: what it does that Llama does not.
        stack: of a model with two: `enc` or `dec`. Roles and hyper-parameters of that stack go by their bare names.
        one_node: all experts of a block are one node of ONNX Runtime, on their integers.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        family: Family,
        stack: str | None = None,
        *,
        one_node: bool = False,
    ) -> None:
        super().__init__()
        self.one_node = one_node
        self.config = config
        self.architecture = architecture
        self.shapes = shapes
        self.family = family
        hyper = architecture.hyper(config)
        own = {k.removeprefix(f"{stack}_"): v for k, v in hyper.items() if stack and k.startswith(f"{stack}_")}
        self.hyper = {**hyper, **own}
        self._names: dict[tuple[Any, ...], dict[str, str]] = {}
        for name, info in architecture.lookup(config).items():
            role = info.rule.role if stack is None else _role_in(stack, info)
            if name in shapes and role is not None:
                part = "bias" if name.endswith("bias") else "weight"
                self._names.setdefault((info.block, role, info.expert), {}).setdefault(part, name)
        self._grown: dict[str, tuple[Any, ...]] = {}
        self._present: list[tuple[str, ir.Value, tuple[Any, ...]]] = []

    # What the model is

    @property
    def vocabulary(self) -> int:
        """Rows of the token table."""
        return self.rows(None, "token_embd")

    @property
    def width(self) -> int:
        """Features of a position."""
        return int(self.hyper["hidden"])

    def hyper_of(self, block: int) -> dict[str, Any]:
        """Hyper-parameters as they hold for a block."""
        return self.architecture.hyper(layer_config(self.config, block))

    @cached_property
    def resolved(self) -> Any:
        """transformers' config object."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.config["model_type"]].from_dict(shared_config(self.config))

    def option(self, key: str, default: Any = None) -> Any:
        """A config value as transformers resolves it: its defaults where config.json is silent."""
        value = getattr(self.resolved, key, None)
        return default if value is None else value

    def answer(self, word: str | bool | tuple[str, str]) -> bool:
        """A fact of the family, or the config's word on it: a key that is true, or (key, value) that are so."""
        if isinstance(word, tuple):
            return bool(self.option(word[0]) == word[1])
        return bool(self.option(word)) if isinstance(word, str) else word

    @cached_property
    def rotary(self) -> Any:
        """transformers' rotary embedding of this config: frequencies and scaling."""
        import transformers

        kind = getattr(transformers, self.architecture.classes[0])
        module = sys.modules[kind.__module__]
        found = [name for name in vars(module) if name.endswith("RotaryEmbedding")]
        if len(found) != 1:
            raise Unsupported(f"{kind.__name__} has {len(found)} rotary embeddings")
        return getattr(module, found[0])(self.resolved)

    def has(self, block: int | None, role: str, expert: int | None = None) -> bool:
        """Whether the checkpoint has a weight of this role."""
        return "weight" in self._names.get((block, role, expert), {})

    def rows(self, block: int | None, role: str) -> int:
        """Outputs of a linear, or entries of a table."""
        return self.shapes[self._name(block, role, "weight")][0]

    def _name(self, block: int | None, role: str, part: str, expert: int | None = None) -> str:
        found = self._names.get((block, role, expert), {}).get(part)
        if found is None:
            raise Unsupported(f"the checkpoint has no {role} {part}" + ("" if block is None else f" in block {block}"))
        return found

    # Layers

    def lookup(self, role: str, indices: ir.Value, block: int | None = None) -> ir.Value:
        """Rows of a table."""
        name = self._name(block, role, "weight")
        found = self.op("Gather", self._stored(name), indices, axis=0)
        return self.shaped(found, [*(indices.shape or (SEQUENCE,)), self.shapes[name][1]])

    def linear(
        self,
        x: ir.Value,
        block: int | None,
        role: str,
        *,
        rows: tuple[int, int] | None = None,
        tied: str | None = None,
        expert: int | None = None,
    ) -> ir.Value:
        """x @ weight.T + bias; `rows` of a fused matrix; the table of role `tied` where the role has no matrix."""
        borrowed = tied and not self.has(block, role, expert)
        name = self._name(None, str(tied), "weight") if borrowed else self._name(block, role, "weight", expert)
        y = self.op("MatMul", x, self._stored(name, rows, transpose=True))
        bias = self._names.get((block, role, expert), {}).get("bias")
        return y if bias is None else self.op("Add", y, self._stored(bias, rows))

    def parameter(self, block: int | None, role: str) -> ir.Value:
        """A parameter as it is stored."""
        return self._stored(self._name(block, role, "weight"))

    def bias(self, block: int | None, role: str) -> ir.Value | None:
        """The bias of a role, if it has one, as it is stored."""
        name = self._names.get((block, role, None), {}).get("bias")
        return None if name is None else self._stored(name)

    def parameters(self, block: int | None, role: str) -> list[ir.Value]:
        """Weight and, where there is one, bias as they are stored."""
        bias = self.bias(block, role)
        return [self.parameter(block, role), *([] if bias is None else [bias])]

    def stacked(self, x: ir.Value, block: int, role: str, expert: int) -> ir.Value:
        """x times one matrix of a stack, oriented as `Family.stacked` says, plus its bias."""
        rows = (expert, expert + 1)
        matrix = self.op("Squeeze", self._stored(self._name(block, role, "weight"), rows), self.integers(0))
        if self.family.stacked == "out_in":
            matrix = self.op("Transpose", matrix, perm=[1, 0])
        y = self.op("MatMul", x, matrix)
        bias = self._names[block, role, None].get("bias")
        return y if bias is None else self.op("Add", y, self._stored(bias, rows))

    def matrices(self, block: int, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """On-disk names of the experts' matrices of these roles, expert by expert; they have no biases."""
        experts = range(int(self.hyper["experts"]))
        if any("bias" in self._names.get((block, role, expert), {}) for role in roles for expert in experts):
            raise Unsupported(f"the experts of block {block} have biases")
        return tuple(tuple(self._name(block, role, "weight", expert) for role in roles) for expert in experts)

    def heads_first(self, x: ir.Value, heads: int, size: int = -1) -> ir.Value:
        """(batch, sequence, heads * size) to (batch, heads, sequence, size); a sequence of 0 needs the size."""
        return self.op("Transpose", self.op("Reshape", x, self.integers(0, 0, heads, size)), perm=[0, 2, 1, 3])

    def heads_last(self, x: ir.Value) -> ir.Value:
        """(batch, heads, sequence, size) to (batch, sequence, heads * size)."""
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.integers(0, 0, -1))

    def norm(
        self, x: ir.Value, block: int | None, role: str, *, width: int | None = None, epsilon: float | None = None
    ) -> ir.Value:
        """LayerNormalization where there is a bias or the family says so, RMSNormalization elsewhere.

        `width` is that of a norm without any parameter, `epsilon` that of one that the config does not speak of.
        """
        names = self._names.get((block, role, None), {})
        if names:
            scale = self._stored(self._name(block, role, "weight"))
        else:
            width = width or self.width
            scale = self.constant(f"ones.{width}", np.ones(width, np.float32))
        if names and self.family.norm.endswith("plus_one"):
            scale = self.op("Add", scale, self.number(1.0))
        epsilon = epsilon or float(self.hyper.get("norm_eps", self.family.norm_eps))
        if "bias" in names:
            return self.op("LayerNormalization", x, scale, self._stored(names["bias"]), axis=-1, epsilon=epsilon)
        kind = "LayerNormalization" if self.family.norm.startswith("layer") else "RMSNormalization"
        return self.op(kind, x, scale, axis=-1, epsilon=epsilon)

    def normed(self, x: ir.Value, block: int | None, role: str) -> ir.Value:
        """The norm of a role where the model has it, x where it does not; families without parameters always norm."""
        if self.has(block, role) or (self.family.bare_norms and not role.endswith("post_norm")):
            return self.norm(x, block, role)
        return x

    def activation(self, x: ir.Value) -> ir.Value:
        """The config's activation."""
        # T5 says in one word whether there is a gate, too; what transformers makes of it is told apart
        word = str(self.option("dense_act_fn") or self.hyper.get("activation", self.family.activation))
        if word in ("silu", "swish"):
            return self.op("Mul", x, self.op("Sigmoid", x))
        if word == "gelu":
            return self.op("Gelu", x)
        if word in _TANH_GELUS:
            return self.op("Gelu", x, approximate="tanh")
        if word == "relu":
            return self.op("Relu", x)
        if word == "relu2":
            positive = self.op("Relu", x)
            return self.op("Mul", positive, positive)
        raise Unsupported(f"activation {word!r} is not written down here")

    # Cache

    def past(
        self,
        block: int,
        keys: tuple[int, int],
        values: tuple[int, int],
        *,
        cache: str = "",
        lengths: tuple[str, str] = (PAST, TOTAL),
    ) -> tuple[ir.Value, ir.Value]:
        """A cache of a block as it comes in.

        Args:
            block: its number.
            keys, values: (heads, size).
            cache: what its names have behind the block's number.
            lengths: axes of tokens, coming in and going out.
        """
        names = [f"past_key_values.{block}{cache}.{part}" for part in ("key", "value")]
        shapes = [(BATCH, heads, lengths[0], size) for heads, size in (keys, values)]
        found = [self.input(name, shape, FLOAT) for name, shape in zip(names, shapes, strict=True)]
        for name, (_, heads, _, size) in zip(names, shapes, strict=True):
            self._grown[name] = (BATCH, heads, lengths[1], size)
        return found[0], found[1]

    def keep(self, past: Sequence[ir.Value], grown: Sequence[ir.Value]) -> None:
        """What came in as `past` as it goes out."""
        for old, value in zip(past, grown, strict=True):
            name = str(old.name)
            self._present.append((name.replace("past_key_values", "present", 1), value, self._grown[name]))

    def state(self, block: int, word: str, size: Sequence[int]) -> ir.Value:
        """A state of fixed size of a block, (batch, *size), as it comes in."""
        return self.input(f"past_{word}.{block}", (BATCH, *size), FLOAT)

    def keep_state(self, block: int, word: str, value: ir.Value, size: Sequence[int]) -> None:
        """The same as it goes out."""
        self._present.append((f"present_{word}.{block}", value, (BATCH, *size)))

    def present(self) -> None:
        """Make the grown cache an output."""
        for name, value, axes in self._present:
            self.output(name, value, axes)

    def _stored(self, name: str, rows: tuple[int, int] | None = None, *, transpose: bool = False) -> ir.Value:
        shape = self.shapes[name] if rows is None else (rows[1] - rows[0], *self.shapes[name][1:])
        key = name + (f".rows{rows[0]}-{rows[1]}" if rows else "") + (".t" if transpose else "")
        return self.fed(key, Feed(name, rows, transpose), shape[::-1] if transpose else shape)


def _role_in(stack: str, info: TensorInfo) -> str | None:
    """A role as it is called within one of two stacks, None if it belongs to the other.

    Those of the decoder start with `dec_` or `cross_`, those of the encoder with `enc_` or are bare roles of blocks;
    any other bare role is for both.
    """
    role = info.rule.role
    if role.startswith(("dec_", "enc_")):
        return role[len("dec_") :] if role.startswith(stack) else None
    if stack == "enc":
        return None if role.startswith("cross_") else role
    return role if info.block is None or role.startswith("cross_") else None
