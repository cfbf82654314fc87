"""sgl-kernel's names and signatures, against plain torch."""

import unittest

import torch

import epmoe
from epmoe import EpmoeError

TOKENS, TOPK, EXPERTS, HIDDEN = 6, 3, 8, 40


def routing():
    torch.manual_seed(5)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOPK), dtype=torch.int32)
    order = torch.argsort(ids.view(-1), stable=True)
    src2dst = torch.empty(TOKENS * TOPK, dtype=torch.int32)
    src2dst[order] = torch.arange(TOKENS * TOPK, dtype=torch.int32)
    return ids, src2dst


class Upstream(unittest.TestCase):
    def test_ep_moe_pre_reorder(self):
        ids, src2dst = routing()
        x = torch.randn(TOKENS, HIDDEN)
        for per_token, count in ((True, TOKENS), (False, 4)):
            scales = torch.rand(count) + 0.2
            rows = torch.full((TOKENS * TOPK, HIDDEN), -7.0)
            epmoe.ep_moe_pre_reorder(x, rows, src2dst, ids, scales, 2, 5, TOPK, per_token)
            for slot in range(TOKENS * TOPK):
                token, expert, row = slot // TOPK, ids.view(-1)[slot].item(), rows[src2dst[slot]]
                if 2 <= expert <= 5:
                    torch.testing.assert_close(row, x[token] / scales[token if per_token else expert - 2])
                else:
                    self.assertTrue((row == -7).all())

    def test_ep_moe_silu_and_mul(self):
        ids = torch.arange(-1, 7, dtype=torch.int32)
        gateup, down, scales = torch.randn(8, 2 * HIDDEN), torch.full((8, HIDDEN), -7.0), torch.rand(4) + 0.5
        epmoe.ep_moe_silu_and_mul(gateup, down, ids, scales, 2, 5)
        expected = torch.nn.functional.silu(gateup[:, :HIDDEN]) * gateup[:, HIDDEN:]
        torch.testing.assert_close(down[3:7], expected[3:7] / scales[:, None])
        self.assertTrue((down[:3] == -7).all() and (down[7:] == -7).all())

    def test_ep_moe_post_reorder(self):
        ids, src2dst = routing()
        rows, weights = torch.randn(TOKENS * TOPK, HIDDEN), torch.rand(TOKENS, TOPK)
        output = torch.empty(TOKENS, HIDDEN)
        epmoe.ep_moe_post_reorder(rows, output, src2dst, ids, weights, 2, 5, TOPK)
        local = ((ids >= 2) & (ids <= 5)) * weights
        expected = (rows[src2dst.long()].view(TOKENS, TOPK, HIDDEN) * local[..., None]).sum(1)
        torch.testing.assert_close(output, expected)

    def test_apply_shuffle_mul_sum_and_moe_sum_reduce(self):
        rows, output = torch.randn(TOKENS * TOPK, HIDDEN), torch.empty(TOKENS, HIDDEN)
        permutation = torch.randperm(TOKENS * TOPK, dtype=torch.int32)
        factors = torch.rand(TOKENS, TOPK)
        gathered = rows[permutation.long()].view(TOKENS, TOPK, HIDDEN)
        epmoe.apply_shuffle_mul_sum(rows, output, permutation, factors)
        torch.testing.assert_close(output, (gathered * factors[..., None]).sum(1))
        epmoe.apply_shuffle_mul_sum(rows, output, permutation)
        torch.testing.assert_close(output, gathered.sum(1))
        epmoe.moe_sum_reduce(gathered.contiguous(), output, 2.5)
        torch.testing.assert_close(output, gathered.sum(1) * 2.5)

    def test_a_topk_that_is_not_the_tensors(self):
        ids, src2dst = routing()
        rows = torch.zeros(TOKENS * TOPK, HIDDEN)
        with self.assertRaises(EpmoeError) as caught:
            epmoe.ep_moe_pre_reorder(torch.zeros(TOKENS, HIDDEN), rows, src2dst, ids, torch.ones(8), 0, 7, 4, False)
        self.assertEqual(caught.exception.argument, "topk")


if __name__ == "__main__":
    unittest.main()
