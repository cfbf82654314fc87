"""The correction of Triton's interpreter, proved against torch's bfloat16 arithmetic."""

import os
import subprocess
import sys
import unittest
from fractions import Fraction

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


def same_but_zeros(a, b):
    """The same, whatever the sign of a zero: exact arithmetic knows one zero only."""
    return same(*(np.where(bits == 0x8000, 0, bits).astype(np.uint16) for bits in (a, b)))


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
def further_kernel(x, y, z, fused, quotient, negated, magnitude, smaller, larger, chosen, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    tl.store(fused + at, tl.fma(a, b, c))
    tl.store(quotient + at, tl.fdiv(a, b))
    tl.store(negated + at, -a)
    tl.store(magnitude + at, tl.abs(a))
    tl.store(smaller + at, tl.minimum(a, b))
    tl.store(larger + at, tl.maximum(a, b))
    tl.store(chosen + at, tl.where(a >= b, a, c))


@jit
def types_kernel(x, half, double, whole, back_half, back_double, back_whole, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(half + at, value.to(tl.float16))
    tl.store(double + at, value.to(tl.float64))
    tl.store(whole + at, value.to(tl.int32))
    tl.store(back_half + at, tl.load(half + at).to(tl.bfloat16))
    tl.store(back_double + at, (tl.load(double + at) * 1.00390625).to(tl.bfloat16))
    tl.store(back_whole + at, tl.load(whole + at).to(tl.bfloat16))


@jit
def refused_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(out + at, tl.load(x + at))


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

    def test_a_sum_to_odd_remembers_what_it_cannot_hold(self):
        tie = 1 + 2.0**-8
        for tiny, expected in ((2.0**-90, 0x3F81), (-(2.0**-90), 0x3F80), (0.0, 0x3F80)):
            self.assertEqual(narrow(sum_to_odd(tie, tiny)), expected)
            self.assertEqual(narrow(sum_to_odd(-tie, -tiny)), expected | 0x8000)
        self.assertEqual(narrow(tie + 2.0**-90), 0x3F80)  # what a plain sum makes of it
        for a, b in ((np.inf, 1.0), (-np.inf, 1.0), (0.0, 0.0), (1.0, -1.0), (3.0, 0.5)):
            self.assertEqual(sum_to_odd(a, b), a + b)

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

    def test_further_operations_are_those_of_torch(self):
        a, b, c = patterns(1, 16384), patterns(2, 16384), patterns(7, 16384)
        x, y, z = map(as_torch, (a, b, c))
        outs = [torch.zeros_like(x) for _ in range(7)]
        further_kernel[(1,)](x, y, z, *outs, N=len(a))
        fused, quotient, negated, magnitude, smaller, larger, chosen = map(bits_of, outs)
        self.assertTrue(same(quotient, bits_of(x / y)))
        self.assertTrue(same_but_zeros(negated, bits_of(-x)))  # older Tritons compute 0 - x
        self.assertTrue(same(magnitude, bits_of(x.abs())))
        self.assertTrue(same(chosen, bits_of(torch.where(x >= y, x, z))))
        numbers = torch.isfinite(x) & torch.isfinite(y) & (x != y)  # of -0 and 0 either is the smaller
        for got, expected in ((smaller, torch.minimum(x, y)), (larger, torch.maximum(x, y))):
            self.assertTrue(same(got[numbers.numpy()], bits_of(expected)[numbers.numpy()]))
        finite = torch.isfinite(x) & torch.isfinite(y) & torch.isfinite(z)
        triples = zip(*(tensor[finite].tolist() for tensor in (x, y, z)), strict=True)
        expected = [nearest(*map(Fraction, triple)) for triple in triples]
        self.assertTrue(same_but_zeros(fused[finite.numpy()], np.array(expected, np.uint16)))
        twice = bits_of(x * y + z)
        self.assertFalse(same_but_zeros(fused[finite.numpy()], twice[finite.numpy()]))

    def test_conversions_between_types_are_those_of_torch(self):
        bits = patterns(9, 4096)
        bits = bits[np.abs(widen(bits)) < 2.0**31]
        x = as_torch(np.resize(bits, 4096))
        kinds = (torch.float16, torch.float64, torch.int32, *[torch.bfloat16] * 3)
        half, double, whole, *back = [torch.zeros(4096, dtype=kind) for kind in kinds]
        types_kernel[(1,)](x, half, double, whole, *back, N=4096)
        self.assertTrue(torch.equal(half, x.half()))
        self.assertTrue(torch.equal(double, x.double()))
        self.assertTrue(torch.equal(whole, x.to(torch.int32)))
        self.assertTrue(torch.equal(back[0], half.to(torch.bfloat16)))
        expected = [nearest(Fraction(value), Fraction(257, 256), Fraction(0)) for value in x.double().tolist()]
        self.assertTrue(same_but_zeros(bits_of(back[1]), np.array(expected, np.uint16)))
        self.assertTrue(torch.equal(back[2], whole.to(torch.bfloat16)))

    def test_what_is_not_mended_fails_rather_than_answers(self):
        x = torch.ones(4, dtype=torch.bfloat16)
        with self.assertRaisesRegex(Exception, "create_atomic_rmw on bfloat16"):
            refused_kernel[(1,)](x, torch.zeros_like(x), N=4)
        out = torch.zeros(4)
        refused_kernel[(1,)](x.float(), out, N=4)
        self.assertEqual(out.tolist(), [1.0] * 4)

    def test_it_is_in_place(self):
        self.assertTrue(_triton.INTERPRETED)
        self.assertIsNone(_triton.problem())
        self.assertIsNone(_triton.bfloat16_problem())

    def test_an_interpreter_left_as_it_is_is_caught(self):
        problem = told(
            "import epmoe._interpreter as i; i._mend_bfloat16 = lambda *a: None;"
            "from epmoe import _triton; print(_triton.problem(), '|', _triton.bfloat16_problem())"
        )
        self.assertRegex(problem, r"^None \| the interpreter of Triton \S+ (computes bfloat16 wrongly|fails)")

    def test_an_interpreter_of_another_make_is_told(self):
        problem = told(
            "from triton.runtime import interpreter; del interpreter.InterpreterBuilder.cast_impl;"
            "from epmoe import _triton; print(_triton.bfloat16_problem())"
        )
        self.assertRegex(problem, "interpreter of Triton .*cast_impl")

    def test_without_triton_all_but_its_kernels_is_there(self):
        told_of = told(
            "import sys; sys.modules['triton'] = None;"
            "from epmoe import references; d = references.describe('post_reorder');"
            "print(d['torch']['problem'], *{d[n]['problem'] for n in d if n != 'torch'})"
        )
        self.assertRegex(told_of, "^None Triton cannot be imported: .*triton")


def told(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result.stdout.strip() or result.stderr


def nearest(a, b, c):
    """a * b + c as a bfloat16 pattern, by exact arithmetic: the nearest value, of two the even one."""
    exact = a * b + c
    sign, exact = (0x8000, -exact) if exact < 0 else (0, exact)
    low, high = 0, 0x7F80  # patterns of positive numbers are in the order of the numbers; 0x7F80 stands for 2^128
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value_of(middle) <= exact else (low, middle)
    below, above = exact - value_of(low), value_of(high) - exact
    return sign | (low if below < above or (below == above and low % 2 == 0) else high)


def value_of(bits):
    exponent, fraction = bits >> 7, bits & 0x7F
    if exponent == 0:
        return Fraction(fraction, 2**133)
    return (128 + fraction) * Fraction(2) ** (exponent - 134)


if __name__ == "__main__":
    unittest.main()
