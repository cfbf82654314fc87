"""The loader of SGLang's kernels and each op's ``triton-original``, tried on stand-ins of several versions.

A stand-in has a version's path, imports and signatures; its bodies are this file's own.
"""

import os
import sys
import tempfile
import textwrap
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from epmoe import references, sglang_original

IMPORTS = {
    "0.4.6": """
        from sglang.srt.distributed import get_tensor_model_parallel_rank
        from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
        from sglang.srt.utils import is_cuda
    """,
    "0.4.7": """
        from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
        from sglang.srt.utils import dispose_tensor, is_cuda
        try:
            from deep_gemm import m_grouped_gemm_fp8_fp8_bf16_nt_contiguous
        except ImportError:
            m_grouped_gemm_fp8_fp8_bf16_nt_contiguous = None
    """,
    "0.4.9": """
        from sglang.math_utils import ceil_align
        from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
        from sglang.srt.utils import ceil_div, dispose_tensor, is_cuda
    """,
    "0.5.3": """
        from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
        from sglang.srt.utils import ceil_div, dispose_tensor, is_cuda
        from sglang.utils import is_in_ci
    """,
    "0.5.15": """
        from sglang.srt.utils import ceil_div, is_cuda, is_musa
        if is_cuda() or is_musa():
            from sglang.srt.layers.quantization.fp8_kernel import per_token_group_quant_fp8
    """,
    "0.5.18": """
        from sglang.srt.environ import envs
        from sglang.srt.utils import ceil_div, is_cuda, is_musa
        if is_cuda() or is_musa():
            from sglang.kernels.ops.quantization.fp8_kernel import per_token_group_quant_fp8
    """,
}
IMPORTS["0.5.9"] = IMPORTS["0.5.15"]

POST_REORDER = """
    @triton.jit
    def post_reorder_triton_kernel(down, out, src2dst, ids, weights, {tail}BLOCK_SIZE: tl.constexpr):
        token = tl.program_id(0)
        for begin in tl.range(0, hidden_size, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            inside = at < hidden_size
            total = tl.zeros([BLOCK_SIZE], dtype={accumulator})
            for k in range(topk):
                expert_id = tl.load(ids + token * topk + k)
                if {gate}:
                    row = tl.load(src2dst + token * topk + k).to(tl.int64){shift}
                    weight = tl.load(weights + token * topk + k).to({accumulator})
                    total += tl.load(down + row * hidden_size + at, mask=inside).to({accumulator}) * weight
            tl.store(out + token * hidden_size + at, total.to(down.dtype.element_ty), mask=inside)
"""
RANGE, OWN = "(expert_id >= start_expert_id) & (expert_id <= end_expert_id)", "down.dtype.element_ty"
LOCAL = "topk, hidden_size, "
GENERATIONS = {
    "A": {"tail": "start_expert_id, end_expert_id, " + LOCAL, "gate": RANGE, "accumulator": OWN, "shift": ""},
    "C": {"tail": LOCAL, "gate": "expert_id > 0", "accumulator": OWN, "shift": ""},
    "D": {"tail": LOCAL, "gate": "expert_id >= 0", "accumulator": "tl.float32", "shift": ""},
}
GENERATIONS["B"] = GENERATIONS["A"] | {"tail": GENERATIONS["A"]["tail"] + "dst_start, ", "shift": " - dst_start"}

DEEPEP = """
    @triton.jit
    def deepep_permute_triton_kernel(
        x, gateup, src2dst, topk_ids, a1_scales, topk, hidden_size, BLOCK_SIZE: tl.constexpr
    ):
        token = tl.program_id(0)
        for begin in tl.range(0, hidden_size, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            value = tl.load(x + token * hidden_size + at, mask=at < hidden_size).to(gateup.dtype.element_ty)
            for k in range(topk):
                row = tl.load(src2dst + token * topk + k)
                if row >= 0:
                    tl.store(gateup + row * hidden_size + at, value, mask=at < hidden_size)

    @triton.jit
    def deepep_post_reorder_triton_kernel(
        down, out, src2dst, topk_ids, weights, topk, hidden_size, {factor}BLOCK_SIZE: tl.constexpr
    ):
        token = tl.program_id(0)
        for begin in tl.range(0, hidden_size, BLOCK_SIZE):
            at = begin + tl.arange(0, BLOCK_SIZE)
            total = tl.zeros([BLOCK_SIZE], dtype=down.dtype.element_ty)
            for k in range(topk):
                row = tl.load(src2dst + token * topk + k)
                if row >= 0:
                    weight = tl.load(weights + token * topk + k).to(down.dtype.element_ty){times}
                    total += tl.load(down + row * hidden_size + at, mask=at < hidden_size) * weight
            tl.store(out + token * hidden_size + at, total, mask=at < hidden_size)
"""

