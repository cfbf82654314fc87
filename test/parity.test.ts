import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { ops } from 'epmoe'
import { Op } from '../src/call.js'
import { camelCase } from '../src/errors.js'
import type { GridOptions, Problem } from '../src/parity/case.js'
import type { Guarded } from '../src/parity/guard.js'
import { referenceNames } from '../src/parity/references.js'
import type { Report } from '../src/parity/result.js'
import { succeeded } from '../src/parity/result.js'
import { loadCases } from '../src/parity/run.js'

const bin = fileURLToPath(new URL('../src/cli/bin.mjs', import.meta.url))
/** The hazards of both activations. */
const activationHazards = [
  'gate=none',
  'gate=masked',
  'scales=1',
  'quantization=group',
  'out=same.*values=special',
  'out=float8_e4m3fn.*quantization=static.*values=special',
  'quantization=group.*values=special',
  'format=power_of_two',
  'values=zeros',
  'shift=1',
]
const folder = mkdtempSync(join(tmpdir(), 'epmoe-parity-'))

/** What else the standard cases of the other ops must hold. */
const hazardsOf: Record<string, string[]> = {
  preprocess: ['E=1,', 'E=512,', 'routing=skewed', 'routing=single', 'invalid=100', 'negatives=dropped', 'mMax=256'],
  pre_reorder: [
    'shift=1',
    'H=1,',
    'gate=dst',
    'values=special',
    'values=zeros',
    'scales=expert',
    'scales=token',
    'scales=rows',
    'layout=padded',
    'gain=300',
    'scales=token,quantization=static.*values=special',
    'quantization=token.*values=special',
    'quantization=group.*values=special',
    'quantization=token.*power_of_two',
    'quantization=group.*power_of_two',
  ],
  silu_and_mul: activationHazards,
  gelu_and_mul: activationHazards,
  moe_sum_reduce: ['K=9,', 'factor=2.5', 'shift=1', 'values=special'],
  shuffle_mul_sum: ['factors=none', 'factors=same', 'skipped=40', 'values=special', 'ids=int64'],
  ep_scatter: ['scales=1', 'pad=1,', 'spare=128', 'routing=single', 'values=special'],
  ep_gather: ['weights=same', 'routing=skewed', 'values=special', 'shift=1'],
}

function epmoe(...args: string[]) {
  return spawnSync(process.execPath, [bin, ...args], { encoding: 'utf8' })
}

