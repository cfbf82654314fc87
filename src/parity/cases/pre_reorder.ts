import type { DType } from '../../dtype.js'
import type { Tensor } from '../../tensor.js'
import type { Bounds, Case, GridOptions, Known, OpCases, Problem, RecordedCall, Spoiler } from '../case.js'
import { Expectation } from '../expectation.js'
import { indexTensor, normalTensor, quarter, scaleTensor, sprinkle, swap, write } from '../fill.js'
import { cross, shapesOf } from '../grid.js'
import { Guarded } from '../guard.js'
import { presets } from '../presets.js'
import { absmaxOf, groupScale, groupsOf, nearJump, toFloat8 } from '../quantise.js'
import { Random } from '../random.js'
import { localOf, localRange, markLocal, type RoutingKind, rangeOf, route } from '../routing.js'
import { type Spec as BaseSpec, caseOf, casesOf, clampedNaN, type Family, parseCase } from '../spec.js'
import { decoderOf, encoderOf, itemsizeOf, roundsToInfinity } from '../values.js'

interface Spec extends BaseSpec {
  T: number
  H: number
  K: number
  E: number
  ep: number
  rank: number
  /** Of the input, and of the output unless `out` says float8. */
  dtype: DType
  out: 'same' | 'float8_e4m3fn'
  ids: 'int32' | 'int64'
  routing: RoutingKind
  gate: 'ids' | 'dst'
  /** `packed` rows, or DeepGEMM's [E_local, T, H]. */
  layout: 'packed' | 'padded'
  /** What a1_scales is indexed by; `rows`: scale rows of a quantised input are copied instead. */
  scales: 'none' | 'expert' | 'token' | 'rows'
  quantization: 'static' | 'token' | 'group'
  format: 'float32' | 'power_of_two'
  /** Deviation of the values: large ones saturate float8. */
  gain: number
  shift: number
  values: 'normal' | 'special' | 'zeros'
}

const family: Family<Spec> = {
  op: 'pre_reorder',
  defaults: {
    T: 7,
    H: 512,
    K: 8,
    E: 64,
    ep: 1,
    rank: -1,
    dtype: 'bfloat16',
    out: 'same',
    ids: 'int32',
    routing: 'uniform',
    gate: 'ids',
    layout: 'packed',
    scales: 'none',
    quantization: 'static',
    format: 'float32',
    gain: 1,
    shift: 0,
    values: 'normal',
    seed: 1,
  },
  axes: ({ T, H, K, E, ep }) => ({ T, H, K, E, ep }),
  tags: ({ gate, routing, values, layout, quantization, scales, ep }) => [
    gate,
    routing,
    values,
    layout,
    quantization,
    `scales-${scales}`,
    ...(ep > 1 ? ['remote'] : []),
  ],
  steps: ({ T, H, K, ep }) => (T * Math.ceil(H / 512) * K) / ep,
  unspecified: ({ values, quantization }) =>
    values === 'special' && quantization !== 'static' ? clampedNaN : undefined,
  build,
}

/** Where slots go: rows of the output, counted from dst_start, by slot; negative for those that go nowhere. */
interface Layout {
  local: Int32Array
  row: Int32Array
  rows: number[]
  dstStart: number
  /** The first local expert. */
  start: number
}

function layOut(spec: Spec, topkIds: Int32Array, src2dst: Int32Array, random: Random): Layout {
  const { T, K, layout } = spec
  const [start, end] = localRange(spec)
  const local = markLocal(topkIds, [start, end], random)
  if (layout === 'packed') return { local, row: src2dst, rows: [T * K], dstStart: 0, start }
  const taken = new Int32Array(end - start + 1)
  const row = topkIds.map((id, slot) => (local[slot] === 1 ? (id - start) * T + taken[id - start]!++ : -1))
  return { local, row, rows: [end - start + 1, T], dstStart: start * T, start }
}

