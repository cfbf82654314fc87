"""epmoe.shim: putting it in and taking it out, the launch protocol, coverage and fallback, modes, threads."""

import importlib
import os
import sys
import threading
import unittest
import warnings
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from serving_stack import Stack

import epmoe
from epmoe import generated, sglang_original, shim

EXPERTS, TOPK, HIDDEN = 4, 2, 70


def inputs(tokens=5, dtype=torch.float32, seed=0, hidden=HIDDEN):
    """Such that every sum and product is exact, whatever the order and the number of roundings."""
    torch.manual_seed(seed)
    x = torch.randint(-4, 5, (tokens, hidden)).to(dtype)
    return x, torch.randint(-1, EXPERTS, (tokens, TOPK), dtype=torch.int32), torch.randint(1, 4, (tokens, TOPK)) / 4


def combine_call(tokens=5, generation="a", dtype=torch.float32, seed=0, hidden=HIDDEN):
    """Positional arguments of post_reorder; rows of remote slots are NaN."""
    rows, ids, weights = inputs(tokens * TOPK, dtype, seed, hidden)[0], *inputs(tokens, dtype, seed)[1:]
    src2dst = torch.randperm(tokens * TOPK).int()
    remote = (ids < 1) | (ids > 2) if generation in "ab" else ids < 0
    rows[src2dst[remote.view(-1)].long()] = float("nan")
    output = torch.full((tokens, hidden), 7.0, dtype=dtype)
    numbers = {"a": (1, 2, TOPK, hidden), "b": (1, 2, TOPK, hidden, 0)}.get(generation, (TOPK, hidden))
    return [rows, output, src2dst, ids, weights, *numbers]


def remote_as_negative(call):
    call[3] = torch.where(call[3] == 0, -1, call[3])
    return call


class Case(unittest.TestCase):
    def setUp(self):
        self.stack = Stack(self)
        self.addCleanup(self.restore)
        patch = mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        os.environ.pop("EPMOE_SHIM", None)
        self.restore()

    def restore(self):
        shim.uninstall()
        shim.record(None)
        shim.configure(numerics="triton", strict=False, rate=0.01, first_per_shape=1, max_ulp=0, trip_after=3)
        shim.configure(max_overhead=0)  # which launches are compared must not depend on how fast the machine is
        shim.set_mode("*", "epmoe")
        shim.reset()

    def stats(self, kernel="post_reorder_triton_kernel"):
        return shim.stats()[kernel]

    def launch(self, kernel, call, grid=None, **options):
        options.setdefault("BLOCK_SIZE", 64)
        kernel[grid or (call[1].shape[0],)](*call, **options)
        return call[1]


class Installing(Case):
    def test_replaces_copies_and_restores_the_same_objects(self):
        before = self.stack.held()
        done = shim.install()
        places = {(module, key) for module, key, _ in done.replaced if module.startswith(self.stack.name)}
        layer = f"{self.stack.name}.layer"
        for key in ("post_reorder_triton_kernel", "permute", "combine_b", "combine_d", "run_moe_ep_preproess"):
            self.assertIn((layer, key), places)
            self.assertIsNot(getattr(self.stack.layer, key), before[layer, key])
        self.assertIs(self.stack.layer.combine_b, self.stack.b.post_reorder_triton_kernel)
        self.assertIsNot(self.stack.layer.combine_b, self.stack.layer.combine_d)
        self.assertTrue(shim.is_installed())
        replaced = {place for place, value in self.stack.held().items() if value is not before[place]}
        self.assertEqual(replaced, places)
        back = shim.uninstall()
        self.assertEqual(len(back.replaced), len(done.replaced))
        after = self.stack.held()
        self.assertEqual(set(after), set(before))
        self.assertTrue(all(after[place] is value for place, value in before.items()))
        self.assertFalse(shim.is_installed())

    def test_twice_is_once_and_modules_loaded_between_are_restored(self):
        before = self.stack.held()
        shim.install()
        first = self.stack.held()
        self.assertEqual(shim.install().replaced, [])
        self.assertTrue(all(first[place] is value for place, value in self.stack.held().items()))
        late = type(sys)(f"{self.stack.name}.late")
        late.kernel = self.stack.a.post_reorder_triton_kernel  # `from kernels_a import … as kernel`
        sys.modules[late.__name__] = late
        shim.uninstall()
        self.assertIs(late.kernel, before[f"{self.stack.name}.kernels_a", "post_reorder_triton_kernel"])

    def test_what_others_put_there_meanwhile_stays(self):
        shim.install()
        mine = self.stack.layer.permute = object()
        shim.uninstall()
        self.assertIs(self.stack.layer.permute, mine)

    def test_only_what_is_named(self):
        other = Stack(self)
        shim.install([self.stack.a])
        self.assertIsInstance(self.stack.layer.permute, type(shim.pre_reorder_triton_kernel))
        self.assertNotIsInstance(self.stack.layer.combine_b, type(shim.pre_reorder_triton_kernel))
        self.assertNotIsInstance(other.layer.permute, type(shim.pre_reorder_triton_kernel))
        with self.assertRaisesRegex(epmoe.EpmoeError, "loaded modules"):
            shim.install("not.loaded")

    def test_off_is_not_installed_and_namesakes_are_left_alone(self):
        def ep_gather(something, different):
            return something

        self.stack.layer.ep_gather = ep_gather
        self.stack.layer.silu_and_mul_triton_kernel = "no kernel"
        with self.assertWarnsRegex(RuntimeWarning, "ep_gather is left as it is: its signature is not known"):
            done = shim.install(pre_reorder="off")
        self.assertIn((f"{self.stack.name}.layer", "ep_gather", "its signature is not known"), done.skipped)
        self.assertIs(self.stack.layer.ep_gather, ep_gather)
        self.assertEqual(self.stack.layer.silu_and_mul_triton_kernel, "no kernel")
        self.assertNotIn("pre_reorder_triton_kernel", {kernel for _, _, kernel in done.replaced})
        self.assertIs(self.stack.layer.permute, self.stack.a.pre_reorder_triton_kernel)


