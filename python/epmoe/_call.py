"""Calls ops on torch tensors: each op's plan is made once, and a call fills one reused array of values."""

import ctypes
import functools
import os
import threading

import torch

from epmoe import _library as c
from epmoe.errors import EpmoeError

__all__ = ["check", "synchronize"]

_REFUSALS = (
    ("is_sparse", "a sparse tensor", "Call to_dense() on it first"),
    ("is_quantized", "a quantised tensor", "Call dequantize() on it first"),
    ("is_meta", "a meta tensor, which has no memory", "Make it on cpu or cuda"),
)
_CODES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float8_e4m3fn: (10, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
    torch.complex64: (5, 64),
    torch.complex128: (5, 128),
}


@functools.cache
def _has_exchange():
    """Hands torch's exchange table to the library, once. EPMOE_EXCHANGE=0 does without, as an older torch must."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or os.environ.get("EPMOE_EXCHANGE") == "0":
        return False
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    c.require(c.library().epmoe_set_exchange(get_pointer(capsule, b"dlpack_exchange_api")))
    return True


class _Plan(threading.local):
    """What a thread needs to call one op: the descriptor, and an array its arguments are written to."""

    def __init__(self, name):
        info = c.library().epmoe_op_find(name.encode())
        if not info:
            raise EpmoeError("ERR_UNKNOWN_OP", op=name, expected="an op of the built library", received=name)
        self.info = ctypes.cast(info, ctypes.c_void_p)
        params = [info.contents.params[i] for i in range(info.contents.n_params)]
        self.names = [param.name.decode() for param in params]
        self.kinds = [param.kind for param in params]
        self.choices = [
            {param.choices[i].decode(): i for i in range(param.n_choices)} if param.kind == c.KIND_ENUM else None
            for param in params
        ]
        self.values = (c.Value * len(params))()
        self.slots = list(self.values)  # elements of a ctypes array are made anew at each access
        self.payloads = [slot.payload for slot in self.slots]
        self.pointer = ctypes.cast(self.values, ctypes.c_void_p)


_plan = functools.cache(_Plan)


def invoke(op, values, stream=None):
    """Runs ``op`` on ``values``, positional in the descriptor's order; ``None`` stands for an absent argument."""
    plan = _plan(op)
    exchange = _has_exchange()
    keep = []  # what the library reads during the call
    gpu = None
    for i, value in enumerate(values):
        slot = plan.slots[i]
        if value is None:
            slot.kind = c.VALUE_NONE
        elif plan.kinds[i] == c.KIND_TENSOR:
            if not isinstance(value, torch.Tensor):
                raise EpmoeError(
                    "ERR_NOT_A_TENSOR",
                    op=op,
                    argument=plan.names[i],
                    expected="a torch.Tensor",
                    received=_described(value),
                    hint="Convert it with torch.as_tensor()",
                )
            if value.requires_grad or value.is_neg() or value.is_conj():
                _refuse(op, plan.names[i], value)
            if exchange:
                slot.kind = c.VALUE_OBJECT
                plan.payloads[i].object = id(value)
            else:
                if value.device.type == "cuda":
                    gpu = value.device
                slot.kind = c.VALUE_TENSOR
                plan.payloads[i].tensor = _describe(op, plan.names[i], value, keep)
        else:
            _put_scalar(op, plan, i, slot, value)
    if stream is None and gpu is not None:
        stream = torch.cuda.current_stream(gpu)
    mode, handle = (c.STREAM_AUTO, None) if stream is None else (c.STREAM_GIVEN, _stream_handle(op, stream))
    try:
        status = c.library().epmoe_invoke(plan.info, plan.pointer, len(plan.kinds), mode, handle)
    except Exception:
        status = 1  # torch left its own error pending; the library's, which names the argument, is told instead
    if status:
        _raise(op, plan, values)


def _put_scalar(op, plan, i, slot, value):
    payload = plan.payloads[i]
    kind = plan.kinds[i]
    if kind == c.KIND_ENUM and isinstance(value, str) and value in plan.choices[i]:
        slot.kind, payload.i = c.VALUE_INT, plan.choices[i][value]
    elif kind == c.KIND_INT and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        slot.kind, payload.i = c.VALUE_INT, value
    elif kind == c.KIND_FLOAT and isinstance(value, (int, float)) and not isinstance(value, bool):
        slot.kind, payload.f = c.VALUE_FLOAT, value
    else:
        expected = {
            c.KIND_ENUM: " or ".join(map(repr, plan.choices[i] or ())),
            c.KIND_INT: "a whole number",
            c.KIND_FLOAT: "a number",
        }[kind]
        raise EpmoeError(
            "ERR_VALUE",
            op=op,
            argument=plan.names[i],
            expected=expected,
            received=_described(value),
            hint="Leave it out for the default",
        )


def _described(value):
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__qualname__}"


def _stream_handle(op, stream):
    handle = getattr(stream, "cuda_stream", stream)
    if isinstance(handle, int) and not isinstance(handle, bool):
        return handle
    raise EpmoeError(
        "ERR_VALUE",
        op=op,
        argument="stream",
        expected="a torch.cuda.Stream or a cudaStream_t",
        received=_described(stream),
        hint="Leave it out for torch's current stream",
    )


def _refusal(tensor):
    for attribute, what, remedy in _REFUSALS:
        if getattr(tensor, attribute):
            return what, remedy
    if tensor.requires_grad:
        return "a tensor that requires grad", "Call detach() on it first"
    if tensor.is_neg() or tensor.is_conj():
        return "a tensor with its negative or conjugate bit set", "Call resolve_neg() or resolve_conj() on it first"
    return None


def _refuse(op, argument, tensor):
    received, hint = _refusal(tensor) or ("a tensor that cannot be described", "Make it dense first")
    raise EpmoeError(
        "ERR_UNSUPPORTED_TENSOR", op=op, argument=argument, expected="a dense tensor", received=received, hint=hint
    )


def _raise(op, plan, values):
    """The library's error; where torch could not describe a tensor, its own reason is worth more."""
    for name, value in zip(plan.names, values, strict=True):
        if isinstance(value, torch.Tensor) and _refusal(value):
            _refuse(op, name, value)
    c.require(1)


def _describe(op, argument, tensor, keep):
    if _refusal(tensor) or tensor.dtype not in _CODES:
        _refuse(op, argument, tensor)
    code, bits = _CODES[tensor.dtype]
    sizes = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.shape)
    strides = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.stride())
    device_type, device_id = {"cpu": (1, 0), "cuda": (2, tensor.device.index or 0)}.get(tensor.device.type, (0, 0))
    described = c.DLTensor(
        tensor.data_ptr(),
        c.DLDevice(device_type, device_id),
        tensor.dim(),
        c.DLDataType(code, bits, 1),
        ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)),
        0,
    )
    keep.append((sizes, strides, described))
    return ctypes.pointer(described)


def _device_index(device):
    index = torch.device("cuda" if device is None else device).index
    return torch.cuda.current_device() if index is None else index


def synchronize(device=None):
    """Waits for torch's current stream of a CUDA device (the current one by default), then behaves as :func:`check`."""
    index = _device_index(device)
    c.require(c.library().epmoe_stream_synchronize(index, torch.cuda.current_stream(index).cuda_stream))


def check(device=None):
    """Raises ERR_INDEX_OUT_OF_RANGE if a kernel that has finished on the device met such an index, and forgets it."""
    c.require(c.library().epmoe_check(_device_index(device)))
