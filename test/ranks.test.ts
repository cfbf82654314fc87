import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { devices } from 'epmoe'
import { gpu, standIn } from './helpers/devices.js'
import { allowedError } from './helpers/golden.js'
import { inParallel } from './helpers/in-parallel.js'
import { type Ending, onTheirOwn, torchrun } from './ranks/launch.js'
import type { Outcome, Report } from './ranks/outcome.js'

// NCCL wants a GPU for each rank: with one GPU it is tried with one rank, and several ranks by way of the host.
const gpus = standIn ? 0 : devices().length - 1
const jobs = [
  { ranks: 2, backend: 'gloo', device: 'cpu' },
  { ranks: 4, backend: 'gloo', device: 'cpu' },
  ...(gpu === undefined
    ? []
    : [
        { ranks: 1, backend: 'nccl', device: 'cuda:0' },
        { ranks: 2, backend: 'gloo', device: 'cuda:0' },
      ]),
  ...[2, 4, 8].filter((ranks) => ranks <= gpus).map((ranks) => ({ ranks, backend: 'nccl', device: 'own' })),
]

for (const { ranks, backend, device } of jobs) {
  test.serial(`the layer on ${ranks} ranks is no worse than plain torch, ${backend}, ${device}`, async (t) => {
    const reports = await reportsOf(t, ranks, backend, device)
    const names = reports[0]!.outcomes.map(({ name }) => name)
    t.true(names.length > 40)
    for (const [index, name] of names.entries()) {
      const outcomes = reports.map(({ outcomes }) => outcomes[index]!)
      t.deepEqual(new Set(outcomes.map((each) => each.name)), new Set([name]))
      const [error, allowed] = errorsOf(outcomes)
      const control = outcomes[0]!.control === true
      t.is(error > allowed, control, `${name}: ${error} of ${allowed}, ${JSON.stringify(outcomes)}`)
      if (control || name.endsWith('float32')) t.log(`${name}: ${(error / allowed).toPrecision(3)} of what is allowed`)
    }
    t.is(reports[0]!.outcomes.filter(({ control }) => control).length, ranks === 1 ? 6 : 8)
    if (ranks > 1) mistakesAreNamed(t, reports, device)
  })
}

async function reportsOf(t: ExecutionContext, ranks: number, backend: string, device: string): Promise<Report[]> {
  t.timeout(240_000)
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-ranks-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const ending = await torchrun(ranks, ['test/ranks/cases.ts', folder, backend, device])
  t.is(ending.code, 0, ending.output)
  return Array.from({ length: ranks }, (_, rank) => JSON.parse(readFileSync(join(folder, `${rank}.json`), 'utf8')))
}

/** The error against float64 over all ranks' tokens, and the largest that is no worse than plain torch's in the dtype. */
function errorsOf(outcomes: Outcome[]): [error: number, allowed: number] {
  const norm = (squares: (of: Outcome) => number) => Math.sqrt(outcomes.reduce((sum, each) => sum + squares(each), 0))
  const attainable = outcomes[0]!.attainable.map((_, shape) => norm((each) => each.attainable[shape]!))
  const elements = outcomes.reduce((sum, each) => sum + each.elements, 0)
  return [
    norm((each) => each.ranks),
    allowedError(
      norm((each) => each.plain),
      attainable,
      elements,
    ),
  ]
}

/** The code on the rank that errs and on the others, whose message must match. */
type Told = [own: string, others: string, message: RegExp]

