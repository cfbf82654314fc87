import type { DType } from '../../dtype.js'
import { native } from '../../native.js'
import type { Tensor } from '../../tensor.js'
import type { Case, GridOptions, Known, OpCases, Oracle, Problem, RecordedCall, Spoiler } from '../case.js'
import { Expectation } from '../expectation.js'
import { indexTensor, nanBits, normalTensor, sprinkle, swap, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { Kept } from '../kept.js'
import { presets } from '../presets.js'
import { Random } from '../random.js'
import { localOf, localRange, markLocal, type Routing, type RoutingKind, rangeOf, route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { sumBounds, sumRows } from '../sums.js'
import { decoderOf, itemsizeOf, rowsOf } from '../values.js'

interface Spec extends BaseSpec {
  /** Tokens, hidden size, top-k, experts. */
  T: number
  H: number
  K: number
  E: number
  /** The experts are split over this many ranks; this one is tested, the middle one when it is -1. */
  ep: number
  rank: number
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
  /** Whether a shared output and a residual are added. */
  shared: number
  residual: number
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
  shared: 0,
  residual: 0,
}

const family: Family<Spec> = {
  op: 'post_reorder',
  defaults,
  axes: ({ T, H, K, E, ep }) => ({ T, H, K, E, ep }),
  tags: (spec) => [
    spec.gate,
    spec.routing,
    spec.values,
    ...(spec.ep > 1 ? ['remote'] : []),
    ...(spec.shift ? ['unaligned'] : []),
  ],
  steps: ({ T, H, K }) => T * Math.ceil(H / 512) * K,
  build,
}

function build(spec: Spec): Problem {
  const { T, H, K } = spec
  const random = new Random(spec.seed)
  const routing = route(T, K, spec.E, spec.routing, random)
  const [start, end] = localRange(spec)
  const local = markLocal(routing.topkIds, [start, end], random)
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
  for (const [name, present] of [
    ['shared_output', spec.shared],
    ['residual', spec.residual],
  ] as const) {
    if (present === 1) inputs[name] = normalTensor([T, H], spec.dtype, spec.seed + name.length, 1, spec.shift)
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
    bytes: local.reduce((sum, one) => sum + one, T * (1 + spec.shared + spec.residual)) * H * itemsizeOf(spec.dtype),
    oracle: () => keptOracle.get({ ...spec, ids: 'int32' }, () => oracle(spec, inputs, local)),
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
  if (spec.values === 'special') sprinkle(rows)
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
  const { T, H, K, dtype, dstStart, factor, shared, residual } = spec
  const expectation = new Expectation()
  const page = expectation.floats('output', [T, H], sumBounds(K + shared + residual, dtype, factor))
  const weightOf = decoderOf(inputs['topk_weights']!.tensor.dtype)
  const weights = inputs['topk_weights']!.tensor.data
  const src2dst = inputs['src2dst']!.tensor.data
  sumRows(
    page,
    spec,
    inputs['down_output']!.tensor.view([inputs['down_output']!.tensor.numel / Math.max(1, H), H]),
    (slot) => (local[slot] === 0 ? -1 : Number(src2dst[slot]) - dstStart),
    (slot) => weightOf(weights, slot) * factor,
  )
  const decode = decoderOf(dtype)
  for (const name of ['shared_output', 'residual']) {
    const addend = inputs[name]?.tensor.data
    for (let i = 0; addend !== undefined && i < T * H; i++) {
      page.expected[i]! += decode(addend, i)
      page.scale[i]! += Math.abs(decode(addend, i))
    }
  }
  return expectation
}

function recorded({ inputs, scalars }: RecordedCall): Known {
  const rows = inputs['down_output']!.tensor
  const [T = 0, K = 0] = inputs['topk_weights']!.tensor.shape
  const ids = inputs['topk_ids']?.tensor.data
  const spec: Spec = {
    ...defaults,
    T,
    K,
    H: rows.shape.at(-1)!,
    dtype: rows.dtype,
    gate: ids === undefined ? 'dst' : 'ids',
    dstStart: Number(scalars['dst_start'] ?? 0),
    factor: Number(scalars['routed_scaling_factor'] ?? 1),
    shared: 'shared_output' in inputs ? 1 : 0,
    residual: 'residual' in inputs ? 1 : 0,
  }
  const range: [number, number] = ids === undefined ? [0, Infinity] : rangeOf(scalars)
  const local = localOf(ids ?? inputs['src2dst']!.tensor.data, range)
  return {
    dtype: spec.dtype,
    axes: { T, H: spec.H, K },
    interpreterSteps: family.steps(spec),
    oracle: () => oracle(spec, inputs, local),
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
        swap(inputs['src2dst']!, first, other)
        return true
      },
    },
  ]
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
      { shared: 1, dtype, ep: 4 },
      { shared: 1, residual: 1, dtype, ep: 2, factor: 2.5, H: 129 },
      { residual: 1, dtype, gate: 'dst', ep: 4 },
    )
  }
  // More tokens than a grid's second axis counts.
  specs.push({ T: 70000, H: 16, K: 2, dtype: 'float16' })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, experts: E, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: options.dtypes,
      ep: options.ep,
      routing: options.routings,
      weights: options.weightsDtypes,
      ids: options.idsDtypes,
    })
      .filter(
        ({ dtype, weights }) =>
          !(dtype === 'float32' && weights === 'same' && options.weightsDtypes.includes('float32')),
      )
      .map((spec) => caseOf(family, { H, E, K, ...spec, seed: options.seed })),
  )
}

const cases: OpCases = { op: 'post_reorder', standard, grid, parse: (name) => parseCase(family, name), recorded }
export default cases
