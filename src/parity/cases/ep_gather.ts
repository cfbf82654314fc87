import type { DType } from '../../dtype.js'
import type { Case, GridOptions, Known, OpCases, Problem, RecordedCall } from '../case.js'
import { Expectation } from '../expectation.js'
import { floatTensor, indexTensor, nanBits, normalTensor, sprinkle, swap, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { Random } from '../random.js'
import { referenceNames } from '../references.js'
import { localRange, type RoutingKind, route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { sumBounds, sumRows } from '../sums.js'
import { decoderOf, itemsizeOf } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  H: number
  K: number
  E: number
  ep: number
  rank: number
  dtype: DType
  ids: 'int32' | 'int64'
  weights: 'float32' | 'same'
  routing: RoutingKind
  shift: number
  values: 'normal' | 'special'
}

const family: Family<Spec> = {
  op: 'ep_gather',
  defaults: {
    T: 7,
    H: 1024,
    K: 8,
    E: 32,
    ep: 4,
    rank: -1,
    dtype: 'bfloat16',
    ids: 'int64',
    weights: 'float32',
    routing: 'uniform',
    shift: 0,
    values: 'normal',
    seed: 1,
  },
  axes: ({ T, H, K, E, ep }) => ({ T, H, K, E, ep }),
  tags: ({ routing, values, weights }) => [routing, values, `weights-${weights}`],
  steps: ({ T, H, K, ep }) => (T * Math.ceil(H / 512) * K) / ep,
  build,
}

function build(spec: Spec): Problem {
  const { T, H, K, dtype, ids, seed, shift } = spec
  const random = new Random(seed)
  const [start, end] = localRange(spec)
  const routing = route(T, K, spec.E, spec.routing, random)
  const local = routing.topkIds.map((id) => (id >= start && id <= end ? id - start : -1))
  // Half as many rows again as slots: rows that belong to no slot are memory nobody has written.
  const rows = Math.ceil(T * K * 1.5)
  const weightsDtype = spec.weights === 'same' ? dtype : 'float32'
  const inputs: Record<string, Guarded> = {
    input_tensor: normalTensor([rows, H], dtype, seed, 1, shift),
    recv_topk_ids: indexTensor([T, K], ids, (slot) => local[slot]!),
    recv_topk_weight: floatTensor([T, K], weightsDtype, (slot) => routing.weights[slot]!),
    input_index: indexTensor([T, K], 'int32', (slot) => (local[slot]! < 0 ? -1 : routing.src2dst[slot]!)),
  }
  const { data } = inputs['input_tensor']!.tensor
  const used = new Set([...local.keys()].filter((slot) => local[slot]! >= 0).map((slot) => routing.src2dst[slot]!))
  for (let row = 0; row < rows; row++) {
    if (!used.has(row)) data.fill(nanBits(dtype) as never, row * H, (row + 1) * H)
  }
  if (spec.values === 'special') sprinkle(inputs['input_tensor']!.tensor)
  const first = local.findIndex((id) => id >= 0)
  return {
    inputs,
    outputs: () => ({ output_tensor: Guarded.create([T, H], dtype, shift) }),
    scalars: {},
    bytes: (local.filter((id) => id >= 0).length + T) * H * itemsizeOf(dtype),
    oracle: () => oracle(spec, inputs),
    spoilers: [
      {
        name: 'dropped slot',
        apply: (copies) => {
          if (first >= 0) write(copies['recv_topk_ids']!, first, -1)
          return first >= 0
        },
      },
      {
        name: 'swapped rows',
        apply: (copies) => {
          const other = local.findIndex((id, slot) => id >= 0 && Math.floor(slot / K) > Math.floor(first / K))
          if (first >= 0 && other >= 0) swap(copies['input_index']!, first, other)
          return first >= 0 && other >= 0
        },
      },
    ],
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) input[Symbol.dispose]()
    },
  }
}

function recorded({ inputs }: RecordedCall): Known {
  const { shape, dtype } = inputs['input_tensor']!.tensor
  const [T = 0, K = 0] = inputs['recv_topk_ids']!.tensor.shape
  const spec: Spec = { ...family.defaults, T, K, H: shape.at(-1)!, dtype, ep: 1 }
  return {
    dtype,
    axes: { T, H: spec.H, K },
    interpreterSteps: family.steps(spec),
    oracle: () => oracle(spec, inputs),
  }
}

function oracle({ T, H, K, dtype }: Spec, inputs: Record<string, Guarded>): Expectation {
  const expectation = new Expectation()
  const page = expectation.floats('output_tensor', [T, H], sumBounds(K, dtype, 1))
  const { data: weights, dtype: weightsDtype } = inputs['recv_topk_weight']!.tensor
  const decode = decoderOf(weightsDtype)
  const ids = inputs['recv_topk_ids']!.tensor.data
  const index = inputs['input_index']!.tensor.data
  sumRows(
    page,
    { T, H, K },
    inputs['input_tensor']!.tensor,
    (slot) => (Number(ids[slot]) < 0 ? -1 : Number(index[slot])),
    (slot) => decode(weights, slot),
  )
  return expectation
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = []
  for (const { hidden: H, experts: E, topk: K } of Object.values(presets)) specs.push({ T: 3, H, E, K, ep: 8 })
  for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 12, dtype, ep: 1 },
      { dtype, routing: 'skewed', ids: 'int32' },
      { dtype, H: 999, K: 3, shift: 1, ep: 2 },
      { dtype, H: 1, ep: 1 },
      { dtype, K: 1, weights: 'same', ep: 1 },
      { dtype, K: 11, ep: 2 },
      { dtype, values: 'special', ep: 1, E: 9, H: 129 },
    )
  }
  specs.push({ T: 70000, H: 16, K: 2, E: 8, ep: 2, dtype: 'float16' })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, experts: E, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: options.dtypes,
      ep: options.ep,
      ids: options.idsDtypes,
      weights: options.weightsDtypes,
      routing: options.routings,
    }).map((spec) => caseOf(family, { H, E, K, ...spec, seed: options.seed })),
  )
}

const cases: OpCases = {
  op: 'ep_gather',
  // Its sums are float32 to begin with.
  references: referenceNames.filter((name) => name !== 'triton-float32'),
  standard,
  grid,
  parse: (name) => parseCase(family, name),
  recorded,
}
export default cases
