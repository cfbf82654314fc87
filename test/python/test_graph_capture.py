"""epmoe.shim in shadow under CUDA graph capture: each replay is compared, and no launch is left out in silence.

With a GPU real graphs of compiled Triton are captured and replayed. Without one, a capture is played: what would go
into the graph runs once, as its first replay would.
"""

import os
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from serving_stack import Stack

import epmoe
from epmoe import generated, shim
from epmoe._shim import capture
from epmoe.migrate import capsule

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
EXPERTS, TOPK, HIDDEN, TOKENS = 4, 2, 70, 5
KERNEL = "post_reorder_triton_kernel"


def call_of(seed=0, tokens=TOKENS):
    """Such that every sum and product is exact, whatever the order and the number of roundings."""
    torch.manual_seed(seed)
    rows = torch.randint(-4, 5, (tokens * TOPK, HIDDEN)).float()
    ids = torch.randint(0, EXPERTS, (tokens, TOPK), dtype=torch.int32)
    weights = torch.randint(1, 4, (tokens, TOPK)) / 4
    output = torch.full((tokens, HIDDEN), 7.0)
    tensors = [rows, output, torch.randperm(tokens * TOPK).int(), ids, weights]
    return [*(each.to(DEVICE) for each in tensors), 1, 2, TOPK, HIDDEN]


