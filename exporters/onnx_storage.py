"""How each kind of weight is stored in an ONNX file, and the nodes that read it.

| weight                      | read by | nodes                                                     | storage         |
|-----------------------------|---------|-----------------------------------------------------------|-----------------|
| Dense                       | any     | the initializer, behind Cast where it is f16 or bf16       | FLOAT, BFLOAT16 |
| Quantized, affine           | MatMul  | com.microsoft.MatMulNBits, or DequantizeLinear and MatMul  | MatMulNBits 4   |
| Quantized with free minimum | MatMul  | MatMulNBits, plus block sums of the input times the minima | MatMulNBits 4   |
| Quantized, affine           | Gather  | GatherBlockQuantized, or Gathers and DequantizeLinear      | as named        |
| Quantized, values of a table | MatMul | Cast, Gather from the table, Mul by scales, MatMul        | UINT4, FLOAT8   |
| Factored                    | MatMul  | MatMul by the right factor, then by the left               | of the factors  |
| Sum                         | MatMul  | base plus residual                                        | of the parts    |

`plan` and `export` ask the same functions, so that a plan's bytes are the file's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tightship.dtypes import BY_NUMPY, DType
from tightship.dtypes import dtype as dtype_of
from tightship.errors import Unsupported
from tightship.formats.onnx_writer import Initializer, packed_nbytes
from tightship.formats.packings import matmul_nbits, onnx_blocked, onnx_table
from tightship.formats.packings.matmul_nbits import NBits
from tightship.layout import Arrays, Layout
from tightship.target import Exact, Refused
from tightship.weights import Dense, Factored, Quantized, Stored

IN_FLOAT32 = ", widened when loaded"  # ends the word of a storage that ONNX Runtime decodes once
_NARROW = ("f16", "bf16")  # kept as they are behind a Cast; ONNX Runtime's CPU computes in f32
_INTEGER_LEVEL = 4  # of MatMulNBits: activations are rounded to int8
_DECODED_WHOLE = (2, 8)  # bits that have no float32 kernel
_ONNX_WORDS = {1: "FLOAT", 10: "FLOAT16", 16: "BFLOAT16", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL"}


@dataclass(frozen=True)
class Style:
    """What a target asks of every tensor.

    Attributes:
        portable: standard operators only.
        accuracy_level: of MatMulNBits as shipped: 0 or 1 compute in f32, 4 with int8 activations.
        dynamic: inputs of each matrix that has one scale a row are rounded to 8 bits, token by token.
        rounded: the same, for some of them in calibrated ranges, as the checkpoint says.
        half: products and attention are computed in float16.
        one_node: the experts of a block are one node of ONNX Runtime.
        last: logits are those of the last token, unless more are asked for.
    """

    portable: bool = False
    accuracy_level: int = 4
    dynamic: bool = False
    rounded: bool = False
    half: bool = False
    one_node: bool = False
    last: bool = False

    @property
    def integers(self) -> bool:
        """Whether matrices go to the integer kernels."""
        return self.dynamic or self.rounded

    @property
    def fused(self) -> bool:
        """Whether the graph itself may hold ONNX Runtime's own operators."""
        return not self.portable and not self.integers


def storage(weight: Stored, style: Style, *, table: bool = False) -> Exact | Refused:
    """How a weight is stored, and its bytes, from its type and shape alone. `table` marks an embedding."""
    if isinstance(weight, Dense):
        stored = stored_dtype(weight)
        return Exact(_ONNX_WORDS.get(stored.onnx or 0, stored.name), math.prod(weight.shape) * stored.itemsize)
    if isinstance(weight, Quantized) and onnx_table.fits(weight.layout):
        return _table_storage(weight.layout, weight.shape, table=table)
    if isinstance(weight, Quantized):
        return _quantized_storage(weight, style, table=table)
    if table:
        return Refused("a low-rank embedding has no lookup in ONNX", ("f32", "int8-g32"))
    parts = (weight.left, weight.right) if isinstance(weight, Factored) else (weight.base, weight.residual)
    answers = [storage(part, style) for part in parts]
    refusal = next((a for a in answers if isinstance(a, Refused)), None)
    if refusal:
        return refusal
    exact = [a for a in answers if isinstance(a, Exact)]
    word = (" @ " if isinstance(weight, Factored) else " + ").join(a.storage for a in exact)
    return Exact(word, sum(a.nbytes for a in exact))


