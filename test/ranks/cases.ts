// Run by torchrun, once a rank: puts the layer through its cases and writes what came of them to FOLDER/<rank>.json.
// tsx test/ranks/cases.ts FOLDER BACKEND DEVICE, where DEVICE is `own` for each rank's GPU
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { ExpertParallelOptions } from 'epmoe'
import { EpmoeError, expertParallel, joinRanks, type MoeForwardArguments, moeLayer, type PyRef } from 'epmoe'
import { reference } from '../helpers/golden.js'
import { evaluate, python, torch } from '../helpers/python.js'
import type { Outcome, Report, Sums } from './outcome.js'

const [folder = '.', backend = 'gloo', asked = 'cpu'] = process.argv.slice(2)
torch.method('set_num_threads', 1).dispose()
// Memory that torch hands out holds NaN, so that a row nobody has written cannot go unnoticed.
python.eval('torch.use_deterministic_algorithms(True, warn_only=True)', { torch }).dispose()
const group = joinRanks({ backend: backend as 'gloo', timeoutMs: 60_000 })
const { rank, size } = group
const device = asked === 'own' ? group.device : asked

interface Case {
  scheme: 'all-reduce' | 'all-to-all'
  dtype: string
  /** Of the rank, where tokens are its own. */
  tokens: (rank: number) => number
  topk: number
  hidden: number
  half: number
  experts: number
  activation: 'silu' | 'gelu' | 'swigluoai'
  biases: boolean
  added: boolean
  ids: string
  /** Python that changes x, the tensors of the whole model and of all tokens. */
  change: string
  chunks: number
  numerics: 'fp32' | 'triton'
  agreement: 'each-call' | 'none' | undefined
  reduceIn: 'float32' | 'activations' | undefined
  cudaGraphTokens: number
}

const usual: Case = {
  scheme: 'all-to-all',
  dtype: 'bfloat16',
  tokens: () => 24,
  topk: 4,
  hidden: 96,
  half: 64,
  experts: 11,
  activation: 'silu',
  biases: false,
  added: false,
  ids: 'int64',
  change: 'None',
  chunks: 2,
  numerics: 'fp32',
  agreement: undefined,
  reduceIn: undefined,
  cudaGraphTokens: 0,
}
const factor = 1.5

const variants: Record<string, Partial<Case>> = {
  'the usual': {},
  float32: { dtype: 'float32' },
  float16: { dtype: 'float16' },
  'int32 ids': { ids: 'int32' },
  'biases, and what is added': { biases: true, added: true },
  'gpt-oss’s activation': { activation: 'swigluoai', biases: true },
  'triton numerics': { numerics: 'triton' },
  'one chunk': { chunks: 1 },
  'as CUDA graphs': { cudaGraphTokens: 64, chunks: 3, biases: true },
  'five chunks': { chunks: 5, added: true },
  'more chunks than tokens': { chunks: 7, tokens: () => 3 },
  'a wide row': { hidden: 1000, topk: 8 },
  'an expert for each rank': { experts: size, topk: 1 },
  'tokens of which some have no expert': { change: 'x["ids"][::3].fill_(-1)' },
  'no token has an expert': { change: 'x["ids"].fill_(-1)', added: true },
  'the last rank has no hits': { change: `x["ids"].clamp_(max=${Math.floor(11 / size) - 1})`, topk: 1 },
  'all hits on the last expert': { change: 'x["ids"].fill_(10)', topk: 1 },
}
const uneven: Record<string, Partial<Case>> = {
  'tokens by rank': { tokens: (of) => 3 + 17 * of, added: true },
  'a rank without tokens': { tokens: (of) => (of === 0 ? 0 : 20), biases: true },
  'one rank has all tokens': { tokens: (of) => (of === size - 1 ? 40 : 0), chunks: 3 },
  'one token on one rank': { tokens: (of) => (of === 0 ? 1 : 0) },
  'no tokens anywhere': { tokens: () => 0, added: true },
}

const reduced: Record<string, Partial<Case>> = {
  'no agreement': { agreement: 'none' },
  'summed in the activations’ dtype': { reduceIn: 'activations' },
}