function build(spec: Spec): Problem {
  const { T, H, K, ids, gate, scales, quantization, format } = spec
  const random = new Random(spec.seed)
  const routing = route(T, K, spec.E, spec.routing, random)
  const [start, end] = localRange(spec)
  const layout = layOut(spec, routing.topkIds, routing.src2dst, random)
  const { local, row, rows, dstStart } = layout
  const groups = scales === 'rows' || quantization === 'group' ? groupsOf(H) : 1
  const destination = (slot: number) => (gate === 'dst' && local[slot] === 0 ? -1 - (slot % 5) : row[slot]! + dstStart)
  const inputs: Record<string, Guarded> = {
    input: inputOf(spec),
    src2dst: indexTensor([T * K], ids, destination),
    ...(gate === 'ids' ? { topk_ids: indexTensor([T, K], ids, (slot) => routing.topkIds[slot]!) } : {}),
    ...(scales === 'token' ? { a1_scales: scaleTensor([T], random) } : {}),
    ...(scales === 'expert' ? { a1_scales: scaleTensor([end - start + 1], random) } : {}),
    ...(scales === 'rows' ? { input_scales: scaleTensor([T, groups], random) } : {}),
  }
  const findsScales = quantization !== 'static'
  const dtype = spec.out === 'same' ? spec.dtype : spec.out
  return {
    inputs,
    outputs: () => ({
      gateup_input: Guarded.create([...rows, H], dtype, spec.shift),
      ...(findsScales || scales === 'rows' ? { output_scales: Guarded.create([...rows, groups], 'float32') } : {}),
    }),
    scalars: {
      ...(gate === 'ids' ? { start_expert_id: start, end_expert_id: end } : {}),
      ...(dstStart === 0 ? {} : { dst_start: dstStart }),
      ...(scales === 'token' ? { scale_axis: 'token' } : {}),
      ...(findsScales ? { quantization } : {}),
      ...(format === 'float32' ? {} : { scale_format: format }),
    },
    bytes: bytesOf(spec, local, dtype),
    oracle: () => oracle(spec, inputs, layout, routing.topkIds, groups),
    spoilers: [
      {
        name: 'dropped slot',
        apply: (copies) => {
          const first = local.indexOf(1)
          if (first >= 0) write(copies[gate === 'ids' ? 'topk_ids' : 'src2dst']!, first, -1)
          return first >= 0
        },
      },
      {
        name: 'swapped rows',
        apply: (copies) => {
          const first = local.indexOf(1)
          const other = local.findIndex((one, slot) => one === 1 && Math.floor(slot / K) > Math.floor(first / K))
          if (first >= 0 && other >= 0) swap(copies['src2dst']!, first, other)
          return first >= 0 && other >= 0
        },
      },
      ...(scales === 'none' ? [] : [changedScale(spec, layout, routing.topkIds, groups)]),
    ],
    [Symbol.dispose]: () => {
      for (const input of Object.values(inputs)) input[Symbol.dispose]()
    },
  }
}

function recorded({ inputs, outputs, scalars }: RecordedCall): Known {
  const input = inputs['input']!.tensor
  const [T = 0, H = 0] = input.shape
  const { shape: made, dtype: out } = outputs['gateup_input']!
  const src2dst = inputs['src2dst']!.tensor.data
  const ids = inputs['topk_ids']?.tensor.data
  const scaled = 'a1_scales' in inputs ? (scalars['scale_axis'] === 'token' ? 'token' : 'expert') : 'none'
  const dstStart = Number(scalars['dst_start'] ?? 0)
  const spec: Spec = {
    ...family.defaults,
    T,
    H,
    K: T === 0 ? 0 : src2dst.length / T,
    dtype: input.dtype,
    out: out === input.dtype ? 'same' : 'float8_e4m3fn',
    gate: ids === undefined ? 'dst' : 'ids',
    scales: 'input_scales' in inputs ? 'rows' : scaled,
    quantization: (scalars['quantization'] ?? 'static') as Spec['quantization'],
    format: (scalars['scale_format'] ?? 'float32') as Spec['format'],
  }
  const range: [number, number] = ids === undefined ? [0, Infinity] : rangeOf(scalars)
  const layout: Layout = {
    local: localOf(ids ?? src2dst, range),
    row: Int32Array.from(src2dst as ArrayLike<number | bigint>, (row) => Number(row) - dstStart),
    rows: made.slice(0, -1),
    dstStart,
    start: range[0],
  }
  const topkIds = Int32Array.from((ids ?? []) as ArrayLike<number | bigint>, Number)
  const groups = outputs['output_scales']?.shape.at(-1) ?? 1
  return {
    dtype: spec.dtype,
    axes: { T, H, K: spec.K },
    interpreterSteps: family.steps(spec),
    oracle: () => oracle(spec, inputs, layout, topkIds, groups),
  }
}

