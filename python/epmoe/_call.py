"""Calls ops on torch tensors: an op's descriptor is prepared once, and a call packs its values into one record."""

import contextlib
import ctypes
import functools
import numbers
import struct

import torch
from torch import Tensor

from epmoe import _dlpack
from epmoe import _library as c
from epmoe.errors import EpmoeError

__all__ = ["check", "synchronize"]


class _Param:
    def __init__(self, param):
        self.name = param.name.decode()
        self.kind = param.kind
        self.choices = {param.choices[i].decode(): i for i in range(param.n_choices)}


class _Plan:
    """An op's parameters, and how their values are packed as an array of epmoe_value."""

    def __init__(self, op):
        info = c.library().epmoe_op_find(op.encode())
        if not info:
            raise EpmoeError("ERR_UNKNOWN_OP", op=op, expected="an op of the built library", received=op)
        self.info = ctypes.cast(info, ctypes.c_void_p)
        self.params = [_Param(info.contents.params[i]) for i in range(info.contents.n_params)]
        payload = {c.KIND_TENSOR: "P", c.KIND_INT: "q", c.KIND_FLOAT: "d", c.KIND_ENUM: "q"}
        self.pack = struct.Struct("".join("i4x" + payload[param.kind] for param in self.params)).pack


_plan = functools.cache(_Plan)


@functools.cache
def _has_exchange():
    """Hands torch's exchange table to the library, once; False where there is none."""
    capsule = _dlpack.exchange_capsule()
    if capsule is None:
        return False
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    c.require(c.library().epmoe_set_exchange(get_pointer(capsule, b"dlpack_exchange_api")))
    return True


def invoke(op, values, stream=None):
    """Runs ``op`` on ``values``, positional in the descriptor's order; ``None`` stands for an absent argument."""
    plan = _plan(op)
    exchange = _has_exchange()
    described = []  # what the library reads during the call
    packed = []
    for param, value in zip(plan.params, values, strict=True):
        if value is None:
            packed += c.VALUE_NONE, 0
        elif param.kind != c.KIND_TENSOR:
            packed += _scalar(op, param, value)
        elif not isinstance(value, Tensor):
            raise _not_a_tensor(op, param.name, value)
        elif value.requires_grad or value.is_neg():  # the exchange table would export these without a word
            raise _unsupported(op, param.name, value)
        elif exchange:
            packed += c.VALUE_OBJECT, id(value)
        else:
            described.append(_described(op, param.name, value))
            packed += c.VALUE_TENSOR, described[-1].address
    if stream is None and not exchange:
        device = next((each.device for each in described if each.device.type == "cuda"), None)
        stream = device and torch.cuda.current_stream(device)
    mode, handle = (c.STREAM_AUTO, None) if stream is None else (c.STREAM_GIVEN, _handle_of(op, stream))
    reason = None
    try:
        status = c.library().epmoe_invoke(plan.info, plan.pack(*packed), len(plan.params), mode, handle)
    except Exception as error:  # left by torch, which could not describe a tensor; the library knows which one
        status, reason = c.last_error().status, error
    if status:
        _fail(op, plan, values, status, reason)


def _fail(op, plan, values, status, reason):
    """Raises the library's error, or what is wrong with the tensor it complains of, if that is no plain memory."""
    name = c.last_error().argument.decode()
    culprit = next((value for param, value in zip(plan.params, values, strict=True) if param.name == name), None)
    if isinstance(culprit, Tensor) and (reason is not None or _dlpack.oddity(culprit) is not None):
        raise _unsupported(op, name, culprit, reason)
    if reason is not None:
        raise reason
    c.require(status)