const outcomes: Outcome[] = []
for (const scheme of ['all-reduce', 'all-to-all'] as const) {
  const all = { ...variants, ...(scheme === 'all-to-all' ? uneven : reduced) }
  for (const [name, variant] of Object.entries(all)) {
    outcomes.push({ name: `${scheme}: ${name}`, ...measured({ ...usual, ...variant, scheme }) })
  }
  for (const [name, spoil] of Object.entries(controls())) {
    const case_ = { ...usual, ...spoil.of, scheme }
    outcomes.push({ name: `${scheme}: ${name}`, control: true, ...measured(case_, spoil) })
  }
}
if (size === 4) outcomes.push({ name: 'two groups of two ranks', ...inSubgroups() })

const errors: Report['errors'] = {}
mistakes()
writeFileSync(join(folder, `${rank}.json`), JSON.stringify({ outcomes, errors } satisfies Report))
group.dispose()

/** Changes what this rank does; a comparison that passes all the same is worth nothing. */
interface Spoil {
  of?: Partial<Case>
  options?: Partial<ExpertParallelOptions>
  part?: (rank: number) => number
  call?: (call: MoeForwardArguments) => MoeForwardArguments
}

function controls(): Record<string, Spoil> {
  const rounded = evaluate('lambda f: lambda rows: f(rows).bfloat16().float()')
  const silu = reference.get('ACTIVATIONS').item('silu')
  return {
    ...(size > 1 && { 'two ranks have each other’s experts': { part: (of) => (of < 2 ? 1 - of : of) } }),
    'a slot is dropped': {
      call: (call) => ({ ...call, topkIds: evaluate('(y := x.clone(), y[3].fill_(-1))[0]', { x: call.topkIds }) }),
    },
    'float32 with an activation rounded to bfloat16': {
      of: { dtype: 'float32' },
      options: { activation: rounded.call(silu) },
    },
    'float32 with a factor that is off by a millionth': {
      of: { dtype: 'float32' },
      options: { routedScalingFactor: factor * (1 + 1e-6) },
    },
  }
}

/** Squared errors against float64 of this rank's tokens: the ranks' layer, the layer on one rank, plain torch. */
function measured(case_: Case, spoil: Spoil = {}, ranks = group): Sums {
  const all = Array.from({ length: ranks.size }, (_, each) => case_.tokens(each))
  const replicated = case_.scheme === 'all-reduce'
  const total = replicated ? case_.tokens(0) : all.reduce((sum, each) => sum + each, 0)
  const before = replicated ? 0 : all.slice(0, ranks.rank).reduce((sum, each) => sum + each, 0)
  const mine = replicated ? total : all[ranks.rank]!
  const x = whole(case_, total)
  using layer = expertParallel({ ...optionsOf(case_, x, ranks, spoil.part), ...spoil.options })
  const call = { ...callOf(case_, x, before, mine) }
  const output = layer.forward(spoil.call?.(call) ?? call)
  const { biases, activation, added } = case_
  const own = (y: PyRef) => evaluate('y[a:b]', { y, a: before, b: before + mine })
  const plain = (dtype?: string) => own(reference.method('plain', x, activation, biases, factor, added, dtype))
  const parts = ranks.gather('parts', ranks.expertRange(case_.experts)).map(({ start, end }) => [start, end])
  const attainable = [undefined, parts].flatMap((each) =>
    [...reference.method('attainable', x, activation, biases, factor, added, each)].map(own),
  )
  using single = moeLayer({ ...weightsOf(case_, x, 0, case_.experts), ...settings(case_) })
  const alone = single.forward(call)
  const exact = plain('float64')
  const squares = (y: PyRef) => evaluate('float((y.double() - e).square().sum())', { y, e: exact }).toJS() as number
  return {
    ranks: squares(output),
    single: squares(alone),
    plain: squares(plain()),
    attainable: attainable.map(squares),
    exact: evaluate('float(e.square().sum())', { e: exact }).toJS() as number,
    elements: exact.get('nelement').call().toJS() as number,
  }
}