test('the standard run passes, detects every control, and reports in the documented shape', async (t) => {
  const json = join(folder, 'standard.json')
  const junit = join(folder, 'standard.xml')
  const { status, stdout, stderr } = epmoe(
    'parity',
    '--backend',
    'cpu,cpu:triton-numerics',
    '--json',
    json,
    '--junit',
    junit,
  )
  t.is(status, 0, stdout + stderr)
  const report = JSON.parse(readFileSync(json, 'utf8')) as Report
  t.is(report.schema, 'epmoe.parity/1')
  t.true(report.summary.total > 2000)
  t.is(report.summary.passed, report.summary.total)
  t.is(report.summary.failed, 0)
  t.is(report.summary.total, report.cases.length)
  t.true(report.controls.length >= 1000)
  t.true(report.controls.every(({ detected }) => detected))
  t.is(new Set(report.controls.map(({ name }) => name)).size, report.controls.length)
  for (const { name, op, backend, reference, tier, passed, metrics } of report.cases) {
    t.deepEqual(
      [name, op, backend, reference, tier].map((field) => typeof field),
      ['string', 'string', 'string', 'string', 'string'],
    )
    t.is(typeof passed, 'boolean')
    t.deepEqual(Object.keys(metrics).sort(), ['maxAbs', 'maxUlp', 'mismatched', 'referenceRelL2', 'relL2', 'total'])
  }
  // Every op has been compared with every reference that can run here, and controlled for every dtype.
  for (const { name: op, params } of ops()) {
    const own = report.cases.filter((each) => each.op === op)
    t.true(own.length > 20, op)
    const backends = params.some(({ name }) => name === 'numerics') ? 2 : 1
    t.is(new Set(own.map(({ backend }) => backend)).size, backends, op)
    for (const reference of ['float64', 'torch', 'triton']) {
      t.true(
        own.some((each) => each.reference === reference),
        `${op} ${reference}`,
      )
    }
    for (const dtype of new Set(own.map(({ name }) => /dtype=(\w+)/.exec(name)?.[1]))) {
      for (const kind of ['zeros', '(dropped|changed|swapped) \\w+']) {
        const pattern = new RegExp(`^${op}/${dtype}/cpu/${kind} against`)
        t.true(
          report.controls.some(({ name }) => pattern.test(name)),
          `${op} ${dtype} ${kind}`,
        )
      }
    }
    // Every tier that passed something has also rejected something.
    for (const { backend, reference, tier } of own) {
      const pattern = new RegExp(`^${op}/\\w+/${backend}/.* against ${reference}: .*\\b${tier}\\b`)
      t.true(
        report.controls.some(({ name }) => pattern.test(name)),
        `${op} ${backend} ${reference} ${tier}`,
      )
    }
  }
  for (const { op, references } of await loadCases()) {
    const seen = [...report.cases, ...report.skips].filter(({ name }) => name.startsWith(`${op}/`))
    const names = new Set(seen.map(({ reference }) => reference))
    names.delete('*')
    t.deepEqual([...names].sort(), [...(references ?? referenceNames)].sort(), op)
  }
  // Only one thing is not laid down: what Triton's clamp makes of a NaN.
  for (const { name, backend } of report.skips.filter(({ reference }) => reference === '*')) {
    t.is(backend, 'cpu:triton-numerics')
    t.regex(name, /quantization=(token|group).*values=special/)
  }
  // The table is a line for each op, backend, reference and tier.
  const pairings = new Set(report.cases.map((each) => [each.op, each.backend, each.reference, each.tier].join(' ')))
  t.is(stdout.slice(0, stdout.indexOf('\n\n')).split('\n').length, pairings.size + 2)
  t.true(pairings.size < 60)
  for (const [op, hazards] of Object.entries(hazardsOf)) {
    for (const hazard of ['T=70000,|R=70000,', 'T=0,|R=0,', ...hazards]) {
      const pattern = new RegExp(hazard)
      t.true(
        report.cases.some((each) => each.op === op && pattern.test(each.name)),
        `${op} ${hazard}`,
      )
    }
  }
  // Every kind of hazard of post_reorder has been met by every dtype.
  for (const dtype of ['float32', 'float16', 'bfloat16']) {
    for (const hazard of [
      'gate=dst',
      'values=special',
      'shift=1',
      'ep=8',
      'T=0,',
      'dstStart=1000',
      'factor=0.3',
      'ids=int64',
      'weights=same',
      'H=7,',
      'K=1,',
    ]) {
      t.true(
        report.cases.some(
          ({ op, name }) => op === 'post_reorder' && name.includes(`dtype=${dtype}`) && name.includes(hazard),
        ),
        `${dtype} ${hazard}`,
      )
    }
  }
  t.true(report.cases.some(({ name }) => name.includes('T=70000')))
  t.regex(stdout, /\d+ passed, 0 failed, \d+ skipped in/)
  const xml = readFileSync(junit, 'utf8')
  t.is([...xml.matchAll(/<testcase /g)].length, report.cases.length + report.controls.length + report.skips.length)
  t.regex(xml, /failures="0"/)
})

test('the default is more accurate than the original arithmetic, in every 16-bit case with two local slots or more', (t) => {
  const json = join(folder, 'accuracy.json')
  const { status, stdout } = epmoe(
    'parity',
    '--op',
    'post_reorder',
    '--backend',
    'cpu',
    '--reference',
    'triton',
    '--hidden',
    '512,999',
    '--topk',
    '2,8',
    '--tokens',
    '16',
    '--ep',
    '1',
    '--dtype',
    'float16,bfloat16',
    '--json',
    json,
  )
  t.is(status, 0, stdout)
  const { cases } = JSON.parse(readFileSync(json, 'utf8')) as Report
  t.true(cases.length >= 32)
  for (const { name, metrics } of cases) t.true(metrics.relL2 < metrics.referenceRelL2, name)
})

