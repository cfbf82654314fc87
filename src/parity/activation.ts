import type { DType } from '../dtype.js'
import type { Bounds, Case, GridOptions, Known, OpCases, Problem, RecordedCall, Spoiler } from './case.js'
import { Expectation } from './expectation.js'
import { indexTensor, nanBits, normalTensor, quarter, scaleTensor, write } from './fill.js'
import { cross } from './grid.js'
import { Guarded } from './guard.js'
import { presets } from './presets.js'
import { absmaxOf, groupScale, groupsOf, nearJump, toFloat8 } from './quantise.js'
import { Random } from './random.js'
import { localOf, localRange, rangeOf } from './routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, clampedNaN, type Family, parseCase } from './spec.js'
import { decoderOf, encoderOf, itemsizeOf, roundsToInfinity, significantBits, smallestNormal } from './values.js'

interface Spec extends BaseSpec {
  /** Rows, width, experts. */
  R: number
  I: number
  E: number
  ep: number
  rank: number
  dtype: DType
  out: 'same' | 'float8_e4m3fn'
  ids: 'int32' | 'int64'
  /** What says which rows are active: all, by expert, or the first rows of each expert's. */
  gate: 'none' | 'ids' | 'masked'
  scales: number
  quantization: 'static' | 'group'
  format: 'float32' | 'power_of_two'
  shift: number
  values: 'normal' | 'special' | 'zeros'
}

/** An activation in float64, and the magnitude of the terms that make it up. */
interface Activation {
  value: (gate: number) => number
  size: (gate: number) => number
}

const alpha = 0.7978845608028654
const inner = (gate: number) => alpha * (gate + 0.044715 * gate ** 3)
const logistic = (x: number) => 1 / (1 + Math.exp(-x))

/**
 * Where e^gate is no normal float32, an implementation may come to 0 by flushing it or by overflow of e^-gate: wrong by
 * 88 * 2^-126 at most, which is less than a rounding of this.
 */
const vanishing = 2 ** -94

const activations: Record<'silu' | 'gelu', Activation> = {
  silu: {
    value: (gate) => gate * logistic(gate),
    size: (gate) => Math.max(Math.abs(gate * logistic(gate)), gate < -87 ? vanishing : 0),
  },
  // The original adds 1 and tanh, of which little is left for negative gates: a unit is one of what is added.
  gelu: {
    value: (gate) => gate * logistic(2 * inner(gate)),
    size: (gate) => Math.abs(gate / 2),
  },
}

/** The cases of silu_and_mul and gelu_and_mul. */
export function activationCases(name: 'silu' | 'gelu'): OpCases {
  const family: Family<Spec> = {
    op: `${name}_and_mul`,
    defaults: {
      R: 24,
      I: 256,
      E: 16,
      ep: 1,
      rank: -1,
      dtype: 'bfloat16',
      out: 'same',
      ids: 'int32',
      gate: 'ids',
      scales: 0,
      quantization: 'static',
      format: 'float32',
      shift: 0,
      values: 'normal',
      seed: 1,
    },
    axes: ({ R, I, E, ep }) => ({ T: R, H: I, R, I, E, ep }),
    tags: ({ gate, quantization, values, scales, ep }) => [
      gate,
      quantization,
      values,
      ...(scales ? ['scaled'] : []),
      ...(ep > 1 ? ['remote'] : []),
    ],
    steps: ({ R, I, ep }) => (R * Math.ceil(I / 256)) / ep,
    unspecified: ({ values, quantization }) =>
      values === 'special' && quantization === 'group' ? clampedNaN : undefined,
    build: (spec) => build(spec, name),
  }
  return {
    op: family.op,
    standard: () => casesOf(family, standard()),
    grid: (options) => grid(family, options),
    parse: (text) => parseCase(family, text),
    recorded: (call) => recorded(call, name, family.defaults),
  }
}