PREPROCESS = """
    @triton.jit
    def compute_seg_indptr_triton_kernel(sorted_ids, seg_indptr, count):
        expert = tl.program_id(0){shift}
        below = 0
        for i in range(count):
            below += (tl.load(sorted_ids + i) <= expert).to(tl.int32)
        tl.store(seg_indptr + expert + 1, below)

    def run_moe_ep_preproess(topk_ids, num_experts):
        sorted_ids, order = topk_ids.view(-1).sort(stable=True)
        seg_indptr = torch.zeros(num_experts + 1, dtype=torch.int64)
        compute_seg_indptr_triton_kernel[(num_experts,)](sorted_ids, seg_indptr, topk_ids.numel())
        return sorted_ids, order.argsort().int(), seg_indptr

    def deepep_run_moe_deep_preprocess(topk_ids, num_experts):
        sorted_ids, order = topk_ids.view(-1).sort(stable=True)
        none = (sorted_ids < 0).sum()
        bounds = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, dtype=sorted_ids.dtype))
        return sorted_ids[none:], order.argsort() - none, bounds - none
"""

PRE_REORDER = """
    @triton.jit
    def pre_reorder_triton_kernel(
        x, gateup, src2dst, topk_ids, a1_scales, start_expert_id, end_expert_id, topk, hidden_size,
        BLOCK_SIZE: tl.constexpr{flag}
    ):
        token = tl.program_id(0).to(tl.int64)
        for k in range(topk):
            expert = tl.load(topk_ids + token * topk + k)
            if (expert >= start_expert_id) & (expert <= end_expert_id):
                row = tl.load(src2dst + token * topk + k)
                factor = 1.0
                if a1_scales is not None:
                    factor = 1.0 / tl.load(a1_scales + {index})
                for begin in tl.range(0, hidden_size, BLOCK_SIZE):
                    at = begin + tl.arange(0, BLOCK_SIZE)
                    value = tl.load(x + token * hidden_size + at, mask=at < hidden_size).to(tl.float32) * factor
                    value = value.to(gateup.dtype.element_ty)
                    tl.store(gateup + row * hidden_size + at, value, mask=at < hidden_size)
"""

ACTIVATION = """
    @triton.jit
    def {name}_and_mul_triton_kernel(
        gateup, down, hidden_size, topk_ids, scales, start_expert_id, end_expert_id, BLOCK_SIZE: tl.constexpr
    ):
        row, half = tl.program_id(0), hidden_size // 2
        expert = tl.load(topk_ids + row)
        if (expert >= start_expert_id) & (expert <= end_expert_id):
            for begin in tl.range(0, half, BLOCK_SIZE):
                at = begin + tl.arange(0, BLOCK_SIZE)
                gate = tl.load(gateup + row * hidden_size + at, mask=at < half).to(tl.float32)
                up = tl.load(gateup + row * hidden_size + half + at, mask=at < half)
                value = ({act}).to(up.dtype) * up
                if scales is not None:
                    value = value * (1 / tl.load(scales + expert - start_expert_id)).to(up.dtype)
                tl.store(down + row * half + at, value.to(down.dtype.element_ty), mask=at < half)
"""
ACTS = {
    "silu": "gate * tl.sigmoid(gate)",
    "gelu": "gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))",
}

