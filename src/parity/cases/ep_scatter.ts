import type { DType } from '../../dtype.js'
import type { Case, GridOptions, Known, OpCases, Problem, RecordedCall, Spoiler } from '../case.js'
import { Expectation } from '../expectation.js'
import { indexTensor, normalTensor, quarter, scaleTensor, sprinkle, swap, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { groupsOf } from '../quantise.js'
import { Random } from '../random.js'
import { referenceNames } from '../references.js'
import { localRange, type RoutingKind, route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { decoderOf, itemsizeOf } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  H: number
  K: number
  /** Experts of all ranks; the local ones are counted from 0. */
  E: number
  ep: number
  rank: number
  dtype: DType
  ids: 'int32' | 'int64'
  routing: RoutingKind
  scales: number
  /** Reservations are multiples of this. */
  pad: number
  /** Rows beyond the last reservation. */
  spare: number
  values: 'normal' | 'special'
}

const family: Family<Spec> = {
  op: 'ep_scatter',
  defaults: {
    T: 7,
    H: 512,
    K: 8,
    E: 32,
    ep: 4,
    rank: -1,
    dtype: 'bfloat16',
    ids: 'int64',
    routing: 'uniform',
    scales: 0,
    pad: 128,
    spare: 0,
    values: 'normal',
    seed: 1,
  },
  axes: ({ T, H, K, E, ep }) => ({ T, H, K, E, ep }),
  tags: ({ routing, scales, values }) => [routing, values, ...(scales ? ['scaled'] : [])],
  steps: ({ T, K, E, ep }) => (T * K) / ep + E,
  build,
}

/** Local ids and the rows reserved for them. */
function plan({ T, K, ep, rank, E, routing, pad, spare, seed }: Spec) {
  const random = new Random(seed)
  const [start, end] = localRange({ E, ep, rank })
  const ids = route(T, K, E, routing, random).topkIds.map((id) => (id >= start && id <= end ? id - start : -1))
  const experts = end - start + 1
  const counts = new Int32Array(experts)
  for (const id of ids) if (id >= 0) counts[id]!++
  const reserved = counts.map((count) => Math.ceil(count / pad) * pad)
  const rows = reserved.reduce((sum, count) => sum + count, 0) + spare
  return { ids, experts, reserved, rows, random }
}

/** Where each expert's rows begin, and the row of each slot, in order of token and slot; -1 where it has none. */
function place({ ids, reserved, rows }: Placement): { starts: Int32Array; index: Int32Array } {
  const starts = new Int32Array(reserved.length)
  for (let e = 1; e < reserved.length; e++) starts[e] = starts[e - 1]! + reserved[e - 1]!
  const taken = new Int32Array(reserved.length)
  const index = ids.map((id) => {
    if (id < 0 || taken[id]! >= reserved[id]!) return -1
    const row = starts[id]! + taken[id]!++
    return row < rows ? row : -1
  })
  return { starts, index }
}

interface Placement {
  /** [T*K], local. */
  ids: Int32Array
  /** [experts] */
  reserved: Int32Array
  rows: number
}

function build(spec: Spec): Problem {
  const { T, H, K, dtype } = spec
  const { ids, experts, reserved, rows, random } = plan(spec)
  const groups = groupsOf(H)
  const inputs: Record<string, Guarded> = {
    recv_x: normalTensor([T, H], dtype, spec.seed, 3),
    recv_topk: indexTensor([T, K], spec.ids, (slot) => ids[slot]!),
    num_recv_tokens_per_expert: indexTensor([experts], 'int32', (e) => reserved[e]!),
    ...(spec.scales === 1 ? { recv_x_scale: scaleTensor([T, groups], random) } : {}),
  }
  if (spec.values === 'special') sprinkle(inputs['recv_x']!.tensor)
  return {
    inputs,
    outputs: () => ({
      expert_start_loc: Guarded.create([experts], 'int32'),
      output_tensor: Guarded.create([rows, H], dtype),
      ...(spec.scales === 1 ? { output_tensor_scale: Guarded.create([rows, groups], 'float32') } : {}),
      m_indices: Guarded.create([rows], 'int32'),
      output_index: Guarded.create([T, K], 'int32'),
    }),
    scalars: {},
    bytes: (ids.filter((id) => id >= 0).length + T) * H * itemsizeOf(dtype) + rows * 4,
    oracle: () => oracle(inputs, { ids, reserved, rows }),
    spoilers: [
      {
        name: 'dropped slot',
        apply: (copies) => {
          const first = ids.findIndex((id) => id >= 0)
          if (first >= 0) write(copies['recv_topk']!, first, -1)
          return first >= 0
        },
      },
      {
        // Changing one alone could ask for more rows than were reserved.
        name: 'swapped experts',
        apply: (copies) => {
          const first = ids.findIndex((id) => id >= 0)
          const other = ids.findIndex((id) => id >= 0 && id !== ids[first])
          if (other >= 0) swap(copies['recv_topk']!, first, other)
          return other >= 0
        },
      },
      ...(spec.scales === 1 ? [changedScale(spec, ids, groups)] : []),
    ],
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) input[Symbol.dispose]()
    },
  }
}