class Launching(Case):
    def both(self, kernel_of, make, **options):
        """Results of Triton's kernel and of the shim, by the same launch."""
        expected, actual = make(), make()
        self.launch(kernel_of(), expected, **options)
        shim.install()
        self.launch(kernel_of(), actual, **options)
        shim.uninstall()
        return expected[1], actual[1]

    def test_every_generation_of_post_reorder(self):
        for generation in "abd":
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                with self.subTest(generation, dtype=dtype):
                    shim.reset()
                    module = getattr(self.stack, generation)
                    make = lambda g=generation, d=dtype: combine_call(generation=g, dtype=d)
                    expected, actual = self.both(lambda m=module: m.post_reorder_triton_kernel, make)
                    self.assertTrue(torch.equal(expected, actual))
                    self.assertFalse(torch.equal(expected, torch.full_like(expected, 7)))
                    self.assertEqual((self.stats()["epmoe"], self.stats()["fallbacks"]), (1, 0))

    def test_dst_start(self):
        def make():
            call = combine_call(generation="b")
            call[2] += 30
            call[-1] = 30
            return call

        expected, actual = self.both(lambda: self.stack.b.post_reorder_triton_kernel, make)
        self.assertTrue(torch.equal(expected, actual))
        self.assertEqual(self.stats()["epmoe"], 1)

    def test_generation_c_is_refused_with_the_reason(self):
        def make():
            call = combine_call(tokens=9, generation="d")
            self.assertTrue((call[3] == 0).any())
            return call

        with self.assertWarnsRegex(RuntimeWarning, "drops local expert 0"):
            expected, actual = self.both(lambda: self.stack.c.post_reorder_triton_kernel, make)
        self.assertTrue(torch.equal(expected, actual))
        self.assertEqual((self.stats()["epmoe"], self.stats()["fallbacks"]), (0, 1))
        wrong = self.launch(self.stack.d.post_reorder_triton_kernel, make())
        self.assertFalse(torch.equal(expected, wrong))

    def test_ways_to_launch(self):
        shim.install()
        kernel = self.stack.layer.post_reorder_triton_kernel
        names = ("down_output_ptr", "output_ptr", "src2dst_ptr", "topk_ids_ptr", "topk_weights_ptr")
        names += ("start_expert_id", "end_expert_id", "topk", "hidden_size", "BLOCK_SIZE")
        expected = self.launch(kernel, combine_call())
        ways = {
            "positional": lambda c: kernel[(5,)](*c, 64),
            "keywords": lambda c: kernel[(5,)](**dict(zip(names, [*c, 64], strict=True)), num_warps=8, num_stages=2),
            "callable": lambda c: kernel[lambda meta: (meta["output_ptr"].shape[0] * meta["BLOCK_SIZE"] // 64,)](
                *c, 64
            ),
            "more axes": lambda c: kernel[5, 1, 1](*c, BLOCK_SIZE=64),
            "run": lambda c: kernel.run(*c, grid=(5,), warmup=False, BLOCK_SIZE=64),
        }
        for name, way in ways.items():
            with self.subTest(name):
                shim.reset()
                call = combine_call()
                self.assertIsNone(way(call))
                self.assertTrue(torch.equal(call[1], expected))
                self.assertEqual((self.stats()["epmoe"], self.stats()["fallbacks"]), (1, 0))
        self.assertEqual(kernel.__name__, "post_reorder_triton_kernel")
        self.assertEqual(kernel.arg_names, list(names))
        self.assertIsNone(kernel.run(*combine_call(), grid=(5,), warmup=True, BLOCK_SIZE=64))

    def test_the_grid_says_how_many_rows(self):
        make = lambda: combine_call(tokens=6)
        expected, actual = self.both(lambda: self.stack.a.post_reorder_triton_kernel, make, grid=(4,))
        self.assertTrue(torch.equal(expected, actual))
        self.assertEqual(set(actual[4:].view(-1).tolist()), {7.0})
        self.assertEqual(self.stats()["epmoe"], 1)

    def test_no_programs_at_all(self):
        shim.install()
        call = combine_call()
        self.launch(self.stack.layer.post_reorder_triton_kernel, call, grid=(0,))
        self.assertEqual(set(call[1].view(-1).tolist()), {7.0})

    def test_the_whole_layer_and_the_helpers(self):
        x, ids, weights = inputs(9)
        shim.configure("silu_and_mul", max_ulp=2)
        expected = self.stack.layer.forward(x, ids, weights, EXPERTS, 1, 2)
        shim.install()
        actual = self.stack.layer.forward(x, ids, weights, EXPERTS, 1, 2)
        self.assertTrue(torch.equal(expected[0], actual[0]) and torch.equal(expected[2], actual[2]))
        torch.testing.assert_close(expected[1], actual[1], rtol=1e-6, atol=1e-6)
        for kernel in ("run_moe_ep_preproess", "pre_reorder_triton_kernel", "silu_and_mul_triton_kernel"):
            self.assertEqual((self.stats(kernel)["epmoe"], self.stats(kernel)["triton"]), (1, 0), kernel)
        self.assertFalse(torch.equal(self.stack.layer.forward(x + 1, ids, weights, EXPERTS, 1, 2)[0], expected[0]))

    def test_deepep_and_gelu(self):
        a, results = self.stack.a, []
        x, ids, weights = inputs(6)
        for installed in (False, True):
            if installed:
                shim.install()
            order, src2dst, seg = a.deepep_run_moe_deep_preprocess(ids.long(), EXPERTS)
            rows, output = torch.full((12, HIDDEN), 7.0), torch.empty_like(x)
            a.deepep_permute_triton_kernel[(6,)](x, rows, src2dst, ids, None, TOPK, HIDDEN, BLOCK_SIZE=64)
            a.deepep_post_reorder_triton_kernel[(6,)](rows, output, src2dst, ids, weights, TOPK, HIDDEN, BLOCK_SIZE=64)
            down = torch.full((order.numel(), HIDDEN // 2), 7.0)
            a.gelu_and_mul_triton_kernel[(order.numel(),)](rows, down, HIDDEN, order, None, 1, 2, BLOCK_SIZE=64)
            results.append((order, src2dst, seg, rows, output, down))
        for expected, actual in zip(*results, strict=True):
            self.assertEqual(expected.dtype, actual.dtype)
            torch.testing.assert_close(expected, actual, rtol=1e-5, atol=1e-6)
        self.assertTrue(all(map(torch.equal, results[0][:5], results[1][:5])))
        used = {kernel: s["epmoe"] for kernel, s in shim.stats().items() if s["launches"]}
        self.assertEqual(set(used.values()), {1})
        self.assertEqual(len(used), 4)

    def test_scatter_and_gather_as_the_originals_leave_them(self):
        results = []
        torch.manual_seed(0)
        x, scale = torch.randn(6, 256).to(torch.float8_e4m3fn), torch.rand(6, 2)
        ids = torch.randint(-1, EXPERTS, (6, TOPK))
        for installed in (False, True):
            if installed:
                shim.install()
            start, m_indices = torch.zeros(EXPERTS, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
            rows, scales = torch.zeros(512, 256).to(torch.float8_e4m3fn), torch.zeros(512, 2)
            index, output = torch.full((6, TOPK), -9, dtype=torch.int32), torch.empty(6, 256)
            counts = torch.full((EXPERTS,), 128, dtype=torch.int32)
            self.stack.a.ep_scatter(x, scale, ids, counts, start, rows, scales, m_indices, index)
            self.stack.a.ep_gather(rows.float(), ids, torch.ones(6, TOPK), index, output)
            results.append((start, m_indices, index == -9, output))
        self.assertTrue(all(map(torch.equal, *results)))
        self.assertEqual(results[1][0].tolist(), [128 * e + int((ids == e).sum()) for e in range(EXPERTS)])
        self.assertEqual((self.stats("ep_scatter")["epmoe"], self.stats("ep_gather")["epmoe"]), (1, 1))

    def test_masked_activation(self):
        results = []
        torch.manual_seed(0)
        x, counts = torch.randn(2, 5, 256), torch.tensor([5, 2], dtype=torch.int32)
        for installed in (False, True):
            if installed:
                shim.install()
            output, scales = torch.zeros(2, 5, 128).to(torch.float8_e4m3fn), torch.zeros(2, 5, 1)
            self.stack.a.silu_and_mul_masked_post_quant_fwd(x, output, scales, 128, counts)
            results.append((output.float(), scales))
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
        self.assertLessEqual((results[0][0] - results[1][0]).abs().max(), 32)
        self.assertEqual(results[1][0][1, 2:].abs().sum(), 0)
        self.assertEqual(self.stats("silu_and_mul_masked_post_quant_fwd")["epmoe"], 1)

    def test_scales_by_token_and_by_expert(self):
        x, ids, _ = inputs(5)
        _, src2dst, _ = self.stack.a.run_moe_ep_preproess(ids, EXPERTS)
        for by_token, scales in ((True, torch.tensor([1.0, 2, 4, 0.5, 1])), (False, torch.tensor([2.0, 4.0]))):
            make = lambda s=scales: [x, torch.full((10, HIDDEN), 7.0), src2dst, ids, s, 1, 2, TOPK, HIDDEN]
            kernel = lambda: self.stack.layer.permute
            options = {"use_per_token_if_dynamic": by_token, "grid": (5,)}
            expected, actual = self.both(kernel, make, **options)
            self.assertTrue(torch.equal(expected, actual))
            self.assertFalse(torch.equal(expected, self.launch(kernel(), make(torch.ones(5)), **options)))
        make = lambda: [x, torch.full((10, HIDDEN), 7.0), src2dst, ids, torch.tensor([2.0, 4.0]), 1, 2, TOPK, HIDDEN]
        expected, actual = self.both(lambda: self.stack.b.pre_reorder_triton_kernel, make, grid=(5,))
        self.assertTrue(torch.equal(expected, actual))
        self.assertEqual((self.stats("pre_reorder_triton_kernel")["epmoe"]), 3)


class ByName(Case):
    """Rewritten sources: epmoe.shim.<kernel> without a Triton kernel that it took the place of."""

    def test_runs_epmoe_by_the_arguments_alone(self):
        for generation in "abd":
            with self.subTest(generation):
                kernel = getattr(self.stack, generation).post_reorder_triton_kernel
                expected = self.launch(kernel, combine_call(generation=generation))
                actual = self.launch(shim.post_reorder_triton_kernel, combine_call(generation=generation))
                self.assertTrue(torch.equal(expected, actual))
        self.assertEqual(self.stats()["epmoe"], 3)

    def test_helpers(self):
        ids = inputs(7)[1]
        expected = self.stack.a.run_moe_ep_preproess(ids, EXPERTS)
        actual = shim.run_moe_ep_preproess(ids, num_experts=EXPERTS)
        self.assertTrue(all(map(torch.equal, expected, actual)))

    def test_deepgemm(self):
        call = remote_as_negative(combine_call(generation="d"))
        expected = self.launch(self.stack.d.post_reorder_triton_kernel, call).clone()
        rows, output, src2dst, ids, weights = call[:5]
        output.fill_(7)
        result = shim.post_reorder_deepgemm(
            rows, output, src2dst.view(5, TOPK), ids, weights, TOPK, 5, HIDDEN, routed_scaling_factor=2.0
        )
        self.assertIs(result, output)
        self.assertTrue(torch.equal(output, expected * 2))

    def test_without_an_original_what_epmoe_does_not_take_is_an_error(self):
        os.environ["EPMOE_SGLANG"] = "/nowhere"
        sglang_original.find.cache_clear()
        self.addCleanup(sglang_original.find.cache_clear)
        kernel = type(shim.post_reorder_triton_kernel)("post_reorder_triton_kernel")
        call = combine_call()
        call[0] = call[0].double()
        with warnings.catch_warnings(), self.assertRaises(epmoe.EpmoeError) as caught:
            warnings.simplefilter("ignore")
            self.launch(kernel, call)
        self.assertEqual(caught.exception.code, "ERR_NO_ORIGINAL")
        self.assertIn("EPMOE_SGLANG", caught.exception.hint)


class Coverage(Case):
    def spoiled(self):
        """Launches that epmoe does not take, and a word of each reason."""
        doubles = combine_call()
        for at in (0, 1):
            doubles[at] = doubles[at].double()
        strided = combine_call()
        strided[1] = torch.full((5, 2 * HIDDEN), 7.0)[:, ::2]
        short = combine_call()
        yield "received float64", doubles, {}
        yield "not contiguous", strided, {}
        yield "smaller than the launch says", short, {"grid": (5,), "cut": True}
        yield "more than one axis", combine_call(), {"grid": (5, 2)}
        yield "unknown keyword enable_fp_fusion", combine_call(), {"enable_fp_fusion": False}

    def test_falls_back_counts_and_warns_once(self):
        originals = self.stack.held()
        served = []
        original = originals[f"{self.stack.name}.kernels_a", "post_reorder_triton_kernel"]
        shim.install()
        kernel = self.stack.layer.post_reorder_triton_kernel
        for reason, call, options in self.spoiled():
            with self.subTest(reason):
                shim.reset()
                if options.pop("cut", None):
                    call[4] = call[4][:4]
                patched = mock.patch.object(type(original), "__getitem__", lambda *_: lambda *a, **k: served.append(a))
                with patched, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    for _ in range(3):
                        self.launch(kernel, call, **options)
                self.assertEqual(len(caught), 1)
                self.assertIn(reason, str(caught[0].message))
                stats = self.stats()
                self.assertEqual((stats["fallbacks"], stats["triton"], stats["epmoe"]), (3, 3, 0))
                self.assertEqual(list(stats["reasons"].values()), [3])
        self.assertEqual(len(served), 15)

    def test_strict_raises_and_does_not_launch(self):
        shim.install()
        shim.configure("post_reorder", strict=True)
        for reason, call, options in self.spoiled():
            with self.subTest(reason):
                if options.pop("cut", None):
                    call[4] = call[4][:4]
                with self.assertRaisesRegex(epmoe.EpmoeError, reason):
                    self.launch(self.stack.layer.post_reorder_triton_kernel, call, **options)
                self.assertEqual(set(call[1].view(-1).tolist()), {7.0})
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())

    def test_an_exception_in_epmoe_leaves_triton_serving(self):
        expected = self.launch(self.stack.a.post_reorder_triton_kernel, combine_call())
        shim.install()
        call = combine_call()
        with (
            mock.patch.object(generated, "post_reorder", side_effect=MemoryError("none left")),
            self.assertWarnsRegex(RuntimeWarning, "MemoryError: none left"),
        ):
            self.launch(self.stack.layer.post_reorder_triton_kernel, call)
        self.assertTrue(torch.equal(call[1], expected))
        self.assertEqual((self.stats()["fallbacks"], self.stats()["reasons"]), (1, {"MemoryError": 1}))

    def test_an_index_out_of_range_is_not_handed_to_triton(self):
        shim.install()
        call = combine_call()
        call[2][int((call[3].view(-1) == 1).nonzero()[0])] = 10**6
        with self.assertRaises(epmoe.EpmoeError) as caught:
            self.launch(self.stack.layer.post_reorder_triton_kernel, call)
        self.assertEqual(caught.exception.code, "ERR_INDEX_OUT_OF_RANGE")
        self.assertEqual(self.stats()["triton"], 0)

    def test_counting_minus_one_apart_is_noticed(self):
        module = importlib.import_module(f"{self.stack.name}.kernels_b")
        known = self.stack.a.run_moe_ep_preproess

        def run_moe_ep_preproess(topk_ids, num_experts):
            order, src2dst, seg = known(topk_ids, num_experts)
            seg[0] = (topk_ids < 0).sum()
            return order, src2dst, seg

        module.run_moe_ep_preproess = run_moe_ep_preproess
        ids = inputs(5)[1]
        expected = run_moe_ep_preproess(ids, EXPERTS)
        shim.install(module)
        with self.assertWarnsRegex(RuntimeWarning, "counts the slots of -1 apart"):
            actual = module.run_moe_ep_preproess(ids, EXPERTS)
        self.assertTrue(all(map(torch.equal, expected, actual)))


class Modes(Case):
    def test_each_by_the_environment_by_install_and_at_run_time(self):
        os.environ["EPMOE_SHIM"] = "post_reorder = shadow, *=triton"
        shim.install(mode="epmoe", post_reorder="epmoe")
        self.assertEqual(shim.get_mode("post_reorder"), "shadow")
        self.assertEqual(shim.get_mode("gelu_and_mul_triton_kernel"), "triton")
        self.assertEqual(self.stats()["chosen_by"], "EPMOE_SHIM")
        shim.set_mode("post_reorder", "epmoe")
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())
        shim.set_mode("post_reorder", "triton")
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())
        shim.set_mode("post_reorder", "off")
        self.launch(self.stack.layer.post_reorder_triton_kernel, combine_call())
        self.assertEqual([self.stats()[name] for name in ("launches", "epmoe", "triton")], [2, 1, 1])

    def test_mistakes_are_named(self):
        for bad in ("post_reorder=fast", "nothing=epmoe", "post_reorder"):
            os.environ["EPMOE_SHIM"] = bad
            with self.subTest(bad), self.assertRaisesRegex(epmoe.EpmoeError, "EPMOE_SHIM"):
                shim.install()
        del os.environ["EPMOE_SHIM"]
        bounds = ({"rate": 2}, {"max_ulp": -1}, {"max_overhead": -0.1}, {"max_overhead": float("nan")})
        for wrong in (*bounds, {"numerics": "fp8"}, {"strict": 1}, {"unknown": 1}):
            with self.subTest(wrong), self.assertRaises(epmoe.EpmoeError):
                shim.configure(**wrong)
        for call in (lambda: shim.set_mode("post_reorder", "on"), lambda: shim.get_mode("*")):
            with self.assertRaises(epmoe.EpmoeError):
                call()

    def test_numerics(self):
        torch.manual_seed(0)
        call = combine_call(dtype=torch.bfloat16)
        call[0] = torch.randn(10, HIDDEN).bfloat16()
        call[3] = torch.ones_like(call[3])
        call[4] = torch.rand(5, TOPK)
        shim.install()
        found = {}
        for numerics in ("triton", "fp32"):
            shim.configure("post_reorder", numerics=numerics)
            found[numerics] = self.launch(self.stack.layer.post_reorder_triton_kernel, call).clone()
            own = torch.empty_like(found[numerics])
            epmoe.post_reorder(call[0], own, *call[2:3], call[4], topk_ids=call[3], numerics=numerics)
            self.assertTrue(torch.equal(own, found[numerics]))
        self.assertFalse(torch.equal(found["triton"], found["fp32"]))

    def test_two_threads_launch_while_a_third_flips_the_mode(self):
        given = {tokens: inputs(tokens, seed=tokens) for tokens in range(1, 5)}
        expected = {tokens: self.stack.layer.forward(*given[tokens], EXPERTS, 1, 2)[0] for tokens in given}
        shim.install()
        shim.configure(rate=0.3)
        wrong, errors, done = [], [], threading.Event()

        def serve(seed):
            try:
                for step in range(60):
                    tokens = 1 + (step + seed) % 4
                    result = self.stack.layer.forward(*given[tokens], EXPERTS, 1, 2)[0]
                    if not torch.equal(result, expected[tokens]):
                        wrong.append((seed, step))
            except Exception as error:
                errors.append(error)

        def flip():
            while not done.wait(0.002):
                for mode in ("triton", "epmoe"):
                    shim.set_mode("pre_reorder", mode)
                    shim.set_mode("run_moe_ep_preproess", mode)

        # Triton's interpreter is not for two threads: only what epmoe serves is launched by both.
        with mock.patch.object(self.stack.layer, "silu_and_mul_triton_kernel", mock.MagicMock()):
            shim.set_mode("*", "epmoe")
            threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual((wrong, errors), ([], []))
            self.assertEqual(self.stats()["epmoe"], 120)
            self.assertEqual(self.stats()["launches"], 120)
            flipper = threading.Thread(target=flip)
            flipper.start()
            serve(0)
            done.set()
            flipper.join()
        self.assertEqual((wrong, errors), ([], []))
        self.assertEqual(self.stats()["launches"], 180)
        flipped = self.stats("pre_reorder_triton_kernel")
        self.assertEqual(flipped["epmoe"] + flipped["triton"], 180)


if __name__ == "__main__":
    unittest.main()
