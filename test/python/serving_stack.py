"""A small serving stack, written to a folder: SGLang's names, signatures and import habits, with kernels of its own.

``kernels_a.py`` has the kernels of the first generation, ``kernels_b.py``, ``kernels_c.py`` and ``kernels_d.py``
post_reorder's later ones; ``layer.py`` takes them by from-import, by alias and through the module.
"""

import importlib
import itertools
import sys
import tempfile
import textwrap
from pathlib import Path

import epmoe._triton  # noqa: F401  mends the interpreter, which older Triton and newer numpy break

HEADER = """
import torch
import triton
import triton.language as tl
"""

POST_REORDER = """
@triton.jit
def post_reorder_triton_kernel(
    down_output_ptr, output_ptr, src2dst_ptr, topk_ids_ptr, topk_weights_ptr, {tail}BLOCK_SIZE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    dtype = {dtype}
    for begin in tl.range(0, hidden_size, BLOCK_SIZE):
        at = begin + tl.arange(0, BLOCK_SIZE)
        total = tl.zeros([BLOCK_SIZE], dtype=dtype)
        for k in range(topk):
            expert_id = tl.load(topk_ids_ptr + token * topk + k)
            if {gate}:
                row = tl.load(src2dst_ptr + token * topk + k).to(tl.int64){shift}
                weight = tl.load(topk_weights_ptr + token * topk + k).to(dtype)
                value = tl.load(down_output_ptr + row * hidden_size + at, mask=at < hidden_size)
                total += value.to(dtype) * weight
        tl.store(output_ptr + token * hidden_size + at, total.to(output_ptr.dtype.element_ty), mask=at < hidden_size)
"""
_IN, _RANGE = "down_output_ptr.dtype.element_ty", "(expert_id >= start_expert_id) & (expert_id <= end_expert_id)"
_BOUNDS, _SIZES = "start_expert_id, end_expert_id, ", "topk, hidden_size, "
GENERATIONS = {
    "a": {"tail": _BOUNDS + _SIZES, "gate": _RANGE, "shift": "", "dtype": _IN},
    "b": {"tail": f"{_BOUNDS}{_SIZES}dst_start, ", "gate": _RANGE, "shift": " - dst_start", "dtype": _IN},
    "c": {"tail": _SIZES, "gate": "expert_id > 0", "shift": "", "dtype": _IN},
    "d": {"tail": _SIZES, "gate": "expert_id >= 0", "shift": "", "dtype": "tl.float32"},
}

