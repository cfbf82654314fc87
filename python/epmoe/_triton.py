"""The one place that imports Triton, and that mends its interpreter where bfloat16 is concerned.

The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as raw 16-bit patterns and computes on the patterns as if they were
integers; its conversion from float32 truncates. Here each operation on bfloat16 is computed on the values and rounded
once, to nearest even, as hardware does. ``BFLOAT16_PROBLEM`` is None, or says why that could not be arranged.
"""

import os

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BFLOAT16_PROBLEM = None

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = tl = None
    PROBLEM = f"Triton cannot be imported: {error}"
else:
    PROBLEM = None


def widen(bits):
    """bfloat16 patterns (uint16) as float64 values, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def narrow(values):
    """float64 values as bfloat16 patterns (uint16), rounded once to nearest even."""
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    # Rounding twice would err on ties: the float32 in between is rounded to odd, which remembers what was cut off.
    inexact = (near.astype(np.float64) != values) & ~np.isnan(values)
    beyond = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = np.where(inexact, (bits - beyond.astype(np.uint32)) | 1, bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _mend_interpreter():
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    bfloat16 = tl.bfloat16
    originals = {name: getattr(builder, name) for name in ("binary_op", "unary_op", "create_fma", "cast_impl")}
    original_fp_to_fp = builder.create_fp_to_fp

    def is_bfloat16(operand):
        return operand.dtype.scalar == bfloat16

    def result_of(values):
        values = np.asarray(values)
        return handle(values if values.dtype == bool else narrow(values), bfloat16)

    def binary_op(self, lhs, rhs, op):
        if not is_bfloat16(lhs):
            return originals["binary_op"](self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            return result_of(op(widen(lhs.data), widen(rhs.data)))

    def unary_op(self, operand, op):
        if not is_bfloat16(operand):
            return originals["unary_op"](self, operand, op)
        with np.errstate(all="ignore"):
            return result_of(op(widen(operand.data)))

    def create_fma(self, x, y, z):
        if not is_bfloat16(z):
            return originals["create_fma"](self, x, y, z)
        with np.errstate(all="ignore"):
            return result_of(widen(x.data) * widen(y.data) + widen(z.data))

    def convert(source, target):
        if is_bfloat16(source):
            values = widen(source.data)
            if target.scalar == bfloat16:
                return source
            with np.errstate(all="ignore"):
                return handle(values.astype(interpreter._get_np_dtype(target)), target.scalar)
        return handle(narrow(source.data), bfloat16)

    def cast_impl(self, source, target):
        if is_bfloat16(source) or target.scalar == bfloat16:
            return convert(source, target)
        return originals["cast_impl"](self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        if is_bfloat16(source) or target.scalar == bfloat16:
            return convert(source, target)
        return original_fp_to_fp(self, source, target, rounding_mode)

    def get_bf16(self, value):
        return handle(narrow(np.array([value])), bfloat16)

    for function in (binary_op, unary_op, create_fma, cast_impl, create_fp_to_fp, get_bf16):
        setattr(builder, function.__name__, function)


if INTERPRETED and triton is not None:
    try:
        _mend_interpreter()
    except (ImportError, AttributeError) as error:
        BFLOAT16_PROBLEM = (
            f"Triton {triton.__version__} interprets bfloat16 wrongly, and its interpreter is not the one known: {error}"
        )


def jit(function):
    """``triton.jit``, or the bare function where there is no Triton: modules of kernels import either way."""
    return function if triton is None else triton.jit(function)
