"""epmoe.shim in shadow: thousands of launches, faults put in; each is caught and named, and Triton's results serve."""

import itertools
import os
import tempfile
import threading
import time
import unittest
import warnings
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from serving_stack import Stack
from test_shim import EXPERTS, HIDDEN, TOPK, Case, combine_call, inputs

import epmoe
from epmoe import generated, shim
from epmoe._shim import control, shadow
from epmoe.migrate import capsule

NEXT_TO_NOTHING = 1e-12  # of the time: one comparison has it used up for years


class Loop(Case):
    """A serving loop whose Triton results are known beforehand."""

    def setUp(self):
        super().setUp()
        self.given = {tokens: inputs(tokens, seed=tokens) for tokens in range(1, 8)}
        self.expected = {tokens: self.forward(tokens) for tokens in self.given}

    def forward(self, tokens):
        return self.stack.layer.forward(*self.given[tokens], EXPERTS, 1, 2)

    def serve(self, steps, start=0):
        """How many steps gave another result than Triton's."""
        wrong = 0
        for step in range(start, start + steps):
            tokens = 1 + step % len(self.given)
            wrong += not all(map(torch.equal, self.forward(tokens), self.expected[tokens]))
        return wrong

    def fault(self, spoil):
        """epmoe's post_reorder with something done to its result."""
        real = generated.post_reorder

        def post_reorder(*args, **kwargs):
            real(*args, **kwargs)
            spoil(kwargs["output"])

        return mock.patch.object(generated, "post_reorder", post_reorder)

    def kinds(self):
        return [event["kind"] for event in shim.events()]