class Graphs(unittest.TestCase):
    def setUp(self):
        self.stack = Stack(self)
        self.addCleanup(self.restore)
        self.restore()
        self.kernel = self.stack.layer.post_reorder_triton_kernel

    def restore(self):
        shim.uninstall()
        shim.record(None)
        shim.configure(rate=1.0, first_per_shape=0, max_ulp=0, trip_after=0, max_overhead=0)
        shim.reset()

    def start(self, **settings):
        capture.prepare(DEVICE)
        shim.install([self.stack.a], mode="shadow")
        shim.configure(**settings)
        self.kernel = self.stack.layer.post_reorder_triton_kernel

    def stats(self):
        return shim.stats()[KERNEL]

    def launch(self, call):
        self.kernel[(call[1].shape[0],)](*call, BLOCK_SIZE=64)

    def captured(self, *calls):
        """A graph of these launches, or what stands for it: something that can be replayed, once already done."""
        if not CUDA:
            with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                for call in calls:
                    self.launch(call)
            return mock.MagicMock()
        mode = shim.get_mode("post_reorder")
        shim.set_mode("post_reorder", "triton")
        for call in calls:
            self.launch(call)  # compiles
        shim.set_mode("post_reorder", mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                self.launch(call)
        graph.replay()
        return graph

    def fault(self, spoil):
        real = generated.post_reorder

        def post_reorder(*args, **kwargs):
            real(*args, **kwargs)
            spoil(kwargs["output"])

        return mock.patch.object(generated, "post_reorder", post_reorder)

    def expected(self, call):
        output = torch.empty_like(call[1])
        epmoe.post_reorder(call[0], output, call[2], call[4], topk_ids=call[3], start_expert_id=1, end_expert_id=2)
        epmoe.synchronize()
        return output

    def test_replays_are_compared(self):
        self.start()
        calls = [call_of(seed) for seed in range(3)]
        self.captured(*calls)
        shim.flush()
        stats = self.stats()
        self.assertEqual((stats["captured"], stats["staged"], stats["uncompared"]), (3, 3, 0))
        self.assertEqual((stats["compared"], stats["matched"], stats["mismatches"]), (3, 3, 0))
        self.assertEqual([event["kind"] for event in shim.events()], [])
        for call in calls:
            self.assertTrue(torch.equal(call[1], self.expected(call)))

    def test_a_mismatch_is_named_kept_and_trips(self):
        with tempfile.TemporaryDirectory() as folder:
            self.start(trip_after=1)
            shim.record(folder, min_free_bytes=0)
            call = call_of()
            with self.fault(lambda output: output[3, 17:18].add_(0.5)):
                self.captured(call)
            shim.flush()
            stats = self.stats()
            self.assertEqual((stats["compared"], stats["mismatches"], stats["mode"]), (1, 1, "triton"))
            self.assertEqual([event["kind"] for event in shim.events()], ["mismatch", "tripped"])
            self.assertIn("1 of 1 replays", shim.events()[0]["what"])
            self.assertTrue(torch.equal(call[1], self.expected(call)))
            held = capsule.load(shim.events()[0]["capsule"])
            self.assertEqual([str(path) for path in Path(folder).iterdir()], [shim.events()[0]["capsule"]])
            wrong = (held.part("triton")["output"] != held.part("epmoe")["output"]).nonzero()
            self.assertEqual(wrong.tolist(), [[3, 17]])
            self.assertTrue(torch.equal(held.part("triton")["output"], call[1].cpu()))
            self.assertTrue(torch.equal(held.part("argument")["down_output"], call[0].cpu()))

    def test_a_row_of_nan_and_a_row_left_out(self):
        for spoil in (lambda output: output[-1].fill_(float("nan")), lambda output: output[0].fill_(7)):
            self.restore()
            self.start()
            with self.fault(spoil):
                self.captured(call_of())
            shim.flush()
            self.assertEqual((self.stats()["compared"], self.stats()["mismatches"]), (1, 1))
            self.assertEqual(shim.events()[-1]["findings"][0]["mismatched"], HIDDEN)

    def test_units_in_the_last_place(self):
        for max_ulp, mismatches in ((0, 1), (4, 0)):
            self.restore()
            self.start(max_ulp=max_ulp)
            with self.fault(lambda output: output.mul_(1 + 2**-23)):
                self.captured(call_of())
            shim.flush()
            self.assertEqual(self.stats()["mismatches"], mismatches)

    def test_what_cannot_be_compared_is_counted_and_told(self):
        self.start()
        call = call_of()
        with mock.patch.dict(capture._counters, clear=True), self.assertWarnsRegex(RuntimeWarning, "no counters"):
            self.captured(call)
        with mock.patch.object(capture, "MAX_STAGES", 0), self.assertWarnsRegex(RuntimeWarning, "more than 0"):
            self.captured(call)
        stats = self.stats()
        self.assertEqual((stats["captured"], stats["staged"], stats["uncompared"]), (2, 0, 2))
        self.assertEqual([event["kind"] for event in shim.events()], ["captured", "captured"])
        self.assertTrue(torch.equal(call[1], self.expected(call)))
        shim.configure(rate=0)
        self.captured(call)
        stats = self.stats()
        self.assertEqual((stats["captured"], stats["staged"], stats["uncompared"]), (3, 0, 2))

    def test_an_error_of_epmoe_leaves_the_capture_whole(self):
        self.start()
        call = call_of()
        broken = mock.patch.object(generated, "post_reorder", side_effect=RuntimeError("device on fire"))
        with broken, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.captured(call)
        stats = self.stats()
        self.assertEqual((stats["staged"], stats["uncompared"]), (0, 1))
        self.assertIn("device on fire", shim.events()[-1]["what"])
        self.assertTrue(torch.equal(call[1], self.expected(call)))

    @unittest.skipIf(CUDA, "with CUDA the whole layer's graph shows it")
    def test_a_helper_is_compared_once_it_was_called_outside(self):
        self.start()
        ids = torch.tensor([[0, 1], [-1, 3]], dtype=torch.int32)

        def captured():
            with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                return self.stack.a.run_moe_ep_preproess(ids, EXPERTS)

        def counts():
            stats = shim.stats()["run_moe_ep_preproess"]
            return stats["captured"], stats["staged"], stats["uncompared"]

        with self.assertWarnsRegex(RuntimeWarning, "once before the capture"):
            captured()
        self.assertEqual(counts(), (1, 0, 1))
        self.stack.a.run_moe_ep_preproess(ids, EXPERTS)
        captured()
        self.assertEqual(counts(), (2, 1, 1))

    @unittest.skipUnless(CUDA, "replays of a real graph need CUDA")
    def test_inputs_that_change_between_replays(self):
        with tempfile.TemporaryDirectory() as folder:
            self.start()
            shim.record(folder, min_free_bytes=0)
            call = call_of()

            def spoil(output):  # wrong where the first element is 1000, and right in all other replays
                output[0, 0] += (output[0, 1] == 1000).float()

            with self.fault(spoil):
                graph = self.captured(call)
            rows = call[0].clone()
            for replay in range(200):
                call[0].copy_(rows * (replay % 5))
                if replay == 77:
                    call[3][0] = 1  # local, both slots
                    call[4][0] = 1.0
                    slots = call[2][:2].long()
                    call[0][slots[0], 1] = 999
                    call[0][slots[1], 1] = 1
                graph.replay()
                self.assertTrue(torch.equal(call[1], self.expected(call)), replay)
            shim.flush()
            stats = self.stats()
            self.assertEqual((stats["compared"], stats["mismatches"]), (201, 1))
            held = capsule.load(shim.events()[-1]["capsule"])
            self.assertEqual(float(held.part("triton")["output"][0, 1]), 1000)
            self.assertEqual(float((held.part("epmoe")["output"] - held.part("triton")["output"])[0, 0]), 1)

    @unittest.skipUnless(CUDA, "a real graph needs CUDA")
    def test_the_whole_layer_in_a_graph(self):
        self.start(max_ulp=4)
        torch.manual_seed(1)
        x = torch.randn(16, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        ids = torch.randint(-1, EXPERTS, (16, TOPK), dtype=torch.int32, device=DEVICE)
        weights = torch.rand(16, TOPK, device=DEVICE)
        forward = self.stack.layer.forward
        shim.set_mode("*", "triton")
        expected = [each.clone() for each in forward(x, ids, weights, EXPERTS)]
        shim.set_mode("*", "shadow")
        forward(x, ids, weights, EXPERTS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = forward(x, ids, weights, EXPERTS)
        for _ in range(50):
            graph.replay()
        shim.flush()
        for a, b in zip(found, expected, strict=True):
            self.assertTrue(torch.equal(a, b))
        for name in (KERNEL, "pre_reorder_triton_kernel", "silu_and_mul_triton_kernel", "run_moe_ep_preproess"):
            stats = shim.stats()[name]
            with self.subTest(name):
                self.assertEqual((stats["staged"], stats["compared"], stats["mismatches"]), (1, 51, 0))


if __name__ == "__main__":
    unittest.main()
