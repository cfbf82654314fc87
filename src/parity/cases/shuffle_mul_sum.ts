import type { DType } from '../../dtype.js'
import type { Case, GridOptions, OpCases, Problem } from '../case.js'
import { Expectation } from '../expectation.js'
import { floatTensor, indexTensor, normalTensor, sprinkle, swap, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { Random } from '../random.js'
import { route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { sumBounds, sumRows } from '../sums.js'
import { decoderOf, itemsizeOf } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  H: number
  K: number
  dtype: DType
  ids: 'int32' | 'int64'
  factors: 'none' | 'float32' | 'same'
  /** How many slots of a hundred are skipped. */
  skipped: number
  shift: number
  values: 'normal' | 'special'
}

const family: Family<Spec> = {
  op: 'shuffle_mul_sum',
  defaults: {
    T: 7,
    H: 512,
    K: 8,
    dtype: 'bfloat16',
    ids: 'int32',
    factors: 'float32',
    skipped: 0,
    shift: 0,
    values: 'normal',
    seed: 1,
  },
  axes: ({ T, H, K }) => ({ T, H, K }),
  tags: ({ factors, values, skipped }) => [`factors-${factors}`, values, ...(skipped ? ['skipped'] : [])],
  steps: ({ T, H, K }) => T * Math.ceil(H / 512) * K,
  build,
}

function build(spec: Spec): Problem {
  const { T, H, K, dtype, ids, factors, seed, shift } = spec
  const random = new Random(seed)
  const { src2dst, weights } = route(T, K, Math.max(K, 16), 'uniform', random)
  const skip = src2dst.map(() => (random.below(100) < spec.skipped ? 1 : 0))
  const factorsDtype = factors === 'same' ? dtype : 'float32'
  const inputs: Record<string, Guarded> = {
    input: normalTensor([T * K, H], dtype, seed, 1, shift),
    permutation: indexTensor([T * K], ids, (slot) => (skip[slot] === 1 ? -1 : src2dst[slot]!)),
    ...(factors === 'none' ? {} : { factors: floatTensor([T, K], factorsDtype, (slot) => weights[slot]!) }),
  }
  if (spec.values === 'special') sprinkle(inputs['input']!.tensor)
  const first = skip.indexOf(0)
  return {
    inputs,
    outputs: () => ({ output: Guarded.create([T, H], dtype, shift) }),
    scalars: {},
    bytes: (skip.filter((one) => one === 0).length + T) * H * itemsizeOf(dtype),
    oracle: () => {
      const expectation = new Expectation()
      const page = expectation.floats('output', [T, H], sumBounds(K, dtype, 1))
      const decode = decoderOf(factorsDtype)
      const data = inputs['factors']?.tensor.data
      sumRows(
        page,
        spec,
        inputs['input']!.tensor,
        (slot) => (skip[slot] === 1 ? -1 : src2dst[slot]!),
        (slot) => (data === undefined ? 1 : decode(data, slot)),
      )
      return expectation
    },
    spoilers: [
      {
        name: 'dropped slot',
        apply: (copies) => {
          if (first >= 0) write(copies['permutation']!, first, -1)
          return first >= 0
        },
      },
      {
        name: 'swapped rows',
        apply: (copies) => {
          const other = skip.findIndex((one, slot) => one === 0 && Math.floor(slot / K) > Math.floor(first / K))
          if (first >= 0 && other >= 0) swap(copies['permutation']!, first, other)
          return first >= 0 && other >= 0
        },
      },
    ],
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) input[Symbol.dispose]()
    },
  }
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = Object.values(presets).map(({ hidden: H, topk: K }) => ({ T: 3, H, K }))
  for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 12, dtype, ids: 'int64', factors: 'none' },
      { dtype, H: 999, K: 3, shift: 1 },
      { dtype, H: 1, K: 2, factors: 'none' },
      { dtype, H: 300, K: 1 },
      { dtype, factors: 'same' },
      { dtype, skipped: 40 },
      { dtype, values: 'special', H: 129, skipped: 20 },
    )
  }
  specs.push({ T: 70000, H: 16, K: 2, dtype: 'float16' })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: options.dtypes,
      ids: options.idsDtypes,
      factors: ['none', ...options.weightsDtypes] as const,
    }).map((spec) => caseOf(family, { H, K, ...spec, seed: options.seed })),
  )
}

const cases: OpCases = {
  op: 'shuffle_mul_sum',
  // The original is a CUDA kernel of sgl-kernel, and sums in float32 to begin with.
  references: ['float64', 'torch', 'triton'],
  standard,
  grid,
  parse: (name) => parseCase(family, name),
}
export default cases