/** Every rank is told of a mistake, in words that say which rank made it. */
function mistakesAreNamed(t: ExecutionContext, reports: Report[], device: string): void {
  const last = reports.length - 1
  const differ = (message: string): Told => ['ERR_RANKS_DISAGREE', 'ERR_RANKS_DISAGREE', new RegExp(message)]
  const refused = (own: string, message: string): Told => [
    own,
    'ERR_RANK_REFUSED',
    new RegExp(`rank ${last}: .*${message}`),
  ]
  const expected: Record<string, Told> = {
    'fewer tokens on the last rank': [
      'ERR_RANKS_DISAGREE',
      'ERR_RANKS_DISAGREE',
      new RegExp(`hiddenStates: .*rank 0 has 24.*rank ${last} has 23`),
    ],
    'another hidden size on the last rank': [
      'ERR_RANKS_DISAGREE',
      'ERR_RANKS_DISAGREE',
      new RegExp(`w13: .*same hidden size.*rank 0 has 96.*rank ${last} has 48`),
    ],
    'another dtype on the last rank': ['ERR_RANKS_DISAGREE', 'ERR_RANKS_DISAGREE', /w13: .*bfloat16.*float16/],
    'another scheme on the last rank': ['ERR_RANKS_DISAGREE', 'ERR_RANKS_DISAGREE', /scheme: .*all-to-all.*all-reduce/],
    'weights on the last rank that do not fit': ['ERR_SHAPE', 'ERR_RANK_REFUSED', new RegExp(`rank ${last}: .*w2: `)],
    'no experts on the last rank': ['ERR_SHAPE', 'ERR_RANK_REFUSED', new RegExp(`rank ${last}: .*1 to 1024 experts`)],
    'another activation on the last rank': differ('activation: .*rank 0 has silu, .*has gelu'),
    'another factor on the last rank': differ('routedScalingFactor: .*rank 0 has 1.5, .*has 3'),
    'another bias on the last rank': differ('w2Bias: .*rank 0 has none, .*has one'),
    'another numerics on the last rank': differ('numerics: .*rank 0 has fp32, .*has triton'),
    'another activation there is not on the last rank': refused('ERR_VALUE', 'activation: .*received "relu"'),
    'another factor that is no number on the last rank': refused('ERR_VALUE', 'routedScalingFactor: .*received NaN'),
    'another number of tokens for graphs on the last rank': refused('ERR_VALUE', 'cudaGraphTokens: .*received -1'),
    'another option there is not on the last rank': refused('ERR_UNEXPECTED_ARGUMENT', 'topk: '),
    'a barrier on the last rank, where the others make a layer': differ('rank 0 has a layer, .*has a barrier'),
    'experts that do not add up': ['ERR_VALUE', 'ERR_VALUE', /numExperts: expected 11.*received 12/],
    'a scheme there is not': ['ERR_VALUE', 'ERR_VALUE', /'all-reduce' or 'all-to-all', received "broadcast"/],
    'fewer experts than ranks': ['ERR_VALUE', 'ERR_VALUE', /an expert for each rank.*Start fewer ranks/],
    'another world size': ['ERR_RANKS_START', 'ERR_RANKS_START', /WORLD_SIZE=/],
  }
  for (const scheme of ['all-reduce', 'all-to-all']) {
    expected[`${scheme}: no slots on the last rank`] = refused('ERR_SHAPE', 'topkIds: expected .* K of 1 or more')
    expected[`${scheme}: a disposed layer on the last rank`] = refused('ERR_DISPOSED', 'a live layer')
    expected[`${scheme}: another layer on the last rank`] = differ('the same layer on every rank')
    expected[`${scheme}: a wrong dtype on the last rank`] = [
      'ERR_DTYPE',
      'ERR_RANK_REFUSED',
      new RegExp(`rank ${last}: .*hiddenStates: expected bfloat16`),
    ]
    expected[`${scheme}: fewer slots on the last rank`] = [
      'ERR_RANKS_DISAGREE',
      'ERR_RANKS_DISAGREE',
      new RegExp(`topkIds: .*rank 0 has 4.*rank ${last} has 2`),
    ]
  }
  for (const [name, [own, others, message]] of Object.entries(expected)) {
    for (const [rank, { errors }] of reports.entries()) {
      t.is(errors[name]?.code, rank === last ? own : others, `${name}, rank ${rank}: ${errors[name]?.message}`)
      if (rank !== last) t.regex(errors[name]?.message ?? '', message)
    }
  }
  if (device !== 'cpu') return
  for (const scheme of ['all-reduce', 'all-to-all']) {
    const told = reports.map(({ errors }) => errors[`${scheme}: a wrong id on rank 0`]!)
    t.is(told[0]?.code, 'ERR_INDEX_OUT_OF_RANGE')
    t.regex(told[0]?.message ?? '', /topkIds: .*received 5\d at token 2, slot 0/)
    for (const each of told.slice(1)) {
      t.is(each.code, 'ERR_RANK_REFUSED')
      t.regex(each.message, /rank 0: .*at token 2, slot 0/)
    }
  }
}