function whole({ topk, hidden, half, experts, dtype, ids, change }: Case, tokens: number): PyRef {
  const x = reference.method('make', tokens, topk, hidden, half, experts, dtype, device, 1, 2 * half, ids)
  evaluate(change, { x }).dispose()
  return x
}

function weightsOf({ biases }: Case, x: PyRef, a: number, b: number) {
  const part = (name: string) => evaluate('x[name][a:b]', { x, name, a, b })
  return {
    w13: part('w13'),
    w2: part('w2'),
    ...(biases && { w13Bias: part('w13_bias'), w2Bias: part('w2_bias') }),
  }
}

function settings({ activation, numerics, cudaGraphTokens }: Case) {
  return { activation, numerics, cudaGraphTokens, routedScalingFactor: factor }
}

function optionsOf(case_: Case, x: PyRef, ranks = group, part = (of: number) => of): ExpertParallelOptions {
  const { scheme, chunks, agreement, reduceIn, experts } = case_
  // The experts of another rank, as many as one's own.
  const own = ranks.expertRange(experts)
  const shift = (part(ranks.rank) - ranks.rank) * (own.end - own.start)
  const start = Math.min(own.start + shift, experts - (own.end - own.start))
  const weights = weightsOf(case_, x, start, start + own.end - own.start)
  return { ...weights, ...settings(case_), group: ranks, scheme, chunks, agreement, reduceIn, numExperts: experts }
}

function callOf({ added }: Case, x: PyRef, before: number, mine: number): MoeForwardArguments {
  const part = (name: string) => evaluate('x[name][a:a + n].contiguous()', { x, name, a: before, n: mine })
  return {
    hiddenStates: part('hidden'),
    topkIds: part('ids'),
    topkWeights: part('weights'),
    ...(added && { sharedOutput: part('shared'), residual: part('residual') }),
  }
}

/** Experts shared by two ranks each, which have other tokens than the other two. */
function inSubgroups(): Sums {
  const distributed = python.import('torch.distributed')
  const groups = [
    [0, 1],
    [2, 3],
  ].map((ranks) => distributed.method('new_group', ranks))
  const half = joinRanks({ timeoutMs: 60_000, group: groups[rank >> 1] })
  return measured({ ...usual, experts: 5, tokens: (of) => 5 + of + 4 * (rank >> 1) }, {}, half)
}

