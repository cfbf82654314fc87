"""Capsules: one call of a kernel in one file, to run again elsewhere.

A capsule is a safetensors file. Its tensors are ``argument/<name>`` (the op's inputs, as the kernel saw them),
``before/<name>`` (outputs before the call, where it may leave parts as they are), ``triton/<name>`` and
``epmoe/<name>`` (outputs after it). All else is JSON in the file's metadata: kernel, generation, op, scalars, the
launch with its grid, options and the shapes and strides of its tensors, versions, device. A digest covers both. The
``safetensors`` package reads these files as well.

Reading trusts nothing: a file that is cut short, changed or made up raises :class:`CapsuleError`, which names it.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import epmoe
from epmoe.errors import EpmoeError

__all__ = ["Capsule", "CapsuleError", "Ring", "environment", "load", "save"]

FORMAT = 1
MAX_HEADER_BYTES = 16 << 20
MAX_FILE_BYTES = 64 << 30
SUFFIX = ".safetensors"
_PARTS = ("argument", "before", "triton", "epmoe")
_NAME = re.compile(r"(argument|before|triton|epmoe)/[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_DESCRIPTION, _DIGEST = "epmoe.capsule", "epmoe.digest"
_FIELDS = {
    "kernel": str,
    "generation": str,
    "op": str,
    "reason": str,
    "scalars": dict,
    "launch": dict,
    "environment": dict,
    "findings": list,
    "time": (int, float),
}


class CapsuleError(EpmoeError):
    """A capsule that cannot be written or read; ``argument`` is the file, ``code`` is ``"ERR_CAPSULE"``, or
    ``"ERR_NO_SAFETENSORS"`` where the package is missing."""

    def __init__(self, path, expected, received, hint="", code="ERR_CAPSULE"):
        super().__init__(code, op="capsule", argument=str(path), expected=expected, received=received, hint=hint)


@dataclass
class Capsule:
    """``tensors`` by part and name: ``tensors["argument"]["src2dst"]``."""

    kernel: str
    generation: str = ""
    op: str = ""
    reason: str = "recorded"  # or "mismatch"
    scalars: dict = field(default_factory=dict)
    launch: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    findings: list = field(default_factory=list)
    time: float = 0.0
    tensors: dict = field(default_factory=dict)

    def part(self, name):
        return self.tensors.get(name, {})


def environment(device=None):
    """What the call ran on."""
    found = {"epmoe": epmoe.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    device = torch.device(device or "cpu")
    found["device"] = str(device)
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["capability"] = list(torch.cuda.get_device_capability(device))
    return found


def _package(path):
    try:
        import safetensors.torch
    except ImportError as error:
        raise CapsuleError(
            path,
            "the safetensors package",
            f"{type(error).__name__}: {error}",
            "Install it: pip install safetensors",
            "ERR_NO_SAFETENSORS",
        ) from None
    return safetensors.torch


def _digest_of(description, tensors):
    digest = hashlib.blake2b(description.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encode(capsule, path="a new capsule"):
    """The bytes of the file."""
    package = _package(path)
    tensors = {}
    for part, named in capsule.tensors.items():
        for name, tensor in named.items():
            if not _NAME.fullmatch(f"{part}/{name}"):
                raise CapsuleError(path, f"tensors named {'|'.join(_PARTS)}/name", repr(f"{part}/{name}"))
            copy = tensor.detach().cpu().contiguous()  # the writer refuses memory that tensors share
            tensors[f"{part}/{name}"] = copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
    description = json.dumps({"format": FORMAT, **{name: getattr(capsule, name) for name in _FIELDS}}, sort_keys=True)
    return package.save(tensors, {_DESCRIPTION: description, _DIGEST: _digest_of(description, tensors)})


def save(path, capsule):
    """Writes a capsule whole or not at all."""
    _write(Path(path), encode(capsule, path))
    return Path(path)


_count = itertools.count()


def _write(path, data):
    temporary = path.with_name(f".tmp-{os.getpid()}-{next(_count)}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load(path):
    """The capsule in a file; raises :class:`CapsuleError` where it is not exactly what :func:`save` wrote."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CapsuleError(path, "a file", "a folder or device")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise CapsuleError(path, f"at most {MAX_FILE_BYTES} bytes", str(size))
            data = file.read(size)  # read, not mapped: a file cut while mapped would end the process
            if len(data) != size or file.read(1):
                raise CapsuleError(path, f"{size} bytes", "another length", "It is being written to")
    except (OSError, ValueError, MemoryError) as error:
        raise CapsuleError(path, "a file that can be read", f"{type(error).__name__}: {error}") from None
    description, digest = _metadata(path, data)
    try:
        tensors = _package(path).load(data)
    except CapsuleError:
        raise
    except Exception as error:
        raise CapsuleError(path, "a safetensors file", f"{type(error).__name__}: {error}") from None
    if _digest_of(description, tensors) != digest:
        raise CapsuleError(path, "the content that was written", "another", "The file was damaged or changed")
    return _capsule(path, description, tensors)


