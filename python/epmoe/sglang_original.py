"""SGLang's own kernels, loaded from an installed SGLang without importing SGLang.

Importing the package would pull in its whole runtime. The file with the kernels needs torch and triton only; everything
else it imports is answered with stand-ins while it loads.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import types
from pathlib import Path

PATHS = (
    "srt/layers/moe/ep_moe/kernels.py",  # to v0.5.15
    "kernels/ops/moe/ep_moe_kernels.py",  # from v0.5.16
)
KNOWN_WRONG = (
    "its post_reorder (v0.5.4 to v0.5.12) takes `id > 0` for local and so drops local expert 0: "
    "it is no oracle; install sglang 0.4.6 to 0.5.3, or 0.5.13 and later"
)


class Original:
    """What was found: ``problem`` is None, or why there is nothing to compare with."""

    def __init__(self, problem=None, module=None, version="unknown", generation=None, path=None):
        self.problem, self.module, self.version = problem, module, version
        self.generation, self.path = generation, path

    def kernel(self, name):
        return getattr(self.module, name)


@functools.cache
def find():
    """The installed SGLang's kernels; EPMOE_SGLANG may name a folder that holds the package, or the file itself."""
    path, version = _locate()
    if path is None:
        return Original("SGLang is not installed (or has no EP-MoE kernels)")
    try:
        module = load(path)
    except Exception as error:
        return Original(f"{path} cannot be loaded in isolation: {type(error).__name__}: {error}", version=version)
    kernel = getattr(module, "post_reorder_triton_kernel", None)
    if kernel is None:
        return Original(f"{path} has no post_reorder_triton_kernel", version=version)
    generation = generation_of(kernel)
    if generation is None:
        return Original(f"{path}: post_reorder_triton_kernel has a signature not known", version=version)
    problem = f"SGLang {version}: {KNOWN_WRONG}" if generation == "C" else None
    return Original(problem, module, version, generation, path)


def _locate():
    named = os.environ.get("EPMOE_SGLANG")
    if named:
        root = Path(named)
        if root.is_file():
            return root, "unknown"
        roots = [root / "sglang", root]
        version = next((p.name.split("-")[1] for p in root.glob("sglang-*.dist-info")), "unknown")
    else:
        spec = importlib.util.find_spec("sglang")
        if spec is None:
            return None, None
        roots = [Path(folder) for folder in spec.submodule_search_locations or ()]
        try:
            version = importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
    files = (root / path for root in roots for path in PATHS)
    return next((file for file in files if file.is_file()), None), version


def generation_of(kernel):
    """``A`` to ``D``, told by the argument list and, between C and D, by the gate. None when it is none of them."""
    function = getattr(kernel, "fn", kernel)
    names = list(inspect.signature(function).parameters)
    tail = names[5:]
    if tail == ["start_expert_id", "end_expert_id", "topk", "hidden_size", "BLOCK_SIZE"]:
        return "A"
    if tail == ["start_expert_id", "end_expert_id", "topk", "hidden_size", "dst_start", "BLOCK_SIZE"]:
        return "B"
    if tail == ["topk", "hidden_size", "BLOCK_SIZE"]:
        gate = re.search(r"if\s+expert_id\s*(>=?)\s*0", inspect.getsource(function))
        return {">": "C", ">=": "D"}.get(gate.group(1)) if gate else None
    return None


def load(path):
    """Executes the file as a module of its own, with stand-ins for whatever it imports and does not need."""
    spec = importlib.util.spec_from_file_location("epmoe_sglang_original", path)
    module = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


class _StandIn(types.ModuleType):
    """A module that has every attribute: a function that answers False to any question."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    PREFIXES = ("sglang", "deep_gemm", "sgl_kernel", "vllm")

    def __init__(self):
        self.made = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.PREFIXES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_ins():
    """Puts real modules of those names aside, and leaves no stand-in behind."""
    finder = _Finder()
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in finder.PREFIXES}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)
        sys.modules.update(aside)
