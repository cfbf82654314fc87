import test from 'ava'
import { type Device, EpmoeError, preprocess, Stream, Tensor } from 'epmoe'
import fc from 'fast-check'
import { on } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'

interface Form {
  negatives?: 'counted' | 'dropped'
  mMax?: number
}

/** By the definition: a stable sort, counted. */
function definition(ids: number[], experts: number, { negatives = 'counted', mMax = 0 }: Form) {
  const order = ids.map((id, slot) => ({ id, slot })).sort((a, b) => a.id - b.id || a.slot - b.slot)
  const invalid = ids.filter((id) => id === -1).length
  const dropped = negatives === 'dropped' ? invalid : 0
  const src2dst = new Array<number>(ids.length)
  const seen = new Array<number>(experts).fill(0)
  order.forEach(({ id, slot }, position) => {
    src2dst[slot] = mMax > 0 ? (id < 0 ? -1 : id * mMax + seen[id]!++) : position - dropped
  })
  const sorted = order.map(({ id }) => id)
  return {
    src2dst,
    segIndptr: [0, ...Array.from({ length: experts }, (_, e) => ids.filter((id) => id <= e).length - dropped)],
    reorderTopkIds: dropped > 0 ? [...sorted.slice(dropped), ...sorted.slice(0, dropped)] : sorted,
    maskedM: Array.from({ length: experts }, (_, e) => ids.filter((id) => id === e).length),
  }
}

function run(device: Device, ids: ArrayLike<number>, T: number, K: number, experts: number, form: Form, wide: boolean) {
  const dtype = wide ? 'int64' : 'int32'
  const array = wide ? BigInt64Array.from(Array.from(ids), BigInt) : Int32Array.from(ids)
  const topkIds = on(device, array, [T, K])
  const src2dst = Tensor.empty([T * K], { dtype, device })
  const segIndptr = Tensor.empty([experts + 1], { dtype: 'int64', device })
  const reorderTopkIds = Tensor.empty([T * K], { dtype, device })
  const maskedM = Tensor.empty([experts], { dtype: 'int32', device })
  const all = { topkIds, src2dst, segIndptr, reorderTopkIds, maskedM }
  try {
    preprocess({ ...all, ...form })
    if (device !== 'cpu') Stream.own(device).synchronizeSync()
    const { topkIds: _, ...outputs } = all
    return Object.fromEntries(
      Object.entries(outputs).map(([name, tensor]) => {
        using host = tensor.toHostSync()
        return [name, Array.from(host.data as Int32Array, Number)]
      }),
    )
  } finally {
    for (const tensor of Object.values(all)) tensor.dispose()
  }
}

for (const device of testDevices) {
  test(`any routing gives what sorting would, on ${device}`, (t) => {
    const routings = fc.record({
      experts: fc.integer({ min: 1, max: 40 }),
      T: fc.integer({ min: 0, max: 30 }),
      K: fc.integer({ min: 1, max: 9 }),
      skew: fc.constantFrom(1, 3),
      seed: fc.integer({ min: 1, max: 2 ** 30 }),
      wide: fc.boolean(),
      negatives: fc.constantFrom('counted' as const, 'dropped' as const),
      padded: fc.boolean(),
    })
    fc.assert(
      fc.property(routings, ({ experts, T, K, skew, seed, wide, negatives, padded }) => {
        let state = seed
        const next = () => {
          state = (Math.imul(state, 1103515245) + 12345) >>> 0
          return (state / 2 ** 32) ** skew
        }
        const ids = Array.from({ length: T * K }, () => Math.floor(next() * (experts + 1)) - 1)
        const form = { negatives, ...(padded ? { mMax: Math.max(1, T * K) } : {}) }
        t.deepEqual(run(device, ids, T, K, experts, form, wide), definition(ids, experts, form))
      }),
      { numRuns: 300, seed: 20261123 },
    )
    t.pass()
  })

  for (const [T, K, experts, what] of [
    [131072, 8, 256, 'a million slots'],
    [70_000, 2, 512, '70,000 tokens, 512 experts'],
    [20_000, 8, 1, 'one expert'],
    [5000, 3, 1000, '1000 experts'],
  ] as const) {
    test(`${what}, on ${device}`, (t) => {
      const ids = Int32Array.from({ length: T * K }, (_, i) => (Math.imul(i, 2654435761) >>> 7) % (experts + 1)).map(
        (id) => id - 1,
      )
      for (const negatives of ['counted', 'dropped'] as const) {
        const outputs = run(device, ids, T, K, experts, { negatives }, false)
        // The definition by counting, since sorting a million objects takes its time.
        const next = new Int32Array(experts + 2)
        for (const id of ids) next[id + 2]!++
        const counts = Array.from(next.subarray(2))
        const invalid = next[1]!
        for (let bucket = 1; bucket < next.length; bucket++) next[bucket]! += next[bucket - 1]!
        const dropped = negatives === 'dropped' ? invalid : 0
        const wrong = outputs['src2dst']!.findIndex((row, slot) => row !== next[ids[slot]! + 1]!++ - dropped)
        t.is(wrong, -1)
        t.deepEqual(outputs['maskedM'], counts)
        t.is(outputs['segIndptr']!.at(-1), T * K - dropped)
        const valid = outputs['reorderTopkIds']!.slice(0, T * K - dropped)
        t.true(valid.every((id, i) => i === 0 || valid[i - 1]! <= id))
      }
    })
  }

  test(`an expert that is not there is reported and counts as none, on ${device}`, (t) => {
    const error = t.throws(() => run(device, [0, 5, 1, -2], 2, 2, 3, {}, false), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_INDEX_OUT_OF_RANGE')
    t.is(error?.argument, 'topkIds')
    t.regex(error?.received ?? '', /^(5 at token 0, slot 1|-2 at token 1, slot 1)$/)
  })

  test(`an expert with more slots than mMax is reported, and its surplus has no row, on ${device}`, (t) => {
    const src2dst = Tensor.empty([4], { dtype: 'int32', device })
    const segIndptr = Tensor.empty([3], { dtype: 'int64', device })
    const topkIds = on(device, new Int32Array([1, 1, 0, 1]), [4, 1])
    const error = t.throws(
      () => {
        preprocess({ topkIds, src2dst, segIndptr, mMax: 2 })
        if (device !== 'cpu') Stream.own(device).synchronizeSync()
      },
      { instanceOf: EpmoeError },
    )
    t.is(error?.argument, 'mMax')
    t.deepEqual(Array.from(src2dst.toHostSync().data as Int32Array), [2, 3, 0, -1])
  })
}
