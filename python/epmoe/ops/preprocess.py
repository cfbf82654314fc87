"""References of preprocess.

Semantics: rows are in the order of a stable sort of the slots by expert. src2dst [T*K] says each slot's row, seg_indptr
[E+1] where each expert's rows begin, reorder_topk_ids [T*K] each row's expert. Slots of -1 come first and count as rows
within expert 0's segment; ``dropped``, they get negative rows, and their ids come last. With m_max, an expert has m_max
rows: src2dst is expert * m_max + the place within the expert, and -1 where there is no expert or no room.
"""

import functools

import torch

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.ops._report import original_facts, original_problem, torch_facts, triton_facts
from epmoe.references import Reference

BLOCK_SIZE = 512
COUNTING, DROPPING = "run_moe_ep_preproess", "deepep_run_moe_deep_preprocess"


def known_ids(topk_ids, experts):
    """The flat ids; those out of range are -1."""
    flat = topk_ids.reshape(-1)
    return torch.where((flat < 0) | (flat >= experts), -1, flat)


def run_torch(*, topk_ids, src2dst, seg_indptr, reorder_topk_ids=None, masked_m=None, m_max=0, negatives="counted"):
    experts = seg_indptr.numel() - 1
    ids = known_ids(topk_ids, experts).long()
    order = ids.argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(ids.numel(), device=ids.device)
    counts = torch.bincount(ids + 1, minlength=experts + 1)  # of -1 and of each expert
    ends = counts.cumsum(0)
    dropped = counts[0] if negatives == "dropped" else 0
    seg_indptr[0] = 0
    seg_indptr[1:] = ends[1:] - dropped
    if masked_m is not None:
        masked_m.copy_(counts[1:].clamp(max=m_max) if m_max else counts[1:])
    if m_max:
        place = position - (ends - counts)[ids + 1]
        rows = torch.where((ids >= 0) & (place < m_max), ids * m_max + place, -1)
    else:
        rows = position - dropped
    src2dst.view(-1).copy_(rows)
    if reorder_topk_ids is not None:
        reorder_topk_ids[(position - dropped) % max(1, ids.numel())] = ids.to(topk_ids.dtype)


@jit
def bounds_kernel(sorted_ids, bounds, count):
    """bounds[e] is the number of ids below e; one program an e."""
    expert = tl.program_id(0)
    low = tl.program_id(0) * 0
    high = low + count
    while low < high:
        middle = (low + high) // 2
        if tl.load(sorted_ids + middle) < expert:
            low = middle + 1
        else:
            high = middle
    tl.store(bounds + expert, low)


@jit
def segments_kernel(bounds, seg_indptr, masked_m, m_max, DROPPED: tl.constexpr):
    """The tables by expert; one program an expert, and one for the first entry. masked_m may be None."""
    entry = tl.program_id(0)
    end = tl.load(bounds + entry)
    if DROPPED:
        end = end - tl.load(bounds)
    elif entry == 0:
        end = end * 0
    tl.store(seg_indptr + entry, end)
    if masked_m is not None:
        length = tl.load(bounds + entry) - tl.load(bounds + entry - 1, mask=entry > 0, other=0)
        if m_max > 0:
            length = tl.minimum(length, m_max)
        tl.store(masked_m + entry - 1, length.to(tl.int32), mask=entry > 0)


@jit
def rows_kernel(
    sorted_ids, order, bounds, src2dst, reorder_topk_ids, count, m_max, DROPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """The tables by slot; each program takes BLOCK positions of the sort. reorder_topk_ids may be None."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    ids = tl.load(sorted_ids + position, mask=inside, other=-1)
    row = position.to(tl.int64)
    if DROPPED:
        row = row - tl.load(bounds)
    if reorder_topk_ids is not None:
        tl.store(reorder_topk_ids + tl.where(row < 0, row + count, row), ids, mask=inside)
    if m_max > 0:
        place = position - tl.load(bounds + ids, mask=inside & (ids >= 0), other=0)
        row = tl.where((ids >= 0) & (place < m_max), ids.to(tl.int64) * m_max + place, -1)
    slot = tl.load(order + position, mask=inside, other=0)
    tl.store(src2dst + slot, row.to(src2dst.dtype.element_ty), mask=inside)


def run_triton(*, topk_ids, src2dst, seg_indptr, reorder_topk_ids=None, masked_m=None, m_max=0, negatives="counted"):
    entries, count, dropped = seg_indptr.numel(), topk_ids.numel(), negatives == "dropped"
    sorted_ids, order = torch.sort(known_ids(topk_ids, entries - 1), stable=True)
    bounds = torch.empty_like(seg_indptr)
    with torch.cuda.device_of(topk_ids):
        bounds_kernel[(entries,)](sorted_ids, bounds, count)
        segments_kernel[(entries,)](bounds, seg_indptr, masked_m, m_max, DROPPED=dropped)
        if count > 0:
            rows_kernel[(_triton.triton.cdiv(count, BLOCK_SIZE),)](
                sorted_ids,
                order,
                bounds,
                src2dst,
                reorder_topk_ids,
                count,
                m_max,
                DROPPED=dropped,
                BLOCK=BLOCK_SIZE,
            )


def run_original(*, topk_ids, src2dst, seg_indptr, reorder_topk_ids=None, negatives="counted", **_):
    found = sglang_original.find()
    with torch.cuda.device_of(topk_ids):
        sorted_ids, rows, segments = found.kernel(wrapper_of(negatives))(topk_ids, seg_indptr.numel() - 1)
    src2dst.view(-1).copy_(rows)
    seg_indptr.copy_(segments)
    if reorder_topk_ids is not None:
        # DeepEP's are the valid ones alone.
        reorder_topk_ids[: sorted_ids.numel()] = sorted_ids
        reorder_topk_ids[sorted_ids.numel() :] = -1


def original_objection(*, topk_ids, masked_m=None, m_max=0, negatives="counted", **_):
    found, name = sglang_original.find(), wrapper_of(negatives)
    if problem := found.problem_of(name):
        return problem
    if m_max != 0 or masked_m is not None:
        return f"SGLang's {name} packs the rows and counts nothing"
    if negatives == "counted" and not counts_as_known(found, topk_ids.device):
        return f"SGLang {found.version} counts the slots of -1 apart from expert 0's"
    return None


@functools.cache
def counts_as_known(found, device):
    """From v0.5.4 on the first entry counts the slots of -1, and some versions leave the last one 0."""
    ids = torch.tensor([[1, -1, 0, 1]], dtype=torch.int32, device=device)
    with torch.cuda.device_of(ids):
        segments = found.kernel(COUNTING)(ids, 2)[2]
    return segments.tolist() == [0, 2, 4]


def wrapper_of(negatives):
    return COUNTING if negatives == "counted" else DROPPING


REFERENCES = {
    "torch": Reference(run_torch, facts=torch_facts),
    "triton": Reference(run_triton, _triton.problem, facts=triton_facts),
    "triton-original": Reference(
        run_original,
        lambda: original_problem(COUNTING, DROPPING),
        original_objection,
        original_facts,
    ),
}
