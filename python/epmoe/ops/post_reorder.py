"""References of post_reorder.

Semantics: for every token, the rows of its local slots, each times the slot's weight, are summed in slot order. A slot
is local when its expert is within [start_expert_id, end_expert_id], or, without topk_ids, when src2dst is not negative.
Then shared_output and residual are added, in that order.
"""

import functools

import torch

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.ops._gate import local_slots
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
KERNEL, DEEPEP_KERNEL = "post_reorder_triton_kernel", "deepep_post_reorder_triton_kernel"


@jit
def post_reorder_kernel(
    down_output,
    output,
    src2dst,
    topk_ids,
    topk_weights,
    shared_output,
    residual,
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
    """One program a token. Weights and every partial sum are of the activation dtype, or, with FLOAT32, of float32.
    shared_output and residual may be None."""
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
        if shared_output is not None:
            total += tl.load(shared_output + token * hidden_size + columns, mask=inside).to(sum_dtype)
        if residual is not None:
            total += tl.load(residual + token * hidden_size + columns, mask=inside).to(sum_dtype)
        tl.store(output + token * hidden_size + columns, total.to(dtype), mask=inside)


def run_triton(
    *,
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    shared_output=None,
    residual=None,
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
            shared_output,
            residual,
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


def run_torch(
    *,
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    shared_output=None,
    residual=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    routed_scaling_factor=1.0,
):
    """The plain computation in the activation dtype: a product and a sum a slot, each rounded."""
    local, destinations = local_slots(src2dst, topk_weights.shape, topk_ids, start_expert_id, end_expert_id)
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
    if shared_output is not None:
        output += shared_output
    if residual is not None:
        output += residual


def run_original(
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
    if output.numel() == 0:
        return
    (tokens, hidden_size), topk = output.shape, topk_weights.shape[1]
    gated = topk_ids is not None
    found = sglang_original.find()
    name = KERNEL if gated else DEEPEP_KERNEL
    if gated and found.generation == "D":
        # It takes ids local to the rank, negative where remote.
        remote = (topk_ids < start_expert_id) | (topk_ids > end_expert_id)
        topk_ids = (topk_ids - start_expert_id).masked_fill_(remote, -1)
    values = {
        "start_expert_id": start_expert_id,
        "end_expert_id": end_expert_id,
        "topk": topk,
        "hidden_size": hidden_size,
        "dst_start": dst_start,
        "routed_scaling_factor": float(routed_scaling_factor),
        "BLOCK_SIZE": BLOCK_SIZE,
    }
    # The names of the tensors differ between versions, and of the numbers not all are there.
    numbers = {name: values[name] for name in found.parameters(name)[5:]}
    with torch.cuda.device_of(output):
        # DeepEP's kernel does not read the ids.
        found.kernel(name)[(tokens,)](
            down_output, output, src2dst, topk_ids if gated else src2dst, topk_weights, **numbers
        )


def original_objection(
    *,
    down_output,
    output,
    topk_ids=None,
    shared_output=None,
    residual=None,
    dst_start=0,
    routed_scaling_factor=1.0,
    **_,
):
    found = sglang_original.find()
    name = DEEPEP_KERNEL if topk_ids is None else KERNEL
    if problem := found.problem_of(name):
        return problem
    if shared_output is not None or residual is not None:
        return "SGLang's post_reorder adds nothing to the sum"
    named = "SGLang's deepep_post_reorder" if topk_ids is None else "SGLang's post_reorder"
    parameters = found.parameters(name)
    if routed_scaling_factor != 1.0 and "routed_scaling_factor" not in parameters:
        return f"{named} has no routed_scaling_factor"
    if dst_start != 0 and "dst_start" not in parameters:
        return f"{named} of SGLang {found.version} has no dst_start"
    if (topk_ids is None or found.generation == "A") and (problem := narrow_index_objection(down_output, output)):
        return problem
    return triton_objection(down_output=down_output)


def describe_original():
    generation = sglang_original.find().generation
    return original_facts("float32" if generation == "D" else "input-dtype")


REFERENCES = {
    "torch": Reference(run_torch, facts=torch_facts),
    "triton": Reference(run_triton, _triton.problem, triton_objection, triton_facts),
    "triton-float32": Reference(
        functools.partial(run_triton, float32=True),
        _triton.problem,
        triton_objection,
        lambda: triton_facts("float32"),
    ),
    "triton-original": Reference(
        run_original,
        lambda: original_problem(KERNEL),
        original_objection,
        describe_original,
    ),
}