test('a case has one name, by which it is found again', async (t) => {
  for (const op of await loadCases()) {
    for (const { name } of op.standard()) t.is(op.parse(name)?.name, name)
    t.is(op.parse('post_reorder/NOPE=3'), undefined)
    t.is(op.parse('other_op/T=3'), undefined)
  }
})

test('names do not repeat', async (t) => {
  const names = (await loadCases()).flatMap((op) => op.standard().map(({ name }) => name))
  t.is(new Set(names).size, names.length)
})

test('a default run stays short: interpreted Triton, which takes most of it, has so many steps to go', async (t) => {
  const cases = (await loadCases()).flatMap((op) => op.standard())
  const steps = cases.map(({ interpreterSteps }) => interpreterSteps).filter((count) => count <= 2500)
  const total = steps.reduce((sum, count) => sum + count, 0)
  t.true(total < 45_000, String(total))
})

test('every op has controls in a run whose own cases are too small, or too large, to be spoiled', (t) => {
  const json = join(folder, 'controls.json')
  const run = (...args: string[]) => {
    const { status, stdout } = epmoe('parity', '--backend', 'cpu', '--ep', '1', '--json', json, ...args)
    t.is(status, 0, stdout)
    return (JSON.parse(readFileSync(json, 'utf8')) as Report).controls.map(({ name }) => name)
  }
  const small = ['--reference', 'float64,torch', '--tokens', '1', '--hidden', '7', '--topk', '2', '--experts', '4']
  const names = run(...small)
  for (const { name: op } of ops()) {
    t.true(
      names.some((name) => name.startsWith(`${op}/`)),
      op,
    )
  }
  // One wrong slot of 72,000 is less than what bfloat16 rounds away, as far as a norm can tell.
  const large = ['--op', 'post_reorder', '--dtype', 'bfloat16', '--tokens', '9000', '--hidden', '128']
  t.true(run(...large, '--experts', '8', '--ids', 'int32', '--weights', 'float32', '--reference', 'torch').length > 0)
})

test('power-of-two scales do not hang on a rounding, whatever the seed', (t) => {
  const names = [2, 3, 4, 5, 6, 7, 8].flatMap((seed) =>
    ['silu_and_mul', 'gelu_and_mul', 'pre_reorder'].flatMap((op) => [
      '--case',
      `${op}/out=float8_e4m3fn,quantization=group,format=power_of_two,seed=${seed}`,
    ]),
  )
  const { status, stdout } = epmoe('parity', '--backend', 'cpu,cpu:triton-numerics', '--reference', 'float64', ...names)
  t.is(status, 0, stdout)
})

test('options on the command line make the cross product of every op', async (t) => {
  const options: GridOptions = {
    tokens: [3, 5],
    presets: ['gpt-oss-120b'],
    hidden: [],
    topk: [],
    experts: [],
    dtypes: ['bfloat16', 'float16'],
    ep: [1, 8],
    idsDtypes: ['int32', 'int64'],
    weightsDtypes: ['float32'],
    routings: ['uniform'],
    seed: 7,
  }
  for (const each of await loadCases()) {
    const { op } = each
    const cases = each.grid(options)
    t.is(new Set(cases.map(({ name }) => name)).size, cases.length, op)
    t.true(cases.length >= 4, op)
    for (const { name, axes } of cases) {
      t.regex(name, /seed=7\b/)
      t.true(axes['T']! > 0 && axes['H']! > 0, name)
      if (axes['H'] !== 1) t.is(axes['H'], 2880, name)
      if (axes['K'] !== undefined) t.is(axes['K'], 4, name)
      if (axes['E'] !== undefined) t.is(axes['E'], 128, name)
    }
  }
})

