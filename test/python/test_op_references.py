"""The references of every op but post_reorder against plain float64, among each other, and against spoiled results."""

import os
import unittest
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch.nn import functional

from epmoe import _triton, references
from epmoe._interpreter import narrow_float8, widen_float8
from epmoe._triton import jit, tl

FLOAT8 = torch.float8_e4m3fn
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, FLOAT8: 6e-2}
OWN = ("torch", "triton", "triton-float32")
RANGE = {"start_expert_id": 2, "end_expert_id": 5}


def poisoned(*shape, dtype=torch.float32):
    tensor = torch.empty(shape, dtype=dtype)
    raw(tensor).fill_(-1 if dtype != FLOAT8 else 255)
    return tensor


def raw(tensor):
    """The bits, as integers."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a, b):
    return torch.equal(raw(a), raw(b))


def untouched(tensor):
    return same_bits(tensor, poisoned(*tensor.shape, dtype=tensor.dtype))


def random_slots(tokens=5, topk=4, experts=8, dtype=torch.int32, seed=0):
    """Ids of which some are -1 and some experts have none, and a row for each slot."""
    torch.manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, topk), dtype=dtype)
    ids[ids == 3] = 4
    return ids, torch.randperm(tokens * topk)


def scales_by_hand(rows, size, power_of_two=False):
    """float32 scales of float64 rows, group by group."""
    groups = [rows[:, first : first + size] for first in range(0, rows.shape[1], size)]
    absmax = torch.stack([group.abs().nan_to_num(0).amax(1) for group in groups], 1)
    scales = absmax.clamp(min=1e-10) / 448
    return torch.exp2(torch.ceil(torch.log2(scales))) if power_of_two else scales


class Case(unittest.TestCase):
    def run_reference(self, op, name, arguments):
        self.assertIsNone(references.describe(op)[name]["problem"])
        self.assertIsNone(references.objection(op, name, arguments))
        references.run(op, name, arguments)

    def assert_close(self, actual, expected, dtype):
        self.assertEqual(actual.shape, expected.shape)
        error = (actual.double() - expected).norm() / expected.norm()
        self.assertLess(error, TOLERANCE[dtype])
        # The comparison can fail: one row is enough.
        spoiled = actual.double().clone()
        spoiled[expected.norm(dim=1).argmax()] = 0
        self.assertGreater((spoiled - expected).norm() / expected.norm(), TOLERANCE[dtype])


@jit
def float8_kernel(x, narrowed, single, half, brain, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    inside = at < count
    tl.store(narrowed + at, tl.load(x + at, mask=inside).to(tl.float8e4nv), mask=inside)
    value = tl.load(narrowed + at, mask=inside)
    tl.store(single + at, value.to(tl.float32), mask=inside)
    tl.store(half + at, value.to(tl.float16), mask=inside)
    tl.store(brain + at, value.to(tl.bfloat16), mask=inside)


class Float8(unittest.TestCase):
    def test_it_widens_every_pattern_exactly(self):
        bits = np.arange(256, dtype=np.uint8)
        expected = torch.from_numpy(bits.copy()).view(FLOAT8).double().numpy()
        np.testing.assert_array_equal(widen_float8(bits), expected)
        self.assertTrue((narrow_float8(expected)[~np.isnan(expected)] == bits[~np.isnan(expected)]).all())

    def test_ties_go_to_even_and_what_float32_cannot_tell_is_no_tie(self):
        for low in range(0x7E):
            tie = (widen_float8(low) + widen_float8(low + 1)) / 2
            even = low + low % 2
            self.assertEqual(narrow_float8(tie), even)
            self.assertEqual(narrow_float8(-tie), even | 0x80)
            self.assertEqual(narrow_float8(np.nextafter(tie, 0)), low)
            self.assertEqual(narrow_float8(np.nextafter(tie, 1e9)), low + 1)

    def test_the_interpreter_converts_every_16_bit_value_and_many_32_bit_ones_as_torch_does(self):
        torch.manual_seed(1)
        normal = torch.randn(8000)
        special = torch.tensor([0.0, -0.0, 448, 449, 464, 465, 1e30, torch.inf, -torch.inf, torch.nan])
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        single = torch.cat([*(normal * scale for scale in (2e-3, 0.02, 1, 100, 500)), special])
        for x in (single, every.view(torch.float16), every.view(torch.bfloat16)):
            narrowed = torch.empty(x.shape, dtype=FLOAT8)
            widened = [torch.empty(x.shape, dtype=dtype) for dtype in ACTIVATIONS]
            size = _triton.triton.next_power_of_2(x.numel())
            float8_kernel[(1,)](x, narrowed, *widened, x.numel(), SIZE=size)
            numbers = ~x.isnan()
            expected = x.float().clamp(-448, 448).to(FLOAT8)
            self.assertTrue(torch.equal(raw(narrowed)[numbers], raw(expected)[numbers]))
            self.assertTrue(narrowed[~numbers].float().isnan().all())
            for wide in widened:
                self.assertTrue(torch.equal(wide[numbers], narrowed[numbers].to(wide.dtype)))
                self.assertTrue(wide[~numbers].isnan().all())


class Preprocess(Case):
    def expected(self, ids, experts, m_max, negatives):
        flat = ids.view(-1).tolist()
        order = sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
        lowest = 0 if negatives == "dropped" else -1
        dropped = flat.count(-1) if negatives == "dropped" else 0
        segments = [0, *(sum(lowest <= id <= e for id in flat) for e in range(experts))]
        sorted_ids = [flat[slot] for slot in order]
        rows = [0] * len(flat)
        seen = [0] * experts
        for position, slot in enumerate(order):
            rows[slot] = position - dropped
        if m_max:
            for slot, id in enumerate(flat):
                rows[slot] = -1
                if id >= 0:
                    rows[slot] = id * m_max + seen[id]
                    seen[id] += 1
        counts = [flat.count(e) for e in range(experts)]
        return rows, segments, sorted_ids[dropped:] + sorted_ids[:dropped], counts

    def test_all_forms(self):
        for dtype, rows_dtype in ((torch.int32, torch.int32), (torch.int64, torch.int64), (torch.int32, torch.int64)):
            for m_max in (0, 20):
                for negatives in ("counted", "dropped"):
                    ids, _ = random_slots(dtype=dtype)
                    expected = self.expected(ids, 8, m_max, negatives)
                    for name in ("torch", "triton"):
                        arguments = {
                            "topk_ids": ids,
                            "src2dst": poisoned(20, dtype=rows_dtype),
                            "seg_indptr": poisoned(9, dtype=torch.int64),
                            "reorder_topk_ids": poisoned(20, dtype=dtype),
                            "masked_m": poisoned(8, dtype=torch.int32),
                            "m_max": m_max,
                            "negatives": negatives,
                        }
                        with self.subTest(name=name, dtype=dtype, m_max=m_max, negatives=negatives):
                            self.run_reference("preprocess", name, arguments)
                            outputs = [
                                arguments[key].tolist()
                                for key in ("src2dst", "seg_indptr", "reorder_topk_ids", "masked_m")
                            ]
                            self.assertEqual(outputs, list(map(list, expected)))
                            outputs[0][0] += 1
                            self.assertNotEqual(outputs, list(map(list, expected)))

    def test_many_slots_few_experts_and_what_is_absent(self):
        for tokens, experts in ((0, 3), (1, 1), (700, 2)):
            ids = torch.randint(-1, experts, (tokens, 2))
            outputs = {}
            for name in ("torch", "triton"):
                arguments = {
                    "topk_ids": ids,
                    "src2dst": poisoned(tokens, 2, dtype=torch.int32),
                    "seg_indptr": poisoned(experts + 1, dtype=torch.int64),
                }
                self.run_reference("preprocess", name, arguments)
                outputs[name] = arguments
            for key in ("src2dst", "seg_indptr"):
                self.assertTrue(torch.equal(outputs["torch"][key], outputs["triton"][key]))

    def test_what_is_out_of_range_counts_as_none_and_what_has_no_room_gets_none(self):
        for name in ("torch", "triton"):
            arguments = {
                "topk_ids": torch.tensor([[1, 7, -5], [1, 1, 0]]),
                "src2dst": poisoned(6, dtype=torch.int64),
                "seg_indptr": poisoned(3, dtype=torch.int64),
                "reorder_topk_ids": poisoned(6, dtype=torch.int64),
                "masked_m": poisoned(2, dtype=torch.int32),
                "m_max": 2,
                "negatives": "dropped",
            }
            self.run_reference("preprocess", name, arguments)
            self.assertEqual(arguments["src2dst"].tolist(), [2, -1, -1, 3, -1, 0])
            self.assertEqual(arguments["seg_indptr"].tolist(), [0, 1, 4])
            self.assertEqual(arguments["reorder_topk_ids"].tolist(), [0, 1, 1, 1, -1, -1])
            self.assertEqual(arguments["masked_m"].tolist(), [1, 2])


class PreReorder(Case):
    def problem(self, dtype, out_dtype, *, gate="ids", scales=None, hidden=150, dst_start=0, **options):
        ids, src2dst = random_slots()
        local = ((ids >= 2) & (ids <= 5)).view(-1)
        x = (torch.randn(5, hidden) * 4).to(dtype)
        arguments = {
            "input": x,
            "gateup_input": poisoned(20, hidden, dtype=out_dtype),
            "src2dst": src2dst + dst_start,
            **options,
        }
        if dst_start:
            arguments["dst_start"] = dst_start
        if gate == "ids":
            arguments |= {"topk_ids": ids, **RANGE}
        else:
            arguments["src2dst"] = torch.where(local, src2dst, -1 - src2dst)
        divisors = torch.ones(20, dtype=torch.float64)
        if scales is not None:
            arguments |= {"a1_scales": torch.rand(5) + 0.5, "scale_axis": scales}
            index = ids.view(-1) - 2 if scales == "expert" else torch.arange(20) // 4
            divisors[local] = arguments["a1_scales"][index[local].long()].double()
        slots = local.nonzero().squeeze(1)
        rows = x.double()[slots // 4]
        return arguments, src2dst[slots], rows, divisors[slots, None]

    def test_static(self):
        kinds = [{}, {"gate": "dst"}, {"scales": "expert"}, {"scales": "token"}, {"scales": "token", "gate": "dst"}]
        for name in OWN:
            for dtype in ACTIVATIONS:
                for out_dtype in (dtype, FLOAT8):
                    for kind in (*kinds, {"dst_start": 7}, {"hidden": 513}):
                        arguments, where, rows, divisors = self.problem(dtype, out_dtype, **kind)
                        with self.subTest(name=name, dtype=dtype, out_dtype=out_dtype, **kind):
                            self.run_reference("pre_reorder", name, arguments)
                            out = arguments["gateup_input"]
                            self.assert_close(out[where], rows / divisors, out_dtype)
                            others = torch.ones(20, dtype=torch.bool)
                            others[where] = False
                            self.assertTrue(untouched(out[others]))

    def test_scales_found(self):
        for name in OWN:
            for dtype in ACTIVATIONS:
                for quantization, hidden in (("token", 600), ("token", 33), ("group", 300), ("group", 128)):
                    for scale_format in ("float32", "power_of_two"):
                        size = hidden if quantization == "token" else 128
                        scales = poisoned(20, -(-hidden // size))
                        options = {"quantization": quantization, "scale_format": scale_format, "output_scales": scales}
                        arguments, where, rows, _ = self.problem(dtype, FLOAT8, hidden=hidden, **options)
                        arguments["input"][1] = 0
                        rows = arguments["input"].double()[self.tokens(arguments, where)]
                        with self.subTest(name=name, dtype=dtype, **options):
                            self.run_reference("pre_reorder", name, arguments)
                            expected = scales_by_hand(rows, size, scale_format == "power_of_two")
                            torch.testing.assert_close(scales[where].double(), expected, rtol=1e-6, atol=0)
                            wide = scales[where].double().repeat_interleave(size, 1)[:, :hidden]
                            self.assert_close(arguments["gateup_input"][where].double() * wide, rows, FLOAT8)
                            others = torch.ones(20, dtype=torch.bool)
                            others[where] = False
                            self.assertTrue(untouched(arguments["gateup_input"][others]) and untouched(scales[others]))

    def tokens(self, arguments, where):
        token_of = torch.empty(20, dtype=torch.int64)
        token_of[arguments["src2dst"]] = torch.arange(20) // 4
        return token_of[where]

    def test_float8_rows_are_copied_bit_by_bit_with_their_scales(self):
        for name in OWN:
            scales, found = torch.rand(5, 3), poisoned(20, 3)
            arguments, where, _, _ = self.problem(torch.float32, FLOAT8, input_scales=scales, output_scales=found)
            arguments["input"] = torch.randint(0, 256, (5, 150), dtype=torch.uint8).view(FLOAT8)
            self.run_reference("pre_reorder", name, arguments)
            tokens = self.tokens(arguments, where)
            self.assertTrue(same_bits(arguments["gateup_input"][where], raw(arguments["input"])[tokens].view(FLOAT8)))
            self.assertTrue(torch.equal(found[where], scales[tokens]))
            self.assertFalse(torch.equal(found[where], scales[tokens.flip(0)]))

    def test_saturation_and_nan(self):
        x = torch.tensor([[1000.0, -1000.0, torch.nan, 1.0]])
        for name in OWN:
            arguments = {
                "input": x,
                "gateup_input": poisoned(1, 4, dtype=FLOAT8),
                "src2dst": torch.zeros(1, dtype=torch.int32),
            }
            self.run_reference("pre_reorder", name, arguments)
            self.assertEqual(arguments["gateup_input"].float().nan_to_num(7).tolist(), [[448, -448, 7, 1]])
            found = poisoned(1, 1)
            arguments |= {"output_scales": found, "quantization": "token"}
            self.run_reference("pre_reorder", name, arguments)
            torch.testing.assert_close(found.item(), 1000 / 448, rtol=1e-6, atol=0)
            # The original's clamp makes its lower bound of NaN.
            nan = -448 if name == "triton" else 7
            self.assertEqual(arguments["gateup_input"].float().nan_to_num(7)[0, :3].tolist(), [448, -448, nan])

    def test_triton_in_float32_equals_torch_bit_for_bit(self):
        for kind in ({"scales": "expert"}, {"scales": "token"}):
            for out_dtype in (torch.float32, FLOAT8):
                outputs = {}
                for name in OWN:
                    arguments, *_ = self.problem(torch.float32, out_dtype, **kind)
                    self.run_reference("pre_reorder", name, arguments)
                    outputs[name] = arguments["gateup_input"]
                self.assertTrue(same_bits(outputs["torch"], outputs["triton-float32"]))
                if out_dtype == torch.float32:
                    self.assertFalse(same_bits(outputs["torch"], outputs["triton"]))


class Activation(Case):
    def problem(self, dtype, out_dtype, *, op, width=150, ids=True, scaled=False, masked=False, **options):
        torch.manual_seed(2)
        x = (torch.randn(12, 2 * width) * 2).to(dtype)
        arguments = {"gateup_output": x, "down_input": poisoned(12, width, dtype=out_dtype), **options}
        active = torch.ones(12, dtype=torch.bool)
        divisors = torch.ones(12, dtype=torch.float64)
        if ids:
            experts = torch.randint(-1, 8, (12,), dtype=torch.int32).sort().values
            arguments |= {"reorder_topk_ids": experts, **RANGE}
            active &= (experts >= 2) & (experts <= 5)
        if scaled:
            arguments["scales"] = torch.rand(4) + 0.5
            divisors[active] = arguments["scales"][(experts[active] - 2).long()].double()
        if masked:
            arguments["masked_m"] = torch.tensor([4, 0, 2], dtype=torch.int32)
            active &= torch.tensor([True] * 4 + [False] * 4 + [True] * 2 + [False] * 2)
        x[~active] = torch.nan
        gate, up = x.double()[active].chunk(2, 1)
        values = functional.silu(gate) if op == "silu_and_mul" else functional.gelu(gate, approximate="tanh")
        return arguments, active, values * up / divisors[active, None]

    def test_static(self):
        kinds = ({}, {"ids": False}, {"scaled": True}, {"masked": True}, {"masked": True, "ids": False}, {"width": 513})
        for op in ("silu_and_mul", "gelu_and_mul"):
            for name in OWN:
                for dtype in ACTIVATIONS:
                    for out_dtype in (dtype, FLOAT8):
                        for kind in kinds:
                            arguments, active, expected = self.problem(dtype, out_dtype, op=op, **kind)
                            with self.subTest(op=op, name=name, dtype=dtype, out_dtype=out_dtype, **kind):
                                self.run_reference(op, name, arguments)
                                self.assert_close(arguments["down_input"][active], expected, out_dtype)
                                self.assertTrue(untouched(arguments["down_input"][~active]))

    def test_groups(self):
        for op in ("silu_and_mul", "gelu_and_mul"):
            for name in OWN:
                for dtype in ACTIVATIONS:
                    for width, kind in ((150, {}), (256, {"ids": False, "masked": True}), (64, {"masked": True})):
                        for scale_format in ("float32", "power_of_two"):
                            scales = poisoned(12, -(-width // 128))
                            options = {"quantization": "group", "scale_format": scale_format, "output_scales": scales}
                            arguments, active, expected = self.problem(
                                dtype, FLOAT8, op=op, width=width, **kind, **options
                            )
                            with self.subTest(op=op, name=name, dtype=dtype, width=width, **options):
                                self.run_reference(op, name, arguments)
                                by_hand = scales_by_hand(expected, 128)
                                if scale_format == "power_of_two":
                                    self.assertTrue((torch.log2(scales[active]) % 1 == 0).all())
                                    self.assertTrue((scales[active] > by_hand * 0.98).all())
                                    self.assertTrue((scales[active] < by_hand * 2.04).all())
                                else:
                                    rtol = 4 * TOLERANCE[dtype]
                                    torch.testing.assert_close(scales[active].double(), by_hand, rtol=rtol, atol=0)
                                wide = scales[active].double().repeat_interleave(128, 1)[:, :width]
                                actual = arguments["down_input"][active].double() * wide
                                self.assert_close(actual, expected, FLOAT8)
                                self.assertTrue(
                                    untouched(arguments["down_input"][~active]) and untouched(scales[~active])
                                )

    def test_float32_rounds_once_and_the_original_does_not(self):
        for op in ("silu_and_mul", "gelu_and_mul"):
            for dtype in (torch.float16, torch.bfloat16):
                wrong = {}
                for name in ("triton", "triton-float32"):
                    arguments, active, expected = self.problem(dtype, dtype, op=op, scaled=True)
                    self.run_reference(op, name, arguments)
                    wrong[name] = (arguments["down_input"][active] != expected.to(dtype)).double().mean().item()
                self.assertLess(wrong["triton-float32"], 1e-2)
                self.assertGreater(wrong["triton"], 1e-1)

    def test_interpreted_triton_equals_the_original_arithmetic_in_torch(self):
        for dtype in (torch.float16, torch.bfloat16):
            arguments, active, _ = self.problem(dtype, dtype, op="silu_and_mul", scaled=True)
            self.run_reference("silu_and_mul", "triton", arguments)
            gate, up = arguments["gateup_output"][active].chunk(2, 1)
            wide = gate.float()
            factors = (1 / arguments["scales"]).to(dtype)[(arguments["reorder_topk_ids"][active] - 2).long(), None]
            expected = (wide * (1 / (1 + (-wide).exp()))).to(dtype) * up * factors
            self.assertLess((arguments["down_input"][active] != expected).double().mean().item(), 1e-3)


class Sums(Case):
    def setUp(self):
        torch.manual_seed(4)

    def test_moe_sum_reduce(self):
        for name in ("torch", "triton"):
            for dtype in ACTIVATIONS:
                for factor in ({}, {"routed_scaling_factor": 2.5}):
                    x = torch.randn(5, 3, 70).to(dtype)
                    arguments = {"input": x, "output": poisoned(5, 70, dtype=dtype), **factor}
                    with self.subTest(name=name, dtype=dtype, **factor):
                        self.run_reference("moe_sum_reduce", name, arguments)
                        expected = x.double().sum(1) * factor.get("routed_scaling_factor", 1)
                        self.assert_close(arguments["output"], expected, dtype)

    def test_shuffle_mul_sum(self):
        for name in ("torch", "triton"):
            for dtype in ACTIVATIONS:
                for weights in (None, torch.float32, dtype):
                    for flat in (False, True):
                        rows = torch.randn(9, 70).to(dtype)
                        permutation = torch.randint(-2, 9, (5, 3), dtype=torch.int32)
                        rows[~torch.isin(torch.arange(9), permutation)] = torch.nan
                        factors = torch.rand(5, 3).to(weights or torch.float32)
                        expected = torch.zeros(5, 70, dtype=torch.float64)
                        for slot, row in enumerate(permutation.view(-1).tolist()):
                            weight = 1 if weights is None else factors.view(-1)[slot].double()
                            expected[slot // 3] += rows[row].double() * weight if row >= 0 else 0
                        shape = (15,) if flat else (5, 3)
                        arguments = {
                            "input": rows,
                            "output": poisoned(5, 70, dtype=dtype),
                            "permutation": permutation.view(shape),
                        }
                        if weights is not None:
                            arguments["factors"] = factors.view(shape)
                        with self.subTest(name=name, dtype=dtype, weights=weights, flat=flat):
                            self.run_reference("shuffle_mul_sum", name, arguments)
                            self.assert_close(arguments["output"], expected, dtype)

    def test_ep_gather(self):
        for name in ("torch", "triton"):
            for dtype in ACTIVATIONS:
                for weights in (torch.float32, dtype):
                    ids, index = random_slots()
                    present = (ids >= 0).view(-1)
                    rows = torch.randn(20, 70).to(dtype)
                    rows[index[~present]] = torch.nan
                    factors = torch.rand(5, 4).to(weights)
                    arguments = {
                        "input_tensor": rows,
                        "recv_topk_ids": ids,
                        "recv_topk_weight": factors,
                        "input_index": torch.where(present, index, -1).view(5, 4).int(),
                        "output_tensor": poisoned(5, 70, dtype=dtype),
                    }
                    products = rows[index].double() * factors.view(-1, 1).double()
                    expected = products.masked_fill(~present[:, None], 0).view(5, 4, 70).sum(1)
                    with self.subTest(name=name, dtype=dtype, weights=weights):
                        self.run_reference("ep_gather", name, arguments)
                        self.assert_close(arguments["output_tensor"], expected, dtype)

    def test_post_reorder_with_addends(self):
        for name in OWN:
            for dtype in ACTIVATIONS:
                for shared, residual in ((True, False), (False, True), (True, True)):
                    x, shared_output, residual_rows = (torch.randn(4, 70).to(dtype) for _ in range(3))
                    arguments = {
                        "down_output": x,
                        "output": poisoned(4, 70, dtype=dtype),
                        "src2dst": torch.tensor([3, -1, 1, 0]),
                        "topk_weights": torch.full((4, 1), 0.5),
                        "routed_scaling_factor": 3.0,
                    }
                    expected = x.double()[[3, 2, 1, 0]] * torch.tensor([[1.5], [0], [1.5], [1.5]]).double()
                    if shared:
                        arguments["shared_output"] = shared_output
                        expected += shared_output.double()
                    if residual:
                        arguments["residual"] = residual_rows
                        expected += residual_rows.double()
                    with self.subTest(name=name, dtype=dtype, shared=shared, residual=residual):
                        self.run_reference("post_reorder", name, arguments)
                        self.assert_close(arguments["output"], expected, dtype)

    def test_nothing_to_do(self):
        slots = torch.empty(0, 2, dtype=torch.int32)
        rows, weights = torch.empty(0, 8), torch.empty(0, 2)
        calls = {
            "moe_sum_reduce": {"input": torch.empty(0, 2, 8), "output": rows},
            "shuffle_mul_sum": {"input": rows, "output": rows, "permutation": slots, "factors": weights},
            "ep_gather": {
                "input_tensor": rows,
                "recv_topk_ids": slots,
                "recv_topk_weight": weights,
                "input_index": slots,
                "output_tensor": rows,
            },
            "pre_reorder": {"input": rows, "gateup_input": rows, "src2dst": slots},
            "silu_and_mul": {"gateup_output": torch.empty(0, 16), "down_input": rows},
        }
        for op, arguments in calls.items():
            for name in ("torch", "triton"):
                self.run_reference(op, name, arguments)


class EpScatter(Case):
    def problem(self, dtype, reserved=(6, 0, 3, 4, 9), rows=30, scaled=True, hidden=70):
        torch.manual_seed(3)
        ids = torch.tensor([[0, 2, -1], [4, 3, 2], [-1, 0, 4], [4, 4, 2]], dtype=torch.int64)
        x = torch.randint(0, 256, (4, hidden * dtype.itemsize), dtype=torch.uint8).view(dtype)
        arguments = {
            "recv_x": x,
            "recv_topk": ids,
            "num_recv_tokens_per_expert": torch.tensor(reserved, dtype=torch.int32),
            "expert_start_loc": poisoned(5, dtype=torch.int32),
            "output_tensor": poisoned(rows, hidden, dtype=dtype),
            "m_indices": poisoned(rows, dtype=torch.int32),
            "output_index": poisoned(4, 3, dtype=torch.int32),
        }
        if scaled:
            arguments |= {"recv_x_scale": torch.rand(4, 2), "output_tensor_scale": poisoned(rows, 2)}
        return arguments

    def expected(self, arguments):
        reserved, rows = arguments["num_recv_tokens_per_expert"].tolist(), arguments["m_indices"].numel()
        starts = [sum(reserved[:expert]) for expert in range(5)]
        owners = [expert for expert in range(5) for _ in range(reserved[expert])][:rows]
        index, seen, sources = [], [0] * 5, {}
        for slot, expert in enumerate(arguments["recv_topk"].view(-1).tolist()):
            row = -1
            if expert >= 0:
                if seen[expert] < reserved[expert] and starts[expert] + seen[expert] < rows:
                    row = starts[expert] + seen[expert]
                    sources[row] = slot // 3
                seen[expert] += 1
            index.append(row)
        return starts, owners + [-1] * (rows - len(owners)), index, sources

    def test_rows_are_in_order_of_their_slots(self):
        for name in ("torch", "triton"):
            for dtype in (*ACTIVATIONS, FLOAT8):
                for kind in ({}, {"scaled": False}, {"rows": 20}, {"reserved": (1, 0, 2, 1, 2)}):
                    arguments = self.problem(dtype, **kind)
                    starts, owners, index, sources = self.expected(arguments)
                    with self.subTest(name=name, dtype=dtype, **kind):
                        self.run_reference("ep_scatter", name, arguments)
                        self.assertEqual(arguments["expert_start_loc"].tolist(), starts)
                        self.assertEqual(arguments["m_indices"].tolist(), owners)
                        self.assertEqual(arguments["output_index"].view(-1).tolist(), index)
                        for key, moved in (("recv_x", "output_tensor"), ("recv_x_scale", "output_tensor_scale")):
                            if key not in arguments:
                                continue
                            bits, out = raw(arguments[key]), raw(arguments[moved])
                            for row in range(out.shape[0]):
                                if row in sources:
                                    self.assertTrue(torch.equal(out[row], bits[sources[row]]))
                                    self.assertFalse(torch.equal(out[row], bits[sources[row] - 1]))
                                else:
                                    self.assertTrue(untouched(arguments[moved][row : row + 1]))


class Described(unittest.TestCase):
    def test_what_a_verdict_needs(self):
        own = {
            "preprocess": {"torch": "input-dtype", "triton": "input-dtype"},
            "pre_reorder": {"torch": "float32", "triton": "input-dtype", "triton-float32": "float32"},
            "silu_and_mul": {"torch": "input-dtype", "triton": "input-dtype", "triton-float32": "float32"},
            "gelu_and_mul": {"torch": "input-dtype", "triton": "input-dtype", "triton-float32": "float32"},
            "moe_sum_reduce": {"torch": "input-dtype", "triton": "float32"},
            "shuffle_mul_sum": {"torch": "input-dtype", "triton": "float32"},
            "ep_scatter": {"torch": "input-dtype", "triton": "input-dtype"},
            "ep_gather": {"torch": "input-dtype", "triton": "float32"},
        }
        without_original = {"moe_sum_reduce", "shuffle_mul_sum"}
        for op, arithmetic in own.items():
            described = references.describe(op)
            names = [*arithmetic, *([] if op in without_original else ["triton-original"])]
            self.assertEqual(list(described), names)
            for name, expected in arithmetic.items():
                self.assertIsNone(described[name]["problem"])
                self.assertEqual(described[name]["arithmetic"], expected)
                self.assertEqual(described[name]["compiled"], name == "torch")

    def test_dtypes_are_objected_to_where_they_cannot_be_trusted(self):
        rows = {dtype: torch.zeros(1, 4, dtype=dtype) for dtype in (*ACTIVATIONS, FLOAT8)}
        for dtype, problem in ((FLOAT8, "float8_problem"), (torch.bfloat16, "bfloat16_problem")):
            with mock.patch.object(_triton, problem, lambda: "not here"):
                for op, source, target in (
                    ("pre_reorder", "input", "gateup_input"),
                    ("silu_and_mul", "gateup_output", "down_input"),
                ):
                    for name in OWN:
                        expected = None if name == "torch" else "not here"
                        arguments = {source: rows[torch.float32], target: rows[dtype]}
                        self.assertEqual(references.objection(op, name, arguments), expected)
                        arguments = {source: rows[torch.float32], target: rows[torch.float16]}
                        self.assertIsNone(references.objection(op, name, arguments))
        with mock.patch.object(_triton, "float8_problem", lambda: "not here"):
            copied = {"input": rows[FLOAT8], "gateup_input": rows[FLOAT8]}
            self.assertIsNone(references.objection("pre_reorder", "triton", copied))


if __name__ == "__main__":
    unittest.main()