REST = """
@triton.jit
def deepep_permute_triton_kernel(
    input_ptr, gateup_input_ptr, src2dst_ptr, topk_ids_ptr, a1_scales_ptr, topk, hidden_size, BLOCK_SIZE: tl.constexpr
):
    token = tl.program_id(0)
    for begin in tl.range(0, hidden_size, BLOCK_SIZE):
        at = begin + tl.arange(0, BLOCK_SIZE)
        value = tl.load(input_ptr + token * hidden_size + at, mask=at < hidden_size)
        for k in range(topk):
            row = tl.load(src2dst_ptr + token * topk + k)
            if row >= 0:
                wanted = gateup_input_ptr.dtype.element_ty
                tl.store(gateup_input_ptr + row * hidden_size + at, value.to(wanted), mask=at < hidden_size)

@triton.jit
def deepep_post_reorder_triton_kernel(
    down_output_ptr, output_ptr, src2dst_ptr, topk_ids_ptr, topk_weights_ptr, topk, hidden_size,
    BLOCK_SIZE: tl.constexpr
):
    token = tl.program_id(0)
    dtype = down_output_ptr.dtype.element_ty
    for begin in tl.range(0, hidden_size, BLOCK_SIZE):
        at = begin + tl.arange(0, BLOCK_SIZE)
        total = tl.zeros([BLOCK_SIZE], dtype=dtype)
        for k in range(topk):
            row = tl.load(src2dst_ptr + token * topk + k)
            if row >= 0:
                weight = tl.load(topk_weights_ptr + token * topk + k).to(dtype)
                total += tl.load(down_output_ptr + row * hidden_size + at, mask=at < hidden_size) * weight
        tl.store(output_ptr + token * hidden_size + at, total, mask=at < hidden_size)

@triton.jit
def pre_reorder_triton_kernel(
    input_ptr, gateup_input_ptr, src2dst_ptr, topk_ids_ptr, a1_scales_ptr, start_expert_id, end_expert_id, topk,
    hidden_size, BLOCK_SIZE: tl.constexpr{flag}
):
    token = tl.program_id(0)
    for k in range(topk):
        expert = tl.load(topk_ids_ptr + token * topk + k)
        if (expert >= start_expert_id) & (expert <= end_expert_id):
            row = tl.load(src2dst_ptr + token * topk + k)
            factor = 1.0
            if a1_scales_ptr is not None:
                factor = 1.0 / tl.load(a1_scales_ptr + {index})
            for begin in tl.range(0, hidden_size, BLOCK_SIZE):
                at = begin + tl.arange(0, BLOCK_SIZE)
                value = tl.load(input_ptr + token * hidden_size + at, mask=at < hidden_size).to(tl.float32) * factor
                value = value.to(gateup_input_ptr.dtype.element_ty)
                tl.store(gateup_input_ptr + row * hidden_size + at, value, mask=at < hidden_size)

@triton.jit
def silu_and_mul_triton_kernel(
    gateup_output, down_input, hidden_size, reorder_topk_ids, scales, start_expert_id, end_expert_id,
    BLOCK_SIZE: tl.constexpr
):
    row, half = tl.program_id(0), hidden_size // 2
    expert = tl.load(reorder_topk_ids + row)
    if (expert >= start_expert_id) & (expert <= end_expert_id):
        for begin in tl.range(0, half, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            gate = tl.load(gateup_output + row * hidden_size + at, mask=at < half).to(tl.float32)
            up = tl.load(gateup_output + row * hidden_size + half + at, mask=at < half)
            value = (gate * tl.sigmoid(gate)).to(up.dtype) * up
            if scales is not None:
                value = value * (1 / tl.load(scales + expert - start_expert_id)).to(up.dtype)
            tl.store(down_input + row * half + at, value.to(down_input.dtype.element_ty), mask=at < half)

@triton.jit
def gelu_and_mul_triton_kernel(
    gateup_output, down_input, hidden_size, reorder_topk_ids, scales, start_expert_id, end_expert_id,
    BLOCK_SIZE: tl.constexpr
):
    row, half = tl.program_id(0), hidden_size // 2
    expert = tl.load(reorder_topk_ids + row)
    if (expert >= start_expert_id) & (expert <= end_expert_id):
        for begin in tl.range(0, half, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            gate = tl.load(gateup_output + row * hidden_size + at, mask=at < half).to(tl.float32)
            up = tl.load(gateup_output + row * hidden_size + half + at, mask=at < half)
            inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
            value = (gate * tl.sigmoid(inner)).to(up.dtype) * up
            tl.store(down_input + row * half + at, value.to(down_input.dtype.element_ty), mask=at < half)

def run_moe_ep_preproess(topk_ids, num_experts):
    sorted_ids, order = topk_ids.view(-1).sort(stable=True)
    experts = torch.arange(num_experts, dtype=sorted_ids.dtype, device=sorted_ids.device)
    bounds = torch.searchsorted(sorted_ids, experts, right=True)
    return sorted_ids, order.argsort().int(), torch.cat([bounds.new_zeros(1), bounds])

def deepep_run_moe_deep_preprocess(topk_ids, num_experts):
    sorted_ids, order = topk_ids.view(-1).sort(stable=True)
    none = (sorted_ids < 0).sum()
    experts = torch.arange(num_experts + 1, dtype=sorted_ids.dtype, device=sorted_ids.device)
    bounds = torch.searchsorted(sorted_ids, experts)
    return sorted_ids[none:], order.argsort() - none, bounds - none

def silu_and_mul_masked_post_quant_fwd(input, output, output_scale, quant_group_size, masked_m, scale_ue8m0=False):
    gate, up = input.float().chunk(2, -1)
    values = (gate / (1 + (-gate).exp())).to(input.dtype) * up.to(input.dtype)
    groups = values.float().view(*values.shape[:-1], -1, quant_group_size)
    scales = groups.abs().amax(-1).clamp(min=1e-10) / 448
    quotients = (groups / scales[..., None]).clamp(-448, 448).view(values.shape)
    for expert, rows in enumerate(masked_m.tolist()):
        output[expert, :rows] = quotients[expert, :rows].to(output.dtype)
        output_scale[expert, :rows] = scales[expert, :rows]

@torch.no_grad()
def ep_scatter(
    recv_x, recv_x_scale, recv_topk, num_recv_tokens_per_expert, expert_start_loc, output_tensor,
    output_tensor_scale, m_indices, output_index
):
    expert_start_loc.copy_(num_recv_tokens_per_expert.cumsum(0) - num_recv_tokens_per_expert)
    for expert, start in enumerate(expert_start_loc.tolist()):
        m_indices[start : start + num_recv_tokens_per_expert[expert]] = expert
    for token in range(recv_topk.shape[0] - 1, -1, -1):  # the last first: any order is allowed
        for k, expert in enumerate(recv_topk[token].tolist()):
            if expert >= 0:
                row = int(expert_start_loc[expert])
                expert_start_loc[expert] += 1
                output_index[token, k] = row
                output_tensor[row], output_tensor_scale[row] = recv_x[token], recv_x_scale[token]

@torch.no_grad()
def ep_gather(input_tensor, recv_topk_ids, recv_topk_weight, input_index, output_tensor):
    rows = input_tensor[input_index.long().clamp(min=0)].float() * recv_topk_weight.float()[..., None]
    output_tensor.copy_(rows.masked_fill((recv_topk_ids < 0)[..., None], 0).sum(1))
"""
_FLAG = {
    "flag": ", use_per_token_if_dynamic: tl.constexpr",
    "index": "(token if use_per_token_if_dynamic else expert - start_expert_id)",
}