def by_channel(weight: Quantized, style: Style) -> bool:
    """Whether a matrix goes to the integer kernel: symmetric 8 bits, one scale a row, rounded activations."""
    layout = weight.layout
    fits = layout.kind == "affine" and layout.bits == 8 and layout.symmetric  # type: ignore[attr-defined]
    return style.integers and fits and layout.block == 0


def _table_storage(layout: Layout, shape: tuple[int, int], *, table: bool) -> Exact | Refused:
    if table:
        return Refused(f"{layout.name} has no lookup in ONNX", ("int4-g32", "int8-g32"))
    shapes = onnx_table.shapes(layout, *shape)
    word = "FLOAT8E4M3FN" if shapes["codes"][0] == onnx_blocked.FLOAT8 else "UINT4 of a table"
    scaled = " times scales" if "scales" in shapes else ""
    return Exact(f"{word}{scaled}{IN_FLOAT32}", sum(_packed_bytes(*entry) for entry in shapes.values()))


def _quantized_storage(weight: Quantized, style: Style, *, table: bool) -> Exact | Refused:
    rows, cols = weight.shape
    if by_channel(weight, style) and not table:
        shapes = onnx_blocked.channel_shapes(rows, cols).values()
        return Exact("DequantizeLinear UINT8, by channel", sum(_packed_bytes(*entry) for entry in shapes))
    found = matmul_nbits.nbits_for(weight.layout, cols, table=table)
    if isinstance(found, Refused):
        return found
    refusal = _no_lookup(weight, found) if table else _too_slow(found, style)
    if refusal:
        return refusal
    if style.portable:
        blocked = blocked_of(weight, table=table)
        word = {2: "UINT8", 3: "INT8", 21: "UINT4", 22: "INT4"}[blocked.code_type]
        return Exact(f"DequantizeLinear {word}, block {found.block}", blocked.nbytes(rows))
    spec = _with_zero_points(nbits_of(weight, table=table), table=table)
    return Exact(
        f"{'GatherBlockQuantized' if table else 'MatMulNBits'} {spec.bits} bit, block {spec.block}", spec.nbytes(rows)
    )


def _no_lookup(weight: Quantized, found: NBits) -> Refused | None:
    cols = weight.shape[1]
    if found.offsets:
        return Refused(f"{weight.layout.name} has a free minimum, which a lookup cannot add", ("int8-g32", "int4-g32"))
    if cols % found.block:
        return Refused(f"a lookup needs rows of whole blocks of {found.block}, found {cols} columns", ("bf16", "f16"))
    return None


def _too_slow(found: NBits, style: Style) -> Refused | None:
    level = style.accuracy_level
    if style.portable or level == _INTEGER_LEVEL or found.bits not in _DECODED_WHOLE:
        return None
    reason = (
        f"at accuracy level {level} ONNX Runtime decodes {found.bits} bits anew for every product, slower than float32"
    )
    return Refused(reason, ("int4-g32",))


def stored_dtype(weight: Dense) -> DType:
    """The DType in the file: matrices in f16 and bf16 stay, everything else that is float is f32.

    Raises:
        Unsupported: f64, which f32 cannot hold.
    """
    if weight.dtype == "f64":
        raise Unsupported("a float64 tensor does not fit float32", hint="cast it with an f32 target first")
    source = dtype_of(weight.dtype)
    if not source.is_float:
        return source
    return source if weight.dtype in _NARROW and len(weight.shape) > 1 else dtype_of("f32")