function recorded({ inputs, outputs, scalars }: RecordedCall, name: 'silu' | 'gelu', defaults: Spec): Known {
  const { shape, dtype, numel } = inputs['gateup_output']!.tensor
  const { shape: made, dtype: out } = outputs['down_input']!
  const I = made.at(-1)!
  const R = I === 0 ? 0 : numel / (2 * I)
  const ids = inputs['reorder_topk_ids']?.tensor.data
  const masked = inputs['masked_m']?.tensor.data
  const spec: Spec = {
    ...defaults,
    R,
    I,
    dtype,
    out: out === dtype ? 'same' : 'float8_e4m3fn',
    scales: 'scales' in inputs ? 1 : 0,
    quantization: (scalars['quantization'] ?? 'static') as Spec['quantization'],
    format: (scalars['scale_format'] ?? 'float32') as Spec['format'],
  }
  const [start, end] = rangeOf(scalars)
  const each = masked === undefined ? R : shape[1]!
  const active =
    masked === undefined
      ? ids === undefined
        ? new Int32Array(R).fill(1)
        : localOf(ids, [start, end])
      : Int32Array.from({ length: R }, (_, row) => (row % each < Number(masked[Math.floor(row / each)]) ? 1 : 0))
  const experts = Int32Array.from((ids ?? []) as ArrayLike<number | bigint>, Number)
  return {
    dtype,
    axes: { T: R, H: I },
    interpreterSteps: R * Math.ceil(I / 256),
    oracle: () => oracle(spec, activations[name], name, inputs, { active, experts, start, rows: made.slice(0, -1) }),
  }
}

/** Sorted by expert, as preprocess leaves them, -1 first. */
function expertsOfRows({ R, E }: Spec, random: Random): Int32Array {
  return Int32Array.from({ length: R }, () => random.below(E + 1) - 1).sort()
}

function build(spec: Spec, name: 'silu' | 'gelu'): Problem {
  const { R, I, E, ids, gate, quantization, format, out } = spec
  const random = new Random(spec.seed)
  const [start, end] = localRange(spec)
  const experts = expertsOfRows(spec, random)
  const each = R / E
  const masked = Int32Array.from({ length: E }, (_, e) =>
    e % 3 === 1 ? 0 : e % 3 === 2 ? each : random.below(each + 1),
  )
  const active = Int32Array.from({ length: R }, (_, row) => {
    if (gate === 'none') return 1
    if (gate === 'masked') return row % each < masked[Math.floor(row / each)]! ? 1 : 0
    return experts[row]! >= start && experts[row]! <= end ? 1 : 0
  })
  const inputs: Record<string, Guarded> = {
    gateup_output: inputOf(spec, active, activations[name]),
    ...(gate === 'ids' ? { reorder_topk_ids: indexTensor([R], ids, (row) => experts[row]!) } : {}),
    ...(gate === 'masked' ? { masked_m: indexTensor([E], 'int32', (e) => masked[e]!) } : {}),
    ...(spec.scales === 1 ? { scales: scaleTensor([end - start + 1], random) } : {}),
  }
  const rows = gate === 'masked' ? [E, each] : [R]
  const dtype = out === 'same' ? spec.dtype : out
  return {
    inputs,
    outputs: () => ({
      down_input: Guarded.create([...rows, I], dtype, spec.shift),
      ...(quantization === 'group' ? { output_scales: Guarded.create([...rows, groupsOf(I)], 'float32') } : {}),
    }),
    scalars: {
      ...(gate === 'ids' ? { start_expert_id: start, end_expert_id: end } : {}),
      ...(quantization === 'group' ? { quantization } : {}),
      ...(format === 'float32' ? {} : { scale_format: format }),
    },
    bytes: active.reduce((sum, one) => sum + one, 0) * I * (2 * itemsizeOf(spec.dtype) + itemsizeOf(dtype)),
    oracle: () => oracle(spec, activations[name], name, inputs, { active, experts, start, rows }),
    spoilers: spoilersOf(spec, active, experts),
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) input[Symbol.dispose]()
    },
  }
}

function spoilersOf({ R, I, E, gate, scales, ...range }: Spec, active: Int32Array, experts: Int32Array): Spoiler[] {
  const first = active.indexOf(1)
  const [start] = localRange({ E, ...range })
  return [
    {
      name: 'dropped row',
      apply: (copies) => {
        if (first < 0 || gate === 'none') return false
        if (gate === 'ids') write(copies['reorder_topk_ids']!, first, -1)
        else write(copies['masked_m']!, Math.floor((first * E) / R), 0)
        return true
      },
    },
    {
      name: 'changed gates',
      apply: (copies) => {
        // The sign of a row's gates: a single one is less than the rounding of all others to float8.
        if (first < 0 || I < 16) return false
        const { data, dtype } = copies['gateup_output']!.tensor
        for (let i = first * 2 * I; i < (first * 2 + 1) * I; i++) {
          data[i] = dtype === 'float32' ? -(data[i] as number) : (data[i] as number) ^ 0x8000
        }
        return true
      },
    },
    ...(scales === 1
      ? [
          {
            name: 'changed scale',
            apply: (copies: Record<string, Guarded>) => {
              if (first >= 0) quarter(copies['scales']!, experts[first]! - start)
              return first >= 0
            },
          },
        ]
      : []),
  ]
}

