"""The correction of Triton's interpreter, proved against torch's bfloat16 arithmetic."""

import os
import unittest

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from epmoe import _triton
from epmoe._interpreter import narrow, sum_to_odd, widen
from epmoe._triton import jit, tl

SPECIAL = [
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x007F,
    0x0080,
    0x3F80,
    0xBF80,
    0x7F7F,
    0xFF7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x7F81,
]


def patterns(seed, count=20000):
    bits = np.random.default_rng(seed).integers(0, 2**16, count, dtype=np.uint16)
    bits[: len(SPECIAL) ** 2] = np.repeat(SPECIAL, len(SPECIAL)) if seed % 2 else np.tile(SPECIAL, len(SPECIAL))
    return bits


def as_torch(bits):
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def same(a, b):
    """Equal bits, or both NaN."""
    a, b = as_torch(a), as_torch(b)
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all())


def bits_of(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


@jit
def binary_kernel(x, y, total, product, difference, less, as_float, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(total + at, a + b)
    tl.store(product + at, a * b)
    tl.store(difference + at, a - b)
    tl.store(less + at, (a < b).to(tl.int32))
    tl.store(as_float + at, a.to(tl.float32))


@jit
def cast_kernel(x, out, scaled, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at).to(tl.bfloat16)
    tl.store(out + at, value)
    tl.store(scaled + at, value * 0.3)


class Conversions(unittest.TestCase):
    def test_narrow_rounds_once_as_torch_does(self):
        rng = np.random.default_rng(3)
        for values in (
            rng.standard_normal(100000),
            np.ldexp(rng.standard_normal(100000), rng.integers(-140, 128, 100000)),
            np.array(
                [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-50, 2.0**-133, 2.0**-134, 3.4e38, 3.39e38, 1e300]
            ),
        ):
            for signed in (values, -values):
                expected = torch.from_numpy(signed).to(torch.bfloat16)
                # torch converts by way of float32; where that is exact the two must agree.
                exact = signed.astype(np.float32).astype(np.float64) == signed
                self.assertTrue(same(narrow(signed)[exact], bits_of(expected)[exact]))

    def test_a_tie_that_float32_would_make_is_none(self):
        # Just above a tie by less than float32 sees: rounding twice would go down to even.
        value = 1 + 2.0**-8 + 2.0**-50
        self.assertEqual(narrow(value), 0x3F81)
        self.assertEqual(bits_of(torch.tensor([value], dtype=torch.float64).to(torch.bfloat16))[0], 0x3F80)

    def test_widen_is_exact(self):
        bits = np.arange(2**16, dtype=np.uint16)
        self.assertTrue(same(narrow(widen(bits)), bits))


class Interpreter(unittest.TestCase):
    def run_binary(self, a, b):
        x, y = as_torch(a), as_torch(b)
        outs = [torch.zeros_like(x) for _ in range(3)]
        less = torch.zeros(len(a), dtype=torch.int32)
        as_float = torch.zeros(len(a))
        binary_kernel[(1,)](x, y, *outs, less, as_float, N=len(a))
        return x, y, outs, less, as_float

    def test_sums_products_and_differences_are_those_of_torch(self):
        a, b = patterns(1, 16384), patterns(2, 16384)
        x, y, (total, product, difference), less, as_float = self.run_binary(a, b)
        self.assertTrue(same(bits_of(total), bits_of(x + y)))
        self.assertTrue(same(bits_of(product), bits_of(x * y)))
        self.assertTrue(same(bits_of(difference), bits_of(x - y)))
        self.assertTrue(torch.equal(less.bool(), x < y))
        self.assertTrue(torch.equal(as_float.nan_to_num(7), x.float().nan_to_num(7)))
        # The comparison can fail: one bit of one element is enough.
        spoiled = bits_of(total).copy()
        spoiled[np.flatnonzero(~np.isnan(widen(spoiled)))[0]] ^= 1
        self.assertFalse(same(spoiled, bits_of(x + y)))

    def test_casts_round_to_nearest_even(self):
        values = torch.from_numpy(np.random.default_rng(5).standard_normal(4096).astype(np.float32))
        out, scaled = torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
        cast_kernel[(1,)](values, out, scaled, N=4096)
        self.assertTrue(torch.equal(out, values.to(torch.bfloat16)))
        self.assertFalse(torch.equal(out, (values.view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)))
        self.assertTrue(torch.equal(scaled, values.to(torch.bfloat16) * torch.tensor(0.3, dtype=torch.bfloat16)))

    def test_it_is_in_place(self):
        self.assertTrue(_triton.INTERPRETED)
        self.assertIsNone(_triton.problem())
        self.assertIsNone(_triton.bfloat16_problem())


if __name__ == "__main__":
    unittest.main()
