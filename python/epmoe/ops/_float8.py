"""float8_e4m3fn and its scales: the largest magnitude of some columns over 448, the largest float8."""

import torch

from epmoe._triton import jit, tl

GROUP_SIZE = 128
LARGEST = 448.0
LEAST_ABSMAX = 1e-10  # rows of zeros get a scale that divides


def narrow(values, dtype):
    """``values.to(dtype)``, saturating: torch's own conversion to float8 makes NaN of what is beyond 448."""
    return values.clamp(-LARGEST, LARGEST).to(dtype) if dtype == torch.float8_e4m3fn else values.to(dtype)


def raw(tensor):
    """The tensor's bytes where it is float8: moved as numbers, NaN could change, and older GPUs have no float8."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def quantise(values, group_size, power_of_two):
    """float8 rows [N, H] and float32 scales [N, groups] of ``values`` [N, H]; NaN has no say in the scales."""
    rows, columns = values.shape
    wide = values.float()
    padded = torch.nn.functional.pad(wide, (0, -columns % group_size)).view(rows, -1, group_size)
    absmax = padded.abs().masked_fill(padded.isnan(), 0).amax(2)
    scales = absmax.clamp(min=LEAST_ABSMAX) / LARGEST
    if power_of_two:
        bits = scales.view(torch.int32)
        scales = torch.where(bits & 0x7FFFFF != 0, (bits + 0x800000) & ~0x7FFFFF, bits).view(torch.float32)
    quotients = wide / scales.repeat_interleave(group_size, 1)[:, :columns]
    return narrow(quotients, torch.float8_e4m3fn), scales


@jit
def scale_of(absmax, largest, least, POWER_OF_TWO: tl.constexpr, FLOAT32: tl.constexpr):
    """The scale under which magnitudes up to ``absmax`` fit float8; Triton's division unless FLOAT32."""
    absmax = tl.maximum(absmax, least)
    scale = tl.math.div_rn(absmax, largest) if FLOAT32 else absmax / largest
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFF) != 0, (bits + 0x800000) & -0x800000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@jit
def quotient_of(values, scale, largest, FLOAT32: tl.constexpr):
    """What becomes float8. The original's clamp, which without FLOAT32 is kept, turns NaN into its lower bound."""
    if FLOAT32:
        quotient = tl.math.div_rn(values.to(tl.float32), scale)
    else:
        quotient = tl.minimum(tl.maximum(values / scale, -largest), largest)
    return quotient