LAYER = """
import torch

from . import kernels_a as kernels
from .kernels_a import post_reorder_triton_kernel, run_moe_ep_preproess
from .kernels_a import pre_reorder_triton_kernel as permute
from .kernels_a import silu_and_mul_triton_kernel
from .kernels_b import post_reorder_triton_kernel as combine_b
from .kernels_d import post_reorder_triton_kernel as combine_d

def forward(x, topk_ids, weights, experts, first=0, last=None):
    \"\"\"Rows to experts and back; what the experts do is activate, on the side.\"\"\"
    last = experts - 1 if last is None else last
    (tokens, hidden), topk = x.shape, topk_ids.shape[1]
    order, src2dst, _ = run_moe_ep_preproess(topk_ids, experts)
    rows = torch.full((tokens * topk, hidden), 7.0, dtype=x.dtype, device=x.device)
    permute[(tokens,)](x, rows, src2dst, topk_ids, None, first, last, topk, hidden, 64, use_per_token_if_dynamic=False)
    wide = torch.cat([rows, torch.ones_like(rows)], 1)
    down = torch.full_like(rows, 7.0)
    silu_and_mul_triton_kernel[(tokens * topk,)](wide, down, 2 * hidden, order, None, first, last, BLOCK_SIZE=64)
    output = torch.empty_like(x)
    post_reorder_triton_kernel[lambda meta: (tokens,)](
        rows, output, src2dst, topk_ids, weights, first, last, topk, hidden, BLOCK_SIZE=64, num_warps=4
    )
    return output, down, src2dst
"""

_numbers = itertools.count()


def write(root):
    """The package's sources, in a folder that is made."""
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("")
    for generation, kind in GENERATIONS.items():
        source = HEADER + POST_REORDER.format(**kind)
        if generation == "a":
            source += REST.replace("{flag}", _FLAG["flag"]).replace("{index}", _FLAG["index"])
        if generation == "b":
            by_expert = {"flag": "", "index": "expert - start_expert_id"}
            cut = REST[REST.index("@triton.jit\ndef pre_reorder") : REST.index("@triton.jit\ndef silu")]
            source += cut.replace("{flag}", by_expert["flag"]).replace("{index}", by_expert["index"])
        (root / f"kernels_{generation}.py").write_text(source)
    (root / "layer.py").write_text(textwrap.dedent(LAYER))


class Stack:
    """Imported under a package name of its own."""

    def __init__(self, case):
        folder = tempfile.TemporaryDirectory()
        case.addCleanup(folder.cleanup)
        self.name = f"serving_{next(_numbers)}"
        write(Path(folder.name) / self.name)
        sys.path.insert(0, folder.name)
        try:
            self.layer = importlib.import_module(f"{self.name}.layer")
            for generation in GENERATIONS:
                setattr(self, generation, importlib.import_module(f"{self.name}.kernels_{generation}"))
        finally:
            sys.path.remove(folder.name)
        case.addCleanup(self._forget)

    def _forget(self):
        for name in [name for name in sys.modules if name.partition(".")[0] == self.name]:
            del sys.modules[name]

    def held(self):
        """Everything that its modules hold, by place."""
        return {
            (name, key): value
            for name, module in sys.modules.items()
            if name.partition(".")[0] == self.name
            for key, value in vars(module).items()
            if not key.startswith("__")
        }
