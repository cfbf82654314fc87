"""epmoe from plain Python: calls, refusals, both ways of reading tensors, upstream's signature."""

import ctypes
import inspect
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import epmoe
from epmoe import _call, _dlpack, _library

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


def set_exchange(case, wanted):
    """Has tensors read through torch's exchange table or from their attributes, until the test ends."""
    patch = mock.patch.dict(os.environ, {"EPMOE_EXCHANGE": "1" if wanted else "0"})
    patch.start()
    case.addCleanup(_call._has_exchange.cache_clear)
    case.addCleanup(patch.stop)
    _call._has_exchange.cache_clear()


def expected(call):
    rows = call["down_output"].double()[call["src2dst"].long()].view(3, 2, 8)
    return (rows * call["topk_weights"].double()[..., None]).sum(1)


class Calls(unittest.TestCase):
    exchange = True

    def setUp(self):
        set_exchange(self, self.exchange)

    def test_every_dtype_and_device(self):
        for device in DEVICES:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for numerics in ("fp32", "triton"):
                    with self.subTest(device=device, dtype=dtype, numerics=numerics):
                        call = valid(device, dtype)
                        self.assertIs(epmoe.post_reorder(**call, numerics=numerics), call["output"])
                        torch.testing.assert_close(call["output"].double(), expected(call), rtol=1e-2, atol=1e-2)
                        self.assertFalse(torch.allclose(call["output"].double(), expected(call) * 1.1))

    def test_tensors_are_read_the_way_that_is_asked_for(self):
        with mock.patch.object(_dlpack, "Description", side_effect=_dlpack.Description) as description:
            call = valid(DEVICES[-1])
            epmoe.post_reorder(**call)
        self.assertEqual(description.call_count, 0 if self.exchange else 5)
        self.assertEqual(_call._has_exchange(), self.exchange)

    def test_offsets_and_empty_tensors(self):
        call = valid()
        memory = torch.zeros(100)
        call["output"] = memory[40:64].view(3, 8)
        epmoe.post_reorder(**call)
        self.assertTrue(torch.equal(call["output"].double(), expected(call)))
        self.assertEqual(memory[:40].abs().sum() + memory[64:].abs().sum(), 0)
        nothing = {"output": torch.empty(0, 8), "src2dst": torch.empty(0, dtype=torch.int32)}
        nothing |= {"topk_weights": torch.empty(0, 2), "topk_ids": torch.empty(0, 2, dtype=torch.int32)}
        self.assertEqual(epmoe.post_reorder(**valid() | nothing).numel(), 0)

    def test_optional_arguments(self):
        call = valid()
        del call["topk_ids"], call["start_expert_id"], call["end_expert_id"]
        epmoe.post_reorder(**call)
        self.assertTrue(torch.equal(call["output"].double(), expected(call)))
        call["src2dst"][0] = -3
        epmoe.post_reorder(**call, routed_scaling_factor=2)
        weights = call["topk_weights"].clone()
        weights[0, 0] = 0
        self.assertTrue(torch.equal(call["output"].double(), 2 * expected(call | {"topk_weights": weights})))

    def test_numbers_of_numpy(self):
        call = valid() | {"start_expert_id": np.int32(0), "end_expert_id": np.int64(0)}
        epmoe.post_reorder(**call, routed_scaling_factor=np.float32(4))
        weights = call["topk_weights"] * torch.tensor([4.0, 0.0])
        self.assertTrue(torch.equal(call["output"].double(), expected(call | {"topk_weights": weights})))

    @unittest.skipUnless(len(DEVICES) > 1, "needs a GPU")
    def test_streams(self):
        side = torch.cuda.Stream()
        epmoe.post_reorder(**valid("cuda")).isnan().all().item()  # loading a kernel may wait for the whole device
        for how in ("current", "given", "handle"):
            call = valid("cuda")
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.cuda._sleep(200_000_000)
                call["topk_weights"].mul_(2)
                if how == "current":
                    epmoe.post_reorder(**call)
            if how != "current":
                epmoe.post_reorder(**call, stream=side if how == "given" else side.cuda_stream)
            self.assertTrue(call["output"].isnan().all(), "the kernel ran ahead of its stream")
            with torch.cuda.stream(side):
                epmoe.synchronize()
            self.assertTrue(torch.equal(call["output"].double(), expected(call)))

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


