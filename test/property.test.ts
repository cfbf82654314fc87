import test from 'ava'
import { type Device, EpmoeError, Tensor } from 'epmoe'
import fc from 'fast-check'
import { on, read, runPostReorder } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'

const runs = 2000

interface Random {
  T: number
  K: number
  H: number
  extraRows: number
  seed: number
  wideIds: boolean
  wideDst: boolean
  gate: boolean
  start: number
  end: number
  dstStart: number
  factor: number
  /** Which mistake to make, if any. */
  mistake: string
}

const mistakes = [
  'none',
  'none',
  'none',
  'index',
  'negative index',
  'shape of output',
  'shape of weights',
  'dtype of output',
  'dtype of src2dst',
  'overlap',
  'disposed',
  'nothing',
  'junk',
  'range',
  'factor',
  'no experts',
] as const

const calls = fc.record<Random>({
  T: fc.integer({ min: 0, max: 6 }),
  K: fc.integer({ min: 1, max: 10 }),
  H: fc.integer({ min: 1, max: 70 }),
  extraRows: fc.integer({ min: 0, max: 3 }),
  seed: fc.integer({ min: 1, max: 2 ** 30 }),
  wideIds: fc.boolean(),
  wideDst: fc.boolean(),
  gate: fc.boolean(),
  start: fc.integer({ min: 0, max: 3 }),
  end: fc.integer({ min: 3, max: 7 }),
  dstStart: fc.integer({ min: -5, max: 1000 }),
  factor: fc.float({ min: -4, max: 4, noNaN: true, noDefaultInfinity: true }),
  mistake: fc.constantFrom(...mistakes),
})

/** The answer, or undefined where the call is mistaken, by the definition and in doubles. */
function build(random: Random, device: Device) {
  const { T, K, H, start, end, dstStart, factor, mistake } = random
  const rows = T * K + random.extraRows
  let state = random.seed
  const next = () => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    return state / 2 ** 32
  }
  // Quarters, so that float32 sums are exact and the answer is one number, whatever the order.
  const quarter = () => Math.floor(next() * 64 - 32) / 4
  const data = Float32Array.from({ length: rows * H }, quarter)
  const weights = Float32Array.from({ length: T * K }, quarter)
  const ids = Array.from({ length: T * K }, () => Math.floor(next() * 10) - 1)
  const dst = Array.from({ length: T * K }, () => Math.floor(next() * rows) + dstStart)
  if (!random.gate) for (let i = 0; i < dst.length; i++) if (next() < 0.3 || dst[i]! < 0) dst[i] = -1 - (i % 3)
  const local = (slot: number) => (random.gate ? ids[slot]! >= start && ids[slot]! <= end : dst[slot]! >= 0)
  let bad = false
  if (mistake === 'index' || mistake === 'negative index') {
    const slot = Math.floor(next() * T * K)
    if (T > 0) {
      dst[slot] = mistake === 'index' ? dstStart + rows + Math.floor(next() * 5) : dstStart - 1 - Math.floor(next() * 5)
      bad = local(slot)
    }
  }
  const answer = new Float64Array(T * H)
  if (!bad) {
    for (let slot = 0; slot < T * K; slot++) {
      if (!local(slot)) continue
      for (let column = 0; column < H; column++) {
        answer[Math.floor(slot / K) * H + column]! += data[(dst[slot]! - dstStart) * H + column]! * weights[slot]!
      }
    }
  }
  const index = (values: number[], wide: boolean, shape: number[]) =>
    on(device, wide ? BigInt64Array.from(values, BigInt) : Int32Array.from(values), shape)
  const call: Record<string, unknown> = {
    downOutput: on(device, data, [rows, H]),
    output: on(device, new Float32Array(T * H).fill(Number.NaN), [T, H]),
    src2dst: index(dst, random.wideDst, [T * K]),
    ...(random.gate ? { topkIds: index(ids, random.wideIds, [T, K]), startExpertId: start, endExpertId: end } : {}),
    topkWeights: on(device, weights, [T, K]),
    dstStart,
    routedScalingFactor: factor,
  }
  const mistaken = bad || spoil(call, random, device, next)
  return {
    call,
    answer: mistaken ? undefined : answer.map((value) => Math.fround(Math.fround(value) * Math.fround(factor))),
  }
}

/** Makes the mistake; false when it turns out to be none. */
function spoil(
  call: Record<string, unknown>,
  { T, K, H, mistake }: Random,
  device: Device,
  next: () => number,
): boolean {
  const names = ['downOutput', 'output', 'src2dst', 'topkWeights']
  const name = names[Math.floor(next() * names.length)]!
  switch (mistake) {
    case 'shape of output':
      call['output'] = Tensor.empty([T + 1, H], { device })
      return true
    case 'shape of weights':
      call['topkWeights'] = Tensor.empty([T, K + 1], { device })
      // Without tokens and ids nothing else says what K is.
      return T > 0 || call['topkIds'] !== undefined
    case 'dtype of output':
      call['output'] = Tensor.empty([T, H], { device, dtype: 'float16' })
      return true
    case 'dtype of src2dst':
      call['src2dst'] = Tensor.empty([T * K], { device })
      return true
    case 'overlap':
      if (T === 0 || (call['downOutput'] as Tensor).numel < T * H) return false
      call['output'] = (call['downOutput'] as Tensor).view([T, H])
      return true
    case 'disposed':
      ;(call[name] as Tensor).dispose()
      return true
    case 'nothing':
      delete call[name]
      return true
    case 'junk':
      call[name] = [3, 'x', {}, [], { id: 4096, callable: true }, new Float32Array(4), null, Symbol.iterator][
        Math.floor(next() * 8)
      ]
      return true
    case 'range':
      if (call['topkIds'] === undefined) return false
      call['startExpertId'] = 9
      return true
    case 'factor':
      call['routedScalingFactor'] = [Number.NaN, Number.POSITIVE_INFINITY, 1e300, 'two', {}][Math.floor(next() * 5)]
      return true
    case 'no experts':
      call['topkWeights'] = Tensor.empty([T, 0], { device })
      return true
    default:
      return false
  }
}

for (const device of testDevices) {
  test(`${runs} random calls on ${device}: the answer, or an EpmoeError, and never anything else`, (t) => {
    let right = 0
    let refused = 0
    fc.assert(
      fc.property(calls, (random) => {
        const { call, answer } = build(random, device)
        try {
          runPostReorder(call as never, device)
        } catch (error) {
          if (!(error instanceof EpmoeError) || error.code === 'ERR_INTERNAL') throw error
          if (answer !== undefined) throw new Error(`refused a valid call: ${error.message}`)
          refused++
          return
        }
        if (answer === undefined) throw new Error(`accepted a mistake: ${random.mistake}`)
        const output = read(call['output'] as Tensor)
        answer.forEach((expected, i) => {
          // A product of sum and factor may be -0 where the definition gives 0, and the reverse.
          if (output[i] !== expected) throw new Error(`element ${i}: expected ${expected}, received ${output[i]}`)
        })
        right++
        for (const value of Object.values(call)) if (value instanceof Tensor) value.dispose()
      }),
      { numRuns: runs, seed: 20261123 },
    )
    // Both kinds have been met, often.
    t.true(right > runs / 10, `${right} right`)
    t.true(refused > runs / 10, `${refused} refused`)
  })
}
