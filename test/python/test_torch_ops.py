"""epmoe::… as torch.library ops: registration, tracing, compiling; functional variants."""

import unittest

import torch

import epmoe
import epmoe.torch_ops as ops
from epmoe import _library

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
T, K, H, E = 3, 2, 8, 4


def call_of(op, device="cpu", dtype=torch.float32, tokens=T, seed=0):
    """Arguments of an op by name, outputs included."""
    torch.manual_seed(seed)
    slots = tokens * K
    ids = torch.randint(0, E, (tokens, K), dtype=torch.int32)
    floats = lambda *shape: torch.randn(*shape).to(dtype)
    integers = lambda *shape, dtype=torch.int32: torch.zeros(*shape, dtype=dtype)
    activation = {
        "gateup_output": floats(slots, 2 * H),
        "down_input": floats(slots, H),
        "reorder_topk_ids": ids.view(-1),
        "scales": torch.rand(2) + 1,
        "start_expert_id": 1,
        "end_expert_id": 2,
    }
    calls = {
        "post_reorder": {
            "down_output": floats(slots, H),
            "output": floats(tokens, H),
            "src2dst": torch.randperm(slots),
            "topk_ids": ids,
            "topk_weights": torch.rand(tokens, K),
            "end_expert_id": 2,
            "residual": floats(tokens, H),
        },
        "pre_reorder": {
            "input": floats(tokens, H),
            "gateup_input": floats(slots, H),
            "src2dst": torch.randperm(slots),
            "topk_ids": ids,
            "end_expert_id": 2,
        },
        "preprocess": {
            "topk_ids": ids,
            "src2dst": integers(slots),
            "seg_indptr": integers(E + 1, dtype=torch.int64),
            "reorder_topk_ids": integers(slots),
        },
        "silu_and_mul": activation,
        "gelu_and_mul": {name: value for name, value in activation.items() if name != "scales"},
        "moe_sum_reduce": {
            "input": floats(tokens, K, H),
            "output": floats(tokens, H),
            "routed_scaling_factor": 2.5,
        },
        "shuffle_mul_sum": {
            "input": floats(slots, H),
            "output": floats(tokens, H),
            "permutation": torch.randperm(slots).view(tokens, K),
            "factors": torch.rand(tokens, K),
        },
        "ep_scatter": {
            "recv_x": floats(tokens, H),
            "recv_topk": ids,
            "num_recv_tokens_per_expert": torch.full((E,), slots, dtype=torch.int32),
            "expert_start_loc": integers(E),
            "output_tensor": floats(E * slots, H),
            "m_indices": integers(E * slots),
            "output_index": integers(tokens, K),
        },
        "ep_gather": {
            "input_tensor": floats(slots, H),
            "recv_topk_ids": ids,
            "recv_topk_weight": torch.rand(tokens, K),
            "input_index": torch.randperm(slots).view(tokens, K),
            "output_tensor": floats(tokens, H),
        },
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in calls[op].items()}


def all_ops():
    index, names = 0, []
    while info := _library.library().epmoe_op_at(index):
        names.append(info.contents.name.decode())
        index += 1
    return names


def outputs_of(op):
    schema = getattr(torch.ops.epmoe, op).default._schema
    return [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]


def copy(call):
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in call.items()}


def without_outputs(op, call):
    return {name: value for name, value in call.items() if name not in outputs_of(op)}


class Registration(unittest.TestCase):
    def test_every_op_of_the_library_is_there(self):
        for op in all_ops():
            self.assertIn(op, ops.__all__)
            self.assertIs(getattr(ops, op), getattr(torch.ops.epmoe, op))
        self.assertEqual(
            set(ops.FUNCTIONAL),
            {"post_reorder", "silu_and_mul", "gelu_and_mul", "moe_sum_reduce", "shuffle_mul_sum", "ep_gather"},
        )

    def test_schemas_say_what_is_written(self):
        self.assertEqual(outputs_of("post_reorder"), ["output"])
        self.assertEqual(outputs_of("silu_and_mul"), ["down_input", "output_scales"])
        self.assertEqual(len(outputs_of("ep_scatter")), 5)
        for op in ops.FUNCTIONAL:
            self.assertEqual(outputs_of(f"{op}_functional"), [])

    def test_opcheck(self):
        for device in DEVICES:
            for op in all_ops():
                with self.subTest(op, device=device):
                    found = torch.library.opcheck(getattr(ops, op).default, (), call_of(op, device))
                    self.assertEqual(set(found.values()), {"SUCCESS"})
            for op in ops.FUNCTIONAL:
                with self.subTest(op, device=device, functional=True):
                    call = without_outputs(op, call_of(op, device))
                    function = getattr(ops, f"{op}_functional").default
                    self.assertEqual(set(torch.library.opcheck(function, (), call).values()), {"SUCCESS"})

    def test_opcheck_notices_an_undeclared_write(self):
        with torch.library._scoped_library("epmoe_test", "DEF") as lib:
            lib.define("silent(Tensor input, Tensor output, float factor) -> ()")
            run = lambda input, output, factor: ops.moe_sum_reduce(input, output, factor)
            lib.impl("silent", run, "CPU")
            torch.library.register_fake("epmoe_test::silent", lambda input, output, factor: None, lib=lib)
            call = call_of("moe_sum_reduce")
            with self.assertRaisesRegex(Exception, "mutat"):
                torch.library.opcheck(torch.ops.epmoe_test.silent.default, tuple(call.values()))