/** Integers that a whole call leaves as they were. */
function untouched(name: string, problem: Problem): Record<string, number> {
  const op = new Op(name)
  const named = (values: Record<string, unknown>) =>
    Object.fromEntries(Object.entries(values).map(([key, value]) => [camelCase(key), value]))
  const tensors = (guarded: Record<string, Guarded>) =>
    named(Object.fromEntries(Object.entries(guarded).map(([key, { tensor }]) => [key, tensor])))
  const after = [0xff, 0x07].map((byte) => {
    const outputs = problem.outputs()
    for (const { tensor } of Object.values(outputs)) {
      const { buffer, byteOffset, byteLength } = tensor.data
      new Uint8Array(buffer, byteOffset, byteLength).fill(byte)
    }
    op.call({ ...tensors(problem.inputs), ...tensors(outputs), ...named(problem.scalars) })
    return outputs
  })
  const [first = {}, second = {}] = after
  return Object.fromEntries(
    Object.entries(first)
      .filter(([, { tensor }]) => tensor.dtype.startsWith('int'))
      .map(([key, { tensor }]) => {
        const other = second[key]!.tensor.data
        return [key, Array.from(tensor.data as Int32Array).filter((value, i) => value !== other[i]).length]
      }),
  )
}

// Poisoned integers are -1, which is a result as well: a second poison tells what was written from what was left alone.
test('-1 where there is no row is written, not left over', async (t) => {
  for (const cases of (await loadCases()).filter(({ op }) => op === 'preprocess' || op === 'ep_scatter')) {
    for (const each of cases.standard().filter(({ axes }) => axes['T']! < 1000)) {
      using problem = each.build()
      const spare = Number(/spare=(\d+)/.exec(each.name)?.[1] ?? 0)
      for (const [name, count] of Object.entries(untouched(each.op, problem))) {
        t.is(count, name === 'm_indices' ? spare : 0, `${each.name} ${name}`)
      }
    }
  }
})

test('--list prints names, --only and --skip choose among them', (t) => {
  const all = epmoe('parity', '--list').stdout.trim().split('\n')
  const half = epmoe('parity', '--list', '--only', 'dtype=float16', '--skip', 'gate=dst').stdout.trim().split('\n')
  t.true(half.length > 5 && half.length < all.length)
  t.true(half.every((name) => name.includes('dtype=float16') && !name.includes('gate=dst')))
})

const misuse: [string, string[]][] = [
  ['an unknown option', ['parity', '--nope']],
  ['an unknown backend', ['parity', '--backend', 'tpu']],
  ['an unknown preset', ['parity', '--preset', 'gpt-9']],
  ['tokens that are no numbers', ['parity', '--tokens', 'many']],
  ['an unknown op', ['parity', '--op', 'matmul']],
  ['an unknown case', ['parity', '--case', 'post_reorder/x=1']],
  ['a selection of nothing', ['parity', '--only', 'no such case']],
  ['a broken pattern', ['parity', '--only', '(']],
  ['an unknown verb', ['frobnicate']],
]
for (const [what, args] of misuse) {
  test(`${what} is a usage error`, (t) => {
    const { status, stderr } = epmoe(...args)
    t.is(status, 2, stderr)
    t.not(stderr, '')
  })
}

test('a backend that is not here is an environment error', (t) => {
  const { status, stderr } = spawnSync(process.execPath, [bin, 'parity', '--backend', 'cuda'], {
    encoding: 'utf8',
    env: { ...process.env, CUDA_VISIBLE_DEVICES: '' },
  })
  t.is(status, 3, stderr)
})

test('a run is good only when something was compared and controlled, and nothing slipped through', (t) => {
  const summary = { total: 3, passed: 3, failed: 0, skipped: 0, controlsMissed: 0, seconds: 1 }
  const report = {
    schema: 'epmoe.parity/1',
    environment: {},
    cases: [],
    controls: [{ name: 'c', detected: true }],
    skips: [],
    summary,
  } as Report
  t.true(succeeded(report))
  t.false(succeeded({ ...report, controls: [] }))
  t.false(succeeded({ ...report, summary: { ...summary, total: 0 } }))
  t.false(succeeded({ ...report, summary: { ...summary, failed: 1 } }))
  t.false(succeeded({ ...report, summary: { ...summary, controlsMissed: 1 } }))
})
