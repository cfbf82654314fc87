"""The gated activation, which silu_and_mul and gelu_and_mul share.

Semantics: down_input [R, I] = act(gate) * up / scale, gate and up being the halves of gateup_output [R, 2*I]. A row is
active when its expert is within [start_expert_id, end_expert_id] (all are without reorder_topk_ids) and, with masked_m
[E], when it is among the first masked_m[e] of expert e's R / E rows. Rows that are not active stay untouched.
"""

import functools

import torch
from torch.nn import functional

from epmoe import _triton, sglang_original
from epmoe._triton import jit, tl
from epmoe.ops._float8 import GROUP_SIZE, LARGEST, LEAST_ABSMAX, narrow, quantise, quotient_of, raw, scale_of
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
MASKED_WRAPPER = "silu_and_mul_masked_post_quant_fwd"


@jit
def activate(gate, GELU: tl.constexpr, QUANTISES: tl.constexpr, FLOAT32: tl.constexpr):
    """In float32. The original's expressions, for the sake of the last bit: two for silu."""
    if GELU:
        argument = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        if FLOAT32:
            activated = gate * tl.sigmoid(2 * argument)
        else:
            activated = 0.5 * gate * (1 + (2 * tl.sigmoid(2 * argument) - 1))
    elif QUANTISES:
        activated = gate / (1 + tl.exp(-gate))
    else:
        activated = gate * tl.sigmoid(gate)
    return activated


