"""References of ep_scatter.

Semantics: expert e has num_recv_tokens_per_expert[e] rows of output_tensor [M, H], from expert_start_loc[e] on. The
rows of recv_x [T, H] and of recv_x_scale [T, G] are copied there, a copy for each slot of recv_topk [T, K], in order of
flat slot. m_indices [M] says the expert of each reserved row, output_index [T, K] the row of each slot: -1 where the
slot has no expert, or the expert no room. Rows of no slot, and m_indices beyond the reservations, stay untouched.
"""

import torch

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.ops import preprocess
from epmoe.ops._float8 import raw
from epmoe.ops._report import (
    narrow_index_objection,
    original_facts,
    original_problem,
    torch_facts,
    triton_facts,
    triton_objection,
)
from epmoe.references import Reference

BLOCK_SIZE = 512
WRAPPER, ALIGNMENT = "ep_scatter", 128


def run_torch(
    *,
    recv_x,
    recv_topk,
    num_recv_tokens_per_expert,
    expert_start_loc,
    output_tensor,
    m_indices,
    output_index,
    recv_x_scale=None,
    output_tensor_scale=None,
):
    reserved = num_recv_tokens_per_expert.long().clamp(min=0)
    experts, rows = reserved.numel(), m_indices.numel()
    starts = reserved.cumsum(0) - reserved
    expert_start_loc.copy_(starts)
    owners = torch.repeat_interleave(torch.arange(experts, device=reserved.device), reserved)[:rows]
    m_indices[: owners.numel()] = owners.to(torch.int32)

    ids = preprocess.known_ids(recv_topk, experts).long()
    order = ids.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(ids.numel(), device=ids.device)
    counts = torch.bincount(ids + 1, minlength=experts + 1)
    place -= (counts.cumsum(0) - counts)[ids + 1]
    destinations = starts[ids] + place
    placed = (ids >= 0) & (place < reserved[ids]) & (destinations < rows)
    output_index.copy_(torch.where(placed, destinations, -1).view(output_index.shape))
    slots = placed.nonzero().squeeze(1)
    tokens = slots // max(1, recv_topk.shape[1])
    raw(output_tensor)[destinations[slots]] = raw(recv_x)[tokens]
    if recv_x_scale is not None:
        output_tensor_scale[destinations[slots]] = recv_x_scale[tokens]


