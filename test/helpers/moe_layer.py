"""A mixture-of-experts layer in plain torch, one expert at a time, in any dtype: what the layer is compared with."""

import torch
from torch.nn import functional


def _silu(rows):
    gate, up = rows.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _gelu(rows):
    gate, up = rows.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def _swigluoai(rows):
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "swigluoai": _swigluoai, "square": lambda rows: rows * rows}


def make(tokens, topk, hidden, half, experts, dtype, device, seed=1, width=None, ids_dtype="int64"):
    """Random weights of the whole model, with biases, and one call's inputs. No token chooses an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    width = width or 2 * half

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, getattr(torch, dtype))

    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :topk]
    return {
        "w13": normal(experts, width, hidden, scale=hidden**-0.5),
        "w2": normal(experts, hidden, half, scale=half**-0.5),
        "w13_bias": normal(experts, width, scale=0.3),
        "w2_bias": normal(experts, hidden, scale=0.3),
        "hidden": normal(tokens, hidden),
        "ids": chosen.to(device, getattr(torch, ids_dtype)).contiguous(),
        "weights": torch.rand(tokens, topk, generator=generator).to(device),
        "shared": normal(tokens, hidden),
        "residual": normal(tokens, hidden),
    }


@torch.no_grad()
def plain(x, activation, biases, factor=1.0, added=False, dtype=None):
    """The layer by torch alone, every step in ``dtype`` (default: the inputs')."""
    cast = lambda name: x[name].to(getattr(torch, dtype)) if dtype else x[name]
    hidden, w13, w2, b13, b2 = map(cast, ("hidden", "w13", "w2", "w13_bias", "w2_bias"))
    weights = x["weights"].to(hidden)
    out = torch.zeros_like(hidden)
    for expert in range(w13.shape[0]):
        token, slot = torch.where(x["ids"] == expert)
        rows = functional.linear(hidden[token], w13[expert], b13[expert] if biases else None)
        rows = functional.linear(ACTIVATIONS[activation](rows), w2[expert], b2[expert] if biases else None)
        out.index_add_(0, token, rows * weights[token, slot, None])
    out = out * factor
    return out + cast("shared") + cast("residual") if added else out


@torch.no_grad()
def attainable(x, activation, biases, factor=1.0, added=False, parts=None):
    """The layer with no rounding that its dtype could do without, once for each shape of its matrix products.

    ``parts`` are ranges of experts, the sums of which are added, as ranks that have these experts do.

    Rows [R, N] of an expert are torch's to multiply, all at once or 1, 2, 4, ... at a time: by the shape it chooses a
    kernel, and the kernel the order of additions. Products and the activation are rounded to the dtype, everything else
    is float32 and rounded once. What these results differ by is nobody's merit or fault; in 16 bits it is next to
    nothing beside the roundings, in float32 it is all that there is.
    """
    most = max(1, int((x["ids"][..., None] == torch.arange(x["w13"].shape[0]).to(x["ids"])).sum((0, 1)).max()))
    sizes = [2**power for power in range(most.bit_length())] + [most]
    ranges = [range(*part) for part in parts or [(0, x["w13"].shape[0])]]
    return [_attainable(x, activation, biases, factor, added, ranges, size) for size in sizes]


def _attainable(x, activation, biases, factor, added, ranges, rows_at_once):
    out = sum(_sum_of(x, activation, biases, experts, rows_at_once) * factor for experts in ranges)
    for name in ("shared", "residual"):
        if added and x[name] is not None:
            out = out + x[name].float()
    return out.to(x["hidden"])


def _sum_of(x, activation, biases, experts, rows_at_once):
    hidden = x["hidden"]
    out = torch.zeros_like(hidden, dtype=torch.float32)
    weights = x["weights"].float()
    for expert in experts:
        token, slot = torch.where(x["ids"] == expert)
        biases13, biases2 = (x["w13_bias"][expert], x["w2_bias"][expert]) if biases else (None, None)
        rows = _product(hidden[token], x["w13"][expert], biases13, rows_at_once)
        rows = ACTIVATIONS[activation](rows.double()).to(hidden)
        rows = _product(rows, x["w2"][expert], biases2, rows_at_once)
        out.index_add_(0, token, rows.float() * weights[token, slot, None])
    return out


def _product(rows, weight, bias, rows_at_once):
    return torch.cat([functional.linear(part, weight, bias) for part in rows.split(rows_at_once)])


def error(output, exact):
    """Relative to the float64 result, in the L2 norm; NaN when any element is."""
    return ((output.double() - exact).norm() / exact.norm()).item()