/** Calls and layers that one rank or all get wrong: each rank's error, and that the group goes on. */
function mistakes(): void {
  const last = size - 1
  const only =
    (of: number, change: (call: MoeForwardArguments) => MoeForwardArguments) => (call: MoeForwardArguments) =>
      rank === of ? change(call) : call
  const wrongType = only(last, (call) => ({ ...call, hiddenStates: evaluate('x.double()', { x: call.hiddenStates }) }))
  const wrongId = only(0, (call) => ({
    ...call,
    topkIds: evaluate('x + (x * 0).index_fill(0, torch.tensor([2]), 50)', { x: call.topkIds }),
  }))
  const fewerSlots = only(last, (call) => ({
    ...call,
    topkIds: evaluate('x[:, :2].contiguous()', { x: call.topkIds }),
    topkWeights: evaluate('x[:, :2].contiguous()', { x: call.topkWeights }),
  }))
  const fewerTokens = only(last, ({ hiddenStates, topkIds, topkWeights }) => {
    const cut = (x: PyRef) => evaluate('x[1:].contiguous()', { x })
    return { hiddenStates: cut(hiddenStates), topkIds: cut(topkIds), topkWeights: cut(topkWeights) }
  })
  const noSlots = only(last, (call) => ({
    ...call,
    topkIds: evaluate('x[:, :0].contiguous()', { x: call.topkIds }),
    topkWeights: evaluate('x[:, :0].contiguous()', { x: call.topkWeights }),
  }))
  for (const scheme of ['all-reduce', 'all-to-all'] as const) {
    const case_ = { ...usual, scheme }
    attempt(`${scheme}: a wrong dtype on the last rank`, () => measured(case_, { call: wrongType }))
    attempt(`${scheme}: no slots on the last rank`, () => measured(case_, { call: noSlots }))
    attempt(`${scheme}: a disposed layer on the last rank`, () => disposedOnLast(case_))
    attempt(`${scheme}: another layer on the last rank`, () => swappedOnLast(case_))
    if (device === 'cpu') attempt(`${scheme}: a wrong id on rank 0`, () => measured(case_, { call: wrongId }))
    attempt(`${scheme}: fewer slots on the last rank`, () => measured(case_, { call: fewerSlots }))
    if (scheme === 'all-reduce') attempt('fewer tokens on the last rank', () => measured(case_, { call: fewerTokens }))
    // What was refused has left no trace.
    outcomes.push({ name: `${scheme}: after calls that were refused`, ...measured(case_) })
  }
  const make = (change: (options: ExpertParallelOptions) => ExpertParallelOptions) => () => {
    expertParallel(change(optionsOf(usual, whole(usual, 4)))).dispose()
  }
  const onLast = (change: (options: ExpertParallelOptions) => object) =>
    make((options) => (rank === last ? { ...options, ...change(options) } : options))
  const narrower = (x: PyRef, axis: number) => evaluate('x.narrow(axis, 0, 48)', { x, axis })
  attempt(
    'another hidden size on the last rank',
    onLast(({ w13, w2 }) => ({ w13: narrower(w13, 2), w2: narrower(w2, 1) })),
  )
  attempt(
    'another dtype on the last rank',
    onLast(({ w13, w2 }) => ({ w13: evaluate('x.half()', { x: w13 }), w2: evaluate('x.half()', { x: w2 }) })),
  )
  attempt(
    'another scheme on the last rank',
    onLast(() => ({ scheme: 'all-reduce' })),
  )
  attempt(
    'weights on the last rank that do not fit',
    onLast(({ w13 }) => ({ w2: w13 })),
  )
  attempt(
    'no experts on the last rank',
    onLast(({ w13, w2 }) => ({ w13: evaluate('x[:0]', { x: w13 }), w2: evaluate('x[:0]', { x: w2 }) })),
  )
  // As many as there are experts on this rank; the last one's alone matter.
  const own = group.expertRange(usual.experts)
  const others: Record<string, object> = {
    activation: { activation: 'gelu' },
    factor: { routedScalingFactor: 2 * factor },
    bias: {
      w2Bias: whole(usual, 1)
        .item('w2_bias')
        .method('narrow', 0, 0, own.end - own.start),
    },
    numerics: { numerics: 'triton' },
    'activation there is not': { activation: 'relu' },
    'factor that is no number': { routedScalingFactor: Number.NaN },
    'number of tokens for graphs': { cudaGraphTokens: -1 },
    'option there is not': { topk: 2 },
  }
  for (const [what, options] of Object.entries(others)) {
    attempt(
      `another ${what} on the last rank`,
      onLast(() => options),
    )
  }
  attempt('a barrier on the last rank, where the others make a layer', () => {
    if (rank === last) group.barrier()
    else make((options) => options)()
  })
  attempt(
    'experts that do not add up',
    make((options) => ({ ...options, numExperts: 12 })),
  )
  attempt(
    'a scheme there is not',
    make((options) => ({ ...options, scheme: 'broadcast' as 'all-reduce' })),
  )
  attempt('fewer experts than ranks', () => group.expertRange(size - 1))
  attempt('another world size', () => joinRanks({ worldSize: size + 1 }))
}

function disposedOnLast(case_: Case): void {
  const x = whole(case_, 4)
  using layer = expertParallel(optionsOf(case_, x))
  if (rank === size - 1) layer.dispose()
  layer.forward(callOf(case_, x, 0, 4))
}

function swappedOnLast(case_: Case): void {
  const x = whole(case_, 4)
  using first = expertParallel(optionsOf(case_, x))
  using second = expertParallel(optionsOf(case_, x))
  const own = rank === size - 1 ? second : first
  own.forward(callOf(case_, x, 0, 4))
}

function attempt(name: string, work: () => unknown): void {
  try {
    work()
    errors[name] = { code: '', message: 'nothing was wrong' }
  } catch (error) {
    if (!(error instanceof EpmoeError)) throw error
    errors[name] = { code: error.code, message: error.message }
  }
}
