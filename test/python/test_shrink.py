"""Smaller calls out of recorded ones: for every op and axis they are valid, and carry along what was recorded."""

import os
import tempfile
import unittest
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import recorded_calls
import torch

from epmoe import generated, references
from epmoe.errors import EpmoeError
from epmoe.migrate import calls, capsule, replay, shrink


def outputs_of(call, run):
    """What a call writes, from poison; numerics are those that were asked for."""
    made = {name: calls.poison(*spec) for name, spec in call.outputs.items()}
    run(**call.arguments, **made)
    return made


def plain(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


class Shrink(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        recorded_calls.main(folder.name)
        cls.calls = {path.name: replay.read(path)["call"] for path in sorted(cls.folder.iterdir())}

    def check(self, call):
        """epmoe's kernel takes it, agrees with torch, and with what was recorded where that was cut along."""
        op, scalars = call.capsule.op, call.capsule.scalars
        numerics = {"numerics": "triton"} if "numerics" in scalars else {}
        mine = outputs_of(call, lambda **given: getattr(generated, op)(**given, **{**scalars, **numerics}))
        others = {name: value for name, value in scalars.items() if name != "numerics"}
        theirs = outputs_of(call, lambda **given: references.run(op, "torch", {**given, **others}))
        for name, tensor in mine.items():
            torch.testing.assert_close(plain(tensor), plain(theirs[name]), equal_nan=True, rtol=0.02, atol=0.02)
            if "triton" in call.recorded:
                found = call.recorded["triton"][name]
                torch.testing.assert_close(plain(tensor), plain(found), equal_nan=True, rtol=0.02, atol=0.02)

    def test_every_op_and_axis(self):
        seen = set()
        for name, call in self.calls.items():
            self.check(call)
            for axis, size in shrink.sizes(call).items():
                for keep in ([0], [size - 1], list(range(size // 2)), list(range(0, size, 2)), list(range(1, size))):
                    with self.subTest(name, axis=axis, keep=keep):
                        smaller = shrink.reduced(call, axis, keep)["call"]
                        self.assertEqual(shrink.sizes(smaller).get(axis, 1), len(keep))
                        self.check(smaller)
                        seen.add((call.capsule.op, axis))
        self.assertEqual(
            sorted(seen),
            sorted(
                [
                    *((op, axis) for op in ("post_reorder", "pre_reorder") for axis in ("tokens", "topk", "hidden")),
                    *((op, axis) for op in ("ep_scatter", "ep_gather") for axis in ("tokens", "topk", "hidden")),
                    *((op, "experts") for op in ("post_reorder", "pre_reorder", "ep_scatter", "silu_and_mul")),
                    *(("preprocess", axis) for axis in ("tokens", "topk", "experts")),
                    *(("silu_and_mul", axis) for axis in ("tokens", "hidden")),
                ]
            ),
        )

    def test_one_cut_after_the_other_and_written(self):
        for name, call in self.calls.items():
            with self.subTest(name):
                for axis in ("tokens", "experts", "topk", "hidden"):
                    size = shrink.sizes(call).get(axis, 1)
                    if size > 1:
                        call = shrink.reduced(call, axis, [size // 2])["call"]
                self.assertEqual(shrink.sizes(call), {})
                again = replay.read(shrink.write(call, self.folder / "small.capsule"))["call"]
                self.check(again)
                self.assertEqual(again.outputs, call.outputs)

    def test_the_check_can_fail(self):
        call = next(call for name, call in self.calls.items() if "post_reorder" in name)
        smaller = shrink.reduced(call, "tokens", [0, 2])["call"]
        smaller.recorded["triton"]["output"] = smaller.recorded["triton"]["output"].flip(0)
        with self.assertRaises(AssertionError):
            self.check(smaller)
        smaller = shrink.reduced(call, "tokens", [0, 2])["call"]
        smaller.arguments["src2dst"][:] = 99
        with self.assertRaises(EpmoeError):
            self.check(smaller)

    def test_a_capsule_that_was_saved_is_the_one_that_was_cut(self):
        call = next(call for name, call in self.calls.items() if "pre_reorder" in name)
        smaller = shrink.reduced(call, "tokens", [1, 3])["call"]
        held = capsule.load(shrink.write(smaller, self.folder / "again.capsule"))
        self.assertTrue(torch.equal(held.part("argument")["input"], call.arguments["input"][[1, 3]]))
        self.assertEqual((held.kernel, held.op), ("pre_reorder_triton_kernel", "pre_reorder"))


if __name__ == "__main__":
    unittest.main()
