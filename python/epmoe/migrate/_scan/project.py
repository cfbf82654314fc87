"""What imported names lead to in the files of a scan, and in an SGLang beside them."""

import ast
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from epmoe import sglang_original
from epmoe._shim.signatures import HELPERS, KERNELS, NAMES
from epmoe.migrate._scan.bindings import Bindings, Defined, Imported
from epmoe.migrate._scan.sources import Source, Unusable

_DEPTH = 8
_FOREIGN = {"epmoe", "torch"}  # their names are their own: torch.ops.epmoe.ep_gather
_SHIM = "epmoe.shim."
_MODULES = tuple("sglang." + path.removesuffix(".py").replace("/", ".") for path in sglang_original.PATHS)
MOVED = _MODULES[1]


@dataclass(frozen=True)
class Definition:
    """A kernel's or helper's definition; ``names`` are its parameters, None where there are ``*`` or ``**`` ones."""

    file: str
    names: tuple | None
    defaults: frozenset
    text: str


@dataclass(frozen=True)
class Meaning:
    """A kernel that a name may stand for. ``module`` is where it is imported from."""

    kernel: str
    module: str = ""
    definition: Definition | None = None
    migrated: bool = False


class File:
    def __init__(self, path, data):
        self.path, self.source = path, Source(data)
        self.bindings = Bindings(self.source.tree, KERNELS)  # helpers' names are too plain to go by


class Project:
    def __init__(self):
        self.files = {}  # by absolute path
        self._by_base = {}
        self._sglang = None

    def add(self, path, data):
        file = File(path, data)
        self._index(os.path.abspath(path), file)
        return file

    def _index(self, place, file):
        self.files[place] = file
        self._by_base.setdefault(os.path.basename(place), []).append(place)

    def use_sglang(self, named):
        """Has an SGLang's file answer for its kernels where the scanned ones do not: the one named, or an installed."""
        path, _ = sglang_original.locate(named)
        if path is not None:
            with contextlib.suppress(OSError, Unusable):
                self._sglang = File(os.fspath(path), Path(path).read_bytes())

    # ------------------------------------------------------------ names

    def meanings(self, origins, file):
        """The kernels among what a name may stand for."""
        return [meaning for each in origins for meaning in self._meanings(each, file, 0)]

    def _meanings(self, origin, file, depth):
        if isinstance(origin, Defined):
            name = getattr(origin.node, "name", "")
            if name not in NAMES or isinstance(origin.node, ast.ClassDef):
                return []
            found = definition_of(origin.node, file)
            if name in HELPERS and not _is_namesake(found, name):
                return []
            return [Meaning(name, "", found, origin.dropped_in)]
        if not isinstance(origin, Imported):
            return []
        dotted = origin.dotted
        module, name = _split(dotted)
        if dotted.partition(".")[0] in _FOREIGN:
            ours = dotted.startswith(_SHIM) and dotted.removeprefix(_SHIM) in NAMES
            return [Meaning(name, module, None, True)] if ours else []
        if name in NAMES:
            found = self._definition(dotted, file, depth)
            if found is not None and name in HELPERS and not _is_namesake(found, name):
                return []
            return [Meaning(name, module, found, origin.dropped_in)]
        # A name of their own that another file gave a kernel.
        other = self._file_of(module, file)
        if other is None or depth > _DEPTH:
            return []
        inner = other.bindings.exported(name)
        found = [meaning for each in inner for meaning in self._meanings(each, other, depth + 1)]
        return [
            replace(
                each,
                module=module if each.module.startswith(".") else each.module,
                migrated=each.migrated or origin.dropped_in,
            )
            for each in found
        ]

    def _definition(self, dotted, file, depth):
        """Where a kernel is defined, through re-exports; None where that is not seen, or not one place."""
        module, name = _split(dotted)
        other = self._file_of(module, file)
        if other is None or depth > _DEPTH:
            return None
        top = other.bindings.top.names.get(name, [])
        found = {definition_of(each.node, other) for each in top if isinstance(each, Defined)}
        for each in [*top, *(Imported(star.dotted + name) for star in other.bindings.stars if not top)]:
            if isinstance(each, Imported):
                found.add(self._definition(each.dotted, other, depth + 1))
        return found.pop() if len(found) == 1 else None

    def _file_of(self, module, file):
        """The scanned file of a module as another file names it."""
        stem = module.lstrip(".")
        level = len(module) - len(stem)
        parts = stem.split(".") if stem else []
        here = os.path.abspath(file.path)
        if level:
            base = here
            for _ in range(level):
                base = os.path.dirname(base)
            whole = os.path.join(base, *parts)
            return self.files.get(f"{whole}.py") or self.files.get(os.path.join(whole, "__init__.py"))
        if not parts:
            return None
        found = []
        for tail in (os.path.join(*parts) + ".py", os.path.join(*parts, "__init__.py")):
            for place in self._by_base.get(os.path.basename(tail), []):
                root = place.removesuffix(os.sep + tail)
                # The folder that an absolute import starts from is on sys.path, not a package itself.
                if root != place and not os.path.exists(os.path.join(root, "__init__.py")):
                    found.append((len(os.path.commonpath([place, here])), place))
        found.sort(reverse=True)
        if found and (len(found) == 1 or found[0][0] > found[1][0]):
            return self.files[found[0][1]]
        return self._sglang if not found and self._sglang_is(module) else None

    def _sglang_is(self, module):
        if self._sglang is None or module not in _MODULES:
            return False
        path = self._sglang.path.replace(os.sep, "/")
        at = next((at for at, tail in enumerate(sglang_original.PATHS) if path.endswith(tail)), None)
        return at is None or module == _MODULES[at]

    # ------------------------------------------------------------ names given to kernels

    def aliases(self):
        """Names that modules give to kernels and that are not the kernels' own, with the modules' last names.

        Others may import these; from a package by its folder's name, or by none.
        """
        found = set()
        for file in self.files.values():
            stem = os.path.basename(file.path).removesuffix(".py")
            for name in file.bindings.top.names.keys() - {*NAMES}:
                if self.meanings(file.bindings.exported(name), file):
                    found.add((name, "" if stem == "__init__" else stem))
        return found


def _split(dotted):
    """A module, with the dots of a relative one, and the name in it."""
    name = dotted.rpartition(".")[2]
    module = dotted[: len(dotted) - len(name)]
    return (module[:-1] if module.strip(".") else module), name


def _is_namesake(definition, name):
    """Whether a function of a helper's name has anything to do with it: these names are not SGLang's alone."""
    return definition is None or definition.names is None or bool({*definition.names} & {*HELPERS[name].names})


def definition_of(node, file):
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    with_default = [each.arg for each in every[: len(every) - len(arguments.kwonlyargs)]][-len(arguments.defaults) :]
    defaults = {*(with_default if arguments.defaults else [])}
    defaults |= {
        each.arg for each, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is not None
    }
    known = arguments.vararg is None and arguments.kwarg is None
    names = tuple(each.arg for each in every) if known else None
    return Definition(file.path, names, frozenset(defaults), file.source.of(node))


def is_jit(node):
    """Whether a function is a Triton kernel, by its decorators."""
    decorators = getattr(node, "decorator_list", [])
    named = [each.func if isinstance(each, ast.Call) else each for each in decorators]
    return any(getattr(each, "attr", getattr(each, "id", "")) == "jit" for each in named)
