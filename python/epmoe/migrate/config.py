"""``epmoe.migrate.json``: how a stack is migrated, in one file that Python and the command line read.

.. code-block:: json

    {
      "modes": { "*": "shadow", "post_reorder": "epmoe" },
      "settings": { "*": { "rate": 0.01, "first_per_shape": 3 }, "silu_and_mul": { "max_ulp": 2 } },
      "record": { "folder": "capsules", "rate": 0.001, "max_bytes": 2147483648 }
    }

Kernels are named as in :func:`epmoe.shim.set_mode`; modes, settings and what is recorded as in ``install``,
``configure`` and ``record``. All parts are optional. A relative folder is meant from where the file is.
"""

import difflib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from epmoe.errors import EpmoeError

NAME = "epmoe.migrate.json"
VARIABLE = "EPMOE_MIGRATE"
MAX_BYTES = 1 << 20
RECORD = {"folder": str, "rate": float, "first_per_shape": int, "max_bytes": int, "min_free_bytes": int}


@dataclass
class Config:
    """``record`` is None where nothing is recorded; its folder is absolute."""

    path: Path
    modes: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    record: dict | None = None

    def plain(self):
        return {"path": str(self.path), "modes": self.modes, "settings": self.settings, "record": self.record}


def _bad(path, where, expected, received, hint=""):
    """``ERR_CONFIG``: which key of which file, what would be right, what is there."""
    return EpmoeError(
        "ERR_CONFIG", op=str(path), argument=where, expected=expected, received=str(received)[:80], hint=hint
    )


def read(path):
    """The checked configuration; raises :class:`EpmoeError` naming the key that is wrong."""
    path = Path(path).absolute()
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(path, "", "a file of JSON", f"{type(error).__name__}: {error}") from None
    return checked(found, path)


def _once(path, pairs):
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _bad(path, name, "each key once", "it occurs twice")
    return dict(pairs)


def checked(found, path=NAME):
    from epmoe._shim import control

    path = Path(path).absolute()
    _keys(path, "", found, ("$schema", "modes", "settings", "record"))
    modes, settings, record = (found.get(name, {}) for name in ("modes", "settings", "record"))
    _kernels(path, "modes", modes, control)
    for kernel, mode in modes.items():
        if mode not in control.MODES:
            raise _bad(path, f"modes.{kernel}", ", ".join(control.MODES), repr(mode))
    _kernels(path, "settings", settings, control)
    for kernel, values in settings.items():
        _keys(path, f"settings.{kernel}", values, control.SETTINGS)
        try:
            control.check_settings(values)
        except EpmoeError as error:
            raise _bad(path, f"settings.{kernel}.{error.argument}", error.expected, error.received) from None
    if "record" not in found or record is None:
        return Config(path, modes, settings)
    _keys(path, "record", record, RECORD)
    return Config(path, modes, settings, _record(path, record))


def _record(path, record):
    if not isinstance(record.get("folder"), str) or not record["folder"]:
        raise _bad(path, "record.folder", "the folder for capsules", repr(record.get("folder")))
    for name, value in record.items():
        if name == "folder":
            continue
        whole = RECORD[name] is int
        numeric = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not numeric or value < 0 or (name == "rate" and value > 1):
            expected = "a whole number from 0 on" if whole else "a number from 0 to 1"
            raise _bad(path, f"record.{name}", expected, repr(value))
    return {**record, "folder": str(path.parent / record["folder"])}


def _keys(path, where, found, known):
    if not isinstance(found, dict):
        raise _bad(path, where, "an object", type(found).__name__)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]}?" if near else ""
            place = f"{where}.{name}".lstrip(".")
            raise _bad(path, place, "one of " + ", ".join(known), f"the unknown key {name!r}", hint)


def _kernels(path, where, found, control):
    if not isinstance(found, dict):
        raise _bad(path, where, "an object by kernel", type(found).__name__)
    for kernel in found:
        try:
            control.names_of(kernel)
        except EpmoeError as error:
            near = difflib.get_close_matches(kernel, [n.removesuffix("_triton_kernel") for n in control.NAMES], 1)
            hint = f"Did you mean {near[0]}?" if near else ""
            raise _bad(path, f"{where}.{kernel}", error.expected, "an unknown kernel", hint) from None


def set_modes(path, modes):
    """Writes modes to the file, which need not exist, and returns what it now says. Whole or not at all."""
    path = Path(path).absolute()
    held = json.loads(path.read_text()) if path.exists() and read(path) else {}
    if modes.get("*"):
        held["modes"] = {}  # one mode for all is meant for all
    held["modes"] = {**held.get("modes", {}), **modes}
    config = checked(held, path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w") as file:
            file.write(json.dumps(held, indent=2) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return config


def named():
    """What EPMOE_MIGRATE names, or None."""
    return os.environ.get(VARIABLE) or None