class Clean(Loop):
    def test_a_long_run_without_faults(self):
        shim.install(mode="shadow")
        shim.configure(rate=0.05, first_per_shape=2)
        shim.configure("silu_and_mul", max_ulp=2)
        self.assertEqual(self.serve(300), 0)
        for kernel in ("post_reorder_triton_kernel", "pre_reorder_triton_kernel", "silu_and_mul_triton_kernel"):
            stats = self.stats(kernel)
            with self.subTest(kernel):
                self.assertEqual((stats["launches"], stats["triton"], stats["epmoe"]), (300, 300, 0))
                self.assertGreaterEqual(stats["sampled"], 14)
                self.assertLess(stats["sampled"], 100)
                self.assertEqual(stats["matched"], stats["sampled"])
                self.assertEqual((stats["mismatches"], stats["errors"], stats["uncovered"]), (0, 0, 0))
                self.assertGreater(stats["shadow_seconds"], 0)
                self.assertAlmostEqual(stats["shadow_overhead"], stats["shadow_seconds"] / stats["elapsed_seconds"])
        self.assertEqual(shim.events(), [])

    def test_thousands_of_launches(self):
        kernel = mock.MagicMock()  # what Triton launches costs nothing here: this counts launches
        rows, ids, weights = torch.randn(8, HIDDEN), torch.ones(4, TOPK, dtype=torch.int32), torch.ones(4, TOPK)
        shim.install(mode="shadow")
        shim.configure(rate=0.01, first_per_shape=3, trip_after=0)
        shimmed = self.stack.layer.post_reorder_triton_kernel
        src2dst = torch.arange(8)
        with mock.patch.object(shimmed, "_original", kernel):
            for step in range(5000):
                tokens = 1 + step % 4
                output = torch.full((tokens, HIDDEN), 7.0)
                shimmed[(tokens,)](rows, output, src2dst, ids, weights, 0, 3, TOPK, HIDDEN, BLOCK_SIZE=64)
        stats = self.stats()
        self.assertEqual((stats["launches"], kernel.__getitem__.call_count), (5000, 5000))
        self.assertEqual(stats["shapes"], 4)
        self.assertGreaterEqual(stats["sampled"], 12 + 20)
        self.assertLess(stats["sampled"], 12 + 110)
        self.assertEqual(stats["mismatches"], stats["sampled"])  # the control: nobody wrote Triton's output
        self.assertEqual(len(shim.events()), stats["sampled"])

    def test_what_tells_launches_apart(self):
        def call(tokens=4, hidden=HIDDEN, dtype=torch.float32, index=torch.int32, weights=torch.float32):
            rows, output = torch.randn(8, hidden).to(dtype), torch.empty(tokens, hidden, dtype=dtype)
            ids, src2dst = torch.ones(4, TOPK, dtype=index), torch.arange(8, dtype=index)
            return (tokens,), (rows, output, src2dst, ids, torch.ones(4, TOPK, dtype=weights)), hidden

        shim.install(mode="shadow")
        shim.configure(rate=0, first_per_shape=1, trip_after=0)
        calls = [
            call(),
            call(tokens=3),
            call(hidden=HIDDEN + 2),
            call(dtype=torch.bfloat16),
            call(index=torch.int64),
            call(dtype=torch.bfloat16, weights=torch.bfloat16),
        ]
        for generation, bounds, start, expected in (("a", (0, 3), (), 6), ("b", (0, 3), (0,), 12), ("d", (), (), 18)):
            kernel = getattr(self.stack, generation).post_reorder_triton_kernel
            with mock.patch.object(kernel, "_original", mock.MagicMock()), self.subTest(generation):
                for _ in range(3):
                    for grid, tensors, hidden in calls:
                        kernel[grid](*tensors, *bounds, TOPK, hidden, *start, BLOCK_SIZE=64)
                stats = self.stats()
                self.assertEqual((stats["sampled"], stats["shapes"]), (expected, expected))
        # What cannot be told by a shape is Triton's to refuse.
        with mock.patch.object(kernel, "_original", mock.MagicMock()) as triton:
            kernel[[3]]([1], {}, None, 2, "x", TOPK, HIDDEN, BLOCK_SIZE=64)
            triton.__getitem__.return_value.assert_called_once()

    def test_results_of_helpers(self):
        shim.install(mode="shadow")
        shim.configure(rate=1)
        self.assertEqual(self.serve(7), 0)
        self.assertEqual(self.stats("run_moe_ep_preproess")["matched"], 7)
        torch.manual_seed(0)
        x, scale = torch.randn(6, 256).to(torch.float8_e4m3fn), torch.rand(6, 2)
        ids = torch.randint(-1, EXPERTS, (6, TOPK))

        def scatter():
            start, m_indices = torch.zeros(EXPERTS, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
            rows, scales = torch.zeros(512, 256).to(torch.float8_e4m3fn), torch.zeros(512, 2)
            index = torch.full((6, TOPK), -9, dtype=torch.int32)
            counts = torch.full((EXPERTS,), 128, dtype=torch.int32)
            self.stack.a.ep_scatter(x, scale, ids, counts, start, rows, scales, m_indices, index)

        scatter()  # the original's order is another
        self.assertEqual(self.stats("ep_scatter")["matched"], 1)
        real = generated.ep_scatter

        def spoiled(**arguments):
            real(**arguments)
            arguments["output_tensor_scale"][int(arguments["output_index"].max()), 0] += 1

        with mock.patch.object(generated, "ep_scatter", spoiled):
            scatter()
        self.assertEqual(self.stats("ep_scatter")["mismatches"], 1)
        self.assertIn("output_tensor_scale", shim.events()[-1]["what"])


class Faults(Loop):
    def start(self, **settings):
        shim.install(mode="shadow")
        shim.configure(**{"rate": 1.0, "first_per_shape": 0, "trip_after": 0, "max_ulp": 2, **settings})
        shim.configure("silu_and_mul", max_ulp=2)

    def test_one_wrong_element(self):
        self.start(max_ulp=0)

        def spoil(output):
            if output.shape[0] == 5:
                output[3, 17] += 0.125

        with self.fault(spoil):
            self.assertEqual(self.serve(14), 0)
        stats = self.stats()
        self.assertEqual((stats["mismatches"], stats["matched"]), (2, 12))
        event = shim.events()[-1]
        finding = event["findings"][0]
        self.assertEqual((finding["output"], finding["mismatched"], finding["elements"]), ("output", 1, 5 * HIDDEN))
        self.assertEqual((finding["first_index"], finding["max_abs"]), ((3, 17), 0.125))
        self.assertEqual((event["kernel"], event["generation"]), ("post_reorder_triton_kernel", "A"))
        self.assertEqual(event["launch"]["grid"], [5])

    def test_rows_of_nan_and_rows_left_out(self):
        def left_out(*args, **kwargs):
            output = kwargs["output"]
            kept = output[0].clone()
            real(*args, **kwargs)
            output[0] = kept

        real = generated.post_reorder
        nan = self.fault(lambda output: output[-1].fill_(float("nan")))
        for name, patch in (("nan", nan), ("left out", mock.patch.object(generated, "post_reorder", left_out))):
            with self.subTest(name), patch:
                self.restore()
                self.start()
                self.assertEqual(self.serve(7), 0)
                self.assertEqual((self.stats()["mismatches"], self.stats()["matched"]), (7, 0))
                finding = shim.events()[-1]["findings"][0]
                self.assertEqual((finding["mismatched"], finding["max_abs"]), (HIDDEN, float("inf")))

    def test_a_row_that_should_stay_as_it_is(self):
        self.start()
        real = generated.pre_reorder

        def touches(**arguments):
            rows = arguments["gateup_input"]
            real(**arguments)
            rows[(rows == 7).all(1).nonzero()[:1, 0]] = 6

        with mock.patch.object(generated, "pre_reorder", touches):
            self.assertEqual(self.serve(7), 0)
        self.assertGreater(self.stats("pre_reorder_triton_kernel")["mismatches"], 0)

    def test_an_exception(self):
        self.start()
        with mock.patch.object(generated, "post_reorder", side_effect=RuntimeError("device on fire")):
            self.assertEqual(self.serve(7), 0)
        stats = self.stats()
        self.assertEqual((stats["errors"], stats["compared"], stats["triton"]), (7, 0, 7))
        self.assertIn("RuntimeError: device on fire", shim.events()[-1]["what"])

    def test_a_shape_outside_coverage(self):
        self.start(strict=True)
        call = combine_call()
        call[0], call[1] = call[0].double(), call[1].double()
        expected = [each.clone() if isinstance(each, torch.Tensor) else each for each in call]
        with self.assertWarnsRegex(RuntimeWarning, "received float64"):
            self.launch(self.stack.layer.post_reorder_triton_kernel, call)
        shim.uninstall()
        self.assertTrue(torch.equal(self.launch(self.stack.a.post_reorder_triton_kernel, expected), call[1]))
        stats = self.stats()
        self.assertEqual((stats["uncovered"], stats["errors"], stats["mismatches"]), (1, 0, 0))
        self.assertEqual(list(stats["reasons"]), ["ERR_DTYPE down_output"])

    def test_an_index_out_of_range_is_an_error_of_the_sample(self):
        self.start()
        call = combine_call()
        call[2][int((call[3].view(-1) == 1).nonzero()[0])] = 10**6
        shimmed = self.stack.layer.post_reorder_triton_kernel
        with mock.patch.object(shimmed, "_original", mock.MagicMock()):
            self.launch(shimmed, call)
        self.assertEqual(self.stats()["errors"], 1)
        self.assertIn("1000000", shim.events()[-1]["what"])

    def test_trips_back_to_triton(self):
        self.start(trip_after=3)
        heard = []
        self.addCleanup(shim.on_event(heard.append))
        with self.fault(lambda output: output.add_(1)):
            self.assertEqual(self.serve(20), 0)
        stats = self.stats()
        self.assertEqual((stats["mode"], stats["chosen_by"], stats["mismatches"]), ("triton", "tripped", 3))
        self.assertIn("3 failures in shadow", stats["tripped"])
        self.assertEqual((stats["launches"], stats["triton"], stats["sampled"]), (20, 20, 3))
        self.assertEqual(self.kinds(), ["mismatch"] * 3 + ["tripped"])
        self.assertEqual(heard, shim.events())
        self.assertEqual(shim.get_mode("pre_reorder"), "shadow")
        self.assertEqual(shim.events(since=heard[2]["number"]), heard[3:])
        shim.set_mode("post_reorder", "shadow")
        self.assertEqual(self.serve(5), 0)
        self.assertEqual((self.stats()["mode"], self.stats()["tripped"], self.stats()["matched"]), ("shadow", "", 5))

    def test_errors_of_triton_reach_the_caller(self):
        self.start()
        shimmed = self.stack.layer.post_reorder_triton_kernel
        broken = mock.MagicMock()
        broken.__getitem__.return_value.side_effect = ValueError("Triton's own")
        with mock.patch.object(shimmed, "_original", broken), self.assertRaisesRegex(ValueError, "Triton's own"):
            self.launch(shimmed, combine_call())
        self.assertEqual(self.stats()["errors"], 0)

    def test_a_listener_that_fails_and_a_bounded_queue(self):
        self.start()
        remove = shim.on_event(lambda event: 1 / 0)
        call = combine_call()
        with self.fault(lambda output: output.add_(1)), self.assertWarnsRegex(RuntimeWarning, "a listener failed"):
            self.launch(self.stack.layer.post_reorder_triton_kernel, call)
        remove()
        numbers = [event["number"] for event in shim.events()]
        with self.fault(lambda output: output.add_(1)):
            shimmed = self.stack.layer.post_reorder_triton_kernel
            with mock.patch.object(shimmed, "_original", mock.MagicMock()):
                for _ in range(1100):
                    self.launch(shimmed, call)
        self.assertEqual(len(shim.events()), 1000)
        self.assertNotIn(numbers[0], [event["number"] for event in shim.events()])

    def test_graph_capture_is_told(self):
        self.start()
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            self.assertEqual(self.serve(7), 0)
        self.assertEqual(self.serve(7), 0)
        stats = self.stats()
        self.assertEqual((stats["captured"], stats["sampled"], stats["triton"]), (7, 7, 14))
        told = [event for event in shim.events() if event["kernel"] == "post_reorder_triton_kernel"]
        self.assertEqual([event["kind"] for event in told], ["captured"])

    def test_verdicts_that_come_later(self):
        """As on CUDA, where a launch does not wait for the device: at most so many are on their way."""
        self.start()
        ready, waits = threading.Event(), mock.MagicMock()
        asked = mock.MagicMock(side_effect=ready.is_set)
        make = shadow.Comparison.__init__

        def later(comparison, *args):
            make(comparison, *args)
            flags = comparison.flags
            comparison.fetched = mock.MagicMock(device=torch.device("cpu"), event=mock.MagicMock(query=asked))
            comparison.fetched.flags = lambda: waits() and flags

        shimmed, call = self.stack.layer.post_reorder_triton_kernel, combine_call()
        with (
            mock.patch.object(shadow.Comparison, "__init__", later),
            mock.patch.object(shimmed, "_original", mock.MagicMock()),
        ):
            for step in range(1, shadow.MAX_PENDING + 2):
                self.launch(shimmed, call)
                self.assertEqual((self.stats()["pending"], self.stats()["compared"]), (step, 0))
            waits.assert_not_called()
            asked.reset_mock()
            with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                self.launch(shimmed, call)
            asked.assert_not_called()  # a graph's capture ends when an event is asked for
            self.launch(shimmed, call)
            self.assertEqual((self.stats()["pending"], waits.call_count), (shadow.MAX_PENDING + 1, 1))
            ready.set()
            self.launch(shimmed, call)
            self.assertEqual((self.stats()["pending"], self.stats()["compared"]), (1, shadow.MAX_PENDING + 2))
            shim.flush()
        stats = self.stats()
        self.assertEqual((stats["pending"], stats["mismatches"]), (0, shadow.MAX_PENDING + 3))

    def test_an_output_that_is_an_input(self):
        self.start()
        rows = torch.ones(4, HIDDEN)
        call = [rows, rows, torch.arange(4), torch.ones(4, 1, dtype=torch.int32), torch.ones(4, 1), 0, 3, 1, HIDDEN]
        with self.assertWarnsRegex(RuntimeWarning, "shares memory"):
            self.launch(self.stack.layer.post_reorder_triton_kernel, call)
        self.assertEqual((self.stats()["uncovered"], self.stats()["errors"]), (1, 0))

    def test_two_threads(self):
        self.start(rate=0.5)
        stats = self.serve_two_threads()
        self.assertEqual((stats["matched"], stats["mismatches"], stats["errors"]), (stats["sampled"], 0, 0))
        self.assertGreater(stats["sampled"], 300)

    def test_two_threads_whose_launches_are_put_off(self):
        self.start(max_overhead=NEXT_TO_NOTHING)
        stats = self.serve_two_threads()
        self.assertEqual((stats["matched"], stats["sampled"] + stats["put_off"]), (stats["sampled"], 800))
        self.assertGreater(stats["put_off"], 700)

    def serve_two_threads(self):
        """Stats of two threads' 400 launches each."""
        shimmed, errors = self.stack.layer.post_reorder_triton_kernel, []
        triton = mock.MagicMock()

        def launch(*args, **_):
            epmoe.post_reorder(args[0], args[1], args[2], args[4], topk_ids=args[3], start_expert_id=1, end_expert_id=2)

        triton.__getitem__.return_value = launch
        calls = [combine_call(seed=seed) for seed in range(2)]

        def serve(call):
            try:
                for _ in range(400):
                    self.launch(shimmed, call)
            except Exception as error:
                errors.append(error)

        with mock.patch.object(shimmed, "_original", triton):
            threads = [threading.Thread(target=serve, args=(call,)) for call in calls]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        stats = self.stats()
        self.assertEqual((errors, stats["launches"], stats["triton"]), ([], 800, 800))
        return stats


class Recording(Loop):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def capsules(self):
        return [capsule.load(os.path.join(self.folder, name)) for name in sorted(os.listdir(self.folder))]

    def test_a_mismatch_leaves_a_capsule_that_fails_again(self):
        shim.install(mode="shadow")
        shim.configure(rate=1, first_per_shape=0, max_ulp=2)
        shim.record(self.folder)
        with self.fault(lambda output: output[0, :1].add_(1)):
            self.assertEqual(self.serve(1, start=4), 0)
        found = self.capsules()
        self.assertEqual([each.reason for each in found], ["mismatch"])
        held = found[0]
        self.assertEqual(shim.events()[-1]["capsule"], os.path.join(self.folder, os.listdir(self.folder)[0]))
        self.assertEqual((held.kernel, held.generation, held.op), ("post_reorder_triton_kernel", "A", "post_reorder"))
        self.assertEqual((held.launch["grid"], held.launch["options"]), ([5], {"num_warps": 4}))
        self.assertEqual(held.launch["arguments"]["output_ptr"]["strides"], [HIDDEN, 1])
        self.assertEqual(held.environment["torch"], torch.__version__)
        again = torch.empty_like(held.part("triton")["output"])
        epmoe.post_reorder(**held.part("argument"), **held.scalars, output=again)
        self.assertTrue(torch.equal(again, held.part("triton")["output"]))
        self.assertFalse(torch.equal(again, held.part("epmoe")["output"]))

    def test_running_processes_in_every_mode(self):
        for mode, part in (("triton", "triton"), ("epmoe", "epmoe"), ("shadow", "triton")):
            with self.subTest(mode), tempfile.TemporaryDirectory() as self.folder:
                self.restore()
                shim.install(mode=mode)
                shim.set_mode("silu_and_mul", "triton")
                shim.record(self.folder, first_per_shape=1)
                self.assertEqual(self.serve(14), 0)
                found = self.capsules()
                kernels = {each.kernel for each in found}
                self.assertEqual(len(found), 7 * 4)
                self.assertEqual(len(kernels), 4)
                self.assertEqual(self.stats()["recorded"], 7)
                for held in found:
                    own = "triton" if held.kernel.startswith("silu") else part
                    self.assertEqual(held.reason, "recorded")
                    self.assertTrue(held.part(own))
                    if held.op == "pre_reorder":
                        again = held.part("before")["gateup_input"]
                        epmoe.pre_reorder(**held.part("argument"), **held.scalars, gateup_input=again)
                        self.assertTrue(torch.equal(again, held.part(own)["gateup_input"]))

    def test_a_full_disk(self):
        shim.install(mode="shadow")
        shim.configure(rate=1, first_per_shape=0, trip_after=0)
        shim.record(self.folder, rate=0.5)
        full = OSError(28, "No space left on device")
        with self.fault(lambda output: output.add_(1)), mock.patch.object(os, "fsync", side_effect=full):
            self.assertEqual(self.serve(40), 0)
        stats = self.stats()
        self.assertGreater(stats["record_failures"], 0)
        self.assertEqual((stats["recorded"], os.listdir(self.folder)), (0, []))
        self.assertIn(
            "No space left", [event for event in shim.events() if event["kind"] == "record_failed"][-1]["what"]
        )
        self.assertGreater(stats["mismatches"], 0)
        self.assertEqual(self.serve(7), 0)
        self.assertGreater(len(self.capsules()), 0)

    def test_a_crash_while_recording_leaves_nothing_half(self):
        shim.install(mode="triton")
        shim.record(self.folder, first_per_shape=1)
        with mock.patch.object(os, "replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            self.serve(1)
        self.assertEqual(os.listdir(self.folder), [])


class Measure(unittest.TestCase):
    def measure(self, expected, actual, max_ulp=0):
        return shadow.measure(expected, actual, max_ulp).tolist()

    def test_bits(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64):
            a = torch.arange(1, 13).view(3, 4).to(dtype)
            b = a.clone()
            self.assertEqual(self.measure(a, b), [0, 0, 0, 0])
            b[1, 2] = 9
            self.assertEqual(self.measure(a, b)[:3], [1, 6, 2])
        zero = torch.zeros(2)
        self.assertEqual(self.measure(zero, -zero)[0], 2)
        self.assertEqual(self.measure(torch.empty(0, 4), torch.empty(0, 4)), [0, 0, 0, 0])

    def test_nan_equals_nan_only(self):
        nan = torch.tensor([float("nan"), 1.0])
        other = torch.tensor([0x7FFFFFFF, 0x3F800000], dtype=torch.int32).view(torch.float32)
        self.assertEqual(self.measure(nan, other)[0], 0)
        for max_ulp in (0, 1e9):
            self.assertEqual(self.measure(torch.ones(2), nan, max_ulp)[0], 1)
            self.assertEqual(self.measure(nan, torch.ones(2), max_ulp)[0], 1)

    def test_units_in_the_last_place_of_the_row(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            eps = torch.finfo(dtype).eps
            a = torch.tensor([[1.0, 1.5], [8.0, 0.0]]).to(dtype)
            b = a.clone()
            b[0, 0], b[1, 1] = 1 + eps, 8 * eps
            self.assertEqual(self.measure(a, b)[0], 2)
            self.assertEqual(self.measure(a, b)[3], 1)
            self.assertEqual(self.measure(a, b, 1)[0], 0)
            self.assertEqual(self.measure(a, b, 0.5)[0], 2)

    def test_one_in_a_million(self):
        a = torch.randn(1000, 1000)
        b = a.clone()
        b[999, 998] = torch.nextafter(b[999, 998], torch.tensor(9.0))
        found = self.measure(a, b)
        self.assertEqual(found[:2], [1, 999998])


class Sampling(unittest.TestCase):
    def test_chance_has_the_rate_that_was_asked_for(self):
        count = 20_000
        for rate in (0.001, 0.05, 0.5, 0.9):
            with self.subTest(rate):
                sampler = control.Sampler(rate, 0, seed=1)
                picked = [sampler.by_chance() for _ in range(count)]
                self.assertLess(abs(sum(picked) - count * rate), 5 * (count * rate * (1 - rate)) ** 0.5)
                # Independent: two in a row are as frequent as that makes them.
                both = sum(a and b for a, b in itertools.pairwise(picked))
                self.assertLess(abs(both - count * rate**2), 5 * (3 * count * rate**2) ** 0.5)

    def test_never_and_always(self):
        for rate, expected in ((0, {False}), (1e-300, {False}), (1, {True}), (1.0, {True})):
            sampler = control.Sampler(rate, 0, seed=1)
            self.assertEqual({sampler.wants(None, ()) for _ in range(1000)}, expected, rate)

    def test_the_first_of_each_shape(self):
        sampler = control.Sampler(0, 2)
        taken = [sampler.wants(lambda shape: shape, (step % 3,)) for step in range(12)]
        self.assertEqual((taken, sampler.known()), ([True] * 6 + [False] * 6, 3))
        with mock.patch.object(control, "MAX_SHAPES", 4):
            taken = [sampler.wants(lambda shape: shape, (shape,)) for shape in (3, 4, 3, 4, 3)]
        self.assertEqual((taken, sampler.known()), ([True, False, True, False, False], 4))


class Bound(Loop):
    def test_the_first_of_each_shape_and_then_none(self):
        shim.install(mode="shadow")
        shim.configure(rate=1, first_per_shape=2)
        shim.configure("silu_and_mul", max_ulp=2)
        # Without a bound, the control, all are sampled.
        for max_overhead, sampled in ((NEXT_TO_NOTHING, 14), (0, 35)):
            shim.reset()
            shim.configure(max_overhead=max_overhead)
            self.assertEqual(self.serve(35), 0)
            for kernel in ("post_reorder_triton_kernel", "pre_reorder_triton_kernel", "silu_and_mul_triton_kernel"):
                with self.subTest(kernel, max_overhead=max_overhead):
                    stats = self.stats(kernel)
                    self.assertEqual((stats["launches"], stats["triton"], stats["epmoe"]), (35, 35, 0))
                    self.assertEqual((stats["sampled"], stats["put_off"]), (sampled, 35 - sampled))
                    self.assertEqual((stats["matched"], stats["mode"]), (sampled, "shadow"))

    def test_what_comparing_takes_stays_within_the_bound(self):
        """By a clock that goes on by one each time it is asked."""
        shim.install(mode="shadow")
        shimmed, call, clock = self.stack.layer.post_reorder_triton_kernel, combine_call(), itertools.count()
        with (
            mock.patch.object(time, "perf_counter", lambda: float(next(clock))),
            mock.patch.object(shimmed, "_original", mock.MagicMock()),
        ):
            shim.configure(rate=1, first_per_shape=0, trip_after=0, max_overhead=0.05)
            for _ in range(500):
                self.launch(shimmed, call)
        stats, elapsed = self.stats(), next(clock)
        self.assertEqual((stats["launches"], stats["sampled"] + stats["put_off"]), (500, 500))
        one = stats["shadow_seconds"] / stats["sampled"]
        self.assertLess(stats["shadow_seconds"], 0.05 * elapsed + 2 * one)
        self.assertGreater(stats["shadow_seconds"], 0.05 * elapsed - 2 * one)
        self.assertGreater(stats["sampled"], 5)

    def test_time_before_sampling_began_buys_nothing(self):
        clock, kernel = [0.0], control.controls["post_reorder_triton_kernel"]

        def after(seconds):
            clock[0] += seconds
            return kernel.puts_off()

        with mock.patch.object(time, "perf_counter", lambda: clock[0]):
            shim.set_mode("post_reorder", "shadow")
            shim.configure(max_overhead=0.5)
            kernel.spent("shadow", 1)
            self.assertEqual([after(1), after(1), after(1)], [True, False, False])
            for restart in (
                lambda: shim.configure(rate=1),
                lambda: (shim.set_mode("post_reorder", "triton"), after(1000), shim.set_mode("post_reorder", "shadow")),
                shim.reset,
            ):
                restart()
                kernel.spent("shadow", 1)
                self.assertEqual([after(1), after(1)], [True, False])
            kernel.spent("shadow", 100)
            self.assertTrue(after(0))
            shim.set_mode("post_reorder", "shadow")  # said again it forgives nothing
            self.assertTrue(after(0))

    def test_launches_under_capture_are_not_put_off(self):
        shim.install(mode="shadow")
        shim.configure(rate=1, first_per_shape=0, max_overhead=NEXT_TO_NOTHING)
        self.assertEqual(self.serve(7), 0)
        # The time is that of all kernels together, and the first to launch has had it.
        self.assertEqual((self.stats()["sampled"], self.stats()["put_off"]), (0, 7))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.assertEqual(self.serve(7), 0)
        stats = self.stats()
        self.assertEqual((stats["captured"], stats["staged"] + stats["uncompared"], stats["put_off"]), (7, 7, 7))


class Overhead(Case):
    def test_what_is_told_is_what_it_costs(self):
        shim.install(mode="shadow")
        shim.configure(rate=0, first_per_shape=1)
        kernel, call = self.stack.layer.post_reorder_triton_kernel, combine_call()
        begin = time.perf_counter()
        for _ in range(20):
            self.launch(kernel, call)
        whole = time.perf_counter() - begin
        stats = self.stats()
        self.assertEqual(stats["sampled"], 1)
        self.assertLess(stats["shadow_seconds"], whole)
        self.assertGreater(stats["shadow_seconds"], 0)

    def test_a_stack_of_its_own_is_not_seen(self):
        other = Stack(self)
        shim.install([self.stack.b], mode="shadow")
        self.launch(other.a.post_reorder_triton_kernel, combine_call())
        self.assertEqual(self.stats()["launches"], 0)


if __name__ == "__main__":
    unittest.main()