@jit
def segments_kernel(reserved, expert_start_loc, m_indices, rows, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program an expert."""
    expert = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    before = tl.load(reserved + each, mask=each < expert, other=0)
    start = tl.sum(tl.maximum(before, 0), 0)
    tl.store(expert_start_loc + expert, start)
    end = tl.minimum(start + tl.maximum(tl.load(reserved + expert), 0), rows)
    for begin in tl.range(start, end, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(m_indices + at, expert, mask=at < end)


@jit
def scatter_kernel(
    recv_x,
    recv_x_scale,
    ids,
    packed,
    seg_indptr,
    reserved,
    expert_start_loc,
    output_tensor,
    output_tensor_scale,
    output_index,
    topk,
    hidden_size,
    groups,
    rows,
    BLOCK: tl.constexpr,
):
    """One program a slot; ``packed`` is its row were the segments as long as their slots. recv_x_scale may be None."""
    slot = tl.program_id(0).to(tl.int64)
    token = slot // topk
    expert = tl.load(ids + slot)
    row = tl.program_id(0).to(tl.int64) * 0 - 1
    if expert >= 0:
        place = tl.load(packed + slot) - tl.load(seg_indptr + expert)
        if place < tl.load(reserved + expert):
            row = tl.load(expert_start_loc + expert) + place
            if row >= rows:
                row = row * 0 - 1
    tl.store(output_index + slot, row.to(tl.int32))
    if row >= 0:
        for begin in tl.range(0, hidden_size, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < hidden_size
            values = tl.load(recv_x + token * hidden_size + columns, mask=inside)
            tl.store(output_tensor + row * hidden_size + columns, values, mask=inside)
        if recv_x_scale is not None:
            for begin in tl.range(0, groups, BLOCK):
                columns = begin + tl.arange(0, BLOCK)
                inside = columns < groups
                scales = tl.load(recv_x_scale + token * groups + columns, mask=inside)
                tl.store(output_tensor_scale + row * groups + columns, scales, mask=inside)


def run_triton(
    *,
    recv_x,
    recv_topk,
    num_recv_tokens_per_expert,
    expert_start_loc,
    output_tensor,
    m_indices,
    output_index,
    recv_x_scale=None,
    output_tensor_scale=None,
):
    experts, rows = num_recv_tokens_per_expert.numel(), m_indices.numel()
    ids = preprocess.known_ids(recv_topk, experts)
    packed = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    seg_indptr = torch.empty(experts + 1, dtype=torch.int64, device=ids.device)
    preprocess.run_triton(topk_ids=ids, src2dst=packed, seg_indptr=seg_indptr, negatives="dropped")
    with torch.cuda.device_of(recv_x):
        segments_kernel[(experts,)](
            num_recv_tokens_per_expert,
            expert_start_loc,
            m_indices,
            rows,
            EXPERTS=_triton.triton.next_power_of_2(experts),
            BLOCK=BLOCK_SIZE,
        )
        if ids.numel() > 0:
            scatter_kernel[(ids.numel(),)](
                raw(recv_x),
                recv_x_scale,
                ids,
                packed,
                seg_indptr,
                num_recv_tokens_per_expert,
                expert_start_loc,
                raw(output_tensor),
                output_tensor_scale,
                output_index,
                recv_topk.shape[1],
                recv_x.shape[1],
                0 if recv_x_scale is None else recv_x_scale.shape[1],
                rows,
                BLOCK=BLOCK_SIZE,
            )


def run_original(
    *,
    recv_x,
    recv_topk,
    num_recv_tokens_per_expert,
    expert_start_loc,
    output_tensor,
    m_indices,
    output_index,
    recv_x_scale,
    output_tensor_scale,
):
    """In an order of its own within an expert: its rows are put in the order of their slots."""
    starts, rows, scales, index = map(
        torch.empty_like, (expert_start_loc, output_tensor, output_tensor_scale, output_index)
    )
    with torch.cuda.device_of(recv_x):
        sglang_original.find().kernel(WRAPPER)(
            recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert, starts, rows, scales, m_indices, index
        )
    put_in_order(
        recv_topk, (starts, rows, scales, index), (expert_start_loc, output_tensor, output_tensor_scale, output_index)
    )


def put_in_order(recv_topk, made, ordered):
    """Rewrites what SGLang's ep_scatter made, whose order within an expert is left to chance, as epmoe orders it. Both
    are (expert_start_loc, output_tensor, output_tensor_scale, output_index)."""
    starts, rows, scales, index = made
    expert_start_loc, output_tensor, output_tensor_scale, output_index = ordered
    ids = recv_topk.reshape(-1).long()
    slots = (ids >= 0).nonzero().squeeze(1)
    # It has moved each start on by the slots that came.
    expert_start_loc.copy_(starts - torch.bincount(ids[slots], minlength=starts.numel()).to(torch.int32))
    # Its rows of an expert, which no two slots share, in ascending order go to the expert's slots in theirs.
    given = index.view(-1)[slots].long()
    by_expert = ids[slots].argsort(stable=True)
    canonical = torch.empty_like(given)
    canonical[by_expert] = given.sort().values
    output_index.fill_(-1)
    output_index.view(-1)[slots] = canonical.to(torch.int32)
    raw(output_tensor)[canonical] = raw(rows)[given]
    output_tensor_scale[canonical] = scales[given]


def original_objection(
    *, recv_x, recv_topk, num_recv_tokens_per_expert, output_tensor, m_indices, recv_x_scale=None, **_
):
    found = sglang_original.find()
    if problem := found.problem_of(WRAPPER):
        return problem
    if recv_x_scale is None:
        return "SGLang's ep_scatter moves rows with scales only"
    if recv_x.shape[1] % ALIGNMENT != 0 or recv_x_scale.shape[1] != recv_x.shape[1] // ALIGNMENT:
        return f"SGLang's ep_scatter moves a scale for each {ALIGNMENT} columns"
    reserved = num_recv_tokens_per_expert
    if m_indices.numel() % ALIGNMENT != 0 or bool((reserved % ALIGNMENT).any()):
        return f"SGLang's ep_scatter needs reservations padded to {ALIGNMENT} rows"
    ids = preprocess.known_ids(recv_topk, reserved.numel()).long()
    counts = torch.bincount(ids + 1, minlength=reserved.numel() + 1)
    if bool(reserved.sum() > m_indices.numel()) or bool((counts[1:] > reserved).any()):
        return "SGLang's ep_scatter writes out of bounds where rows are reserved too few"
    if problem := narrow_index_objection(recv_x, output_tensor):
        return problem
    return triton_objection(recv_x=recv_x)


REFERENCES = {
    "torch": Reference(run_torch, facts=torch_facts),
    "triton": Reference(run_triton, _triton.problem, facts=triton_facts),
    "triton-original": Reference(
        run_original,
        lambda: original_problem(WRAPPER),
        original_objection,
        original_facts,
    ),
}
