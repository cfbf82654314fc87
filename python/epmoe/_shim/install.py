"""Puts shims where loaded modules hold the kernels, and takes them out again."""

import contextlib
import inspect
import sys
import types
from dataclasses import dataclass, field

from epmoe._shim.control import NAMES, controls, lock
from epmoe._shim.forms import form_of
from epmoe._shim.kernels import Shim, make, warn
from epmoe._shim.signatures import HELPERS, KERNELS
from epmoe.errors import EpmoeError


@dataclass
class Installation:
    """``replaced``: (module, its name for it, kernel); ``skipped``: (module, kernel, reason)."""

    replaced: list = field(default_factory=list)
    skipped: list = field(default_factory=list)


_by_original = {}  # id of an original: its shim, which keeps the original alive


def _loaded():
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name != "epmoe" and not name.startswith("epmoe."):
            yield name, module


def _named(modules):
    if modules is None:
        return list(_loaded())
    found = []
    for each in [modules] if isinstance(modules, (str, types.ModuleType)) else modules:
        module = sys.modules.get(each) if isinstance(each, str) else each
        if not isinstance(module, types.ModuleType):
            raise EpmoeError(
                "ERR_VALUE",
                op="shim.install",
                argument="modules",
                expected="loaded modules or their names",
                received=repr(each)[:80],
                hint="Import it first",
            )
        found.append((module.__name__, module))
    return found


def _is_kernel(value):
    """Whether this is what ``triton.jit`` makes, compiled or interpreted: told by what it can do."""
    return (
        hasattr(type(value), "__getitem__") and hasattr(value, "run") and inspect.isfunction(getattr(value, "fn", None))
    )


def _is_shim(value):
    """Without asking the value, which in other people's modules may do anything."""
    return issubclass(type(value), Shim)


def _objection(value, name):
    """None for a kernel or helper of a known signature; why not, for one of another; False for anything else."""
    if _is_shim(value):
        return False
    if name in KERNELS:
        if not _is_kernel(value):
            return False
        with contextlib.suppress(TypeError, ValueError, OSError):
            if form_of(value, name) is not None:
                return None
        return "its signature is not known"
    if not inspect.isfunction(value):
        return False
    return None if HELPERS[name].fits(list(inspect.signature(value).parameters)) else "its signature is not known"


def install(modules=None):
    """Replaces every kernel whose mode is not ``off``. A second call finds what was loaded meanwhile."""
    done = Installation()
    with lock:
        for module_name, module in _named(modules):
            held = vars(module)
            for name in NAMES:
                value = held.get(name)
                if value is None or controls[name].mode == "off":
                    continue
                objection = _objection(value, name)
                if objection is None and id(value) not in _by_original:
                    _by_original[id(value)] = make(name, value)
                elif objection:
                    done.skipped.append((module_name, name, objection))
        # Copies made by `from module import kernel` are the same object, under whatever name.
        for module_name, module in _loaded():
            held = vars(module)
            for key, value in list(held.items()):
                shim = _by_original.get(id(value))
                if shim is not None and shim._original is value and shim._control.mode != "off":
                    held[key] = shim
                    done.replaced.append((module_name, key, shim.__name__))
    return done


_drop_ins = {}  # id of a kernel: its shim, or the kernel itself where its signature is not known; both keep it alive


def drop_in(kernel):
    """The shim of one kernel or helper, for sources that are rewritten: ``drop_in(kernel)[grid](...)``.

    It asks for no ``install`` and is not undone by ``uninstall``; the modes and EPMOE_SHIM hold for it. A kernel of an
    unknown signature, and anything that is no kernel, comes back as it is.
    """
    known = _drop_ins.get(id(kernel))
    return known if known is not None else _dropped_in(kernel)


def _dropped_in(kernel):
    if _is_shim(kernel):
        return kernel
    # Asked of the object alone: a value that only says it has such a name is none of ours.
    name = getattr(getattr(kernel, "fn", kernel), "__name__", None)
    objection = _objection(kernel, name) if name in NAMES else False
    if objection is False:
        return kernel
    with lock:
        if objection and id(kernel) not in _drop_ins:
            warn(f"{name} is left as it is: {objection}")
        return _drop_ins.setdefault(id(kernel), kernel if objection else make(name, kernel))


def uninstall():
    """Puts every original back, also in modules that were loaded since; returns what was put back."""
    done = Installation()
    with lock:
        for module_name, module in _loaded():
            held = vars(module)
            for key, value in list(held.items()):
                if _is_shim(value) and _by_original.get(id(value._original)) is value:
                    held[key] = value._original
                    done.replaced.append((module_name, key, value.__name__))
        _by_original.clear()
    return done


def is_installed():
    return bool(_by_original)
