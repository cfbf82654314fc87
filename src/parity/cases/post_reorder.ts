import type { DType } from '../../dtype.js'
import { native } from '../../native.js'
import { Tensor } from '../../tensor.js'
import type { Case, GridOptions, OpCases, Oracle, Problem, Spoiler } from '../case.js'
import { Guarded } from '../guard.js'
import { Kept } from '../kept.js'
import { presets } from '../presets.js'
import { Random } from '../random.js'
import { type Routing, type RoutingKind, route } from '../routing.js'
import { decoderOf, rowsOf, significantBits } from '../values.js'

interface Spec {
  /** Tokens, hidden size, top-k, experts. */
  T: number
  H: number
  K: number
  E: number
  /** The experts are split over this many ranks; this one is tested, the middle one when it is -1. */
  ep: number
  rank: number
  dtype: DType
  ids: 'int32' | 'int64'
  weights: 'float32' | 'same'
  routing: RoutingKind
  /** `ids`: by expert range. `dst`: DeepEP's, by src2dst. */
  gate: 'ids' | 'dst'
  dstStart: number
  factor: number
  /** Elements by which every tensor is moved off its alignment. */
  shift: number
  /** `normal`, or with infinities, NaNs and subnormals among the rows. */
  values: 'normal' | 'special'
  seed: number
}

const defaults: Spec = {
  T: 7,
  H: 512,
  K: 8,
  E: 64,
  ep: 1,
  rank: -1,
  dtype: 'bfloat16',
  ids: 'int32',
  weights: 'float32',
  routing: 'uniform',
  gate: 'ids',
  dstStart: 0,
  factor: 1,
  shift: 0,
  values: 'normal',
  seed: 1,
}

function nameOf(spec: Spec): string {
  const fields = Object.entries(spec).map(([key, value]) => `${key}=${value}`)
  return `post_reorder/${fields.join(',')}`
}

function parse(name: string): Case | undefined {
  const [op, fields] = name.split('/')
  if (op !== 'post_reorder' || fields === undefined) return undefined
  const spec: Record<string, string | number> = { ...defaults }
  for (const field of fields.split(',')) {
    const [key = '', value = ''] = field.split('=')
    if (!(key in defaults)) return undefined
    spec[key] = typeof defaults[key as keyof Spec] === 'number' ? Number(value) : value
  }
  return caseOf(spec as unknown as Spec)
}

function caseOf(spec: Spec): Case {
  const { T, H, K, E, ep } = spec
  return {
    name: nameOf(spec),
    op: 'post_reorder',
    dtype: spec.dtype,
    tags: [spec.gate, spec.routing, spec.values, ...(ep > 1 ? ['remote'] : []), ...(spec.shift ? ['unaligned'] : [])],
    axes: { T, H, K, E, ep },
    interpreterSteps: T * Math.ceil(H / 512) * K,
    build: () => build(spec),
  }
}

/** The local expert range of the rank that is tested; never empty. */
function localRange({ E, ep, rank }: Spec): [number, number] {
  const each = Math.max(1, Math.floor(E / ep))
  const start = Math.min(E - each, (rank < 0 ? Math.floor(ep / 2) : rank) * each)
  return [start, start + each - 1]
}

function build(spec: Spec): Problem {
  const { T, H, K } = spec
  const random = new Random(spec.seed)
  const routing = route(T, K, spec.E, spec.routing, random)
  const [start, end] = localRange(spec)
  const local = routing.topkIds.map((id) => (id >= start && id <= end ? 1 : 0))
  // Padded tokens reach the kernel with id -1.
  for (let slot = 0; slot < local.length; slot++) {
    if (local[slot] === 0 && random.below(4) === 0) routing.topkIds[slot] = -1
  }
  const rows = T * K
  const downOutput = keptRows.get({ ...spec, ids: 'int32', weights: 'float32', factor: 1 }, () => {
    const made = Guarded.create([rows, H], spec.dtype, spec.shift)
    fillRows(made.tensor, spec, routing, local)
    return made
  })
  const weightsDtype = spec.weights === 'same' ? spec.dtype : 'float32'
  const inputs: Record<string, Guarded> = {
    down_output: downOutput,
    src2dst: indexTensor([T * K], spec.ids, (slot) => destination(spec, routing, local, slot)),
    topk_weights: weightTensor([T, K], weightsDtype, routing.weights),
  }
  if (spec.gate === 'ids') inputs['topk_ids'] = indexTensor([T, K], spec.ids, (slot) => routing.topkIds[slot]!)
  const scalars: Record<string, number> = {
    ...(spec.gate === 'ids' ? { start_expert_id: start, end_expert_id: end } : {}),
    ...(spec.dstStart === 0 ? {} : { dst_start: spec.dstStart }),
    ...(spec.factor === 1 ? {} : { routed_scaling_factor: spec.factor }),
  }
  return {
    inputs,
    outputs: () => ({ output: Guarded.create([T, H], spec.dtype, spec.shift) }),
    scalars,
    oracle: () => keptOracle.get({ ...spec, ids: 'int32' }, () => oracle(spec, inputs, local)),
    bounds: boundsOf(spec),
    spoilers: spoilersOf(spec, local),
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) if (input !== downOutput) input[Symbol.dispose]()
    },
  }
}

