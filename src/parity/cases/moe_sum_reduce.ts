import type { DType } from '../../dtype.js'
import type { Case, GridOptions, OpCases, Problem } from '../case.js'
import { Expectation } from '../expectation.js'
import { normalTensor, sprinkle } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { type Spec as BaseSpec, caseOf, casesOf, type Family, parseCase } from '../spec.js'
import { sumBounds, sumRows } from '../sums.js'
import { itemsizeOf } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  H: number
  K: number
  dtype: DType
  factor: number
  shift: number
  values: 'normal' | 'special'
}

const family: Family<Spec> = {
  op: 'moe_sum_reduce',
  defaults: { T: 7, H: 512, K: 8, dtype: 'bfloat16', factor: 1, shift: 0, values: 'normal', seed: 1 },
  axes: ({ T, H, K }) => ({ T, H, K }),
  tags: ({ values, shift }) => [values, ...(shift ? ['unaligned'] : [])],
  steps: ({ T, H, K }) => T * Math.ceil(H / 512) * K,
  build,
}

function build(spec: Spec): Problem {
  const { T, H, K, dtype, factor, seed, shift } = spec
  const inputs = { input: normalTensor([T, K, H], dtype, seed, 1, shift) }
  if (spec.values === 'special') sprinkle(inputs.input.tensor)
  return {
    inputs,
    outputs: () => ({ output: Guarded.create([T, H], dtype, shift) }),
    scalars: factor === 1 ? {} : { routed_scaling_factor: factor },
    bytes: (K + 1) * T * H * itemsizeOf(dtype),
    oracle: () => {
      const expectation = new Expectation()
      const page = expectation.floats('output', [T, H], sumBounds(K, dtype, factor))
      using rows = inputs.input.tensor.view([T * K, H])
      sumRows(
        page,
        spec,
        rows,
        (slot) => slot,
        () => factor,
      )
      return expectation
    },
    spoilers: [
      {
        name: 'swapped rows',
        apply: (copies) => {
          // Of two tokens: within one, the sum would be the same.
          const { data } = copies['input']!.tensor
          if (T < 2 || H < 16) return false
          const first = data.slice(0, H)
          data.copyWithin(0, K * H, K * H + H)
          data.set(first as never, K * H)
          return true
        },
      },
    ],
    [Symbol.dispose]: () => inputs.input[Symbol.dispose](),
  }
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = Object.values(presets).map(({ hidden: H, topk: K }) => ({ T: 3, H, K }))
  for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 12, dtype, K: 9 },
      { dtype, H: 999, K: 3, shift: 1 },
      { dtype, H: 1, K: 2 },
      { dtype, H: 24, K: 1 },
      { dtype, factor: 2.5 },
      { dtype, values: 'special', H: 129 },
    )
  }
  specs.push({ T: 70000, H: 16, K: 2, dtype: 'float16' })
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, topk: K }) =>
    cross({ T: options.tokens, dtype: options.dtypes, factor: [1, 2.5] }).map((spec) =>
      caseOf(family, { H, K, ...spec, seed: options.seed }),
    ),
  )
}

const cases: OpCases = {
  op: 'moe_sum_reduce',
  // The original is a CUDA kernel of sgl-kernel, and sums in float32 to begin with.
  references: ['float64', 'torch', 'triton'],
  standard,
  grid,
  parse: (name) => parseCase(family, name),
}
export default cases