def _metadata(path, data):
    """The description and its digest, after a look at everything in the header that is used."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, MAX_HEADER_BYTES):
        raise CapsuleError(
            path,
            "a header that fits the file",
            f"a length of {length} in a file of {len(data)} bytes",
            "It is cut short",
        )
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CapsuleError(path, "a header in JSON", f"{type(error).__name__}: {error}") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(k), str) for k in (_DESCRIPTION, _DIGEST)):
        raise CapsuleError(path, "a capsule", "a safetensors file without a capsule's metadata")
    stray = next((name for name in header if not _NAME.fullmatch(name)), None)
    if stray is not None:
        raise CapsuleError(path, f"tensors named {'|'.join(_PARTS)}/name", repr(stray[:80]))
    return metadata[_DESCRIPTION], metadata[_DIGEST]


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _capsule(path, description, tensors):
    try:
        found = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise CapsuleError(path, "a description in JSON", f"{type(error).__name__}: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        told = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise CapsuleError(path, f"a capsule of format {FORMAT}", repr(told)[:80])
    for name, kind in _FIELDS.items():
        if not isinstance(found.get(name), kind) or isinstance(found[name], bool):
            raise CapsuleError(path, f"{name} in its description", repr(found.get(name))[:80])
    capsule = Capsule(**{name: found[name] for name in _FIELDS})
    for name in sorted(tensors):
        part, _, own = name.partition("/")
        capsule.tensors.setdefault(part, {})[own] = tensors[name]
    return capsule


class Ring:
    """A folder of capsules of bounded size: where a new one has no room, the oldest go, recorded ones before those of a
    mismatch. Other files in the folder are left alone. Threads and processes may share it. Of the disk, at least
    ``min_free_bytes`` are left to others."""

    def __init__(self, folder, max_bytes=1 << 30, min_free_bytes=0):
        self.folder, self.max_bytes, self.min_free_bytes = Path(folder), max_bytes, min_free_bytes
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".tmp-*" + SUFFIX):  # by a process that ended while writing
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 600:
                    left.unlink()

    def files(self):
        """The capsules, those that go first being first, with their sizes."""
        found = []
        for path in self.folder.glob("capsule-*" + SUFFIX):
            with contextlib.suppress(OSError):
                found.append((path, path.stat().st_size))
        return sorted(found, key=lambda each: (each[0].name.endswith("-mismatch" + SUFFIX), each[0].name))

    def add(self, capsule):
        """Writes a capsule and says where. Raises OSError when the disk is full, CapsuleError when it is too large."""
        capsule.time = capsule.time or time.time()
        data = encode(capsule, self.folder)
        if len(data) > self.max_bytes:
            raise CapsuleError(self.folder, f"at most {self.max_bytes} bytes", str(len(data)), "Raise max_bytes")
        kernel = re.sub(r"[^a-z0-9_]", "", capsule.kernel)
        reason = "mismatch" if capsule.reason == "mismatch" else "recorded"
        with self._lock:
            name = f"capsule-{time.time_ns():020d}-{os.getpid()}-{next(_count):06d}-{kernel}-{reason}{SUFFIX}"
            held = self.files()
            total = sum(size for _, size in held)
            for path, size in held:
                if total + len(data) <= self.max_bytes:
                    break
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total -= size
            free = shutil.disk_usage(self.folder).free
            if free - len(data) < self.min_free_bytes:
                told = f"{free} bytes are free, of which {self.min_free_bytes} are to be left"
                raise OSError(errno.ENOSPC, told, str(self.folder))
            _write(self.folder / name, data)
        return self.folder / name
