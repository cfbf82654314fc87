"""torch's exchange table, and a description of tensors by their attributes for a torch that has none."""

import ctypes
import os

import torch

from epmoe._library import DLDataType, DLDevice, DLTensor

_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_DTYPES = {
    "float16": (_FLOAT, 16),
    "float32": (_FLOAT, 32),
    "float64": (_FLOAT, 64),
    "bfloat16": (_BFLOAT, 16),
    "int8": (_INT, 8),
    "int16": (_INT, 16),
    "int32": (_INT, 32),
    "int64": (_INT, 64),
    "uint8": (_UINT, 8),
    "uint16": (_UINT, 16),
    "uint32": (_UINT, 32),
    "uint64": (_UINT, 64),
    "bool": (_BOOL, 8),
    "complex32": (_COMPLEX, 32),
    "complex64": (_COMPLEX, 64),
    "complex128": (_COMPLEX, 128),
    "float8_e4m3fn": (10, 8),
    "float8_e4m3fnuz": (11, 8),
    "float8_e5m2": (12, 8),
    "float8_e5m2fnuz": (13, 8),
    "float8_e8m0fnu": (14, 8),
}
_CODES = {getattr(torch, name): code for name, code in _DTYPES.items() if hasattr(torch, name)}
_DEVICES = {"cpu": 1, "cuda": 2}


def exchange_capsule():
    """torch's C exchange table as a capsule; None for a torch without one, or when EPMOE_EXCHANGE=0 does without."""
    if os.environ.get("EPMOE_EXCHANGE") == "0":
        return None
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def oddity(tensor):
    """Why a tensor is not plain memory, and how to mend it; None when it is, or in a way not known."""
    if tensor.is_meta:
        return "a meta tensor, which has no memory", "Make it on cpu or cuda"
    if tensor.is_nested:
        return "a nested tensor", "Call to_padded_tensor() on it first"
    if tensor.is_quantized:
        return "a quantised tensor", "Call dequantize() on it first"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}", "Call to_dense() on it first"
    if tensor.requires_grad:
        return "a tensor that requires grad", "Call detach() on it first"
    if tensor.is_neg():
        return "a tensor with its negative bit set", "Call resolve_neg() on it first"
    if tensor.is_conj():
        return "a tensor with its conjugate bit set", "Call resolve_conj() on it first"
    return None


class Description:
    """A DLTensor at ``address``, valid as long as this object and the tensor live."""

    def __init__(self, tensor):
        if oddity(tensor) is not None or tensor.dtype not in _CODES or tensor.device.type not in _DEVICES:
            raise TypeError(f"{tensor.dtype} on {tensor.device}")
        self.device = tensor.device
        rank = tensor.dim()
        self._sizes = (ctypes.c_int64 * max(1, rank))(*tensor.shape)
        self._strides = (ctypes.c_int64 * max(1, rank))(*tensor.stride())
        self._tensor = DLTensor(
            tensor.data_ptr(),
            DLDevice(_DEVICES[tensor.device.type], tensor.device.index or 0),
            rank,
            DLDataType(*_CODES[tensor.dtype], 1),
            self._sizes,
            self._strides,
            0,
        )
        self.address = ctypes.addressof(self._tensor)