class CallsWithoutTheExchangeTable(Calls):
    exchange = False


class Refusals(unittest.TestCase):
    exchange = True

    def setUp(self):
        set_exchange(self, self.exchange)

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
        for other in ([5, 0, 4, 1, 3, 2], np.zeros(6, np.int32), 3, "src2dst", object()):
            self.refuse("ERR_NOT_A_TENSOR", "src2dst", src2dst=other)
        self.refuse("ERR_MISSING_ARGUMENT", "src2dst", src2dst=None)
        self.refuse("ERR_DTYPE", "src2dst", src2dst=torch.zeros(6))
        self.refuse("ERR_SHAPE", "output", output=torch.zeros(3, 9))
        self.refuse("ERR_RANK", "topk_weights", topk_weights=torch.zeros(6))
        self.refuse("ERR_NOT_CONTIGUOUS", "down_output", down_output=torch.zeros(8, 6).t())

    def test_dtypes_whatever_they_are(self):
        for name in ("int16", "uint16", "bool", "float64", "complex64", "complex32", "float8_e4m3fn", "float8_e5m2"):
            tensor = torch.zeros(6, 8).to(getattr(torch, name))
            error = self.refuse("ERR_DTYPE", "down_output", down_output=tensor)
            self.assertEqual(error.expected, "float32, float16 or bfloat16")

    def test_tensors_that_are_no_plain_memory(self):
        ones, pair = torch.ones(6, 8), [torch.ones(3, 8), torch.ones(3, 8)]
        unsupported = {
            "requires grad": torch.zeros(6, 8, requires_grad=True),
            "torch.sparse_coo": ones.to_sparse(),
            "torch.sparse_csr": ones.to_sparse_csr(),
            "torch._mkldnn": ones.to_mkldnn(),
            "meta": torch.zeros(6, 8, device="meta"),
            "negative": torch._neg_view(ones),
            "conjugate": torch.complex(ones, ones).conj(),
            "quantised": torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor(pair, layout=torch.strided),
        }
        for what, tensor in unsupported.items():
            with self.subTest(what):
                error = self.refuse("ERR_UNSUPPORTED_TENSOR", "down_output", down_output=tensor)
                self.assertIn(what, error.received)
                self.assertRegex(error.hint, r"^(Call \w+\(\)|Make it)")
                # The same in another place, and nothing of it left behind.
                self.refuse("ERR_UNSUPPORTED_TENSOR", "topk_weights", topk_weights=tensor)
                epmoe.post_reorder(**valid())

    def test_tensors_that_function_transforms_wrap(self):
        def call(rows):
            return epmoe.post_reorder(**valid() | {"down_output": rows})

        with self.assertRaises(epmoe.EpmoeError) as caught:
            torch.func.vmap(call)(torch.ones(2, 6, 8))
        self.assertEqual(caught.exception.code, "ERR_UNSUPPORTED_TENSOR")
        self.assertNotIn("\n", str(caught.exception))

    def test_overlap(self):
        memory = torch.zeros(72)
        changes = {"down_output": memory[:48].view(6, 8), "output": memory[40:64].view(3, 8)}
        self.refuse("ERR_OVERLAP", "output", **changes)

    def test_scalars(self):
        self.refuse("ERR_VALUE", "end_expert_id", start_expert_id=3)
        for other in (1.0, 1.5, True, "1", torch.tensor(1), 2**63, 2**60, -(2**70)):
            self.refuse("ERR_VALUE", "end_expert_id", end_expert_id=other)
        for other in (float("nan"), float("inf"), 1e39, 10**400, False, "2", torch.tensor(2.0), 1j):
            self.refuse("ERR_VALUE", "routed_scaling_factor", routed_scaling_factor=other)
        for other in ("fp64", 0, True, ["fp32"]):
            error = self.refuse("ERR_VALUE", "numerics", numerics=other)
            self.assertEqual(error.expected, "'fp32' or 'triton'")
        for other in ("mine", True, 1.5):
            self.refuse("ERR_VALUE", "stream", stream=other)

    def test_an_index_out_of_range(self):
        for device in DEVICES:
            call = valid(device) | {"src2dst": torch.tensor([5, 0, 6, 1, 3, 2], device=device)}
            with self.assertRaises(epmoe.EpmoeError) as caught:
                epmoe.post_reorder(**call)
                epmoe.synchronize()
            self.assertEqual(caught.exception.code, "ERR_INDEX_OUT_OF_RANGE")
            self.assertIn("6 at token 1, slot 0", caught.exception.received)
            call["src2dst"][2] = 4  # it was told once, and only that slot was skipped
            epmoe.synchronize()
            epmoe.check()

    def test_devices_to_wait_for(self):
        epmoe.synchronize("cpu")
        epmoe.check(torch.device("cpu"))
        for other in ("no such", "mps", 1.5, True, -1):
            for function in (epmoe.synchronize, epmoe.check):
                with self.assertRaises(epmoe.EpmoeError) as caught:
                    function(other)
                self.assertEqual((caught.exception.code, caught.exception.argument), ("ERR_VALUE", "device"))
        if len(DEVICES) == 1:
            epmoe.synchronize()
            for device in (0, "cuda", "cuda:0"):
                with self.assertRaises(epmoe.EpmoeError) as caught:
                    epmoe.check(device)
                self.assertEqual(caught.exception.code, "ERR_NO_CUDA")
        else:
            for device in (None, 0, "cuda", torch.device("cuda:0")):
                epmoe.synchronize(device)


