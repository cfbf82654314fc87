import type { Case, GridOptions, Known, OpCases, Problem, RecordedCall } from '../case.js'
import { Expectation } from '../expectation.js'
import { indexTensor, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { Random } from '../random.js'
import { referenceNames } from '../references.js'
import { type RoutingKind, route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { itemsizeOf } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  K: number
  E: number
  /** Of topk_ids, and so of reorder_topk_ids. */
  dtype: 'int32' | 'int64'
  dst: 'int32' | 'int64'
  routing: RoutingKind
  /** How many slots of a hundred have the id -1. */
  invalid: number
  negatives: 'counted' | 'dropped'
  /** Rows of each expert in DeepGEMM's form; 0: packed. */
  mMax: number
  /** Whether masked_m is asked for. */
  counts: number
}

const family: Family<Spec> = {
  op: 'preprocess',
  defaults: {
    T: 7,
    K: 8,
    E: 64,
    dtype: 'int32',
    dst: 'int32',
    routing: 'uniform',
    invalid: 0,
    negatives: 'counted',
    mMax: 0,
    counts: 0,
    seed: 1,
  },
  axes: ({ T, K, E }) => ({ T, H: 1, K, E }),
  tags: ({ routing, negatives, mMax }) => [routing, negatives, mMax > 0 ? 'padded' : 'packed'],
  steps: ({ T, K, E }) => E * Math.ceil(Math.log2(T * K + 2)) + Math.ceil((T * K) / 512),
  build,
}

function build(spec: Spec): Problem {
  const { T, K, E, dtype, dst, negatives, mMax } = spec
  const random = new Random(spec.seed)
  const { topkIds } = route(T, K, E, spec.routing, random)
  for (let slot = 0; slot < topkIds.length; slot++) if (random.below(100) < spec.invalid) topkIds[slot] = -1
  const inputs = { topk_ids: indexTensor([T, K], dtype, (slot) => topkIds[slot]!) }
  return {
    inputs,
    outputs: () => ({
      src2dst: Guarded.create([T * K], dst),
      seg_indptr: Guarded.create([E + 1], 'int64'),
      reorder_topk_ids: Guarded.create([T * K], dtype),
      ...(spec.counts === 1 ? { masked_m: Guarded.create([E], 'int32') } : {}),
    }),
    scalars: { ...(negatives === 'counted' ? {} : { negatives }), ...(mMax === 0 ? {} : { m_max: mMax }) },
    bytes: T * K * (2 * itemsizeOf(dtype) + itemsizeOf(dst)),
    oracle: () => oracle(spec, topkIds),
    spoilers: [
      {
        name: 'changed expert',
        apply: (copies) => {
          const first = topkIds.findIndex((id) => id >= 0)
          if (first < 0 || E === 1) return false
          write(copies['topk_ids']!, first, (topkIds[first]! + 1) % E)
          return true
        },
      },
    ],
    [Symbol.dispose]: () => inputs.topk_ids[Symbol.dispose](),
  }
}

function recorded({ inputs, outputs, scalars }: RecordedCall): Known {
  const ids = inputs['topk_ids']!.tensor
  const [T = 0, K = 0] = ids.shape
  const spec: Spec = {
    ...family.defaults,
    T,
    K,
    E: outputs['seg_indptr']!.shape[0]! - 1,
    dtype: ids.dtype as Spec['dtype'],
    negatives: (scalars['negatives'] ?? 'counted') as Spec['negatives'],
    mMax: Number(scalars['m_max'] ?? 0),
    counts: 'masked_m' in outputs ? 1 : 0,
  }
  return {
    dtype: spec.dtype,
    axes: family.axes(spec),
    interpreterSteps: family.steps(spec),
    oracle: () => oracle(spec, Int32Array.from(ids.data as ArrayLike<number | bigint>, Number)),
  }
}

/** A counting sort with the slots of -1 as the first bucket. */
function oracle({ T, K, E, negatives, mMax, counts: counted }: Spec, topkIds: Int32Array): Expectation {
  const counts = new Int32Array(E + 1)
  for (const id of topkIds) counts[id + 1]!++
  const invalid = counts[0]!
  const dropped = negatives === 'dropped' ? invalid : 0
  const begins = new Int32Array(E + 2)
  for (let bucket = 0; bucket <= E; bucket++) begins[bucket + 1] = begins[bucket]! + counts[bucket]!
  const expectation = new Expectation()
  const src2dst = expectation.integers('src2dst', [T * K]).expected
  const segIndptr = expectation.integers('seg_indptr', [E + 1]).expected
  const reorder = expectation.integers('reorder_topk_ids', [T * K]).expected
  const maskedM = counted === 1 ? expectation.integers('masked_m', [E]).expected : undefined
  segIndptr[0] = 0
  for (let expert = 0; expert < E; expert++) {
    segIndptr[expert + 1] = begins[expert + 2]! - dropped
    if (maskedM !== undefined) maskedM[expert] = counts[expert + 1]!
  }
  const taken = new Int32Array(E + 1)
  topkIds.forEach((id, slot) => {
    const position = taken[id + 1]!++
    const row = begins[id + 1]! + position - dropped
    src2dst[slot] = mMax === 0 ? row : id < 0 ? -1 : id * mMax + position
    reorder[row < 0 ? row + T * K : row] = id
  })
  return expectation
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = []
  for (const { experts: E, topk: K } of Object.values(presets)) specs.push({ T: 33, E, K, invalid: 20 })
  for (const dtype of ['int32', 'int64'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 1, dtype },
      { T: 64, K: 2, E: 1, dtype },
      { T: 100, K: 3, E: 512, dtype, invalid: 10, counts: 1 },
      { T: 50, dtype, routing: 'skewed', invalid: 30 },
      { T: 40, dtype, routing: 'single', K: 1, E: 9 },
      { T: 20, dtype, invalid: 100 },
      { T: 50, dtype, dst: 'int64', negatives: 'dropped', invalid: 40 },
      { T: 9, dtype, dst: 'int64', negatives: 'dropped', invalid: 100 },
      { T: 50, dtype, mMax: 256, invalid: 10, counts: 1 },
      { T: 50, dtype, mMax: 64, negatives: 'dropped', invalid: 50, routing: 'skewed', counts: 1 },
    )
  }
  specs.push({ T: 70000, K: 2, E: 256, invalid: 5 })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ experts: E, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: options.idsDtypes,
      routing: options.routings,
      invalid: [0, 20],
      counts: [0, 1],
    }).map((spec) => caseOf(family, { E, K, ...spec, seed: options.seed })),
  )
}

const cases: OpCases = {
  op: 'preprocess',
  // There is no arithmetic in it that could be float32.
  references: referenceNames.filter((name) => name !== 'triton-float32'),
  standard,
  grid,
  parse: (name) => parseCase(family, name),
  recorded,
}
export default cases
