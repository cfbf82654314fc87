"""Finds, loads and declares libepmoe. In a process that Node started it is the copy Node has loaded."""

import ctypes
import functools
import os
import sys
from pathlib import Path

from epmoe.errors import EpmoeError

ABI_VERSION = 2

KIND_TENSOR, KIND_INT, KIND_FLOAT, KIND_ENUM = range(4)
VALUE_NONE, VALUE_TENSOR, VALUE_FOREIGN, VALUE_OBJECT, VALUE_INT, VALUE_FLOAT = range(6)
STREAM_AUTO, STREAM_GIVEN = range(2)


class DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Error(ctypes.Structure):
    _fields_ = [
        ("status", ctypes.c_int32),
        ("op", ctypes.c_char_p),
        ("argument", ctypes.c_char_p),
        ("expected", ctypes.c_char_p),
        ("received", ctypes.c_char_p),
        ("hint", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
    ]


class Param(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("doc", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("role", ctypes.c_int32),
        ("optional", ctypes.c_int32),
        ("shape", ctypes.c_char_p),
        ("dtypes", ctypes.c_uint32),
        ("dtype_like", ctypes.c_int32),
        ("default_value", ctypes.c_double),
        ("min_value", ctypes.c_double),
        ("max_value", ctypes.c_double),
        ("choices", ctypes.POINTER(ctypes.c_char_p)),
        ("n_choices", ctypes.c_int32),
    ]


class OpInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("doc", ctypes.c_char_p),
        ("params", ctypes.POINTER(Param)),
        ("n_params", ctypes.c_int32),
        ("has_cuda", ctypes.c_int32),
    ]


class _Payload(ctypes.Union):
    _fields_ = [
        ("tensor", ctypes.POINTER(DLTensor)),
        ("object", ctypes.c_void_p),
        ("i", ctypes.c_int64),
        ("f", ctypes.c_double),
    ]


class Value(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("payload", _Payload)]


def _candidates():
    named = os.environ.get("EPMOE_LIBRARY")
    if named:
        return [Path(named)]
    suffix = "dylib" if sys.platform == "darwin" else "so"
    package = Path(__file__).resolve().parent
    return [package.parent.parent / "build" / "Release" / f"libepmoe.{suffix}", package / f"libepmoe.{suffix}"]


@functools.cache
def library():
    """libepmoe with its functions declared. They are called with the GIL held, which reading torch's objects needs."""
    tried = _candidates()
    path = next((candidate for candidate in tried if candidate.exists()), None)
    if path is None:
        raise _unusable("libepmoe at " + " or ".join(map(str, tried)), "no such file", _BUILD)
    try:
        lib, waiting = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        abi = lib.epmoe_abi_version()
    except (OSError, AttributeError) as error:
        raise _unusable(f"libepmoe at {path}", f"a file that does not load: {error}", _BUILD) from None
    if abi != ABI_VERSION:
        raise _unusable(
            f"libepmoe of ABI {ABI_VERSION}",
            f"{path} of ABI {abi}",
            "Build the library and this package from one source",
        )
    for name, (result, arguments) in _SIGNATURES.items():
        if name in _WAITING:
            setattr(lib, name, getattr(waiting, name))
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_BUILD = "Build it with `npm run setup`, or name it: EPMOE_LIBRARY=/path/to/libepmoe.so"


def _unusable(expected, received, hint):
    return EpmoeError("ERR_NATIVE", expected=expected, received=received, hint=hint)


_SIGNATURES = {
    "epmoe_version": (ctypes.c_char_p, []),
    "epmoe_status_code": (ctypes.c_char_p, [ctypes.c_int32]),
    "epmoe_last_error": (ctypes.POINTER(Error), []),
    "epmoe_op_find": (ctypes.POINTER(OpInfo), [ctypes.c_char_p]),
    "epmoe_op_at": (ctypes.POINTER(OpInfo), [ctypes.c_int32]),
    "epmoe_set_exchange": (ctypes.c_int32, [ctypes.c_void_p]),
    "epmoe_invoke": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p],
    ),
    "epmoe_stream_synchronize": (ctypes.c_int32, [ctypes.c_int32, ctypes.c_void_p]),
    "epmoe_check": (ctypes.c_int32, [ctypes.c_int32]),
    "epmoe_alloc": (ctypes.c_int32, [DLDevice, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]),
}
_WAITING = {"epmoe_stream_synchronize"}  # called without the GIL, so that other threads run meanwhile


def last_error():
    return library().epmoe_last_error().contents


def require(status):
    """Raises what the library remembers of a failure on this thread."""
    if status == 0:
        return
    error = last_error()
    text = {name: getattr(error, name).decode() for name in ("op", "argument", "expected", "received", "hint")}
    raise EpmoeError(library().epmoe_status_code(error.status).decode(), **text)