WRAPPERS = """
    def silu_and_mul_masked_post_quant_fwd(x, output, output_scale, quant_group_size, masked_m{power}):
        gate, up = x.float().chunk(2, -1)
        values = (gate * gate.sigmoid()).to(x.dtype) * up.to(x.dtype)
        groups = values.float().view(*values.shape[:-1], -1, quant_group_size)
        scales = groups.abs().amax(-1).clamp(min=1e-10) / 448
        quotients = (groups / scales[..., None]).clamp(-448, 448).view(values.shape)
        for expert, rows in enumerate(masked_m.tolist()):
            output[expert, :rows] = quotients[expert, :rows].to(output.dtype)
            output_scale[expert, :rows] = scales[expert, :rows]

    @torch.no_grad()
    def ep_scatter(x, scale, topk, counts, start_loc, out, out_scale, m_indices, index{power}):
        assert m_indices.shape[0] % 128 == 0
        start_loc.copy_(counts.cumsum(0) - counts)
        for expert, start in enumerate(start_loc.tolist()):
            m_indices[start : start + counts[expert]] = expert
        # The last token first: any order is allowed.
        for token in range(topk.shape[0] - 1, -1, -1):
            for k, expert in enumerate(topk[token].tolist()):
                if expert >= 0:
                    row = int(start_loc[expert])
                    start_loc[expert] += 1
                    index[token, k] = row
                    out[row], out_scale[row] = x[token], scale[token]

    @torch.no_grad()
    def ep_gather(x, ids, weights, index, output):
        BLOCK_D = {block}
        assert x.shape[1] % BLOCK_D == 0
        rows = x[index.long().clamp(min=0)].float() * weights.float()[..., None]
        output.copy_(rows.masked_fill((ids < 0)[..., None], 0).sum(1))
"""

# generation of post_reorder, and what else there is: see the tables of each op
VERSIONS = {
    "0.4.6": {"generation": "A", "flag": False, "block": 1024},
    "0.4.7": {"generation": "A", "block": 1024},
    "0.4.9": {"generation": "B", "block": 1024, "power": True},
    "0.5.3": {"generation": "B", "block": 128, "power": True},
    "0.5.9": {"generation": "C", "removed": True, "block": 128, "power": True},
    "0.5.15": {"generation": "D", "removed": True, "block": 128, "power": True},
    "0.5.18": {"generation": "D", "removed": True, "block": 128, "power": True, "factor": True, "moved": True},
}


def source(version):
    kind = VERSIONS[version]
    removed, flag, factor = (kind.get(key, default) for key, default in (("removed", 0), ("flag", 1), ("factor", 0)))
    parts = [
        "import torch\nimport triton\nimport triton.language as tl",
        IMPORTS[version],
        "if is_cuda():\n    raise RuntimeError('the stand-in must say no')",
        POST_REORDER.format(**GENERATIONS[kind["generation"]]),
        DEEPEP.format(
            factor="routed_scaling_factor: tl.constexpr, " if factor else "",
            times=" * routed_scaling_factor" if factor else "",
        ),
        PREPROCESS.format(shift=" - 1" if removed else ""),
        WRAPPERS.format(
            power=", scale_ue8m0=False" if kind.get("power") else "",
            block="1024 if x.shape[1] % 1024 == 0 else 128" if kind["block"] == 128 else 1024,
        ),
    ]
    if not removed:
        by_expert = "expert - start_expert_id"
        parts += [
            PRE_REORDER.format(
                flag=", use_per_token_if_dynamic: tl.constexpr" if flag else "",
                index=f"(token if use_per_token_if_dynamic else {by_expert})" if flag else by_expert,
            ),
            *(ACTIVATION.format(name=name, act=act) for name, act in ACTS.items()),
        ]
    return "\n".join(textwrap.dedent(part) for part in parts)


