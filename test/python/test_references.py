"""The references of post_reorder against float64, and the loader of SGLang's kernels."""

import importlib.util
import os
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe import _triton, references, sglang_original


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
        for name in ("torch", "triton", "triton-float32"):
            for dtype in TOLERANCE:
                for kind in ({}, {"gate": "dst"}, {"gate": "dst", "factor": 2.5}, {"dst_start": 100}, {"factor": 0.3}):
                    with self.subTest(name=name, dtype=dtype, **kind):
                        self.check(name, dtype, **kind)

    def test_interpreted_triton_equals_torch_bit_for_bit(self):
        """Both round the product and then the sum. Compiled Triton does not: it fuses the two."""
        for dtype in TOLERANCE:
            for kind in ({}, {"gate": "dst", "factor": 1.1}, {"dst_start": 100}):
                outputs = {}
                for name in ("torch", "triton", "triton-float32"):
                    arguments, _ = problem(dtype, **kind)
                    references.run("post_reorder", name, arguments)
                    outputs[name] = arguments["output"]
                with self.subTest(dtype=dtype, **kind):
                    self.assertTrue(torch.equal(outputs["torch"], outputs["triton"]))
                    if dtype != torch.float32:
                        self.assertFalse(torch.equal(outputs["torch"], outputs["triton-float32"]))

    def test_float32_accumulation_rounds_once(self):
        for dtype in (torch.float16, torch.bfloat16):
            errors = {}
            for name in ("triton", "triton-float32"):
                arguments, expected = problem(dtype)
                references.run("post_reorder", name, arguments)
                rounded = expected.to(dtype)
                errors[name] = (arguments["output"] != rounded).double().mean().item()
            self.assertLess(errors["triton-float32"], 1e-2)
            self.assertGreater(errors["triton"], 1e-1)

    def test_described_with_what_a_verdict_needs(self):
        described = references.describe("post_reorder")
        self.assertEqual(list(described), ["torch", "triton", "triton-float32", "triton-original"])
        for name, arithmetic in (("torch", "input-dtype"), ("triton", "input-dtype"), ("triton-float32", "float32")):
            facts = described[name]
            self.assertIsNone(facts["problem"])
            self.assertEqual((facts["arithmetic"], facts["compiled"]), (arithmetic, name == "torch"))
            self.assertRegex(facts["version"], r"^\d+\.\d+")

    def test_bfloat16_is_objected_to_where_it_cannot_be_trusted(self):
        arguments, _ = problem(torch.bfloat16)
        with mock.patch.object(_triton, "bfloat16_problem", lambda: "not here"):
            for name in ("triton", "triton-float32"):
                self.assertEqual(references.objection("post_reorder", name, arguments), "not here")
                self.assertIsNone(references.objection("post_reorder", name, problem(torch.float16)[0]))
            self.assertIsNone(references.objection("post_reorder", "torch", arguments))

    def test_the_work_of_torch_does_not_grow_with_the_tokens(self):
        class Counting(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.calls += 1
                return function(*args, **(kwargs or {}))

        counts = []
        for tokens in (2, 512):
            arguments = {
                "down_output": torch.ones(tokens * 8, 64),
                "output": torch.empty(tokens, 64),
                "src2dst": torch.arange(tokens * 8),
                "topk_weights": torch.ones(tokens, 8),
            }
            with Counting() as counting:
                references.run("post_reorder", "torch", arguments)
            self.assertTrue((arguments["output"] == 8).all())
            counts.append(counting.calls)
        self.assertEqual(*counts)

    def test_no_tokens(self):
        empty = {
            "down_output": torch.empty(0, 8),
            "output": torch.empty(0, 8),
            "src2dst": torch.empty(0, dtype=torch.int32),
            "topk_weights": torch.empty(0, 2),
        }
        for name in ("torch", "triton", "triton-float32"):
            references.run("post_reorder", name, dict(empty))


HEADER = """
    import torch, triton
    import triton.language as tl
    from sglang.srt.utils import is_cuda, ceil_div
    from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
    import sglang.srt.distributed as distributed
    from sglang.srt.environ import Envs, envs
    import absent_package.part
    try:
        from absent_kernels import gemm
    except ImportError:
        gemm = None

    if is_cuda() or envs.SGLANG_FLAG.get():
        raise RuntimeError("the stand-in must say no")

    class Wrapper(Envs):
        def get(self, name: "str | None" = None, kind: Envs | None = None) -> distributed.Group[int]:
            return per_token_group_quant_fp8(name)

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

    def install(self, generation, path=sglang_original.PATHS[0], named=True):
        tail, gate, accumulator, shift = GENERATIONS[generation]
        source = textwrap.dedent(HEADER)
        file = self.root / "sglang" / path
        file.parent.mkdir(parents=True)
        file.write_text(source.format(tail=tail, gate=gate, accumulator=accumulator, shift=shift))
        (self.root / "sglang" / "__init__.py").write_text("raise RuntimeError('SGLang itself must not be imported')")
        patch = mock.patch.dict(os.environ, {"EPMOE_SGLANG": str(self.root) if named else ""})
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
                twin = "triton-float32" if generation == "D" else "triton"
                described = references.describe("post_reorder")
                self.assertEqual(described["triton-original"]["generation"], generation)
                self.assertEqual(described["triton-original"]["arithmetic"], described[twin]["arithmetic"])
                for dtype in TOLERANCE:
                    arguments, expected = problem(dtype, **kind)
                    self.assertIsNone(references.objection("post_reorder", "triton-original", arguments))
                    references.run("post_reorder", "triton-original", arguments)
                    error = (arguments["output"].double() - expected).norm() / expected.norm()
                    self.assertLess(error, TOLERANCE[dtype])
                    original = arguments["output"].clone()
                    references.run("post_reorder", twin, arguments)
                    self.assertTrue(torch.equal(arguments["output"], original))
                    references.run("post_reorder", twin, arguments | {"end_expert_id": 4})
                    self.assertFalse(torch.equal(arguments["output"], original))

    def test_the_newer_path_is_found(self):
        self.install("D", sglang_original.PATHS[1])
        self.assertEqual(sglang_original.find().generation, "D")

    def test_generation_c_is_refused_with_the_reason(self):
        self.install("C")
        found = sglang_original.find()
        self.assertEqual(found.generation, "C")
        self.assertIsNone(found.problem)
        self.assertIn("drops local expert 0", found.problem_of(sglang_original.POST_REORDER))
        self.assertIn("drops local expert 0", references.describe("post_reorder")["triton-original"]["problem"])

    def test_what_a_generation_cannot_express_is_objected_to(self):
        self.install("A")
        for kind, reason in (
            ({"dst_start": 5}, "no dst_start"),
            ({"factor": 2.0}, "routed_scaling_factor"),
            ({"gate": "dst"}, "no deepep_post_reorder_triton_kernel"),
        ):
            arguments, _ = problem(torch.float32, **kind)
            self.assertIn(reason, references.objection("post_reorder", "triton-original", arguments))
        beyond = torch.empty(1).expand(2**19, 4096)
        arguments = problem(torch.float32)[0] | {"down_output": beyond}
        self.assertIn("32 bits", references.objection("post_reorder", "triton-original", arguments))

    def test_nothing_is_left_behind(self):
        self.install("A")
        absent = mock.Mock()  # somebody's own, which is put aside and put back
        with mock.patch.dict(sys.modules, {"sglang.srt.utils": absent}):
            sglang_original.find.cache_clear()
            before, finders = dict(sys.modules), list(sys.meta_path)
            self.assertEqual(sglang_original.find().generation, "A")
            self.assertEqual(sys.modules, before)
            self.assertEqual(sys.meta_path, finders)

    def test_nothing_is_left_behind_by_a_file_that_fails(self):
        self.install("A")
        (self.root / "sglang" / sglang_original.PATHS[0]).write_text("import sglang.srt.utils\n1 / 0")
        before, finders = dict(sys.modules), list(sys.meta_path)
        self.assertIn("ZeroDivisionError", sglang_original.find().problem)
        self.assertEqual(sys.modules, before)
        self.assertEqual(sys.meta_path, finders)

    def test_an_installed_package_is_found_and_not_imported(self):
        self.install("B", named=False)
        info = self.root / "sglang-0.4.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.4.9\n")
        with mock.patch.object(sys, "path", [str(self.root), *sys.path]):
            importlib.invalidate_caches()
            found = sglang_original.find()
        self.assertEqual((found.problem, found.generation, found.version), (None, "B", "0.4.9"))
        self.assertNotIn("sglang", sys.modules)

    def test_the_places_that_may_be_named(self):
        self.install("B")
        package = self.root / "sglang"
        (package / "version.py").write_text('__version__ = "0.5.2"')
        repository = self.root / "repository"
        (repository / "python").mkdir(parents=True)
        (repository / "python" / "sglang").symlink_to(package)
        for place in (self.root, package, package / sglang_original.PATHS[0], repository):
            with self.subTest(place.name), mock.patch.dict(os.environ, {"EPMOE_SGLANG": str(place)}):
                sglang_original.find.cache_clear()
                found = sglang_original.find()
                self.assertEqual((found.problem, found.generation, found.version), (None, "B", "0.5.2"))

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
        self.assertIn("no post_reorder_triton_kernel", sglang_original.find().problem_of(sglang_original.POST_REORDER))
        self.setUp()
        self.install("A")
        file = self.root / "sglang" / sglang_original.PATHS[0]
        file.write_text(file.read_text().replace("hidden_size, BLOCK_SIZE: tl", "hidden_size, more, BLOCK_SIZE: tl"))
        self.assertIn("signature not known", sglang_original.find().problem_of(sglang_original.POST_REORDER))
        self.setUp()
        with (
            mock.patch.dict(os.environ, {"EPMOE_SGLANG": ""}),
            mock.patch.object(importlib.util, "find_spec", lambda name: None),
        ):
            self.assertIn("not installed", sglang_original.find().problem)


if __name__ == "__main__":
    unittest.main()