interface Seen {
  rank: number
  pid?: number
  attempt?: number
  code?: string
  message?: string
  seconds?: number
}

function seenBy({ output }: Ending): Seen[] {
  return output
    .split('\n')
    .filter((line) => line.startsWith('{"rank"'))
    .map((line) => JSON.parse(line) as Seen)
}

// The timeout of test/ranks/lost.ts is 8 s.
interface Fate {
  code: string
  message: RegExp
  victim?: number
  scheme?: string
}

const fates: Record<string, Fate> = {
  'is killed': { code: 'ERR_RANK_LOST', message: /rank 1 has given no sign of life for \d/ },
  'is killed, and keeps the store': {
    code: 'ERR_RANK_LOST',
    message: /rank 0 and the store that it keeps cannot be reached/,
    victim: 0,
    scheme: 'all-reduce',
  },
  freezes: { code: 'ERR_RANK_LOST', message: /rank 1 has given no sign of life for \d/ },
  'ends early': { code: 'ERR_RANK_LOST', message: /rank 1 left the job after call 3/ },
  throws: { code: 'ERR_RANK_LOST', message: /rank 1 left the job after call 3/ },
  'does not come': { code: 'ERR_RANK_LATE', message: /within 8 s, received rank 1 has come to call 3 only/ },
  'cannot agree': { code: 'ERR_RANK_LOST', message: /rank 1 failed in call 4: MemoryError: no room for a head/ },
  'misses a call': { code: 'ERR_RANKS_DISAGREE', message: /the same number of calls .*rank 0 has 4, rank 1 has 5/ },
  'fails in the middle': { code: 'ERR_RANK_LOST', message: /rank 1 failed in call 4: experts on fire/ },
}

for (const [fate, expected] of Object.entries(fates)) isTold(3, 'gloo', fate, expected)
// A GPU that waits for a dead one would wait for ever.
if (gpus >= 2) {
  for (const scheme of ['all-reduce', 'all-to-all'])
    for (const fate of ['is killed', 'freezes']) isTold(2, 'nccl', fate, { ...fates[fate]!, scheme })
}

function isTold(ranks: number, backend: string, fate: string, expected: Fate): void {
  const { code, message, victim = 1, scheme = 'all-to-all' } = expected
  const title = `rank ${victim} of ${ranks} ${fate}, ${scheme} by ${backend}: the others are told, by name, and end`
  test(title, async (t) => {
    t.timeout(240_000)
    const { others, victims } = await inParallel(async () => {
      const program = ['test/ranks/lost.ts', fate, String(victim), scheme, backend]
      const { children, endings } = await onTheirOwn(ranks, program)
      const ended = await Promise.all(endings.filter((_, rank) => rank !== victim))
      children[victim]?.kill('SIGKILL')
      return { others: ended, victims: await endings[victim]! }
    })
    for (const ending of others) {
      const told = seenBy(ending).filter((each) => each.code !== undefined)
      t.is(told.length, 2, ending.output)
      t.is(told[0]?.code, code, ending.output)
      t.regex(told[0]?.message ?? '', message)
      // A group that has lost a rank says so at once from then on.
      t.is(told[1]?.message, told[0]?.message)
      t.is(ending.code, 3, ending.output)
      t.is(ending.signal, null)
    }
    t.is(seenBy(victims)[0]?.rank, victim, victims.output)
  })
}

test('under torchrun a rank that dies ends the job, and is named', async (t) => {
  t.timeout(240_000)
  const ending = await inParallel(() => torchrun(2, ['test/ranks/lost.ts', 'is killed', '1']))
  t.not(ending.code, 0)
  t.regex(ending.output, /local_rank: 1/)
  t.regex(ending.output, /SIGKILL/)
})

test('ranks that never come are named', async (t) => {
  t.timeout(240_000)
  const others = await inParallel(async () => {
    const { children, endings } = await onTheirOwn(3, ['test/ranks/lost.ts'])
    children[2]?.kill('SIGKILL')
    return Promise.all(endings.slice(0, 2))
  })
  for (const ending of others) {
    t.not(ending.code, 0)
    t.regex(ending.output, /ERR_RANKS_START/)
    t.regex(ending.output, /expected 3 ranks within 8 s, received nothing from rank 2/)
  }
})
