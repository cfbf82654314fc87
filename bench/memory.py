"""What Python and the C library know of the memory of the process they are in."""

import ctypes
import sys

_MEMBERS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MEMBERS]


_libc = ctypes.CDLL(None)
_glibc = hasattr(_libc, "mallinfo2")
if _glibc:
    _libc.mallinfo2.restype = _Mallinfo


def figures():
    """MB that malloc has handed out and MB that it keeps though they were freed, of all threads; thousands of blocks
    that Python's own allocator has handed out. Without glibc the first two are 0."""
    info = _libc.mallinfo2() if _glibc else _Mallinfo()
    return {
        "mallocUsed": (info.uordblks + info.hblkhd) / 1e6,
        "mallocKept": info.fordblks / 1e6,
        "pythonBlocks": sys.getallocatedblocks() / 1e3,
    }


def trim():
    """Has malloc give the pages back that it keeps free."""
    if _glibc:
        _libc.malloc_trim(0)