@jit
def is_active(reorder_topk_ids, masked_m, row, rows_each, start_expert_id, end_expert_id):
    """Either table may be None."""
    active = row >= 0
    if reorder_topk_ids is not None:
        expert = tl.load(reorder_topk_ids + row)
        active = (expert >= start_expert_id) & (expert <= end_expert_id)
    if masked_m is not None:
        active = active & (row % rows_each < tl.load(masked_m + row // rows_each))
    return active


@jit
def activation_kernel(
    gateup_output,
    down_input,
    reorder_topk_ids,
    scales,
    masked_m,
    rows_each,
    width,
    start_expert_id,
    end_expert_id,
    GELU: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. The activation and each product are rounded to the input's dtype, or, with FLOAT32, only the
    result is rounded."""
    dtype = gateup_output.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if is_active(reorder_topk_ids, masked_m, row, rows_each, start_expert_id, end_expert_id):
        if scales is not None:
            scale = tl.load(scales + tl.load(reorder_topk_ids + row) - start_expert_id)
            factor = (1 / scale).to(dtype)
        for begin in tl.range(0, width, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < width
            gate = tl.load(gateup_output + row * 2 * width + columns, mask=inside).to(tl.float32)
            up = tl.load(gateup_output + (row * 2 + 1) * width + columns, mask=inside)
            activated = activate(gate, GELU, False, FLOAT32)
            if FLOAT32:
                values = activated * up.to(tl.float32)
                if scales is not None:
                    values = tl.math.div_rn(values, scale)
            else:
                values = activated.to(dtype) * up
                if scales is not None:
                    values = values * factor
            tl.store(down_input + row * width + columns, values.to(down_input.dtype.element_ty), mask=inside)


@jit
def quantise_kernel(
    gateup_output,
    down_input,
    reorder_topk_ids,
    masked_m,
    output_scales,
    rows_each,
    width,
    start_expert_id,
    end_expert_id,
    largest,
    least_absmax,
    GELU: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a group of a row."""
    dtype = gateup_output.dtype.element_ty
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if is_active(reorder_topk_ids, masked_m, row, rows_each, start_expert_id, end_expert_id):
        columns = group * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(gateup_output + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gateup_output + (row * 2 + 1) * width + columns, mask=inside, other=0.0)
        activated = activate(gate, GELU, True, FLOAT32)
        values = activated * up.to(tl.float32) if FLOAT32 else up * activated.to(dtype)
        scale = scale_of(tl.max(tl.abs(values)), largest, least_absmax, POWER_OF_TWO, FLOAT32)
        quotient = quotient_of(values, scale, largest, FLOAT32)
        tl.store(down_input + row * width + columns, quotient.to(down_input.dtype.element_ty), mask=inside)
        tl.store(output_scales + row * tl.num_programs(1) + group, scale)


def run_triton(
    *,
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    scales=None,
    masked_m=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    quantization="static",
    scale_format="float32",
    gelu=False,
    float32=False,
):
    if down_input.numel() == 0:
        return
    width = down_input.shape[-1]
    rows = down_input.numel() // width
    rows_each = rows if masked_m is None else rows // masked_m.numel()
    with torch.cuda.device_of(down_input):
        if quantization == "static":
            activation_kernel[(rows,)](
                gateup_output,
                down_input,
                reorder_topk_ids,
                scales,
                masked_m,
                rows_each,
                width,
                start_expert_id,
                end_expert_id,
                GELU=gelu,
                FLOAT32=float32,
                BLOCK=BLOCK_SIZE,
            )
        else:
            quantise_kernel[(rows, output_scales.shape[-1])](
                gateup_output,
                down_input,
                reorder_topk_ids,
                masked_m,
                output_scales,
                rows_each,
                width,
                start_expert_id,
                end_expert_id,
                LARGEST,
                LEAST_ABSMAX,
                GELU=gelu,
                POWER_OF_TWO=scale_format == "power_of_two",
                FLOAT32=float32,
                BLOCK=GROUP_SIZE,
            )


def run_torch(
    *,
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    scales=None,
    masked_m=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    quantization="static",
    scale_format="float32",
    gelu=False,
):
    """The plain computation in the activation dtype; scales are float32, so what they divide is float32 too."""
    if down_input.numel() == 0:
        return
    width = down_input.shape[-1]
    out = raw(down_input).view(-1, width)
    active = torch.ones(out.shape[0], dtype=torch.bool, device=out.device)
    if reorder_topk_ids is not None:
        active &= (reorder_topk_ids >= start_expert_id) & (reorder_topk_ids <= end_expert_id)
    if masked_m is not None:
        places = torch.arange(out.shape[0] // masked_m.numel(), device=out.device)
        active &= (places < masked_m[:, None]).view(-1)
    rows = active.nonzero().squeeze(1)
    gate, up = gateup_output.view(-1, 2, width)[rows].unbind(1)
    values = (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up
    if quantization == "group":
        quantised, found = quantise(values, GROUP_SIZE, scale_format == "power_of_two")
        out[rows] = raw(quantised)
        output_scales.view(out.shape[0], -1)[rows] = found
        return
    if scales is not None:
        values = values / scales[(reorder_topk_ids[rows] - start_expert_id).long(), None]
    out[rows] = raw(narrow(values, down_input.dtype))


def run_original(
    *,
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    scales=None,
    masked_m=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2**31 - 1,
    quantization="static",
    scale_format="float32",
    kernel,
):
    if down_input.numel() == 0:
        return
    found = sglang_original.find()
    width = down_input.shape[-1]
    rows = down_input.numel() // width
    with torch.cuda.device_of(down_input):
        if quantization == "group":
            if masked_m is None:
                masked_m = torch.full((1,), rows, dtype=torch.int32, device=down_input.device)
            tables = [table.view(masked_m.numel(), -1, table.shape[-1]) for table in (gateup_output, down_input)]
            scale_table = output_scales.view(masked_m.numel(), -1, output_scales.shape[-1])
            options = {"scale_ue8m0": True} if scale_format == "power_of_two" else {}
            found.kernel(MASKED_WRAPPER)(*tables, scale_table, GROUP_SIZE, masked_m, **options)
            return
        if reorder_topk_ids is None:
            reorder_topk_ids = torch.full((rows,), start_expert_id, dtype=torch.int32, device=down_input.device)
        found.kernel(kernel)[(rows,)](
            gateup_output,
            down_input,
            2 * width,
            reorder_topk_ids,
            scales,
            start_expert_id,
            end_expert_id,
            BLOCK_SIZE=BLOCK_SIZE,
        )


def original_objection(
    *,
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    masked_m=None,
    quantization="static",
    scale_format="float32",
    kernel,
    **_,
):
    found = sglang_original.find()
    silu = kernel.startswith("silu")
    if quantization == "group" and not silu:
        return "SGLang has no kernel that quantises after gelu"
    name = kernel if quantization == "static" else MASKED_WRAPPER
    if problem := found.problem_of(name):
        return problem
    if quantization == "static":
        if masked_m is not None:
            return f"SGLang's {name} has no masked_m"
        if problem := narrow_index_objection(gateup_output, down_input):
            return problem
    elif reorder_topk_ids is not None:
        return f"SGLang's {name} does not gate by expert"
    elif down_input.shape[-1] % GROUP_SIZE != 0:
        return f"SGLang's {name} needs a width divisible by {GROUP_SIZE}"
    elif scale_format == "power_of_two" and "scale_ue8m0" not in found.parameters(name):
        return f"{name} of SGLang {found.version} has no scales that are powers of two"
    return triton_objection(gateup_output=gateup_output, down_input=down_input)


def references_of(kernel):
    """The references of the op whose original is ``kernel``."""
    gelu = kernel.startswith("gelu")
    names = (kernel,) if gelu else (kernel, MASKED_WRAPPER)
    run = functools.partial(run_triton, gelu=gelu)
    return {
        "torch": Reference(functools.partial(run_torch, gelu=gelu), facts=torch_facts),
        "triton": Reference(run, _triton.problem, triton_objection, triton_facts),
        "triton-float32": Reference(
            functools.partial(run, float32=True), _triton.problem, triton_objection, lambda: triton_facts("float32")
        ),
        "triton-original": Reference(
            functools.partial(run_original, kernel=kernel),
            lambda: original_problem(*names),
            functools.partial(original_objection, kernel=kernel),
            original_facts,
        ),
    }
