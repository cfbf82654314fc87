import test from 'ava'
import { type DType, Tensor } from 'epmoe'
import { native } from '../src/native.js'
import { passes, requirementFor } from '../src/parity/verdict.js'

function compare(
  dtype: DType,
  actual: number[],
  reference: number[] | { exact: number[] },
  truth: number[],
  scale = truth,
) {
  const stored = (values: number[]) =>
    dtype === 'float32'
      ? Tensor.from(new Float32Array(values))
      : Tensor.from(new Uint16Array(values), undefined, { dtype })
  const doubles = (values: number[]) => Tensor.from(new Float64Array(values))
  const other = Array.isArray(reference) ? stored(reference) : doubles(reference.exact)
  return native().parity.compare(
    stored(actual).handleFor('t'),
    other.handleFor('t'),
    doubles(truth).handleFor('t'),
    doubles(scale.map(Math.abs)).handleFor('t'),
  )
}

test('equal elements are equal, and nothing else is', (t) => {
  t.like(compare('float32', [1, 2], [1, 2], [1, 2]), { mismatched: 0, total: 2, maxUlp: 0, maxAbs: 0, relL2: 0 })
  t.is(compare('float32', [1, 2], [1, 2 + 2 ** -22], [1, 2]).mismatched, 1)
})

test('an ulp is the last place of the dtype at the given magnitude', (t) => {
  // float32: 1 + 2^-23 is the next after 1; bfloat16: 0x3f81 after 0x3f80; float16: 0x3c01 after 0x3c00.
  t.is(compare('float32', [1 + 2 ** -23], [1], [1]).maxUlp, 1)
  t.is(compare('bfloat16', [0x3f81], [0x3f80], [1]).maxUlp, 1)
  t.is(compare('float16', [0x3c01], [0x3c00], [1]).maxUlp, 1)
  t.is(compare('float32', [1 + 2 ** -23], [1], [1], [4]).maxUlp, 0.25)
  // Among float16's subnormals the last place no longer shrinks.
  t.is(compare('float16', [0x0002], [0x0001], [2 ** -24]).maxUlp, 1)
})

test('a float64 reference is compared as it is, not rounded', (t) => {
  const metrics = compare('bfloat16', [0x3f80], { exact: [1 + 2 ** -9] }, [1 + 2 ** -9])
  t.is(metrics.mismatched, 0)
  t.is(metrics.maxUlp, 0.25)
})

test('ties of a float64 reference round to even', (t) => {
  t.is(compare('bfloat16', [0x3f80], { exact: [1 + 2 ** -8] }, [1]).mismatched, 0)
  t.is(compare('bfloat16', [0x3f82], { exact: [1 + 3 * 2 ** -8] }, [1]).mismatched, 0)
  t.is(compare('bfloat16', [0x3f81], { exact: [1 + 2 ** -8 + 2 ** -40] }, [1]).mismatched, 0)
})

test('a NaN equals a NaN and differs from a number, whichever side it is on', (t) => {
  t.is(compare('bfloat16', [0x7fc0], [0x7fff], [Number.NaN]).mismatched, 0)
  for (const [a, b] of [
    [0x7fc0, 0x3f80],
    [0x3f80, 0x7fc0],
  ] as const) {
    const metrics = compare('bfloat16', [a], [b], [1])
    t.is(metrics.mismatched, 1)
    t.is(metrics.maxUlp, Number.POSITIVE_INFINITY)
  }
  t.is(compare('bfloat16', [0x7fc0], [0x3f80], [1]).relL2, Number.POSITIVE_INFINITY)
})

test('infinities must agree in sign, and with the oracle', (t) => {
  t.is(compare('float32', [Infinity], [Infinity], [Infinity]).mismatched, 0)
  t.is(compare('float32', [Infinity], [-Infinity], [Infinity]).maxUlp, Number.POSITIVE_INFINITY)
  t.is(compare('float32', [-Infinity], [-Infinity], [Infinity]).relL2, Number.POSITIVE_INFINITY)
})

test('errors are relative to the oracle, for both sides', (t) => {
  const metrics = compare('float32', [3, 4.5], [3, 4], [3, 4])
  t.is(metrics.relL2, 0.1)
  t.is(metrics.referenceRelL2, 0)
})

test('each tier rejects what it has to', (t) => {
  const close = compare('bfloat16', [0x3f81, 0x3f80], [0x3f80, 0x3f80], [1, 1])
  t.false(passes({ tier: 'bit-exact' }, close))
  t.true(passes({ tier: 'ulp', bound: 1 }, close))
  t.false(passes({ tier: 'ulp', bound: 0.99 }, close))
  t.false(passes({ tier: 'golden' }, close))
  const better = compare('bfloat16', [0x3f80, 0x3f80], [0x3f81, 0x3f80], [1, 1])
  t.true(passes({ tier: 'golden' }, better))
})

test('compiled Triton in the dtype of the input is owed every bit, others a bound', (t) => {
  const bounds = { fp32: 0.5, triton: 5, reference: 9 }
  const exact = { name: 'x', device: 'cpu', numerics: 'triton' } as const
  const plain = { ...exact, numerics: 'fp32' } as const
  const triton = { name: 'triton', problem: null, compiled: true, arithmetic: 'input-dtype' } as const
  t.is(requirementFor(exact, triton, bounds).tier, 'bit-exact')
  t.deepEqual(requirementFor(exact, { ...triton, compiled: false }, bounds), { tier: 'ulp', bound: 14 })
  t.is(requirementFor(plain, triton, bounds).tier, 'golden')
  t.deepEqual(requirementFor(plain, { name: 'float64', problem: null }, bounds), { tier: 'ulp', bound: 0.5 })
})
