"""SGLang's own kernels, loaded from an installed SGLang without importing SGLang.

Importing the package would pull in its whole runtime. The file with the kernels needs torch and triton only; everything
else it imports is answered with stand-ins while it loads.
"""

import ast
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
POST_REORDER = "post_reorder_triton_kernel"
REMOVED = {f"{op}_triton_kernel": "v0.5.4" for op in ("pre_reorder", "silu_and_mul", "gelu_and_mul")}


class Original:
    """What was found: ``problem`` is None, or why there is no file; ``generation`` is post_reorder's, if known."""

    def __init__(self, problem=None, module=None, version="unknown", generation=None, path=None):
        self.problem, self.module, self.version = problem, module, version
        self.generation, self.path = generation, path

    def problem_of(self, name):
        """None, or why the kernel or wrapper of that name cannot be compared with."""
        if self.problem:
            return self.problem
        if not hasattr(self.module, name):
            removed = f" (removed in {REMOVED[name]})" if name in REMOVED else ""
            return f"SGLang {self.version} has no {name}{removed}"
        if name == POST_REORDER and self.generation is None:
            return f"{self.path}: {name} has a signature not known"
        if name == POST_REORDER and self.generation == "C":
            return f"SGLang {self.version}: {KNOWN_WRONG}"
        return None

    def kernel(self, name):
        return getattr(self.module, name)

    def parameters(self, name):
        return list(inspect.signature(self._function(name)).parameters)

    def source(self, name):
        return inspect.getsource(self._function(name))

    def _function(self, name):
        return getattr(self.kernel(name), "fn", self.kernel(name))


@functools.cache
def find():
    """The installed SGLang's kernels; EPMOE_SGLANG may name a folder that holds the package, or the file itself."""
    path, version = locate()
    if path is None:
        named = os.environ.get("EPMOE_SGLANG")
        where = f"EPMOE_SGLANG={named} holds no sglang with" if named else "SGLang is not installed, or has no"
        return Original(f"{where} EP-MoE kernels ({' or '.join(PATHS)})", version=version)
    try:
        module = load(path)
    except Exception as error:
        problem = f"{path} cannot be loaded in isolation: {type(error).__name__}: {error}"
        return Original(problem, version=version, path=path)
    kernel = getattr(module, POST_REORDER, None)
    generation = None if kernel is None else generation_of(kernel)
    return Original(None, module, version, generation, path)


def locate(named=None):
    """The file with the kernels, or None, and the version it is of; ``named`` wins over EPMOE_SGLANG."""
    named = named or os.environ.get("EPMOE_SGLANG")
    if named:
        root = Path(named)
        if root.is_file():
            package = next((folder for folder in root.parents if folder.name == "sglang"), root.parent)
            return root, _version_of(package)
        roots = [root, root / "sglang", root / "python" / "sglang"]  # package, site-packages or wheel, repository
    else:
        spec = importlib.util.find_spec("sglang")
        roots = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    for root in roots:
        for path in PATHS:
            if (root / path).is_file():
                return root / path, _version_of(root)
    return None, "unknown"


def _version_of(package):
    """The version of the distribution that a package's folder belongs to."""
    for info in package.parent.glob("sglang-*.dist-info"):
        return importlib.metadata.Distribution.at(info).version
    with contextlib.suppress(OSError):
        written = re.search(r"""__version__ = ["'](.+?)["']""", (package / "version.py").read_text())
        return written.group(1) if written else "unknown"
    return "unknown"


def generation_of(kernel):
    """``A`` to ``D``, told by the argument list and, between C and D, by the gate. None when it is none of them."""
    function = getattr(kernel, "fn", kernel)
    return generation_by(tuple(inspect.signature(function).parameters), lambda: inspect.getsource(function))


def generation_by(names, source):
    """The same by post_reorder's parameters; ``source()`` is its text."""
    tail = list(names[5:])
    if tail == ["start_expert_id", "end_expert_id", "topk", "hidden_size", "BLOCK_SIZE"]:
        return "A"
    if tail == ["start_expert_id", "end_expert_id", "topk", "hidden_size", "dst_start", "BLOCK_SIZE"]:
        return "B"
    if tail == ["topk", "hidden_size", "BLOCK_SIZE"]:
        gate = re.search(r"if\s+expert_id\s*(>=?)\s*0", source())
        return {">": "C", ">=": "D"}.get(gate.group(1)) if gate else None
    return None


def load(path):
    """Executes the file as a module of its own, with stand-ins for what it imports and does not need."""
    spec = importlib.util.spec_from_file_location("epmoe_sglang_original", path)
    module = importlib.util.module_from_spec(spec)
    with _stand_ins({"sglang", *_absent_imports(path)}):
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
    return module


def _absent_imports(path):
    """Top-level names the file imports that are not installed."""
    names = set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None}


class _Nothing:
    """Stands for a function, class or constant: false, and the same whatever is asked of it."""

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__

    def __bool__(self):
        return False

    def __mro_entries__(self, bases):
        return ()


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def answers(self, module):
        return module.partition(".")[0] in self.names

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.answers(name) else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_ins(names):
    """Puts real modules of those names aside, and leaves no stand-in behind."""
    finder = _Finder(names)
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if finder.answers(name)}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if finder.answers(name):
                del sys.modules[name]
        sys.modules.update(aside)
