"""EP-MoE kernels on torch tensors: one function an op, on the CPU and on CUDA.

Errors are :class:`EpmoeError`. On CUDA, work goes to torch's current stream, and an index out of range inside a tensor
is found by :func:`synchronize` or :func:`check`.
"""

import importlib
import pkgutil

from epmoe.errors import EpmoeError

__version__ = "0.1.0"
__all__ = ["EpmoeError", "__version__", "check", "synchronize"]


def __getattr__(name):
    """Functions are found on first use, so that importing epmoe imports neither torch nor the library."""
    if not name.startswith("_"):
        for module in _modules():
            source = importlib.import_module(module)
            if name in source.__all__:
                globals()[name] = getattr(source, name)
                return globals()[name]
    raise AttributeError(f"module 'epmoe' has no attribute {name!r}")


def _modules():
    yield from ("epmoe._call", "epmoe.generated")
    upstream = importlib.import_module("epmoe.upstream")
    for module in pkgutil.iter_modules(upstream.__path__):
        yield f"epmoe.upstream.{module.name}"
