"""References of pre_reorder.

Semantics: each token's row of input [T, H] is copied to the rows src2dst - dst_start of its local slots, divided by a
scale and converted on the way. A slot is local when its expert is within [start_expert_id, end_expert_id], or, without
topk_ids, when src2dst is not negative. Rows of gateup_input and output_scales that are no local slot's stay untouched.
"""

import functools

import torch

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.ops._float8 import (
    GROUP_SIZE,
    LARGEST,
    LEAST_ABSMAX,
    narrow,
    quantise,
    quotient_of,
    raw,
    scale_of,
)
from epmoe.ops._gate import local_row, local_slots
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
KERNEL, DEEPEP_KERNEL = "pre_reorder_triton_kernel", "deepep_permute_triton_kernel"


@jit
def pre_reorder_kernel(
    input,
    gateup_input,
    src2dst,
    topk_ids,
    a1_scales,
    input_scales,
    output_scales,
    start_expert_id,
    end_expert_id,
    topk,
    hidden_size,
    groups,
    dst_start,
    PER_TOKEN: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token. topk_ids, a1_scales and input_scales may be None. Rows are multiplied by the reciprocal of
    their scale, or, with FLOAT32, divided by it."""
    dtype = gateup_input.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    for slot in range(topk):
        at = token * topk + slot
        row = local_row(src2dst, topk_ids, at, start_expert_id, end_expert_id, dst_start)
        if row >= 0:
            if a1_scales is not None:
                if PER_TOKEN:
                    scale = tl.load(a1_scales + token)
                else:
                    scale = tl.load(a1_scales + tl.load(topk_ids + at) - start_expert_id)
                reciprocal = 1.0 / scale
            for begin in tl.range(0, hidden_size, BLOCK):
                columns = begin + tl.arange(0, BLOCK)
                inside = columns < hidden_size
                values = tl.load(input + token * hidden_size + columns, mask=inside)
                if a1_scales is not None:
                    if FLOAT32:
                        values = tl.math.div_rn(values.to(tl.float32), scale)
                    else:
                        values = values.to(tl.float32) * reciprocal
                tl.store(gateup_input + row * hidden_size + columns, values.to(dtype), mask=inside)
            if input_scales is not None:
                for begin in tl.range(0, groups, BLOCK):
                    columns = begin + tl.arange(0, BLOCK)
                    inside = columns < groups
                    scales = tl.load(input_scales + token * groups + columns, mask=inside)
                    tl.store(output_scales + row * groups + columns, scales, mask=inside)


@jit
def quantise_kernel(
    input,
    gateup_input,
    src2dst,
    topk_ids,
    output_scales,
    start_expert_id,
    end_expert_id,
    topk,
    hidden_size,
    groups,
    group_size,
    dst_start,
    largest,
    least_absmax,
    POWER_OF_TWO: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a group of a token."""
    dtype = gateup_input.dtype.element_ty
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * group_size
    last = tl.minimum(first + group_size, hidden_size)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in tl.range(first, last, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        values = tl.load(input + token * hidden_size + columns, mask=columns < last, other=0.0)
        most = tl.maximum(most, tl.abs(values.to(tl.float32)))
    scale = scale_of(tl.max(most), largest, least_absmax, POWER_OF_TWO, FLOAT32)
    for slot in range(topk):
        row = local_row(src2dst, topk_ids, token * topk + slot, start_expert_id, end_expert_id, dst_start)
        if row >= 0:
            for begin in tl.range(first, last, BLOCK):
                columns = begin + tl.arange(0, BLOCK)
                values = tl.load(input + token * hidden_size + columns, mask=columns < last)
                quotient = quotient_of(values, scale, largest, FLOAT32)
                tl.store(gateup_input + row * hidden_size + columns, quotient.to(dtype), mask=columns < last)
            tl.store(output_scales + row * groups + group, scale)


def run_triton(
    *,
    input,
    gateup_input,
    src2dst,
    topk_ids=None,
    a1_scales=None,
    input_scales=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    scale_axis="expert",
    quantization="static",
    scale_format="float32",
    float32=False,
):
    tokens, hidden_size = input.shape
    if input.numel() == 0:
        return
    groups = 0 if output_scales is None else output_scales.shape[-1]
    topk = src2dst.numel() // tokens
    with torch.cuda.device_of(input):
        if quantization == "static":
            pre_reorder_kernel[(tokens,)](
                raw(input),
                raw(gateup_input) if input.dtype == gateup_input.dtype else gateup_input,
                src2dst,
                topk_ids,
                a1_scales,
                input_scales,
                output_scales,
                start_expert_id,
                end_expert_id,
                topk,
                hidden_size,
                groups,
                dst_start,
                PER_TOKEN=scale_axis == "token",
                FLOAT32=float32,
                BLOCK=BLOCK_SIZE,
            )
        else:
            group_size = hidden_size if quantization == "token" else GROUP_SIZE
            quantise_kernel[(tokens, groups)](
                input,
                gateup_input,
                src2dst,
                topk_ids,
                output_scales,
                start_expert_id,
                end_expert_id,
                topk,
                hidden_size,
                groups,
                group_size,
                dst_start,
                LARGEST,
                LEAST_ABSMAX,
                POWER_OF_TWO=scale_format == "power_of_two",
                FLOAT32=float32,
                BLOCK=min(BLOCK_SIZE, _triton.triton.next_power_of_2(group_size)),
            )


def run_torch(
    *,
    input,
    gateup_input,
    src2dst,
    topk_ids=None,
    a1_scales=None,
    input_scales=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    dst_start=0,
    scale_axis="expert",
    quantization="static",
    scale_format="float32",
):
    """Scales are float32, so what they divide is float32 too."""
    tokens, hidden_size = input.shape
    if input.numel() == 0:
        return
    local, destinations = local_slots(src2dst, (tokens, -1), topk_ids, start_expert_id, end_expert_id)
    rows = raw(gateup_input).view(-1, hidden_size)
    scale_rows = None if output_scales is None else output_scales.view(-1, output_scales.shape[-1])
    values, scales = input, input_scales
    by_expert = a1_scales is not None and scale_axis == "expert"
    if quantization != "static":
        size = hidden_size if quantization == "token" else GROUP_SIZE
        values, scales = quantise(input, size, scale_format == "power_of_two")
    elif a1_scales is not None and not by_expert:
        values = input / a1_scales[:tokens, None]
    for slot in range(local.shape[1]):
        here = local[:, slot].nonzero().squeeze(1)
        destination = (destinations[here, slot] - dst_start).long()
        if by_expert:
            divisors = a1_scales[(topk_ids[here, slot] - start_expert_id).long()]
            moved = raw(narrow(input[here] / divisors[:, None], gateup_input.dtype))
        elif values.dtype == gateup_input.dtype:
            moved = raw(values)[here]
        else:
            moved = raw(narrow(values[here], gateup_input.dtype))
        rows[destination] = moved
        if scales is not None:
            scale_rows[destination] = scales[here]


def run_original(
    *,
    input,
    gateup_input,
    src2dst,
    topk_ids=None,
    a1_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    scale_axis="expert",
    **_,
):
    tokens, hidden_size = input.shape
    if input.numel() == 0:
        return
    found = sglang_original.find()
    name = DEEPEP_KERNEL if topk_ids is None else KERNEL
    values = {
        "start_expert_id": start_expert_id,
        "end_expert_id": end_expert_id,
        "topk": src2dst.numel() // tokens,
        "hidden_size": hidden_size,
        "BLOCK_SIZE": BLOCK_SIZE,
        "use_per_token_if_dynamic": scale_axis == "token",
    }
    # The names of the tensors differ between versions, and of the numbers not all are there.
    numbers = {each: values[each] for each in found.parameters(name)[5:]}
    with torch.cuda.device_of(input):
        # DeepEP's kernel does not read the ids.
        ids = src2dst if topk_ids is None else topk_ids
        found.kernel(name)[(tokens,)](input, gateup_input, src2dst, ids, a1_scales, **numbers)


def original_objection(
    *,
    input,
    gateup_input,
    topk_ids=None,
    a1_scales=None,
    input_scales=None,
    dst_start=0,
    scale_axis="expert",
    quantization="static",
    **_,
):
    found = sglang_original.find()
    name = DEEPEP_KERNEL if topk_ids is None else KERNEL
    if problem := found.problem_of(name):
        return problem
    if quantization != "static" or input_scales is not None:
        return f"SGLang's {name} neither finds scales nor copies them"
    if input.dtype == torch.float8_e4m3fn:
        return f"SGLang's {name} is given no float8 rows"
    if dst_start != 0:
        return f"SGLang's {name} has no dst_start"
    if a1_scales is not None and topk_ids is None:
        return f"SGLang's {name} does not scale"
    if a1_scales is not None and scale_axis == "token" and "use_per_token_if_dynamic" not in found.parameters(name):
        return f"{name} of SGLang {found.version} has no scales by token"
    if "int64" not in found.source(name) and (problem := narrow_index_objection(input, gateup_input)):
        return problem
    return triton_objection(input=input, gateup_input=gateup_input)


def is_copy(input, quantization="static", **_):
    return input.dtype == torch.float8_e4m3fn and quantization == "static"


def objection(**arguments):
    # Copied float8 is moved as bytes.
    return None if is_copy(**arguments) else triton_objection(**arguments)


REFERENCES = {
    "torch": Reference(run_torch, facts=lambda: torch_facts("float32")),
    "triton": Reference(run_triton, _triton.problem, objection, triton_facts),
    "triton-float32": Reference(
        functools.partial(run_triton, float32=True),
        _triton.problem,
        objection,
        lambda: triton_facts("float32"),
    ),
    "triton-original": Reference(
        run_original,
        lambda: original_problem(KERNEL, DEEPEP_KERNEL),
        original_objection,
        original_facts,
    ),
}
