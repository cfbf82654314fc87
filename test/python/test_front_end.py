"""epmoe from plain Python: calls, refusals, both ways of reading tensors, upstream's signature."""

import inspect
import os
import subprocess
import sys
import unittest

import torch

import epmoe
from epmoe import _call

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def valid(device="cpu", dtype=torch.float32):
    rows = (torch.arange(6.0)[:, None] + torch.arange(8.0) / 8).to(device, dtype)
    return {
        "down_output": rows,
        "output": torch.full((3, 8), float("nan"), device=device, dtype=dtype),
        "src2dst": torch.tensor([5, 0, 4, 1, 3, 2], device=device, dtype=torch.int32),
        "topk_weights": torch.tensor([[0.5, 0.25]] * 3, device=device),
        "topk_ids": torch.tensor([[0, 1]] * 3, device=device),
        "start_expert_id": 0,
        "end_expert_id": 1,
    }


def expected(call):
    rows = call["down_output"].double()[call["src2dst"].long()].view(3, 2, 8)
    return (rows * call["topk_weights"].double()[..., None]).sum(1)


class Calls(unittest.TestCase):
    def test_every_dtype_and_device(self):
        for device in DEVICES:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for numerics in ("fp32", "triton"):
                    with self.subTest(device=device, dtype=dtype, numerics=numerics):
                        call = valid(device, dtype)
                        self.assertIs(epmoe.post_reorder(**call, numerics=numerics), call["output"])
                        torch.testing.assert_close(call["output"].double(), expected(call), rtol=1e-2, atol=1e-2)
                        self.assertFalse(torch.allclose(call["output"].double(), expected(call) * 1.1))

    def test_without_the_exchange_table(self):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_front_end as t, epmoe;"
            "c = t.valid(t.DEVICES[-1]); epmoe.post_reorder(**c);"
            "assert t.torch.equal(c['output'].double(), t.expected(c));"
            "assert not t._call._has_exchange(); print('fine')"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__)],
            env={**os.environ, "EPMOE_EXCHANGE": "0"},
            capture_output=True,
            text=True,
        )
        self.assertEqual(result.stdout.strip(), "fine", result.stderr)
        self.assertTrue(_call._has_exchange())

    def test_upstream_signature(self):
        names = list(inspect.signature(epmoe.ep_moe_post_reorder).parameters)
        self.assertEqual(
            names,
            [
                "down_output",
                "output",
                "src2dst",
                "topk_ids",
                "topk_weights",
                "start_expert_id",
                "end_expert_id",
                "topk",
            ],
        )
        call = valid()
        tensors = [call[name] for name in names[:5]]
        epmoe.ep_moe_post_reorder(*tensors, 0, 1, 2)
        self.assertTrue(torch.equal(call["output"].double(), expected(call)))
        with self.assertRaises(epmoe.EpmoeError) as caught:
            epmoe.ep_moe_post_reorder(*tensors, 0, 1, 3)
        self.assertEqual(caught.exception.argument, "topk")

    def test_a_thread_of_its_own(self):
        import threading

        results = []

        def work():
            call = valid()
            for _ in range(200):
                epmoe.post_reorder(**call)
            results.append(torch.equal(call["output"].double(), expected(call)))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [True] * 4)


class Refusals(unittest.TestCase):
    def refuse(self, code, argument, **changes):
        call = valid() | changes
        with self.assertRaises(epmoe.EpmoeError) as caught:
            epmoe.post_reorder(**call)
        error = caught.exception
        self.assertEqual((error.code, error.argument), (code, argument), str(error))
        self.assertEqual(error.op, "post_reorder")
        self.assertTrue(error.received)
        return error

    def test_tensors(self):
        self.refuse("ERR_NOT_A_TENSOR", "src2dst", src2dst=[5, 0, 4, 1, 3, 2])
        self.refuse("ERR_MISSING_ARGUMENT", "src2dst", src2dst=None)
        self.refuse("ERR_DTYPE", "src2dst", src2dst=torch.zeros(6))
        self.refuse("ERR_SHAPE", "output", output=torch.zeros(3, 9))
        self.refuse("ERR_RANK", "topk_weights", topk_weights=torch.zeros(6))
        self.refuse("ERR_NOT_CONTIGUOUS", "down_output", down_output=torch.zeros(8, 6).t())
        unsupported = {
            "requires grad": torch.zeros(6, 8, requires_grad=True),
            "sparse": torch.zeros(6, 8).to_sparse(),
            "meta": torch.zeros(6, 8, device="meta"),
            "negative": torch._neg_view(torch.zeros(6, 8)),
        }
        for what, tensor in unsupported.items():
            error = self.refuse("ERR_UNSUPPORTED_TENSOR", "down_output", down_output=tensor)
            self.assertIn(what, error.received)

    def test_overlap(self):
        memory = torch.zeros(72)
        changes = {"down_output": memory[:48].view(6, 8), "output": memory[40:64].view(3, 8)}
        self.refuse("ERR_OVERLAP", "output", **changes)

    def test_scalars(self):
        self.refuse("ERR_VALUE", "end_expert_id", start_expert_id=3)
        self.refuse("ERR_VALUE", "end_expert_id", end_expert_id=1.5)
        self.refuse("ERR_VALUE", "end_expert_id", end_expert_id=True)
        self.refuse("ERR_VALUE", "routed_scaling_factor", routed_scaling_factor=float("nan"))
        self.refuse("ERR_VALUE", "numerics", numerics="fp64")
        self.refuse("ERR_VALUE", "stream", stream="mine")

    def test_an_index_out_of_range(self):
        for device in DEVICES:
            call = valid(device) | {"src2dst": torch.tensor([5, 0, 6, 1, 3, 2], device=device)}
            with self.assertRaises(epmoe.EpmoeError) as caught:
                epmoe.post_reorder(**call)
                epmoe.synchronize()
            self.assertEqual(caught.exception.code, "ERR_INDEX_OUT_OF_RANGE")
            self.assertIn("6 at token 1, slot 0", caught.exception.received)


class Package(unittest.TestCase):
    def test_importing_epmoe_imports_neither_torch_nor_triton(self):
        code = "import sys, epmoe; assert not {'torch', 'triton'} & set(sys.modules); print(epmoe.__version__)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual(result.stdout.strip(), epmoe.__version__, result.stderr)

    def test_a_missing_library_is_told(self):
        code = "from epmoe._library import library; library()"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "EPMOE_LIBRARY": "/no/such/libepmoe.so"},
            capture_output=True,
            text=True,
        )
        self.assertIn("/no/such/libepmoe.so", result.stderr)
        self.assertIn("npm run setup", result.stderr)

    def test_unknown_names(self):
        with self.assertRaises(AttributeError):
            epmoe.no_such_function  # noqa: B018


if __name__ == "__main__":
    unittest.main()