/** No group's largest magnitude is where a rounding of it would double a power-of-two scale. */
function leaveJumps({ tensor }: Guarded, { R, I }: Spec, { value }: Activation): void {
  const { data, dtype } = tensor
  const [decode, encode] = [decoderOf(dtype), encoderOf(dtype)]
  for (let group = 0; group < R * groupsOf(I); group++) {
    const row = Math.floor(group / groupsOf(I))
    const first = (group % groupsOf(I)) * 128
    const sizes = Array.from({ length: Math.min(128, I - first) }, (_, i) => {
      const gate = row * 2 * I + first + i
      return Math.abs(value(decode(data, gate)) * decode(data, gate + I))
    })
    const most = absmaxOf(sizes)
    if (!nearJump(most, 2 ** -5)) continue
    const up = (row * 2 + 1) * I + first + sizes.indexOf(most)
    data[up] = encode(decode(data, up) * 1.25)
  }
}

/**
 * What any float may be in both halves, and in the gates what is beyond the range of exp. The largest numbers are left out
 * of float32: a few of them are all that a norm sees, and whose result is nearer there is chance.
 */
function sprinkleSpecials({ tensor: { data, dtype } }: Guarded, width: number): void {
  const least = { float16: 2 ** -24, bfloat16: 2 ** -133 }[dtype as string] ?? 2 ** -149
  const largest = { float16: [65504, -65504], bfloat16: [2 ** 128 - 2 ** 120, 2 ** 120 - 2 ** 128] }[dtype as string]
  const anywhere = [Number.NaN, Infinity, -Infinity, 30, -30, -0, 1e-30, least]
  const gates = [...anywhere, -88, -95, -1000, ...(largest ?? [])]
  const encode = encoderOf(dtype)
  for (let i = 0, k = 0; i < data.length; i += 37, k++) {
    const values = i % (2 * width) < width ? gates : anywhere
    data[i] = encode(values[k % values.length]!)
  }
}

function inputOf(spec: Spec, active: Int32Array, activation: Activation): Guarded {
  const { R, I, dtype, seed, shift, values } = spec
  const input = normalTensor([R, 2 * I], dtype, seed, 2, shift)
  const { data } = input.tensor
  if (values === 'special') sprinkleSpecials(input, I)
  if (values === 'zeros') for (let row = 0; row < R; row += 2) data.fill(0 as never, row * 2 * I, (row + 1) * 2 * I)
  if (spec.format === 'power_of_two') leaveJumps(input, spec, activation)
  // Rows of remote experts are memory nobody has written.
  for (let row = 0; row < R; row++)
    if (active[row] === 0) data.fill(nanBits(dtype) as never, row * 2 * I, (row + 1) * 2 * I)
  return input
}

/**
 * Default: float32 to the end. On a GPU 16-bit inputs go through an approximate exp, wrong by some 10 units of a float32,
 * which 16 bits do not show. Triton's arithmetic rounds activation and product to the dtype, and with a scale its
 * reciprocal and one more product; each costs a unit at most, the last half of one. Where a scale is found, the largest
 * magnitude carries those errors into all values of its group.
 */
function boundsOf(
  { dtype, out, scales, quantization }: Spec,
  name: 'silu' | 'gelu',
): { values: Bounds; scales: Bounds } {
  const roundings = scales === 1 ? 4 : 2
  const unit = 2 ** -significantBits(dtype)
  // exp's argument grows with the gate, and its error with it; float32 shows what 16 bits hide.
  const single = name === 'gelu' ? 48 : 32
  const relative = dtype === 'float32' ? single * 2 ** -23 : 2 * unit
  const found = { fp32: single, triton: relative * 2 ** 24 + single, reference: relative * 2 ** 24 + single }
  if (quantization === 'group') {
    const values = 0.51 + 16 * 2 * relative
    return { values: { fp32: 0.52, triton: values, reference: values }, scales: found }
  }
  const before = roundings * unit * 16
  if (out === 'float8_e4m3fn') {
    return { values: { fp32: 0.52, triton: 0.52 + before, reference: 0.52 + before }, scales: found }
  }
  const rounded = dtype === 'float32' ? single + roundings : roundings - 0.4
  return {
    values: { fp32: dtype === 'float32' ? 8 : 0.52, triton: rounded, reference: rounded },
    scales: found,
  }
}

