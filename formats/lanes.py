# ruff: noqa: ARG001, ARG005  numba fixes the signatures of what it calls
"""Sixteen float32 side by side, as one value inside numba kernels: explicit SIMD with IEEE arithmetic.

A block search is a chain of sums in a fixed order, so it cannot be vectorised along its block; it is vectorised across
sixteen blocks instead. LLVM maps `<16 x float>` to one, two or four registers and never fuses or reorders, so every CPU
gives the same bits.

Inside `numba.njit`: `load(tile, row)` and `store(tile, row, v)` move a row of a C-contiguous float32 (n, 16) array;
`splat(x)` fills all lanes; `+ - * /` and comparisons work lane by lane (a scalar counts as splat); `where(mask, a, b)`
selects; masks combine with `&` and `|`, and `some(mask)` tells whether any lane is set.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic, overload

COUNT = 16
_FLOATS = ir.VectorType(ir.FloatType(), COUNT)
_INTS = ir.VectorType(ir.IntType(32), COUNT)
_BITS = ir.VectorType(ir.IntType(1), COUNT)


class Lanes(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__("float32x16")


class Mask(types.Type):
    """Sixteen truth values."""

    def __init__(self) -> None:
        super().__init__("mask16")


lanes, mask = Lanes(), Mask()


@register_default(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


@register_default(Mask)
class _MaskModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _BITS)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_INTS, None))


@intrinsic
def splat(typingctx: Any, scalar: Any) -> Any:
    """All lanes equal to a number (rounded to float32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[0], signature.args[0], types.float32))

    return lanes(scalar), codegen


def _row_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kind, row = signature.args[0], context.cast(builder, args[1], signature.args[1], types.intp)
    tile = context.make_array(kind)(context, builder, args[0])
    start = builder.mul(row, ir.Constant(row.type, COUNT))
    return builder.bitcast(builder.gep(tile.data, [start]), _FLOATS.as_pointer())


def _check_tile(tile: Any) -> bool:
    return isinstance(tile, types.Array) and tile.dtype == types.float32 and tile.ndim == 2 and tile.layout == "C"


@intrinsic
def load(typingctx: Any, tile: Any, row: Any) -> Any:
    """Row `row` of a float32 (n, 16) array."""
    if not _check_tile(tile):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_row_pointer(context, builder, signature, args), align=4)

    return lanes(tile, row), codegen


@intrinsic
def store(typingctx: Any, tile: Any, row: Any, value: Any) -> Any:
    """Write row `row` of a float32 (n, 16) array."""
    if not _check_tile(tile):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _row_pointer(context, builder, signature, args), align=4)
        return context.get_dummy_value()

    return types.none(tile, row, lanes), codegen


def _unary(emit: Any) -> Any:
    @intrinsic
    def op(typingctx: Any, a: Any) -> Any:
        return lanes(lanes), lambda context, builder, signature, args: emit(builder, args[0])

    return op


def _binary(emit: Any, result: types.Type = lanes, operand: types.Type = lanes) -> Any:
    @intrinsic
    def op(typingctx: Any, a: Any, b: Any) -> Any:
        return result(operand, operand), lambda context, builder, signature, args: emit(builder, *args)

    return op


def _call(name: str) -> Any:
    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        signature = ir.FunctionType(_FLOATS, [_FLOATS])
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [value])

    return emit


def _nearest(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Adding 1.5 * 2^23 leaves no fraction bits: ties to even, for magnitudes below 2^22."""
    anchor = _splat(builder, ir.Constant(ir.FloatType(), 12582912.0))
    return builder.fsub(builder.fadd(value, anchor), anchor)


absolute = _unary(_call("llvm.fabs.v16f32"))
root = _unary(_call("llvm.sqrt.v16f32"))
nearest = _unary(_nearest)
less = _binary(lambda b, x, y: b.fcmp_ordered("<", x, y), mask)
smaller = _binary(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
larger = _binary(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@intrinsic
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """Lane by lane, `a` where the mask is set, else `b`."""
    return lanes(mask, lanes, lanes), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def some(typingctx: Any, condition: Any) -> Any:
    """True if any lane of the mask is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.bitcast(args[0], ir.IntType(COUNT))
        return builder.icmp_unsigned("!=", word, ir.Constant(word.type, 0))

    return types.boolean(mask), codegen


def _overload(symbol: Any, emit: Any, result: types.Type = lanes, operand: types.Type = lanes) -> None:
    """Give lanes (or masks) an operator; a scalar on either side is splat first."""
    op = _binary(emit, result, operand)

    def both(a: Any, b: Any) -> Any:
        return op(a, b)

    def scalar_right(a: Any, b: Any) -> Any:
        return op(a, splat(b))

    def scalar_left(a: Any, b: Any) -> Any:
        return op(splat(a), b)

    @overload(symbol)
    def choose(a: Any, b: Any) -> Any:
        if a == operand and b == operand:
            return both
        if operand == lanes and a == lanes and isinstance(b, types.Number):
            return scalar_right
        if operand == lanes and b == lanes and isinstance(a, types.Number):
            return scalar_left
        return None


_overload(operator.add, lambda b, x, y: b.fadd(x, y))
_overload(operator.sub, lambda b, x, y: b.fsub(x, y))
_overload(operator.mul, lambda b, x, y: b.fmul(x, y))
_overload(operator.truediv, lambda b, x, y: b.fdiv(x, y))
_overload(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), mask)
_overload(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), mask)
_overload(operator.ge, lambda b, x, y: b.fcmp_ordered(">=", x, y), mask)
_overload(operator.ne, lambda b, x, y: b.fcmp_unordered("!=", x, y), mask)
_overload(operator.and_, lambda b, x, y: b.and_(x, y), mask, mask)
_overload(operator.or_, lambda b, x, y: b.or_(x, y), mask, mask)