function recorded({ inputs, outputs }: RecordedCall): Known {
  const { shape, dtype } = inputs['recv_x']!.tensor
  const topk = inputs['recv_topk']!.tensor
  const [T = 0, K = 0] = topk.shape
  const reserved = Int32Array.from(inputs['num_recv_tokens_per_expert']!.tensor.data as Int32Array)
  const spec: Spec = { ...family.defaults, T, K, H: shape[1]!, E: reserved.length, dtype, ep: 1 }
  const ids = Int32Array.from(topk.data as ArrayLike<number | bigint>, Number)
  return {
    dtype,
    axes: family.axes(spec),
    interpreterSteps: family.steps(spec),
    oracle: () => oracle(inputs, { ids, reserved, rows: outputs['m_indices']!.shape[0]! }),
  }
}

function oracle(inputs: Record<string, Guarded>, placement: Placement): Expectation {
  const { reserved, rows } = placement
  const { starts, index } = place(placement)
  const { data, dtype, shape } = inputs['recv_x']!.tensor
  const H = shape[1]!
  const [T = 0, K = 0] = inputs['recv_topk']!.tensor.shape
  const expectation = new Expectation()
  expectation.integers('expert_start_loc', [starts.length]).expected.set(starts)
  const { expected } = expectation.floats('output_tensor', [rows, H])
  const decode = decoderOf(dtype)
  const scales = inputs['recv_x_scale']?.tensor
  const groups = scales?.shape[1] ?? 0
  const scalePage = scales && expectation.floats('output_tensor_scale', [rows, groups])
  const mIndices = expectation.integers('m_indices', [rows]).expected
  for (let e = 0; e < reserved.length; e++) mIndices.fill(e, starts[e], starts[e]! + reserved[e]!)
  expectation.integers('output_index', [T, K]).expected.set(index)
  index.forEach((row, slot) => {
    if (row < 0) return
    const token = Math.floor(slot / K)
    for (let column = 0; column < H; column++) expected[row * H + column] = decode(data, token * H + column)
    for (let group = 0; scalePage !== undefined && group < groups; group++) {
      scalePage.expected[row * groups + group] = (scales!.data as Float32Array)[token * groups + group]!
    }
  })
  return expectation
}

/** The scale that the first local slot's row has first. */
function changedScale({ K }: Spec, ids: Int32Array, groups: number): Spoiler {
  return {
    name: 'changed scale',
    apply: (copies) => {
      const first = ids.findIndex((id) => id >= 0)
      if (first >= 0) quarter(copies['recv_x_scale']!, Math.floor(first / K) * groups)
      return first >= 0
    },
  }
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = []
  for (const { hidden: H, experts: E, topk: K } of Object.values(presets)) specs.push({ T: 3, H, E, K, ep: 8 })
  for (const dtype of ['bfloat16', 'float8_e4m3fn'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 12, dtype, scales: 1, H: 1024 },
      { dtype, scales: 1, routing: 'skewed', ids: 'int32', spare: 128 },
      { dtype, H: 999, K: 3, pad: 1, scales: 1 },
      { dtype, H: 1, pad: 1, spare: 5 },
      { dtype, routing: 'single', K: 1, ep: 1 },
      { dtype, values: 'special', ep: 1, E: 9, H: 129 },
    )
  }
  specs.push({ T: 12, dtype: 'float32', H: 130, scales: 1 }, { T: 12, dtype: 'float16', H: 128, scales: 1 })
  specs.push({ T: 70000, H: 16, K: 2, E: 8, ep: 1, pad: 1, dtype: 'float8_e4m3fn' })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, experts: E, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: ['bfloat16', 'float8_e4m3fn'] as const,
      ep: options.ep,
      ids: options.idsDtypes,
      routing: options.routings,
    }).map((spec) => caseOf(family, { H, E, K, scales: 1, ...spec, seed: options.seed })),
  )
}

const cases: OpCases = {
  op: 'ep_scatter',
  // There is no arithmetic in it that could be float32.
  references: referenceNames.filter((name) => name !== 'triton-float32'),
  standard,
  grid,
  parse: (name) => parseCase(family, name),
  recorded,
}
export default cases