def dense_initializer(name: str, weight: Dense, *, turned: bool) -> Initializer:
    """The initializer of a dense weight, (in, out) where `turned`."""
    stored = stored_dtype(weight)
    shape = weight.shape[::-1] if turned else weight.shape

    def read() -> np.ndarray:
        data = weight.read().astype(stored.numpy, copy=False)
        return data.T if turned else data

    return Initializer(name, stored.onnx or 0, tuple(shape), math.prod(shape) * stored.itemsize, read)


def operand_initializers(name: str, weight: Quantized, style: Style, *, table: bool = False) -> dict[str, Initializer]:
    """Initializers of a quantized weight by operand name, in the order of the node's inputs. Packed once, when written.

    Raises:
        Unsupported: ONNX has no exact form of this layout; the message names the nearest.
    """
    answer = storage(weight, style, table=table)
    if isinstance(answer, Refused):
        raise Unsupported(f"ONNX cannot store this: {answer.reason}", tensor=name, hint=", ".join(answer.nearest))
    rows, cols = weight.shape
    if onnx_table.fits(weight.layout):
        shapes = onnx_table.shapes(weight.layout, rows, cols)
        return _packed_once(name, shapes, lambda: onnx_table.pack(weight.layout, weight.read()))
    if by_channel(weight, style) and not table:
        shapes = onnx_blocked.channel_shapes(rows, cols)
        return _packed_once(name, shapes, lambda: onnx_blocked.pack_channels(weight.read()))
    if style.portable:
        blocked = blocked_of(weight, table=table)
        return _packed_once(
            name, blocked.shapes(rows), lambda: onnx_blocked.pack(weight.layout, weight.read(), blocked)
        )
    spec = _with_zero_points(nbits_of(weight, table=table), table=table)
    kinds = {key: (of_numpy(dtype), shape) for key, (dtype, shape) in spec.shapes(rows).items()}
    return _packed_once(name, kinds, lambda: matmul_nbits.pack(weight.layout, weight.read(), spec))


def blocked_of(weight: Quantized, *, table: bool) -> onnx_blocked.Blocked:
    """The DequantizeLinear form of a weight; a table of an odd number of rows has no pairs to look up."""
    return onnx_blocked.Blocked(nbits_of(weight, table=table), whole=table and weight.shape[0] % 2 == 1)


def _packed_bytes(kind: int, shape: tuple[int, ...]) -> int:
    return packed_nbytes(shape, onnx_blocked.BITS[kind])


def nbits_of(weight: Quantized, *, table: bool = False) -> NBits:
    """The MatMulNBits form of a weight whose storage was found exact before."""
    spec = matmul_nbits.nbits_for(weight.layout, weight.shape[1], table=table)
    if isinstance(spec, Refused):
        raise Unsupported(spec.reason, hint=", ".join(spec.nearest))
    return spec


def _with_zero_points(spec: NBits, *, table: bool) -> NBits:
    """A lookup by ONNX Runtime's operator always gets them: execution providers disagree about the default."""
    return dataclasses.replace(spec, zero_points=True) if table else spec


def _packed_once(
    name: str, kinds: Mapping[str, tuple[int, tuple[int, ...]]], pack: Callable[[], Arrays]
) -> dict[str, Initializer]:
    """Operand -> initializer; the packed arrays are let go when the last operand has been written."""
    held: Arrays = {}

    def reader(key: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if key not in held:
                held.update(pack())
            return held.pop(key)

        return read

    return {
        key: Initializer(f"{name}.{key}", kind, shape, packed_nbytes(shape, onnx_blocked.BITS[kind]), reader(key))
        for key, (kind, shape) in kinds.items()
    }


def of_numpy(kind: np.dtype) -> int:
    """TensorProto type of a NumPy type."""
    return int(BY_NUMPY[np.dtype(kind)].onnx or 0)
