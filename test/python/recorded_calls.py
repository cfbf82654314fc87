"""`python recorded_calls.py FOLDER`: a capsule of every op that the shim records, of launches of the serving stack."""

import os
import sys
import unittest

os.environ["TRITON_INTERPRET"] = "1"

import torch
from serving_stack import Stack

from epmoe import shim

EXPERTS, TOPK, HIDDEN, TOKENS = 4, 2, 70, 5


def main(folder):
    case = unittest.TestCase()
    stack = Stack(case)
    shim.install(mode="triton")
    shim.record(folder, first_per_shape=1, min_free_bytes=0)
    torch.manual_seed(3)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOPK), dtype=torch.int32)
    stack.layer.forward(torch.randn(TOKENS, HIDDEN).bfloat16(), ids, torch.rand(TOKENS, TOPK), EXPERTS, 1, 2)
    for generation, bounds in (("b", (1, 2)), ("d", ())):
        rows, output = torch.randn(TOKENS * TOPK, HIDDEN).half(), torch.empty(TOKENS, HIDDEN).half()
        kernel = getattr(stack, generation).post_reorder_triton_kernel
        start = (0,) if generation == "b" else ()
        src2dst, weights = torch.randperm(TOKENS * TOPK).int(), torch.rand(TOKENS, TOPK)
        kernel[(TOKENS,)](rows, output, src2dst, ids, weights, *bounds, TOPK, HIDDEN, *start, BLOCK_SIZE=64)
    stack.a.deepep_run_moe_deep_preprocess(ids, EXPERTS)
    x, scale = torch.randn(TOKENS, 256).to(torch.float8_e4m3fn), torch.rand(TOKENS, 2)
    starts, owners = torch.zeros(EXPERTS, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    rows, scales = torch.zeros(512, 256).to(torch.float8_e4m3fn), torch.zeros(512, 2)
    index, counts = torch.full((TOKENS, TOPK), -9, dtype=torch.int32), torch.full((EXPERTS,), 128, dtype=torch.int32)
    stack.a.ep_scatter(x, scale, ids, counts, starts, rows, scales, owners, index)
    stack.a.ep_gather(rows.bfloat16(), ids, torch.rand(TOKENS, TOPK), index, torch.empty(TOKENS, 256).bfloat16())
    values, found = torch.zeros(EXPERTS, 8, 256).to(torch.float8_e4m3fn), torch.zeros(EXPERTS, 8, 2)
    masked = torch.tensor([3, 0, 8, 1], dtype=torch.int32)
    stack.a.silu_and_mul_masked_post_quant_fwd(torch.randn(EXPERTS, 8, 512).bfloat16(), values, found, 128, masked)
    shim.uninstall()
    case.doCleanups()


if __name__ == "__main__":
    main(sys.argv[1])