/** Cases that differ in the dtype of their indices alone share the data and its oracle, which take most of the time. */
const keptRows = new Kept<Spec, Guarded>()
const keptOracle = new Kept<Spec, Oracle>()

/** DeepEP marks remote slots by any negative number, not only -1. */
function destination(spec: Spec, routing: Routing, local: Int32Array, slot: number): number {
  const row = routing.src2dst[slot]! + spec.dstStart
  return spec.gate === 'dst' && local[slot] === 0 ? -1 - (slot % 5) : row
}

function fillRows(rows: Tensor, spec: Spec, routing: Routing, local: Int32Array): void {
  if (rows.nbytes === 0) return
  native().parity.fillNormal(rows.handleFor('fillNormal'), spec.seed, 1)
  const row = rowsOf(rows)
  // Rows of remote slots are memory nobody has written: a kernel that touches them shows NaN.
  for (let slot = 0; slot < local.length; slot++) {
    if (local[slot] === 1) continue
    const { data, offset } = row(routing.src2dst[slot]!)
    data.fill(nanBits(spec.dtype) as never, offset, offset + spec.H)
  }
  if (spec.values === 'special') sprinkle(rows.data as Uint16Array | Float32Array, spec.dtype)
}

/** NaN, infinities, the largest number, the smallest subnormal and negative zero, here and there. */
function sprinkle(data: Uint16Array | Float32Array, dtype: DType): void {
  const specials: Record<string, number[]> = {
    float32: [Number.NaN, Infinity, -Infinity, 3.4028234663852886e38, 1.401298464324817e-45, -0],
    float16: [0x7e00, 0x7c00, 0xfc00, 0x7bff, 0x0001, 0x8000],
    bfloat16: [0x7fc0, 0x7f80, 0xff80, 0x7f7f, 0x0001, 0x8000],
  }
  const values = specials[dtype] ?? []
  for (let i = 0, k = 0; i < data.length; i += 37, k++) data[i] = values[k % values.length]!
}

function nanBits(dtype: DType): number {
  return dtype === 'float32' ? Number.NaN : dtype === 'float16' ? 0x7e01 : 0x7fc1
}

function indexTensor(shape: number[], dtype: 'int32' | 'int64', value: (slot: number) => number): Guarded {
  const guarded = Guarded.create(shape, dtype)
  const { data } = guarded.tensor
  if (data instanceof BigInt64Array) for (let i = 0; i < data.length; i++) data[i] = BigInt(value(i))
  else for (let i = 0; i < data.length; i++) data[i] = value(i)
  return guarded
}

function weightTensor(shape: number[], dtype: DType, weights: Float64Array): Guarded {
  const guarded = Guarded.create(shape, dtype)
  const { data } = guarded.tensor
  const single = new Float32Array(weights)
  if (dtype === 'float32') (data as Float32Array).set(single)
  else {
    const bits = new Uint32Array(single.buffer)
    // Truncation is as good a weight as any, and needs no rounding rules.
    for (let i = 0; i < bits.length; i++) data[i] = dtype === 'bfloat16' ? bits[i]! >>> 16 : halfBits(bits[i]!)
  }
  return guarded
}

/** float16 bits of a positive float32 in [2^-14, 2), truncated. */
function halfBits(bits: number): number {
  return Math.max(0x0400, (bits - (112 << 23)) >>> 13)
}

function oracle(spec: Spec, inputs: Record<string, Guarded>, local: Int32Array): Oracle {
  const { T, H, K, dstStart, factor } = spec
  const expected = Tensor.zeros([T, H], { dtype: 'float64' })
  const scale = Tensor.zeros([T, H], { dtype: 'float64' })
  const sum = expected.data as Float64Array
  const magnitude = scale.data as Float64Array
  const rows = rowsOf(inputs['down_output']!.tensor)
  const decode = decoderOf(spec.dtype)
  const weightOf = decoderOf(inputs['topk_weights']!.tensor.dtype)
  const weights = inputs['topk_weights']!.tensor.data
  const src2dst = inputs['src2dst']!.tensor.data
  for (let token = 0; token < T; token++) {
    const out = token * H
    for (let slot = token * K; slot < (token + 1) * K; slot++) {
      if (local[slot] === 0) continue
      const { data, offset } = rows(Number(src2dst[slot]) - dstStart)
      const weight = weightOf(weights, slot) * factor
      for (let column = 0; column < H; column++) {
        const term = decode(data, offset + column) * weight
        sum[out + column]! += term
        magnitude[out + column]! += Math.abs(term)
      }
    }
  }
  return {
    output: 'output',
    expected,
    scale,
    [Symbol.dispose]: () => {
      expected.dispose()
      scale.dispose()
    },
  }
}

