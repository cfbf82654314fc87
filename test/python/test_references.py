"""The references of post_reorder against float64, and the loader of SGLang's kernels."""

import os
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from epmoe import references, sglang_original


def problem(dtype, *, gate="ids", factor=1.0, dst_start=0, seed=0):
    torch.manual_seed(seed)
    tokens, topk, hidden = 5, 4, 70
    ids = torch.randint(-1, 8, (tokens, topk), dtype=torch.int32)
    src2dst = torch.randperm(tokens * topk, dtype=torch.int64)
    local = ((ids >= 2) & (ids <= 5)).view(-1)
    rows = torch.randn(tokens * topk, hidden).to(dtype)
    rows[src2dst[~local]] = float("nan")
    arguments = {
        "down_output": rows,
        "output": torch.full((tokens, hidden), float("nan"), dtype=dtype),
        "src2dst": src2dst + dst_start,
        "topk_weights": torch.rand(tokens, topk),
    }
    if gate == "ids":
        arguments |= {"topk_ids": ids, "start_expert_id": 2, "end_expert_id": 5}
    else:
        arguments["src2dst"] = torch.where(local, src2dst, -1 - src2dst)
    if factor != 1.0:
        arguments["routed_scaling_factor"] = factor
    if dst_start:
        arguments["dst_start"] = dst_start
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for slot in range(tokens * topk):
        if local[slot]:
            weight = arguments["topk_weights"].view(-1)[slot].double() * factor
            expected[slot // topk] += rows[src2dst[slot]].double() * weight
    return arguments, expected


TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class PostReorder(unittest.TestCase):
    def check(self, name, dtype, **kind):
        arguments, expected = problem(dtype, **kind)
        self.assertIsNone(references.objection("post_reorder", name, arguments))
        references.run("post_reorder", name, arguments)
        error = (arguments["output"].double() - expected).norm() / expected.norm()
        self.assertLess(error, TOLERANCE[dtype])
        spoiled = arguments["output"].clone()
        spoiled[1] = spoiled[2]
        self.assertGreater((spoiled.double() - expected).norm() / expected.norm(), TOLERANCE[dtype])

    def test_against_float64(self):
        for name in ("torch", "triton"):
            for dtype in TOLERANCE:
                for kind in ({}, {"gate": "dst"}, {"gate": "dst", "factor": 2.5}, {"dst_start": 100}, {"factor": 0.3}):
                    with self.subTest(name=name, dtype=dtype, **kind):
                        self.check(name, dtype, **kind)

    def test_no_tokens(self):
        empty = {
            "down_output": torch.empty(0, 8),
            "output": torch.empty(0, 8),
            "src2dst": torch.empty(0, dtype=torch.int32),
            "topk_weights": torch.empty(0, 2),
        }
        for name in ("torch", "triton"):
            references.run("post_reorder", name, dict(empty))


HEADER = """
    import torch, triton
    import triton.language as tl
    from sglang.srt.utils import is_cuda, ceil_div
    from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
    import sglang.srt.distributed as distributed

    if is_cuda():
        raise RuntimeError("the stand-in must say no")

    @triton.jit
    def post_reorder_triton_kernel(down, out, src2dst, ids, weights, {tail}):
        token = tl.program_id(0)
        for begin in tl.range(0, hidden_size, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            inside = at < hidden_size
            total = tl.zeros([BLOCK_SIZE], dtype={accumulator})
            for k in range(topk):
                expert_id = tl.load(ids + token * topk + k)
                if {gate}:
                    row = tl.load(src2dst + token * topk + k){shift}
                    weight = tl.load(weights + token * topk + k).to({accumulator})
                    total += tl.load(down + row * hidden_size + at, mask=inside).to({accumulator}) * weight
            tl.store(out + token * hidden_size + at, total.to(down.dtype.element_ty), mask=inside)
"""
RANGE = "(expert_id >= start_expert_id) & (expert_id <= end_expert_id)"
OWN = "down.dtype.element_ty"
GENERATIONS = {
    "A": ("start_expert_id, end_expert_id, topk, hidden_size, BLOCK_SIZE: tl.constexpr", RANGE, OWN, ""),
    "B": (
        "start_expert_id, end_expert_id, topk, hidden_size, dst_start, BLOCK_SIZE: tl.constexpr",
        RANGE,
        OWN,
        " - dst_start",
    ),
    "C": ("topk, hidden_size, BLOCK_SIZE: tl.constexpr", "expert_id > 0", OWN, ""),
    "D": ("topk, hidden_size, BLOCK_SIZE: tl.constexpr", "expert_id >= 0", "tl.float32", ""),
}


class Original(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        sglang_original.find.cache_clear()
        self.addCleanup(sglang_original.find.cache_clear)

    def install(self, generation, path=sglang_original.PATHS[0], gate=None):
        tail, default_gate, accumulator, shift = GENERATIONS[generation]
        source = textwrap.dedent(HEADER)
        file = self.root / "sglang" / path
        file.parent.mkdir(parents=True)
        file.write_text(source.format(tail=tail, gate=gate or default_gate, accumulator=accumulator, shift=shift))
        (self.root / "sglang" / "__init__.py").write_text("raise RuntimeError('SGLang itself must not be imported')")
        patch = mock.patch.dict(os.environ, {"EPMOE_SGLANG": str(self.root)})
        patch.start()
        self.addCleanup(patch.stop)

    def test_each_generation_is_told_and_runs(self):
        for generation, kind in (("A", {}), ("B", {"dst_start": 40}), ("D", {})):
            with self.subTest(generation):
                self.setUp()
                self.install(generation)
                found = sglang_original.find()
                self.assertIsNone(found.problem)
                self.assertEqual(found.generation, generation)
                arguments, expected = problem(torch.float32, **kind)
                self.assertIsNone(references.objection("post_reorder", "triton-original", arguments))
                references.run("post_reorder", "triton-original", arguments)
                error = (arguments["output"].double() - expected).norm() / expected.norm()
                self.assertLess(error, 1e-6)

    def test_the_newer_path_is_found(self):
        self.install("D", sglang_original.PATHS[1])
        self.assertEqual(sglang_original.find().generation, "D")

    def test_generation_c_is_refused_with_the_reason(self):
        self.install("C")
        found = sglang_original.find()
        self.assertEqual(found.generation, "C")
        self.assertIn("drops local expert 0", found.problem)
        self.assertIn("drops local expert 0", references.describe("post_reorder")["triton-original"]["problem"])

    def test_what_a_generation_cannot_express_is_objected_to(self):
        self.install("A")
        for kind, reason in (
            ({"dst_start": 5}, "no dst_start"),
            ({"factor": 2.0}, "routed_scaling_factor"),
            ({"gate": "dst"}, "topk_ids"),
        ):
            arguments, _ = problem(torch.float32, **kind)
            self.assertIn(reason, references.objection("post_reorder", "triton-original", arguments))

    def test_nothing_is_left_behind(self):
        before = {name for name in sys.modules if name.startswith("sglang")}
        finders = list(sys.meta_path)
        self.install("A")
        sglang_original.find()
        self.assertEqual({name for name in sys.modules if name.startswith("sglang")}, before)
        self.assertEqual(sys.meta_path, finders)

    def test_absence_and_breakage_are_told(self):
        with mock.patch.dict(os.environ, {"EPMOE_SGLANG": str(self.root)}):
            self.assertIn(str(self.root), sglang_original.find().problem)
        self.setUp()
        self.install("A")
        (self.root / "sglang" / sglang_original.PATHS[0]).write_text("this is no Python")
        self.assertIn("SyntaxError", sglang_original.find().problem)
        self.setUp()
        self.install("A")
        (self.root / "sglang" / sglang_original.PATHS[0]).write_text("def other(): pass")
        self.assertIn("no post_reorder_triton_kernel", sglang_original.find().problem)


if __name__ == "__main__":
    unittest.main()
