"""The one place that imports Triton. Kernels are declared with :func:`jit`, and run where :func:`problem` is None."""

import functools
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, tl = None, SimpleNamespace(constexpr=None)  # annotations of kernels are evaluated either way
    _import_problem = f"Triton cannot be imported: {error}"


def jit(function):
    """``triton.jit``, or the bare function where there is no Triton: modules of kernels import either way."""
    return function if triton is None else triton.jit(function)


@jit
def _probe(x, y, output, count, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], dtype=x.dtype.element_ty)
    for _ in tl.range(0, count):
        total += tl.load(x + columns) * tl.load(y + columns).to(tl.float32).to(x.dtype.element_ty)
    tl.store(output + columns, total)


# TRITON_INTERPRET=1 and the other ways to ask for the interpreter are told by what became of a kernel.
INTERPRETED = triton is not None and not isinstance(_probe, triton.runtime.JITFunction)

_mending_problem = None
if INTERPRETED:
    try:
        from triton.runtime import interpreter

        from epmoe._interpreter import mend

        mend(interpreter, tl)
    except (ImportError, AttributeError) as error:
        _mending_problem = f"the interpreter of Triton {triton.__version__} is not the one known: {error}"


@functools.cache
def problem():
    """None, or why kernels cannot run."""
    if triton is None:
        return _import_problem
    return _interpreter_problem("float32") if INTERPRETED else None


@functools.cache
def bfloat16_problem():
    """None, or why the results of bfloat16 kernels would be worthless."""
    known = _mending_problem or problem()
    return known or (_interpreter_problem("bfloat16") if INTERPRETED else None)


@functools.cache
def float8_problem():
    """None, or why kernels that read or write float8_e4m3fn cannot run or would be worthless."""
    known = _mending_problem or problem()
    if known or INTERPRETED:
        return known
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "Triton has no float8_e4m3fn before compute capability 8.9"
    return None


def _interpreter_problem(name):
    """Runs a kernel whose result is known."""
    import torch

    dtype = getattr(torch, name)
    x = torch.tensor([1.0, 1.0078125, -3.0, 255.0], dtype=dtype)
    y = torch.tensor([1.5, 1.0078125, 0.3359375, 255.0], dtype=dtype)
    output = torch.zeros_like(x)
    try:
        _probe[(1,)](x, y, output, 3, SIZE=4)
    except Exception as error:
        return f"the interpreter of Triton {triton.__version__} fails: {error}"
    product = x * y
    right = torch.equal(output, product + product + product)
    return None if right else f"the interpreter of Triton {triton.__version__} computes {name} wrongly"