class Versions(unittest.TestCase):
    def setUp(self):
        self.addCleanup(sglang_original.find.cache_clear)

    def install(self, version):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        root = Path(folder.name)
        file = root / "sglang" / sglang_original.PATHS[bool(VERSIONS[version].get("moved"))]
        file.parent.mkdir(parents=True)
        file.write_text(source(version))
        (root / "sglang" / "__init__.py").write_text("raise RuntimeError('SGLang itself must not be imported')")
        info = root / f"sglang-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        patch = mock.patch.dict(os.environ, {"EPMOE_SGLANG": str(root)})
        patch.start()
        self.addCleanup(patch.stop)
        sglang_original.find.cache_clear()
        return sglang_original.find()

    def objection(self, op, arguments):
        return references.objection(op, "triton-original", arguments)

    def check(self, op, make, outputs, twin="triton"):
        """SGLang's gives what ``twin`` gives, bit for bit; and not what it gives after one input is changed."""
        results = []
        for name in ("triton-original", twin):
            arguments = make()
            self.assertIsNone(references.objection(op, name, arguments))
            references.run(op, name, arguments)
            results.append([bits(arguments[key]) for key in outputs])
        for original, own in zip(*results, strict=True):
            self.assertTrue(torch.equal(original, own), op)
        arguments = make()
        first = next(iter(arguments))
        arguments[first] = arguments[first].flip(0).contiguous()
        references.run(op, twin, arguments)
        spoiled = [bits(arguments[key]) for key in outputs]
        self.assertFalse(all(map(torch.equal, spoiled, results[0])), op)

    def test_generation_and_version_are_told_and_sglang_is_not_imported(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                before, finders = set(sys.modules), list(sys.meta_path)
                found = self.install(version)
                self.assertEqual((found.problem, found.version, found.generation), (None, version, kind["generation"]))
                self.assertEqual({name for name in sys.modules if name.partition(".")[0] == "sglang"}, set())
                self.assertEqual(set(sys.modules) - before, set())
                self.assertEqual(sys.meta_path, finders)

    def test_what_is_missing_is_told_op_by_op(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                removed = f"SGLang {version} has no {{}}_triton_kernel (removed in v0.5.4)"
                for op in ("pre_reorder", "silu_and_mul", "gelu_and_mul"):
                    gated = self.objection(op, CALLS[op]())
                    self.assertEqual(gated, removed.format(op) if kind.get("removed") else None)
                described = references.describe("gelu_and_mul")["triton-original"]
                if kind.get("removed"):
                    self.assertEqual(described, {"problem": removed.format("gelu_and_mul")})
                for op in ("preprocess", "pre_reorder", "silu_and_mul", "ep_scatter", "ep_gather"):
                    described = references.describe(op)["triton-original"]
                    self.assertEqual(
                        (described["problem"], described["sglang"], described["generation"]),
                        (None, version, kind["generation"]),
                    )

    def test_a_file_without_any_is_told_op_by_op(self):
        found = self.install("0.4.7")
        Path(found.path).write_text("def other(): pass")
        sglang_original.find.cache_clear()
        self.assertIsNone(sglang_original.find().problem)
        for op in (*CALLS, "post_reorder"):
            problem = references.describe(op)["triton-original"]["problem"]
            self.assertRegex(problem, r"^SGLang 0\.4\.7 has no \w+")

    def test_post_reorder(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                if kind["generation"] == "C":
                    problem = references.describe("post_reorder")["triton-original"]["problem"]
                    self.assertIn("SGLang 0.5.9: its post_reorder", problem)
                    self.assertIn("drops local expert 0", problem)
                    self.assertEqual(self.objection("post_reorder", post_reorder()), problem)
                    continue
                described = references.describe("post_reorder")["triton-original"]
                twin = "triton-float32" if kind["generation"] == "D" else "triton"
                self.assertEqual(described["arithmetic"], "float32" if twin == "triton-float32" else "input-dtype")
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    self.check("post_reorder", partial(post_reorder, dtype), ["output"], twin)
                    self.check("post_reorder", partial(post_reorder, dtype, gate="dst"), ["output"])
                moved = post_reorder(dst_start=7)
                if kind["generation"] == "B":
                    self.check("post_reorder", partial(post_reorder, dst_start=7), ["output"])
                else:
                    self.assertIn("no dst_start", self.objection("post_reorder", moved))
                self.assertIn("no routed_scaling_factor", self.objection("post_reorder", post_reorder(factor=2.0)))
                scaled = {"gate": "dst", "factor": 2.5}
                if kind.get("factor"):
                    self.check("post_reorder", partial(post_reorder, torch.bfloat16, **scaled), ["output"])
                else:
                    self.assertIn("no routed_scaling_factor", self.objection("post_reorder", post_reorder(**scaled)))
                for added in ("shared_output", "residual"):
                    arguments = post_reorder() | {added: torch.ones(5, 70)}
                    self.assertIn("adds nothing", self.objection("post_reorder", arguments))

    def test_preprocess(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                outputs = ["src2dst", "seg_indptr", "reorder_topk_ids"]
                self.check("preprocess", partial(preprocess, negatives="dropped"), outputs)
                if kind.get("removed"):
                    self.assertIn("apart from expert 0's", self.objection("preprocess", preprocess()))
                else:
                    self.check("preprocess", preprocess, outputs)
                for more in ({"m_max": 32}, {"masked_m": torch.zeros(8, dtype=torch.int32)}):
                    self.assertIn("packs", self.objection("preprocess", preprocess(negatives="dropped", **more)))

    def test_pre_reorder(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                for dtype in (torch.float32, torch.bfloat16):
                    for out_dtype in (dtype, torch.float8_e4m3fn):
                        forms = [{"gate": "dst"}]
                        if not kind.get("removed"):
                            forms += [{}, {"scales": "expert"}] + [{"scales": "token"}] * kind.get("flag", True)
                        for form in forms:
                            self.check("pre_reorder", partial(pre_reorder, dtype, out_dtype, **form), ["gateup_input"])
                if version == "0.4.6":
                    self.assertIn("no scales by token", self.objection("pre_reorder", pre_reorder(scales="token")))
                arguments = pre_reorder(gate="dst") | {"a1_scales": torch.ones(5), "scale_axis": "token"}
                self.assertIn("does not scale", self.objection("pre_reorder", arguments))
                arguments = pre_reorder(gate="dst") | {"dst_start": 3}
                self.assertIn("no dst_start", self.objection("pre_reorder", arguments))
                arguments = pre_reorder(torch.float8_e4m3fn, torch.float8_e4m3fn, gate="dst")
                self.assertIn("no float8", self.objection("pre_reorder", arguments))

    def test_activations(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                quantising = activation(torch.bfloat16, torch.float8_e4m3fn, groups=True)
                self.assertIn("gelu", self.objection("gelu_and_mul", quantising))
                power_of_two = quantising | {"scale_format": "power_of_two"}
                if kind.get("power"):
                    self.assertIsNone(self.objection("silu_and_mul", power_of_two))
                else:
                    self.assertIn("powers of two", self.objection("silu_and_mul", power_of_two))
                if kind.get("removed"):
                    continue
                for out_dtype in (torch.float16, torch.float8_e4m3fn):
                    for ids in (True, False):
                        make = partial(activation, torch.float16, out_dtype, ids=ids)
                        self.check("silu_and_mul", make, ["down_input"])
                        # The stand-in's gelu is another formula: it differs in the last bits.
                        both = [make(), make()]
                        for name, arguments in zip(("triton-original", "triton"), both, strict=True):
                            references.run("gelu_and_mul", name, arguments)
                        apart = [arguments["down_input"].float() for arguments in both]
                        torch.testing.assert_close(*apart, rtol=0.13, atol=2e-3, equal_nan=True)

    def test_activation_with_groups(self):
        for version in VERSIONS:
            with self.subTest(version):
                self.install(version)
                for masked in (True, False):
                    results = []
                    for name in ("triton-original", "triton"):
                        arguments = activation(torch.bfloat16, torch.float8_e4m3fn, groups=True, masked=masked)
                        references.run("silu_and_mul", name, arguments)
                        results.append(arguments)
                    original, own = results
                    # torch's exp is another than numpy's: an activation may be a unit apart.
                    scales = [arguments["output_scales"].nan_to_num(-1) for arguments in results]
                    torch.testing.assert_close(*scales, rtol=1e-2, atol=0)
                    same = (bits(original["down_input"]) == bits(own["down_input"])).double().mean().item()
                    self.assertGreater(same, 0.98)

    def test_ep_scatter(self):
        outputs = ["expert_start_loc", "output_tensor", "output_tensor_scale", "m_indices", "output_index"]
        for version in VERSIONS:
            with self.subTest(version):
                self.install(version)
                self.check("ep_scatter", ep_scatter, outputs)
                for spoiled, reason in (
                    ({"num_recv_tokens_per_expert": torch.full((3,), 100, dtype=torch.int32)}, "padded to 128"),
                    ({"num_recv_tokens_per_expert": torch.tensor([128, 0, 128]).int()}, "out of bounds"),
                    ({"recv_x": torch.ones(4, 200)}, "for each 128 columns"),
                    ({"recv_x_scale": None}, "with scales only"),
                ):
                    self.assertIn(reason, self.objection("ep_scatter", ep_scatter() | spoiled))

    def test_ep_gather(self):
        for version, kind in VERSIONS.items():
            with self.subTest(version):
                self.install(version)
                outputs = {}
                for name in ("triton-original", "triton"):
                    arguments = ep_gather(1024)
                    self.assertIsNone(references.objection("ep_gather", name, arguments))
                    references.run("ep_gather", name, arguments)
                    outputs[name] = arguments["output_tensor"]
                torch.testing.assert_close(outputs["triton-original"], outputs["triton"], rtol=1e-5, atol=1e-5)
                reason = self.objection("ep_gather", ep_gather(256))
                if kind["block"] == 128:
                    self.assertIsNone(reason)
                else:
                    self.assertIn("divisible by 1024", reason)
                self.assertIn("divisible by", self.objection("ep_gather", ep_gather(70)))


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).clone()


def poisoned(*shape, dtype=torch.float32):
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(torch.uint8).fill_(255)
    return tensor


def slots(gate="ids"):
    """Arguments that say where each of 5 * 4 slots goes, experts 2 to 5 being local, and which are local."""
    torch.manual_seed(5)
    ids, src2dst = torch.randint(-1, 8, (5, 4), dtype=torch.int32), torch.randperm(20)
    local = ((ids >= 2) & (ids <= 5)).view(-1)
    if gate == "dst":
        return {"src2dst": torch.where(local, src2dst, -1 - src2dst)}, src2dst[~local]
    return {"src2dst": src2dst, "topk_ids": ids, "start_expert_id": 2, "end_expert_id": 5}, src2dst[~local]


def post_reorder(dtype=torch.float32, gate="ids", dst_start=0, factor=1.0):
    where, remote = slots(gate)
    where["src2dst"] = where["src2dst"] + dst_start
    rows = torch.randn(20, 70).to(dtype)
    rows[remote] = torch.nan
    arguments = {"down_output": rows, "output": poisoned(5, 70, dtype=dtype), "topk_weights": torch.rand(5, 4), **where}
    return arguments | ({"dst_start": dst_start} if dst_start else {}) | {"routed_scaling_factor": factor}


def preprocess(negatives="counted", **more):
    return {
        "topk_ids": slots()[0]["topk_ids"],
        "src2dst": poisoned(20, dtype=torch.int64 if negatives == "dropped" else torch.int32),
        "seg_indptr": poisoned(9, dtype=torch.int64),
        "reorder_topk_ids": poisoned(20, dtype=torch.int32),
        "negatives": negatives,
        **more,
    }


def pre_reorder(dtype=torch.float32, out_dtype=torch.float32, gate="ids", scales=None):
    where, _ = slots(gate)
    arguments = {"input": torch.randn(5, 70).to(dtype), "gateup_input": poisoned(20, 70, dtype=out_dtype), **where}
    return arguments if scales is None else arguments | {"a1_scales": torch.rand(5) + 0.5, "scale_axis": scales}


def activation(dtype=torch.float32, out_dtype=torch.float32, ids=True, groups=False, masked=True):
    torch.manual_seed(6)
    width = 256 if groups else 70
    arguments = {
        "gateup_output": torch.randn(2, 6, 2 * width).to(dtype),
        "down_input": poisoned(2, 6, width, dtype=out_dtype),
    }
    if groups:
        arguments |= {"quantization": "group", "output_scales": poisoned(2, 6, 2)}
        return arguments | ({"masked_m": torch.tensor([2, 5], dtype=torch.int32)} if masked else {})
    if not ids:
        return arguments
    experts = torch.randint(-1, 8, (12,), dtype=torch.int32)
    experts[:2] = 3
    return arguments | {
        "reorder_topk_ids": experts,
        "scales": torch.rand(4) + 0.5,
        "start_expert_id": 2,
        "end_expert_id": 5,
    }


def ep_scatter():
    torch.manual_seed(7)
    return {
        "recv_x": torch.randn(4, 256).to(torch.float8_e4m3fn),
        "recv_x_scale": torch.rand(4, 2),
        "recv_topk": torch.tensor([[0, 2, -1], [1, 0, 2], [-1, 0, 1], [2, 1, 0]]),
        "num_recv_tokens_per_expert": torch.tensor([128, 128, 256], dtype=torch.int32),
        "expert_start_loc": poisoned(3, dtype=torch.int32),
        "output_tensor": poisoned(640, 256, dtype=torch.float8_e4m3fn),
        "output_tensor_scale": poisoned(640, 2),
        "m_indices": poisoned(640, dtype=torch.int32),
        "output_index": poisoned(4, 3, dtype=torch.int32),
    }


def ep_gather(hidden=1024):
    where, _ = slots()
    return {
        "input_tensor": torch.randn(20, hidden),
        "recv_topk_ids": where["topk_ids"],
        "recv_topk_weight": torch.rand(5, 4),
        "input_index": where["src2dst"].view(5, 4).int(),
        "output_tensor": poisoned(5, hidden),
    }


CALLS = {
    "preprocess": preprocess,
    "pre_reorder": pre_reorder,
    "silu_and_mul": activation,
    "gelu_and_mul": activation,
    "ep_scatter": ep_scatter,
    "ep_gather": ep_gather,
}

if __name__ == "__main__":
    unittest.main()