/** The scale that the first local slot's row has first. */
function changedScale({ K, scales }: Spec, { local, start }: Layout, topkIds: Int32Array, groups: number): Spoiler {
  return {
    name: 'changed scale',
    apply: (copies) => {
      const first = local.indexOf(1)
      if (first < 0) return false
      const token = Math.floor(first / K)
      const [name, at] =
        scales === 'rows'
          ? ['input_scales', token * groups]
          : ['a1_scales', scales === 'token' ? token : topkIds[first]! - start]
      quarter(copies[name]!, at)
      return true
    },
  }
}

/** Rows of tokens that have a local slot, read once, and a row written a local slot. */
function bytesOf({ T, H, K, dtype }: Spec, local: Int32Array, out: DType): number {
  let tokens = 0
  for (let token = 0; token < T; token++) if (local.subarray(token * K, (token + 1) * K).includes(1)) tokens++
  const slots = local.reduce((sum, one) => sum + one, 0)
  return H * (tokens * itemsizeOf(dtype) + slots * itemsizeOf(out))
}

function inputOf({ T, H, dtype, seed, gain, shift, values, format }: Spec): Guarded {
  const input = normalTensor([T, H], dtype, seed, gain, shift)
  if (values === 'special') sprinkle(input.tensor)
  // Every other row is nothing but zeros, whose scale must not divide by zero.
  if (values === 'zeros')
    for (let token = 0; token < T; token += 2) input.tensor.data.fill(0 as never, token * H, (token + 1) * H)
  if (format === 'power_of_two') leaveJumps(input)
  return input
}

/** No magnitude is 448 times a power of two, where an approximate division decides which scale it gets. */
function leaveJumps({ tensor }: Guarded): void {
  const { data, dtype } = tensor
  const [decode, encode] = [decoderOf(dtype), encoderOf(dtype)]
  for (let i = 0; i < data.length; i++) {
    const value = decode(data, i)
    if (nearJump(Math.abs(value), 2 ** -20)) data[i] = encode(value * 1.125)
  }
}

/**
 * Moved rows are exact. A scaled value is divided in float32 and rounded once; Triton's product with an approximate
 * reciprocal is wrong by up to three units of a float32 before that.
 */
function boundsOf({ dtype, out, scales, quantization }: Spec): Bounds | undefined {
  if (out === 'same' && scales !== 'expert' && scales !== 'token') return undefined
  if (dtype === 'float8_e4m3fn') return undefined
  if (scales === 'none' && quantization === 'static') return { fp32: 0.5, triton: 0.5, reference: 0.5 }
  return dtype === 'float32' && out === 'same'
    ? { fp32: 0.51, triton: 4, reference: 4 }
    : { fp32: 0.51, triton: 0.52, reference: 0.52 }
}

/** One division of the largest magnitude. */
const scaleBounds: Bounds = { fp32: 0.51, triton: 3, reference: 3 }

function oracle(
  spec: Spec,
  inputs: Record<string, Guarded>,
  { local, row, rows, start }: Layout,
  topkIds: Int32Array,
  groups: number,
): Expectation {
  const { T, H, K, quantization, scales, out } = spec
  const expectation = new Expectation()
  const page = expectation.floats('gateup_input', [...rows, H], boundsOf(spec))
  const findsScales = quantization !== 'static'
  const scalePage =
    findsScales || scales === 'rows'
      ? expectation.floats('output_scales', [...rows, groups], findsScales ? scaleBounds : undefined)
      : undefined
  const input = inputs['input']!.tensor
  const decode = decoderOf(input.dtype)
  const a1Scales = inputs['a1_scales']?.tensor.data as Float32Array | undefined
  const inputScales = inputs['input_scales']?.tensor.data as Float32Array | undefined
  const narrow =
    out === 'float8_e4m3fn' && input.dtype !== 'float8_e4m3fn'
      ? toFloat8
      : (value: number) => roundsToInfinity(input.dtype, value)
  for (let slot = 0; slot < T * K; slot++) {
    if (local[slot] === 0) continue
    const token = Math.floor(slot / K)
    const target = row[slot]!
    const found = findsScales ? scalesOf(spec, input, token, groups) : undefined
    for (let group = 0; scalePage !== undefined && group < groups; group++) {
      const scale = found?.[group] ?? inputScales![token * groups + group]!
      scalePage.expected[target * groups + group] = scale
      scalePage.scale[target * groups + group] = scale
    }
    const fixed = scales === 'token' ? a1Scales![token]! : scales === 'expert' ? a1Scales![topkIds[slot]! - start]! : 1
    for (let column = 0; column < H; column++) {
      const divisor = found === undefined ? fixed : found[quantization === 'token' ? 0 : column >> 7]!
      const value = narrow(decode(input.data, token * H + column) / divisor)
      page.expected[target * H + column] = value
      page.scale[target * H + column] = Math.abs(value)
    }
  }
  return expectation
}

