"""The parts of a mixture-of-experts layer that are torch's own work: the grouped GEMM, and what surrounds it.

Rows are grouped by expert, as ``preprocess`` orders them: expert ``e`` owns rows ``seg_indptr[e]`` to
``seg_indptr[e + 1]``. Rows beyond the last segment belong to nobody; they may be uninitialised and stay so.
"""

import functools
import itertools

import torch
from torch.nn import functional

__all__ = ["ends_of", "expert_table", "grouped_gemm", "local_ids", "swiglu_oai", "waits"]


def ends_of(seg_indptr):
    """Where the experts' rows end, [E], int32, of seg_indptr [E + 1]: what a layer's products share."""
    return seg_indptr[1:].to(torch.int32)


@torch.no_grad()
def grouped_gemm(rows, weights, ends, bias=None):
    """``rows[i] @ weights[e].T + bias[e]`` for every row ``i`` of every expert ``e``.

    rows [R, N], weights [E, M, N] (any strides: a transposed view costs nothing), ends [E] as of :func:`ends_of`,
    bias [E, M].
    In bfloat16 ``torch.nn.functional.grouped_mm`` does it without waiting for the GPU, so that it can be captured in a
    CUDA graph. Where that cannot be had (other dtypes, GPUs before compute capability 9.0, torch before 2.10, strides
    that are no multiple of 16 bytes) it is one matmul an expert, which needs the segments on the host: it waits. On the
    CPU ``grouped_mm`` is such a loop itself, and a faster one.
    """
    if rows.shape[0] == 0:
        return rows.new_empty(0, weights.shape[1])
    # With a bias, other dtypes than bfloat16 are spared a rounding by addmm.
    if not _has_grouped_mm(rows, weights) or (bias is not None and weights.dtype != torch.bfloat16):
        return _matmul_per_expert(rows, weights, [0, *ends.tolist()], bias)
    # On CUDA, grouped_mm pads rows that are no multiple of 16 bytes.
    out = functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends).contiguous()
    return out if bias is None else out.add_(bias[_expert_of_rows(rows.shape[0], ends)])


def waits(w13, w2):
    """Whether :func:`grouped_gemm` makes the caller of such a layer wait, for the GPU or as the CPU's own work."""
    return not w13.is_cuda or not all(
        _has_grouped_mm(weights.new_empty(1, weights.shape[2]), weights) for weights in (w13, w2)
    )


def _has_grouped_mm(rows, weights):
    """Whether torch has a kernel for these; for other dtypes and older GPUs its grouped_mm is a loop that waits."""
    if not hasattr(functional, "grouped_mm"):
        return False
    if weights.is_cuda:
        has = weights.dtype == torch.bfloat16 and _capability(weights.device) >= (9, 0)
    else:
        has = _has_grouped_mm_on_cpu(weights.dtype)
    return has and _is_aligned(rows) and _is_aligned(weights)


@functools.cache
def _has_grouped_mm_on_cpu(dtype):
    """Torch had it for bfloat16 first."""
    try:
        ones = functools.partial(torch.ones, dtype=dtype)
        functional.grouped_mm(ones(1, 16), ones(1, 16, 16), offs=torch.ones(1, dtype=torch.int32))
    except RuntimeError:
        return False
    return True


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device)


def _is_aligned(tensor):
    """Whether one of the last two axes is dense and all others have strides of multiples of 16 bytes."""
    *others, row, column = (stride * tensor.element_size() for stride in tensor.stride())
    dense = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and any(
        one == dense and all(stride % 16 == 0 for stride in (*others, other))
        for one, other in ((row, column), (column, row))
    )


def _matmul_per_expert(rows, weights, ends, bias):
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(ends)):
        if end == start:
            continue
        part, weight = rows[start:end], weights[expert].t()
        if bias is None:
            torch.mm(part, weight, out=out[start:end])
        else:
            torch.addmm(bias[expert], part, weight, out=out[start:end])
    return out


def _expert_of_rows(count, ends):
    """The expert of each row; rows of nobody get the last one's, so that indexing with them is safe."""
    rows = torch.arange(count, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends[:-1], rows, right=True)


@torch.no_grad()
def swiglu_oai(gate_up, alpha=1.702, limit=7.0):
    """gpt-oss's activation: gate and up interleaved and clamped, in float32 with one rounding."""
    gate = gate_up[..., ::2].float().clamp(max=limit)
    up = gate_up[..., 1::2].float().clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(alpha * gate))).to(gate_up.dtype)


def expert_table(start, local, total, device):
    """For :func:`local_ids`: the ids of ``local`` experts from ``start`` on, of ``total`` in the model.

    Entry ``id + 2`` is the id on this rank, or -1 for another rank's expert and for -1 itself. The first and the last
    entry stand for every id below and above the model's; they stay invalid, so that ``preprocess`` reports them.
    """
    ids = torch.arange(-2, total + 1, dtype=torch.int32, device=device)
    here = (ids >= start) & (ids < start + local)
    table = torch.where(here, ids - start, -1)
    table[0], table[-1] = -2, local
    return table


@torch.no_grad()
def local_ids(topk_ids, table):
    """The model's expert ids as ids on this rank; on CUDA without a wait."""
    return table[(topk_ids + 2).clamp_(0, table.shape[0] - 1)]
