"""References of post_reorder.

Semantics: for every token, the rows of its local slots, each times the slot's weight, are summed in slot order. A slot
is local when its expert is within [start_expert_id, end_expert_id], or, without topk_ids, when src2dst is not negative.
"""

import functools

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
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token. Weights and every partial sum are of the activation dtype, or, with FLOAT32, of float32."""
    dtype = down_output.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float32 if FLOAT32 else dtype
    token = tl.program_id(0).to(tl.int64)
    first_slot = token * topk
    for begin in tl.range(0, hidden_size, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        total = tl.zeros([BLOCK], dtype=sum_dtype)
        for slot in range(topk):
            destination = tl.load(src2dst + first_slot + slot).to(tl.int64)
            if HAS_IDS:
                expert = tl.load(topk_ids + first_slot + slot)
                local = (expert >= start_expert_id) & (expert <= end_expert_id)
            else:
                local = destination >= 0
            if local:
                weight = tl.load(topk_weights + first_slot + slot).to(sum_dtype)
                if FACTOR != 1.0 and not FLOAT32:
                    weight = weight * FACTOR
                row = down_output + (destination - dst_start) * hidden_size
                total += tl.load(row + columns, mask=inside).to(sum_dtype) * weight
        if FACTOR != 1.0 and FLOAT32:
            total = total * FACTOR
        tl.store(output + token * hidden_size + columns, total.to(dtype), mask=inside)


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
    float32=False,
):
    tokens, hidden_size = output.shape
    if output.numel() == 0:
        return
    with torch.cuda.device_of(output):
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
            FLOAT32=float32,
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
        # As the kernels do, and unlike torch with a Python number: the factor is rounded to the dtype first.
        weights = weights * weights.new_tensor(routed_scaling_factor)
    output.zero_()
    for slot in range(topk_weights.shape[1]):
        # Rows of remote slots are uninitialised: they must not be touched, not even times zero.
        tokens = local[:, slot].nonzero().squeeze(1)
        picked = rows[(destinations[tokens, slot] - dst_start).long()]
        output[tokens] += picked * weights[tokens, slot, None]


def run_original(
    *,
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    routed_scaling_factor=1.0,
):
    found = sglang_original.find()
    tokens, hidden_size = output.shape
    if output.numel() == 0:
        return
    if found.generation == "D":
        # It takes ids local to the rank, negative where remote.
        remote = (topk_ids < start_expert_id) | (topk_ids > end_expert_id)
        topk_ids = (topk_ids - start_expert_id).masked_fill_(remote, -1)
    scalars = {
        "A": (start_expert_id, end_expert_id, topk_weights.shape[1], hidden_size),
        "B": (start_expert_id, end_expert_id, topk_weights.shape[1], hidden_size, dst_start),
        "D": (topk_weights.shape[1], hidden_size),
    }[found.generation]
    with torch.cuda.device_of(output):
        kernel = found.kernel("post_reorder_triton_kernel")
        kernel[(tokens,)](down_output, output, src2dst, topk_ids, topk_weights, *scalars, BLOCK_SIZE=BLOCK_SIZE)


def original_objection(*, down_output, output, topk_ids=None, dst_start=0, routed_scaling_factor=1.0, **_):
    generation = sglang_original.find().generation
    if topk_ids is None:
        return "SGLang's post_reorder gates by topk_ids"
    if routed_scaling_factor != 1.0:
        return "SGLang's post_reorder has no routed_scaling_factor"
    if dst_start != 0 and generation != "B":
        return f"generation {generation} has no dst_start"
    if generation == "A" and max(down_output.numel(), output.numel()) >= 2**31:
        return "generation A indexes with 32 bits: it would read out of bounds beyond 2^31 elements"
    return triton_objection(down_output=down_output)


def triton_objection(*, down_output, **_):
    return _triton.bfloat16_problem() if down_output.dtype == torch.bfloat16 else None


def triton_facts(arithmetic="input-dtype"):
    return {"version": _triton.triton.__version__, "compiled": not _triton.INTERPRETED, "arithmetic": arithmetic}


def original_facts():
    found = sglang_original.find()
    arithmetic = "float32" if found.generation == "D" else "input-dtype"
    return {**triton_facts(arithmetic), "sglang": found.version, "generation": found.generation}


REFERENCES = {
    "torch": Reference(
        run_torch,
        facts=lambda: {"version": torch.__version__, "compiled": True, "arithmetic": "input-dtype"},
    ),
    "triton": Reference(run_triton, _triton.problem, triton_objection, triton_facts),
    "triton-float32": Reference(
        functools.partial(run_triton, float32=True),
        _triton.problem,
        triton_objection,
        lambda: triton_facts("float32"),
    ),
    "triton-original": Reference(
        run_original,
        lambda: _triton.problem() or sglang_original.find().problem,
        original_objection,
        original_facts,
    ),
}
