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
    if not name.startswith("__"):
        if name in {module.name for module in pkgutil.iter_modules(__path__)}:
            return importlib.import_module(f"epmoe.{name}")
        for source in _sources():
            if name in source.__all__:
                globals()[name] = getattr(source, name)
                return globals()[name]
    raise AttributeError(f"module 'epmoe' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *(name for source in _sources() for name in source.__all__)})


def _sources():
    """The modules whose functions are offered here: one a kind, and in upstream one an op."""
    from epmoe import _call, _executor, generated, upstream

    yield from (_call, _executor, generated)
    for module in pkgutil.iter_modules(upstream.__path__):
        yield importlib.import_module(f"epmoe.upstream.{module.name}")