function oracle(
  spec: Spec,
  { value, size }: Activation,
  name: 'silu' | 'gelu',
  inputs: Record<string, Guarded>,
  { active, experts, start, rows }: { active: Int32Array; experts: Int32Array; start: number; rows: number[] },
): Expectation {
  const { R, I, dtype, out, quantization, format } = spec
  const bounds = boundsOf(spec, name)
  const expectation = new Expectation()
  const page = expectation.floats('down_input', [...rows, I], bounds.values)
  const groups = groupsOf(I)
  const scalePage =
    quantization === 'group' ? expectation.floats('output_scales', [...rows, groups], bounds.scales) : undefined
  const { data } = inputs['gateup_output']!.tensor
  const decode = decoderOf(dtype)
  const divisors = inputs['scales']?.tensor.data as Float32Array | undefined
  // An activation that is rounded where the dtype is subnormal is wrong by so much, which up magnifies.
  const normal = smallestNormal(dtype)
  const narrow = out === 'same' ? (x: number) => roundsToInfinity(dtype, x) : toFloat8
  for (let row = 0; row < R; row++) {
    if (active[row] === 0) continue
    const divisor = divisors === undefined ? 1 : divisors[experts[row]! - start]!
    for (let group = 0; group < groups; group++) {
      const columns = Array.from({ length: Math.min(128, I - group * 128) }, (_, i) => group * 128 + i)
      const made = columns.map((column) => {
        const gate = decode(data, row * 2 * I + column)
        const up = decode(data, (row * 2 + 1) * I + column)
        // The product is float32 before anything is done with it.
        const y = roundsToInfinity('float32', value(gate) * up) / divisor
        return { column, y, terms: Math.abs((Math.max(size(gate), normal) * up) / divisor) }
      })
      const most = absmaxOf(made.map(({ y }) => y))
      const scale = scalePage === undefined ? 1 : groupScale(most, format)
      if (scalePage !== undefined) {
        scalePage.expected[row * groups + group] = scale
        scalePage.scale[row * groups + group] = scale
      }
      for (const { column, y, terms } of made) {
        page.expected[row * I + column] = narrow(y / scale)
        page.scale[row * I + column] = Math.max(Math.abs(narrow(y / scale)), toFinite(terms / scale))
      }
    }
  }
  return expectation
}

function toFinite(x: number): number {
  return Number.isFinite(x) ? x : 0
}

function standard(): Partial<Spec>[] {
  const specs: Partial<Spec>[] = []
  for (const { intermediate: I, experts: E } of Object.values(presets)) specs.push({ R: 5, I, E, ep: 2, ids: 'int64' })
  for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
    specs.push(
      { R: 0, dtype },
      { R: 1, dtype, gate: 'none' },
      { dtype, ep: 4 },
      { dtype, I: 999, gate: 'none', shift: 1 },
      { dtype, I: 1 },
      { dtype, scales: 1, ep: 2, I: 130 },
      { dtype, values: 'special', gate: 'none' },
      { dtype, out: 'float8_e4m3fn', ep: 2 },
      { dtype, out: 'float8_e4m3fn', scales: 1, I: 77 },
      { dtype, out: 'float8_e4m3fn', values: 'special', gate: 'none', R: 6 },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', values: 'special', gate: 'none', R: 6, I: 300 },
      { dtype, gate: 'masked', R: 12, E: 4 },
      { dtype, gate: 'masked', R: 24, E: 4, out: 'float8_e4m3fn', quantization: 'group' },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', I: 300, ep: 2 },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', format: 'power_of_two', values: 'zeros' },
    )
  }
  specs.push({ R: 70000, I: 8, E: 8, ep: 2, dtype: 'float16' })
  return specs
}

function grid(family: Family<Spec>, options: GridOptions): Case[] {
  const shapes =
    options.presets.length > 0
      ? options.presets.map((preset) => presets[preset]!)
      : cross({ intermediate: options.hidden, experts: options.experts, topk: options.topk })
  return shapes.flatMap(({ intermediate: I, experts: E, topk }) =>
    cross({
      R: options.tokens.map((T) => T * topk),
      dtype: options.dtypes,
      ep: options.ep,
      ids: options.idsDtypes,
      form: [
        {},
        { scales: 1 },
        { out: 'float8_e4m3fn', scales: 1 },
        { out: 'float8_e4m3fn', quantization: 'group' },
      ] as Partial<Spec>[],
    }).map(({ form, ...spec }) => caseOf(family, { I, E, ...spec, ...form, seed: options.seed })),
  )
}
