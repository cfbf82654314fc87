"""Objects that take the place of SGLang's Triton kernels and run epmoe instead, or beside them.

``install()`` puts them into the loaded modules that hold the kernels; ``uninstall()`` puts the originals back.
Sources that ``epmoe scan`` has rewritten say ``drop_in(kernel)[grid](...)``. Where there is no Triton kernel, the
objects go by their names: ``epmoe.shim.post_reorder_triton_kernel[grid](...)``. A kernel's mode is one of

- ``epmoe`` (the default): epmoe's kernel, with the original's arithmetic; a call that epmoe does not take goes to
  Triton, counted and warned of once, or raises where ``strict`` is set;
- ``shadow``: Triton's kernel serves; of some launches epmoe's result is compared with its, of fewer where that would
  take more than ``max_overhead`` of the time. After ``trip_after`` mismatches or errors the kernel goes back to
  ``triton`` by itself;
- ``triton``: Triton's kernel, counted;
- ``off``: as if there were no shim; such kernels are not installed.

EPMOE_SHIM names modes by kernel (``post_reorder=shadow,*=triton``, or one mode for all) and wins over what ``install``
is told; ``set_mode`` at run time wins over both.

Under CUDA graph capture, in shadow, the comparison of a sampled launch is captured too: each replay is compared, and
``stats`` and ``flush`` read what came of it. What cannot be captured so is counted as ``uncompared`` and told.
"""

from epmoe._shim import capture as _capture
from epmoe._shim import control as _control
from epmoe._shim import install as _install
from epmoe._shim import kernels as _kernels
from epmoe._shim import save as _save
from epmoe._shim import shadow as _shadow
from epmoe._shim import watch as _watch
from epmoe.errors import EpmoeError
from epmoe.migrate import config as _config

__all__ = [
    "apply",
    "configure",
    "drop_in",
    "events",
    "flush",
    "get_mode",
    "install",
    "is_installed",
    "on_event",
    "record",
    "reset",
    "save",
    "set_mode",
    "stats",
    "uninstall",
    "watch",
]


drop_in = _install.drop_in


def install(modules=None, *, config=None, mode=None, **modes):
    """Puts shims in place of the kernels and helpers that loaded modules hold, copies under other names included.

    ``modules`` limits where definitions are looked for (modules or their names); ``mode`` is for all kernels, ``modes``
    are by kernel: ``install(mode="shadow", pre_reorder="epmoe")``. ``config`` is the path of an ``epmoe.migrate.json``,
    otherwise EPMOE_MIGRATE may name one; what is said here wins over it. Returns what was replaced, as (module, name,
    kernel), and what was skipped, as (module, kernel, reason). Calling it again adds what was loaded since.
    """
    config = config or _config.named()
    if config is not None:
        apply(config)
    _control.choose({**({} if mode is None else {"*": mode}), **modes}, "install")
    _control.choose(_control.from_environment(), _control.ENVIRONMENT)
    done = _install.install(modules)
    _capture.prepare_all()
    for module, name, reason in done.skipped:
        _kernels.warn(f"{module}.{name} is left as it is: {reason}")
    return done


def uninstall():
    """Puts back every original, the same object as before; returns what was put back."""
    flush()
    return _install.uninstall()


def is_installed():
    return _install.is_installed()


def set_mode(kernel, mode):
    """Sets the mode of a kernel (``"post_reorder"``, its full name, or ``"*"``) from the next launch on."""
    _control.choose({kernel: mode}, "set_mode")


def get_mode(kernel):
    names = _control.names_of(kernel)
    if len(names) != 1:
        raise EpmoeError("ERR_VALUE", op="shim", argument="kernel", expected="one kernel", received=repr(kernel))
    return _control.controls[names[0]].mode


def configure(kernel="*", **settings):
    """Settings of a kernel, or of all.

    numerics: ``triton`` (default), the arithmetic of the kernel replaced, so that switching changes no bit on a GPU;
        ``fp32``: float32 with one rounding.
    strict: raise where epmoe does not take a call, instead of falling back.
    rate, first_per_shape: which launches shadow samples: this share, and so many of each shape first.
    max_ulp: how far apart results may be in shadow; 0: not by a bit. One unit in the last place is taken at the largest
        magnitude of a row.
    trip_after: mismatches and errors after which shadow ends; 0: never.
    max_overhead: the share of the time (0.01), on the host, that comparing all kernels may take together since shadow
        began, or since the last ``configure`` or ``reset``. Beyond it a launch that ``rate`` picks is passed over and
        counted as ``put_off``; ``first_per_shape`` and graph capture are not held to it. 0: no bound.
    """
    _control.configure(kernel, settings)


def apply(config):
    """Does what an ``epmoe.migrate.json`` says, and returns it: all of it, or, where a key is wrong, nothing."""
    found = _config.read(config)
    if found.record is not None:
        record(**found.record)
    for kernel in sorted(found.settings, key=lambda each: each != "*"):
        _control.configure(kernel, found.settings[kernel])
    _control.choose(found.modes, f"config {found.path}")
    return found


def watch(config=None, *, seconds=1.0):
    """Applies the file again whenever it changes, so that a running process follows ``epmoe mode``. What is wrong with
    it is warned of, and the last good one stays. Returns a function that ends it."""
    path = config or _config.named()
    if path is None:
        raise EpmoeError("ERR_VALUE", op="shim.watch", argument="config", expected="a path", received="None")
    return _watch.start(path, apply, seconds)


def record(folder, *, rate=0.0, first_per_shape=0, max_bytes=1 << 30, min_free_bytes=1 << 28):
    """Keeps capsules in a folder, of at most ``max_bytes`` in all: of every mismatch in shadow, and of sampled launches
    in any mode but ``off``. Nothing is written that would leave less than ``min_free_bytes`` of the disk. None ends
    it."""
    _control.recorder.ring = None if folder is None else _kernels.capsules.Ring(folder, max_bytes, min_free_bytes)
    _kernels.set_recording(rate, first_per_shape)


def stats():
    """Counts by kernel. ``shadow_overhead`` is the share of the time, on the host, that comparing has taken."""
    _capture.poll()
    return {name: control.stats() for name, control in _control.controls.items()}


def save(path):
    """Writes what ``stats`` and ``events`` say, for ``epmoe shadow-report``, whole or not at all."""
    flush()
    _save.write(path, stats(), events())


def events(since=0):
    """The last events with a number above ``since``, oldest first; ``flush()`` has those of graphs' replays come first.

    Their kinds are mismatch, error (epmoe's, in shadow), tripped, captured and record_failed.
    """
    return [event for event in list(_control.events.queue) if event["number"] > since]


def on_event(listener):
    """Has ``listener(event)`` called with each event on the thread it happens on; returns a function that ends it."""
    listeners = _control.events.listeners
    listeners.append(listener)
    return lambda: listeners.remove(listener) if listener in listeners else None


def flush():
    """Waits for comparisons whose results are still on a device."""
    _shadow.poll(wait=True)
    _capture.poll(wait=True)


def reset():
    """Forgets counts, events and sampled shapes, and closes trips' books; modes and settings stay."""
    flush()
    _capture.forget()
    _control.events.queue.clear()
    for control in _control.controls.values():
        with control.lock:
            control.reset()


if _config.named() is not None:
    apply(_config.named())  # sources that were rewritten need no install
_control.choose(_control.from_environment(), _control.ENVIRONMENT)
for _name in _control.NAMES:
    globals()[_name] = _kernels.make(_name)
__all__ += [*_control.NAMES]
