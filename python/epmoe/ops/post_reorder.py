"""References of post_reorder.

Semantics: for every token, the rows of its local slots, each times the slot's weight, are summed in slot order. A slot
is local when its expert is within [start_expert_id, end_expert_id], or, without topk_ids, when src2dst is not negative.
"""

import torch

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.references import Reference

BLOCK_SIZE = 512


@jit
def post_reorder_kernel(
    down_output,
    output,
    src2dst,
    topk_ids,
    topk_weights,
    start_expert_id,
    end_expert_id,
    topk,
    hidden_size,
    dst_start,
    HAS_IDS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token. Weights and every partial sum are of the activation dtype."""
    dtype = down_output.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    first_slot = token * topk
    for begin in tl.range(0, hidden_size, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        total = tl.zeros([BLOCK], dtype=dtype)
        for slot in range(topk):
            destination = tl.load(src2dst + first_slot + slot).to(tl.int64)
            if HAS_IDS:
                expert = tl.load(topk_ids + first_slot + slot)
                local = (expert >= start_expert_id) & (expert <= end_expert_id)
            else:
                local = destination >= 0
            if local:
                weight = tl.load(topk_weights + first_slot + slot).to(dtype)
                if FACTOR != 1.0:
                    weight = weight * FACTOR
                row = down_output + (destination - dst_start) * hidden_size
                total += tl.load(row + columns, mask=inside) * weight
        tl.store(output + token * hidden_size + columns, total, mask=inside)


def run_triton(
    *,
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    routed_scaling_factor=1.0,
):
    tokens, hidden_size = output.shape
    if output.numel() == 0:
        return
    post_reorder_kernel[(tokens,)](
        down_output,
        output,
        src2dst,
        topk_ids if topk_ids is not None else src2dst,
        topk_weights,
        start_expert_id,
        end_expert_id,
        topk_weights.shape[1],
        hidden_size,
        dst_start,
        HAS_IDS=topk_ids is not None,
        FACTOR=float(routed_scaling_factor),
        BLOCK=BLOCK_SIZE,
    )


def local_slots(src2dst, topk_weights, topk_ids, start_expert_id, end_expert_id):
    """Which slots are local, as a bool tensor [T, K], and src2dst in that shape."""
    destinations = src2dst.view(topk_weights.shape)
    if topk_ids is None:
        return destinations >= 0, destinations
    return (topk_ids >= start_expert_id) & (topk_ids <= end_expert_id), destinations


def run_torch(
    *,
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    routed_scaling_factor=1.0,
):
    """The plain computation in the activation dtype: a product and a sum a slot, each rounded."""
    local, destinations = local_slots(src2dst, topk_weights, topk_ids, start_expert_id, end_expert_id)
    rows = down_output.reshape(-1, output.shape[1])
    weights = topk_weights.to(output.dtype)
    if routed_scaling_factor != 1.0:
        weights = weights * routed_scaling_factor
    output.zero_()
    for slot in range(topk_weights.shape[1]):
        # Rows of remote slots are uninitialised: they must not be touched, not even times zero.
        tokens = local[:, slot].nonzero().squeeze(1)
        picked = rows[(destinations[tokens, slot] - dst_start).long()]
        output[tokens] += picked * weights[tokens, slot, None]


def run_original(*, down_output, output, src2dst, topk_weights, topk_ids=None, **scalars):
    tokens, hidden_size = output.shape
    if output.numel() == 0:
        return
    kernel = sglang_original.find().kernel("post_reorder_triton_kernel")
    start, end = scalars.get("start_expert_id", 0), scalars.get("end_expert_id", 2**31 - 1)
    topk = topk_weights.shape[1]
    tensors = (down_output, output, src2dst, topk_ids, topk_weights)
    generation = sglang_original.find().generation
    if generation == "A":
        kernel[(tokens,)](*tensors, start, end, topk, hidden_size, BLOCK_SIZE=BLOCK_SIZE)
    elif generation == "B":
        dst_start = scalars.get("dst_start", 0)
        kernel[(tokens,)](*tensors, start, end, topk, hidden_size, dst_start, BLOCK_SIZE=BLOCK_SIZE)
    else:
        # Generation D takes ids local to the rank, negative where remote.
        local_ids = torch.where((topk_ids >= start) & (topk_ids <= end), topk_ids - start, -1)
        tensors = (down_output, output, src2dst, local_ids, topk_weights)
        kernel[(tokens,)](*tensors, topk, hidden_size, BLOCK_SIZE=BLOCK_SIZE)


def original_objection(*, down_output, output, topk_ids=None, **scalars):
    generation = sglang_original.find().generation
    if topk_ids is None:
        return "SGLang's post_reorder gates by topk_ids"
    if scalars.get("routed_scaling_factor", 1.0) != 1.0:
        return "SGLang's post_reorder has no routed_scaling_factor"
    if scalars.get("dst_start", 0) != 0 and generation != "B":
        return f"generation {generation} has no dst_start"
    if generation == "A" and max(down_output.numel(), output.numel()) >= 2**31:
        return "generation A indexes with 32 bits: it would read out of bounds beyond 2^31 elements"
    return triton_objection(down_output=down_output)


def triton_problem():
    return _triton.PROBLEM


def triton_objection(*, down_output, **_):
    if down_output.dtype == torch.bfloat16 and _triton.BFLOAT16_PROBLEM:
        return _triton.BFLOAT16_PROBLEM
    return None


def triton_facts():
    return {
        "version": _triton.triton.__version__,
        "compiled": not _triton.INTERPRETED,
        "arithmetic": "input-dtype",
    }


def original_facts():
    found = sglang_original.find()
    return {
        **triton_facts(),
        "sglang": found.version,
        "generation": found.generation,
        "arithmetic": "float32" if found.generation == "D" else "input-dtype",
    }


REFERENCES = {
    "torch": Reference(
        run_torch,
        facts=lambda: {"version": torch.__version__, "compiled": True, "arithmetic": "input-dtype"},
    ),
    "triton": Reference(run_triton, triton_problem, triton_objection, triton_facts),
    "triton-original": Reference(
        run_original,
        lambda: triton_problem() or sglang_original.find().problem,
        original_objection,
        original_facts,
    ),
}
