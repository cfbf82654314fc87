import test from 'ava'
import { type DType, Tensor } from 'epmoe'
import { native } from '../src/native.js'
import { Expectation } from '../src/parity/expectation.js'
import type { Guarded } from '../src/parity/guard.js'
import { judge } from '../src/parity/judge.js'
import { absmaxOf, groupScale, nearJump, toFloat8 } from '../src/parity/quantise.js'
import { decoderOf, encoderOf } from '../src/parity/values.js'
import { independentOf, passes, requirementFor } from '../src/parity/verdict.js'

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

test('elements that repeat others are no larger sample', (t) => {
  t.is(independentOf(Float64Array.of(2, 1, 2, Number.NaN, 1, Number.NaN, 0)), 4)
  t.is(independentOf(Float64Array.of()), 0)
  // A tenth worse than the reference: by chance over 81 values, and not over 10,000.
  const metrics = { mismatched: 1, total: 10_000, maxUlp: 1, maxAbs: 1, relL2: 1.1, referenceRelL2: 1 }
  t.false(passes({ tier: 'golden' }, metrics))
  t.true(passes({ tier: 'golden' }, metrics, 81))
  t.false(passes({ tier: 'golden' }, { ...metrics, relL2: 1.4 }, 81))
  t.false(passes({ tier: 'ulp', bound: 0.5 }, metrics, 81))
})

test('compiled Triton in the dtype of the input is owed every bit by kernels on a GPU, others a bound', (t) => {
  const bounds = { fp32: 0.5, triton: 5, reference: 9 }
  const exact = { name: 'x', device: 'cuda:0', numerics: 'triton' } as const
  const plain = { ...exact, numerics: 'fp32' } as const
  const triton = { name: 'triton', problem: null, compiled: true, arithmetic: 'input-dtype' } as const
  t.is(requirementFor(exact, triton, bounds).tier, 'bit-exact')
  t.deepEqual(requirementFor(exact, { ...triton, compiled: false }, bounds), { tier: 'ulp', bound: 14 })
  t.deepEqual(requirementFor({ ...exact, device: 'cpu' }, triton, bounds), { tier: 'ulp', bound: 14 })
  t.is(requirementFor(plain, triton, bounds).tier, 'golden')
  t.deepEqual(requirementFor(plain, { name: 'float64', problem: null }, bounds), { tier: 'ulp', bound: 0.5 })
})

test('integers agree or do not, and their unit is 1', (t) => {
  for (const [dtype, array] of [
    ['int32', Int32Array],
    ['uint8', Uint8Array],
  ] as const) {
    const stored = (values: number[]) => Tensor.from(new array(values), undefined, { dtype })
    const truth = Tensor.from(new Float64Array([3, 200]))
    const against = (values: number[], reference: Tensor) =>
      native().parity.compare(
        stored(values).handleFor('t'),
        reference.handleFor('t'),
        truth.handleFor('t'),
        truth.handleFor('t'),
      )
    t.is(against([3, 200], truth).mismatched, 0)
    t.like(against([3, 198], truth), { mismatched: 1, maxUlp: 2 })
    t.like(against([3, 198], stored([3, 200])), { mismatched: 1, maxUlp: 2 })
  }
  const wide = Tensor.from(new BigInt64Array([-1n, 2n ** 40n]))
  const truth = Tensor.from(new Float64Array([-1, 2 ** 40 + 1]))
  const handles = [wide, truth, truth, truth].map((tensor) => tensor.handleFor('t')) as [number, number, number, number]
  t.like(native().parity.compare(...handles), { mismatched: 1, maxUlp: 1 })
})

test('float8: units of a sixteenth to an eighth, subnormals of 2^-9, a NaN that equals a NaN', (t) => {
  const decode = decoderOf('float8_e4m3fn')
  const encode = encoderOf('float8_e4m3fn')
  const all = Uint8Array.from({ length: 256 }, (_, bits) => bits)
  t.deepEqual(
    [0x38, 0x7e, 0xfe, 0x01, 0x08, 0x80].map((bits) => decode(all, bits)),
    [1, 448, -448, 2 ** -9, 2 ** -6, -0],
  )
  for (let bits = 0; bits < 256; bits++) {
    const value = decode(all, bits)
    if (!Number.isNaN(value) && !Object.is(value, -0)) t.is(encode(value), bits)
  }
  const metrics = (bits: number[], truths: number[]) => {
    const tensors = [
      Tensor.from(Uint8Array.from(bits), undefined, { dtype: 'float8_e4m3fn' }),
      ...[truths, truths, truths.map(Math.abs)].map((values) => Tensor.from(Float64Array.from(values))),
    ]
    const handles = tensors.map((tensor) => tensor.handleFor('t')) as [number, number, number, number]
    return native().parity.compare(...handles)
  }
  t.is(metrics([0x39], [1]).maxUlp, 1)
  t.is(metrics([0x02], [2 ** -9]).maxUlp, 1)
  t.is(metrics([0x7f, 0x7e], [Number.NaN, 448]).mismatched, 0)
  t.is(metrics([0x7e], [Number.NaN]).mismatched, 1)
  // What the oracle leaves unrounded is rounded to nearest even.
  t.is(metrics([0x38], [1 + 1 / 16]).mismatched, 0)
  t.is(metrics([0x3a], [1 + 3 / 16]).mismatched, 0)
})