/**
 * Each rounding is wrong by half a unit in the last place at most. Default: K float32 sums (and a factor), then one
 * rounding to the dtype. Triton's arithmetic: a rounded weight (and its product with a rounded factor) costs a unit, and
 * each of the K sums half of one. A reference that rounds product and sum apart pays twice.
 */
function boundsOf({ K, dtype, factor }: Spec): Problem['bounds'] {
  const narrow = dtype === 'float32' ? 0 : 0.5
  const single = 0.5 * 2 ** (significantBits(dtype) - 24)
  const scaled = factor === 1 ? 0 : 1
  // A partial sum may round up past a power of two, where the unit doubles: hence a last unit of reserve.
  return {
    fp32: narrow + (K + scaled) * single * (narrow === 0 ? 2 : 1) + (narrow === 0 ? 0 : single),
    triton: K / 2 + 1 + 2 * scaled + 1,
    reference: K + 1 + 2 * scaled + 1,
  }
}

function spoilersOf({ T, K, gate }: Spec, local: Int32Array): Spoiler[] {
  const locals = [...local.keys()].filter((slot) => local[slot] === 1)
  const first = locals[0]
  const other = locals.find((slot) => first !== undefined && Math.floor(slot / K) !== Math.floor(first / K))
  return [
    {
      name: 'dropped slot',
      apply: (inputs) => {
        if (first === undefined || T === 0) return false
        write(inputs[gate === 'ids' ? 'topk_ids' : 'src2dst']!, first, -1)
        return true
      },
    },
    {
      name: 'swapped rows',
      apply: (inputs) => {
        if (first === undefined || other === undefined) return false
        const { data } = inputs['src2dst']!.tensor
        const kept = Number(data[first])
        write(inputs['src2dst']!, first, Number(data[other]))
        write(inputs['src2dst']!, other, kept)
        return true
      },
    },
  ]
}

function write(guarded: Guarded, index: number, value: number): void {
  const { data } = guarded.tensor
  if (data instanceof BigInt64Array) data[index] = BigInt(value)
  else data[index] = value
}

const dtypes: DType[] = ['float32', 'float16', 'bfloat16']

/** Every model's shape at a small token count, then one hazard at a time. */
function standard(): Case[] {
  const specs: Partial<Spec>[] = []
  for (const { hidden: H, experts: E, topk: K } of Object.values(presets)) {
    specs.push(
      { T: 1, H, E, K },
      { T: 3, H, E, K, ep: 8, dtype: 'float16', ids: 'int64' },
      { T: 7, H, E, K, ep: 8, routing: 'skewed' },
    )
  }
  for (const dtype of dtypes) {
    specs.push(
      { T: 0, dtype },
      { T: 1, dtype },
      { T: 2, dtype, ep: 8, routing: 'skewed' },
      { T: 64, H: 128, K: 2, dtype, ids: 'int64', weights: 'same' },
      { T: 64, H: 256, K: 4, dtype, ep: 8, routing: 'skewed' },
      { H: 1, dtype },
      { H: 7, dtype, K: 6 },
      { H: 129, dtype, ep: 4 },
      { H: 999, dtype, K: 3, weights: 'same' },
      { shift: 1, dtype },
      { K: 1, dtype, ep: 8 },
      { K: 11, dtype },
      { gate: 'dst', dtype, ep: 4, ids: 'int64' },
      { gate: 'dst', dtype, ep: 2, factor: 2.5 },
      { dstStart: 1000, dtype, ep: 8 },
      { factor: 0.3, dtype, ep: 2 },
      { values: 'special', dtype },
      { values: 'special', dtype, ep: 4, H: 1000 },
    )
  }
  // More tokens than a grid's second axis counts.
  specs.push({ T: 70000, H: 16, K: 2, dtype: 'float16' })
  return specs.map((spec) => caseOf({ ...defaults, ...spec }))
}

function grid(options: GridOptions): Case[] {
  const shapes =
    options.presets.length > 0
      ? options.presets
          .map((name) => presets[name]!)
          .map(({ hidden, experts, topk }) => ({ H: hidden, E: experts, K: topk }))
      : options.hidden.flatMap((H) => options.topk.flatMap((K) => options.experts.map((E) => ({ H, E, K }))))
  const specs: Spec[] = []
  for (const shape of shapes)
    for (const T of options.tokens)
      for (const dtype of options.dtypes)
        for (const ep of options.ep)
          for (const routing of options.routings)
            for (const weights of options.weightsDtypes)
              for (const ids of options.idsDtypes)
                if (!(dtype === 'float32' && weights === 'same' && options.weightsDtypes.includes('float32')))
                  specs.push({ ...defaults, ...shape, T, dtype, ep, ids, weights, routing, seed: options.seed })
  return specs.map(caseOf)
}

const cases: OpCases = { op: 'post_reorder', standard, grid, parse }
export default cases