class RefusalsWithoutTheExchangeTable(Refusals):
    exchange = False


class Package(unittest.TestCase):
    def test_importing_epmoe_imports_neither_torch_nor_triton(self):
        code = "import sys, epmoe; assert not {'torch', 'triton'} & set(sys.modules); print(epmoe.__version__)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual(result.stdout.strip(), epmoe.__version__, result.stderr)

    def test_a_library_that_cannot_be_used_is_told(self):
        module = sys.modules["_ctypes"].__file__
        cases = [
            ({"EPMOE_LIBRARY": "/no/such/libepmoe.so"}, "/no/such/libepmoe.so.*no such file.*npm run setup"),
            ({"EPMOE_LIBRARY": __file__}, "test_front_end.py.*does not load.*npm run setup"),
            ({"EPMOE_LIBRARY": module}, "_ctypes.*does not load.*epmoe_abi_version"),
        ]
        for environment, told in cases:
            with self.subTest(told), mock.patch.dict(os.environ, environment):
                self.refused_library(told)
        version = _library.ABI_VERSION
        with mock.patch.object(_library, "ABI_VERSION", 99):
            self.refused_library(f"ABI 99.*ABI {version}")
        nowhere = str(Path(os.sep, "nowhere", "python", "epmoe", "_library.py"))
        with mock.patch.dict(os.environ), mock.patch.object(_library, "__file__", nowhere):
            os.environ.pop("EPMOE_LIBRARY", None)
            self.refused_library("/nowhere/build/Release/libepmoe.*or /nowhere/python/epmoe/libepmoe.*npm run setup")
        epmoe.post_reorder(**valid())

    def refused_library(self, told):
        with self.assertRaises(epmoe.EpmoeError) as caught:
            _library.library.__wrapped__()
        self.assertEqual(caught.exception.code, "ERR_NATIVE")
        self.assertRegex(str(caught.exception), told)

    def test_an_internal_error_asks_to_be_reported(self):
        self.assertIn("please report it", str(epmoe.EpmoeError("ERR_INTERNAL", received="a contradiction")))
        self.assertNotIn("report", str(epmoe.EpmoeError("ERR_SHAPE", received="[1]")))

    def test_declared_as_in_the_header(self):
        header = (Path(__file__).resolve().parents[2] / "csrc" / "include" / "epmoe.h").read_text()
        header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
        self.assertIn(f"#define EPMOE_ABI_VERSION {_library.ABI_VERSION}\n", header)
        kinds = {"int32_t": "i", "uint32_t": "I", "double": "d", "const char *": "z"}
        for name, structure in (
            ("epmoe_error", _library.Error),
            ("epmoe_param", _library.Param),
            ("epmoe_op_info", _library.OpInfo),
        ):
            body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", header, re.DOTALL).group(1)
            fields = [
                (field, kinds.get(kind.strip().replace("epmoe_status", "int32_t"), "pointer"))
                for kind, field in re.findall(r"^\s*([\w ]+?[ *const]*?\*?)\s*(\w+);", body, re.MULTILINE)
            ]
            declared = [(field, getattr(kind, "_type_", None)) for field, kind in structure._fields_]
            declared = [(field, kind if isinstance(kind, str) else "pointer") for field, kind in declared]
            self.assertEqual(fields, declared)
        for prefix in ("KIND", "VALUE", "STREAM"):
            body = re.search(rf"enum {{\s*(EPMOE_{prefix}_[^}}]*)}}", header).group(1)
            names = re.findall(rf"EPMOE_({prefix}_\w+)", body)
            self.assertEqual([getattr(_library, name) for name in names], list(range(len(names))))
        for name, (_, arguments) in _library._SIGNATURES.items():
            declared = re.search(rf"\b{name}\(([^)]*)\);", header).group(1)
            self.assertEqual(0 if declared == "void" else declared.count(",") + 1, len(arguments), name)
        self.assertEqual(len(_call._plan("post_reorder").params), 12)
        self.assertEqual(len(_call._plan("post_reorder").pack(*[0] * 24)), 12 * ctypes.sizeof(_library.Value))

    def test_an_op_is_added_by_its_files_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            source = "from epmoe.references import Reference\n__all__ = ['once_upstream']\n"
            source += (
                "def once_upstream(): return 7\nREFERENCES = {'torch': Reference(lambda output: output.fill_(5))}\n"
            )
            Path(folder, "another_op.py").write_text(source)
            from epmoe import ops, references, upstream

            with (
                mock.patch.object(upstream, "__path__", [*upstream.__path__, folder]),
                mock.patch.object(ops, "__path__", [*ops.__path__, folder]),
            ):
                self.addCleanup(epmoe.__dict__.pop, "once_upstream", None)
                self.assertIn("once_upstream", dir(epmoe))
                self.assertEqual(epmoe.once_upstream(), 7)
                output = torch.zeros(2)
                references.run("another_op", "torch", {"output": output})
                self.assertEqual(references.describe("another_op"), {"torch": {"problem": None}})
                self.assertEqual(output.tolist(), [5, 5])

    def test_names_are_offered(self):
        self.assertLessEqual(
            {"post_reorder", "ep_moe_post_reorder", "synchronize", "check", "EpmoeError"}, set(dir(epmoe))
        )

    def test_without_torch_what_does_not_need_it_is_there(self):
        code = (
            "import sys; sys.modules['torch'] = None; from epmoe import sglang_original; print(sglang_original.find())"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)

    def test_unknown_names(self):
        with self.assertRaises(AttributeError):
            epmoe.no_such_function  # noqa: B018


if __name__ == "__main__":
    unittest.main()