test('test data are encoded to the nearest, NaN, infinities and the sign of zero included', (t) => {
  for (const dtype of ['float16', 'bfloat16'] as const) {
    const encode = encoderOf(dtype)
    const decode = decoderOf(dtype)
    const stored = (value: number) => decode(Uint16Array.of(encode(value)), 0)
    for (const value of [Number.NaN, Infinity, -Infinity, -0, 0, 1, -2.5, 2 ** -14]) t.is(stored(value), value)
    t.is(stored(1e39), Infinity)
    t.is(stored(-1e39), -Infinity)
    t.is(stored(1 + 2 ** -12), 1)
  }
  t.is(decoderOf('float16')(Uint16Array.of(encoderOf('float16')(65519)), 0), 65504)
  t.is(decoderOf('float16')(Uint16Array.of(encoderOf('float16')(65520)), 0), Infinity)
  t.true(Number.isNaN(decoderOf('float8_e4m3fn')(Uint8Array.of(encoderOf('float8_e4m3fn')(Number.NaN)), 0)))
})

test("float8's scales by definition: NaN has no say, infinity has, zeros divide, powers of two go up", (t) => {
  t.is(absmaxOf([1, Number.NaN, -3]), 3)
  t.is(absmaxOf([1, -Infinity]), Infinity)
  t.is(absmaxOf([Number.NaN]), 0)
  t.is(groupScale(448, 'float32'), 1)
  t.is(groupScale(0, 'float32'), 1e-10 / 448)
  t.deepEqual(
    [448, 449, 447, 224].map((most) => groupScale(most, 'power_of_two')),
    [1, 2, 1, 0.5],
  )
  t.true(nearJump(448, 2 ** -20) && nearJump(56, 2 ** -20) && nearJump(449, 2 ** -5))
  t.false(nearJump(449, 2 ** -20) || nearJump(600, 2 ** -5) || nearJump(0, 2 ** -5) || nearJump(Infinity, 2 ** -5))
  t.deepEqual([449, -1e9, Infinity, 3].map(toFloat8), [448, -448, 448, 3])
  t.true(Number.isNaN(toFloat8(Number.NaN)))
})

test('a call is as good as its worst output, and an exact output allows nothing', (t) => {
  const one = (value: number) => Tensor.from(new Float32Array([value]))
  const oracle = new Expectation()
  for (const [name, bounds] of [
    ['rounded', { fp32: 2, triton: 2, reference: 2 }],
    ['exact', undefined],
  ] as const) {
    const page = oracle.floats(name, [1], bounds)
    page.expected[0] = page.scale[0] = 1
  }
  const outputs = (rounded: number, exact: number) => ({
    rounded: { guarded: { tensor: one(rounded) } as Guarded, intact: true },
    exact: { guarded: { tensor: one(exact) } as Guarded, intact: true },
  })
  const backend = { name: 'cpu', device: 'cpu', numerics: 'fp32' } as const
  const verdict = (rounded: number, exact: number) =>
    judge(outputs(rounded, exact), undefined, oracle, backend, { name: 'float64', problem: null })
  const next = 1 + 2 ** -23
  t.like(verdict(1, 1), { passed: true, reached: 'bit-exact', metrics: { ...verdict(1, 1).metrics, total: 2 } })
  t.like(verdict(next, 1), { passed: true, reached: 'ulp' })
  t.like(verdict(1, next), { passed: false, failure: 'exact differs' })
  t.like(verdict(next + 2 ** -20, 1), { passed: false, failure: 'rounded differs' })
  const broken = outputs(1, 1)
  broken.exact.intact = false
  const judged = judge(broken, undefined, oracle, backend, { name: 'float64', problem: null })
  t.like(judged, { passed: false, failure: 'memory around exact was written to' })
  oracle[Symbol.dispose]()
})