function scalesOf({ H, quantization, format }: Spec, input: Tensor, token: number, groups: number): number[] {
  const size = quantization === 'token' ? H : 128
  const decode = decoderOf(input.dtype)
  return Array.from({ length: groups }, (_, group) => {
    const columns = Array.from({ length: Math.min(size, H - group * size) }, (_, i) => group * size + i)
    return groupScale(absmaxOf(columns.map((column) => decode(input.data, token * H + column))), format)
  })
}

function standard(): Case[] {
  const specs: Partial<Spec>[] = []
  for (const { hidden: H, experts: E, topk: K } of Object.values(presets)) {
    specs.push({ T: 3, H, E, K, ep: 8, ids: 'int64' })
  }
  for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
    specs.push(
      { T: 0, dtype },
      { T: 12, dtype, ep: 8, routing: 'skewed' },
      { H: 999, dtype, K: 3, shift: 1 },
      { H: 1, dtype },
      { dtype, gate: 'dst', ep: 4, ids: 'int64', K: 11 },
      { dtype, values: 'special', ep: 2, H: 129 },
      { dtype, scales: 'expert', ep: 4 },
      { dtype, scales: 'token', H: 250 },
      { dtype, layout: 'padded', ep: 8, T: 9 },
      { dtype, out: 'float8_e4m3fn', gain: 300, ep: 2 },
      { dtype, out: 'float8_e4m3fn', scales: 'expert', ep: 4, routing: 'single', K: 1 },
      { dtype, scales: 'token', H: 77, values: 'special' },
      { dtype, out: 'float8_e4m3fn', scales: 'token', H: 77, values: 'special' },
      { dtype, out: 'float8_e4m3fn', quantization: 'token', values: 'special', ep: 2, H: 129 },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', values: 'special', ep: 2, H: 1000, K: 2 },
      { dtype, out: 'float8_e4m3fn', quantization: 'token', ep: 4, T: 10 },
      { dtype, out: 'float8_e4m3fn', quantization: 'token', H: 1000, values: 'zeros', format: 'power_of_two' },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', ep: 4, layout: 'padded' },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', H: 999, values: 'zeros', K: 2 },
      { dtype, out: 'float8_e4m3fn', quantization: 'group', format: 'power_of_two', gate: 'dst', ep: 2 },
    )
  }
  specs.push(
    { dtype: 'float8_e4m3fn', scales: 'rows', layout: 'padded', ep: 8, T: 12 },
    { dtype: 'float8_e4m3fn', values: 'special', H: 129 },
    { T: 70000, H: 16, K: 2, dtype: 'float16' },
  )
  return casesOf(family, specs)
}

function grid(options: GridOptions): Case[] {
  return shapesOf(options).flatMap(({ hidden: H, experts: E, topk: K }) =>
    cross({
      T: options.tokens,
      dtype: options.dtypes,
      ep: options.ep,
      routing: options.routings,
      ids: options.idsDtypes,
      form: [
        {},
        { scales: 'expert' },
        { scales: 'token', out: 'float8_e4m3fn' },
        { quantization: 'token', out: 'float8_e4m3fn' },
        { quantization: 'group', out: 'float8_e4m3fn' },
      ] as Partial<Spec>[],
    }).map(({ form, ...spec }) => caseOf(family, { H, E, K, ...spec, ...form, seed: options.seed })),
  )
}

const cases: OpCases = { op: 'pre_reorder', standard, grid, parse: (name) => parseCase(family, name), recorded }
export default cases