def _scalar(op, param, value):
    """The kind and payload of a scalar. Exact types are tried first: they are what calls mostly bring, and cheap."""
    if param.kind == c.KIND_INT:
        whole = type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))
        if whole and -(2**63) <= value < 2**63:
            return c.VALUE_INT, int(value)
        expected = "a whole number"
    elif param.kind == c.KIND_FLOAT:
        if type(value) is float:
            return c.VALUE_FLOAT, value
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return c.VALUE_FLOAT, float(value)
        expected = "a finite number that float32 can hold"
    else:
        if isinstance(value, str) and value in param.choices:
            return c.VALUE_INT, param.choices[value]
        expected = " or ".join(map(repr, param.choices))
    raise EpmoeError(
        "ERR_VALUE",
        op=op,
        argument=param.name,
        expected=expected,
        received=_told(value),
        hint="Leave it out for the default",
    )


def _told(value):
    if not isinstance(value, (bool, str, numbers.Number)):
        return f"a {type(value).__qualname__}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _not_a_tensor(op, argument, value):
    return EpmoeError(
        "ERR_NOT_A_TENSOR",
        op=op,
        argument=argument,
        expected="a torch.Tensor",
        received=_told(value),
        hint="Convert it with torch.as_tensor()",
    )


def _unsupported(op, argument, tensor, reason=None):
    received, hint = _dlpack.oddity(tensor) or (f"a tensor that torch cannot describe: {_first_line(reason)}", "")
    return EpmoeError(
        "ERR_UNSUPPORTED_TENSOR", op=op, argument=argument, expected="a dense tensor", received=received, hint=hint
    )


def _first_line(reason):
    return next(iter(str(reason).splitlines()), "")


def _described(op, argument, tensor):
    try:
        return _dlpack.Description(tensor)
    except (RuntimeError, AttributeError, TypeError) as reason:
        raise _unsupported(op, argument, tensor, reason) from None


def _handle_of(op, stream):
    handle = getattr(stream, "cuda_stream", stream)
    if isinstance(handle, int) and not isinstance(handle, bool):
        return handle
    raise EpmoeError(
        "ERR_VALUE",
        op=op,
        argument="stream",
        expected="a torch.cuda.Stream or a cudaStream_t",
        received=_told(stream),
        hint="Leave it out for torch's current stream",
    )


def synchronize(device=None):
    """Waits for torch's current stream of a CUDA device (the current one by default), then behaves as :func:`check`.

    Work on the CPU is done when an op returns: for it, and where there is no GPU, this does nothing.
    """
    index = _cuda_index("synchronize", device)
    if index is not None:
        stream = torch.cuda.current_stream(index).cuda_stream if torch.cuda.is_available() else None
        c.require(c.library().epmoe_stream_synchronize(index, stream))


def check(device=None):
    """Raises ERR_INDEX_OUT_OF_RANGE if a kernel that has finished on the device met such an index, and forgets it."""
    index = _cuda_index("check", device)
    if index is not None:
        c.require(c.library().epmoe_check(index))


class _CudaMemory:
    def __init__(self, address, nbytes):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def allocate(device, nbytes):
    """CUDA memory beside torch's, as a uint8 tensor: it may be asked for while a graph is captured, is no part of the
    graph, and is never freed."""
    address = ctypes.c_void_p()
    c.require(c.library().epmoe_alloc(c.DLDevice(2, device.index), nbytes, ctypes.byref(address)))
    return torch.as_tensor(_CudaMemory(address.value, nbytes), device=device)


def _cuda_index(op, device):
    """The index of a CUDA device; None when there is nothing to wait for."""
    if device is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else None
    if isinstance(device, int) and not isinstance(device, bool) and 0 <= device < 2**31:
        return device
    try:
        named = torch.device(device) if isinstance(device, (str, torch.device)) else None
    except RuntimeError:
        named = None
    if named is None or named.type not in ("cpu", "cuda"):
        raise EpmoeError(
            "ERR_VALUE",
            op=op,
            argument="device",
            expected="a CUDA device, as torch.device, 'cuda:0' or 0",
            received=_told(device) if named is None else str(named),
            hint="Leave it out for the current device",
        )
    if named.type == "cpu":
        return None
    if named.index is not None:
        return named.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0
