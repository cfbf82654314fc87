"""Mends Triton's interpreter (TRITON_INTERPRET=1).

It keeps bfloat16 as raw 16-bit patterns and computes on the patterns as if they were integers; its conversion from
float32 truncates. Once mended, each operation on bfloat16 is computed on the values and rounded once, to nearest even,
as hardware does. Its conversions to and from float8_e4m3fn truncate, wrap around beyond 448 and take NaN for a number;
once mended, they round once to nearest even, saturate, and keep NaN. Before Triton 3.8 it also needs a numpy older than
2.4; once mended, it does not.
"""

import numpy as np

# Of what works on patterns, the operations that nothing here needs: on bfloat16 they fail rather than answer wrongly.
REFUSED = ("create_dot", "create_dot_scaled", "create_clampf", "create_erf", "create_rsqrt", "create_atomic_rmw")


def widen(bits):
    """bfloat16 patterns (uint16) as float64 values, exactly."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def narrow(values):
    """float64 values as bfloat16 patterns (uint16), rounded once to nearest even."""
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    # Rounding twice would err on ties: the float32 in between is rounded to odd, which remembers what was cut off.
    inexact = (near.astype(np.float64) != values) & ~np.isnan(values)
    beyond = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = np.where(inexact, (bits - beyond.astype(np.uint32)) | 1, bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _float8_values():
    """The non-negative float8_e4m3fn numbers in the order of their patterns, 0x00 to 0x7E."""
    bits = np.arange(0x7F)
    exponent, fraction = bits >> 3, bits & 7
    return np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(8 + fraction, exponent - 10))


FLOAT8 = _float8_values()
FLOAT8_TIES = (FLOAT8[1:] + FLOAT8[:-1]) / 2


def widen_float8(bits):
    """float8_e4m3fn patterns (uint8) as float64 values, exactly."""
    bits = np.asarray(bits, np.uint8)
    magnitude = np.append(FLOAT8, np.nan)[bits & 0x7F]
    return np.where(bits & 0x80, -magnitude, magnitude)


def narrow_float8(values):
    """float64 values as float8_e4m3fn patterns (uint8), rounded once to nearest even; beyond 448, infinity too, 448."""
    values = np.asarray(values, np.float64)
    below = np.searchsorted(FLOAT8_TIES, np.abs(values), side="left")
    above = np.searchsorted(FLOAT8_TIES, np.abs(values), side="right")
    bits = np.where(below % 2 == 0, below, above)  # they differ on a tie only
    return (np.where(np.isnan(values), 0x7F, bits) | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def sum_to_odd(a, b):
    """a + b in float64, rounded to odd, so that rounding it again to fewer bits is rounding once."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        total = a + b
        there = total - a
        lost = (a - (total - there)) + (b - there)
    bits = np.atleast_1d(total).view(np.int64)
    even = np.isfinite(total) & (lost != 0) & (bits & 1 == 0).reshape(total.shape)
    step = np.where(even, np.where((lost > 0) == (total > 0), 1, -1), 0)
    return (bits.reshape(total.shape) + step).view(np.float64)


def mend(interpreter, tl):
    """Replaces parts of ``triton.runtime.interpreter``; raises AttributeError where it is not as expected."""
    _mend_float8(interpreter, tl)
    _mend_bfloat16(interpreter, tl)
    _mend_index(interpreter)


def _mend_index(interpreter):
    """Loop bounds are arrays of one element, which numpy takes for no integer any more."""
    original = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def _mend_float8(interpreter, tl):
    """Before bfloat16, which goes by way of float32 and what is put here."""
    builder, handle, float8 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.float8e4nv
    original = builder.create_fp_to_fp
    numpy_types = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}

    def create_fp_to_fp(self, source, target, rounding_mode):
        kind, wanted = source.dtype.scalar, target.scalar
        if kind == wanted == float8:
            return source
        if kind == float8 and wanted in numpy_types:
            return handle(widen_float8(source.data).astype(numpy_types[wanted]), wanted)
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if wanted == float8 and kind in numpy_types and not toward_zero:
            return handle(narrow_float8(source.data), float8)
        return original(self, source, target, rounding_mode)

    builder.create_fp_to_fp = create_fp_to_fp


def _mend_bfloat16(interpreter, tl):
    builder, handle, bfloat16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16
    mended = ("binary_op", "unary_op", "create_fma", "cast_impl", "create_fp_to_fp")
    original = {name: getattr(builder, name) for name in mended}

    def is_bfloat16(operand):
        return isinstance(operand, handle) and operand.dtype.scalar == bfloat16

    def result_of(values):
        return handle(values, tl.int1) if values.dtype == bool else handle(narrow(values), bfloat16)

    def binary_op(self, lhs, rhs, op):
        if not is_bfloat16(lhs):
            return original["binary_op"](self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            return result_of(op(widen(lhs.data), widen(rhs.data)))

    def unary_op(self, operand, op):
        if not is_bfloat16(operand):
            return original["unary_op"](self, operand, op)
        with np.errstate(all="ignore"):
            return result_of(op(widen(operand.data)))

    def create_fma(self, x, y, z):
        if not is_bfloat16(z):
            return original["create_fma"](self, x, y, z)
        with np.errstate(all="ignore"):
            return result_of(sum_to_odd(widen(x.data) * widen(y.data), widen(z.data)))

    def convert(self, source, target, through):
        """From or to bfloat16; what lies on the other side is converted from or to float32 by ``through``."""
        if is_bfloat16(source):
            if target.scalar == bfloat16:
                return source
            single = handle(widen(source.data).astype(np.float32), tl.float32)
            return single if target.scalar == tl.float32 else through(self, single, target)
        if source.dtype.scalar.is_fp8():
            source = through(self, source, tl.float32)
        return handle(narrow(source.data), bfloat16)

    def cast_impl(self, source, target):
        if is_bfloat16(source) or target.scalar == bfloat16:
            return convert(self, source, target, original["cast_impl"])
        return original["cast_impl"](self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        def through(self, source, target):
            return original["create_fp_to_fp"](self, source, target, rounding_mode)

        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if is_bfloat16(source) or (target.scalar == bfloat16 and not toward_zero):
            return convert(self, source, target, through)
        return through(self, source, target)

    def get_bf16(self, value):
        return handle(narrow(np.array([value])), bfloat16)

    def refusing(name):
        inner = getattr(builder, name)

        def operation(self, *operands):
            if any(map(is_bfloat16, operands)):
                raise NotImplementedError(f"{name} on bfloat16: Triton's interpreter computes on the bit patterns")
            return inner(self, *operands)

        return operation

    for function in (binary_op, unary_op, create_fma, cast_impl, create_fp_to_fp, get_bf16):
        setattr(builder, function.__name__, function)
    for name in REFUSED:
        if hasattr(builder, name):
            setattr(builder, name, refusing(name))