class Results(unittest.TestCase):
    def test_the_same_as_the_functions(self):
        for device in DEVICES:
            for op in all_ops():
                with self.subTest(op, device=device):
                    call = call_of(op, device)
                    one, other = copy(call), copy(call)
                    getattr(epmoe, op)(**one)
                    self.assertIsNone(getattr(ops, op)(**other))
                    written = [name for name in outputs_of(op) if name in call]
                    for name in written:
                        self.assertTrue(torch.equal(one[name], other[name]), name)
                    self.assertFalse(all(torch.equal(call[name], other[name]) for name in written))

    def test_functional_variants_make_their_output(self):
        for device in DEVICES:
            for op in ops.FUNCTIONAL:
                with self.subTest(op, device=device):
                    call = call_of(op, device)
                    made = outputs_of(op)[0]
                    call[made].zero_()
                    getattr(epmoe, op)(**call)
                    result = getattr(ops, f"{op}_functional")(**without_outputs(op, call))
                    self.assertTrue(torch.equal(result, call[made]))
                    self.assertFalse(torch.equal(result, torch.zeros_like(result)))

    def test_positions_and_defaults(self):
        call = call_of("post_reorder")
        required = [call[name] for name in ("down_output", "output", "src2dst", "topk_weights")]
        ops.post_reorder(*required)
        expected = torch.empty_like(required[1])
        epmoe.post_reorder(required[0], expected, *required[2:])
        self.assertTrue(torch.equal(required[1], expected))
        self.assertTrue(torch.equal(ops.post_reorder_functional(required[0], *required[2:]), expected))

    def test_functional_dtype_and_leading_axes(self):
        rows = torch.randn(2, 5, 2 * H, dtype=torch.bfloat16)
        counts = torch.tensor([5, 2], dtype=torch.int32)
        result = ops.silu_and_mul_functional(rows, masked_m=counts, dtype=torch.float8_e4m3fn)
        self.assertEqual((result.shape, result.dtype), ((2, 5, H), torch.float8_e4m3fn))
        self.assertEqual(result[1, 2:].float().abs().sum(), 0)
        self.assertGreater(result[1, :2].float().abs().sum(), 0)

    def test_errors_name_the_argument(self):
        call = call_of("post_reorder")
        call["topk_weights"] = call["topk_weights"][:, :1].contiguous()
        with self.assertRaises(epmoe.EpmoeError) as caught:
            ops.post_reorder(**call)
        self.assertEqual(caught.exception.code, "ERR_SHAPE")
        flat = torch.randperm(T * K)
        with self.assertRaisesRegex(epmoe.EpmoeError, "how long T is"):
            ops.shuffle_mul_sum_functional(torch.randn(T * K, H), flat)


class Compiled(unittest.TestCase):
    def setUp(self):
        torch._dynamo.reset()
        self.addCleanup(torch._dynamo.reset)

    def check(self, function, *args, backend="aot_eager", **options):
        expected = function(*args)
        compiled = torch.compile(function, fullgraph=True, backend=backend, **options)
        self.assertTrue(torch.equal(compiled(*args), expected))
        self.assertFalse(torch.equal(compiled(-args[0], *args[1:]), expected))
        return compiled

    def test_mutating_in_the_middle_of_a_graph(self):
        def layer(rows, src2dst, weights):
            output = torch.full((T, H), 7.0, device=rows.device)
            ops.post_reorder(rows * 2, output, src2dst, weights)
            return output + 1

        for device in DEVICES:
            call = call_of("post_reorder", device)
            self.check(layer, call["down_output"], call["src2dst"], call["topk_weights"])

    def test_an_input_that_is_written_to(self):
        def layer(rows, output):
            ops.moe_sum_reduce(rows, output)

        rows, output = torch.randn(T, K, H), torch.zeros(T, H)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(rows, output)
        torch.testing.assert_close(output, rows.sum(1))

    def test_functional_with_changing_sizes(self):
        def layer(rows, ids):
            return ops.silu_and_mul_functional(rows + 1, reorder_topk_ids=ids, end_expert_id=2) * 2

        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for count in (3, 5, 17):
            rows, ids = torch.randn(count, 2 * H), torch.arange(count) % E  # some are local, whatever the count
            self.assertTrue(torch.equal(compiled(rows, ids), layer(rows, ids)))
            self.assertFalse(torch.equal(compiled(rows, ids), layer(rows + 1, ids)))

    @unittest.skipUnless(torch.cuda.is_available(), "no CUDA")
    def test_in_a_cuda_graph(self):
        call = call_of("post_reorder", "cuda")
        ops.post_reorder(**call)
        torch.cuda.synchronize()
        expected = call["output"].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.post_reorder_functional(**without_outputs("post_reorder", call))
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        self.assertTrue(torch.equal(result, expected))


if __name__ == "__main__":
    unittest.main()
