import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { ops } from 'epmoe'
import type { Report } from '../src/parity/result.js'
import { succeeded } from '../src/parity/result.js'
import { loadCases } from '../src/parity/run.js'

const bin = fileURLToPath(new URL('../src/cli/bin.mjs', import.meta.url))
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
    'quantization=token',
    'quantization=group',
    'format=power_of_two',
  ],
  silu_and_mul: [
    'gate=none',
    'gate=masked',
    'scales=1',
    'quantization=group',
    'values=special',
    'values=zeros',
    'shift=1',
  ],
  gelu_and_mul: [
    'gate=none',
    'gate=masked',
    'scales=1',
    'quantization=group',
    'values=special',
    'values=zeros',
    'shift=1',
  ],
  moe_sum_reduce: ['K=9,', 'factor=2.5', 'shift=1', 'values=special'],
  shuffle_mul_sum: ['factors=none', 'factors=same', 'skipped=40', 'values=special', 'ids=int64'],
  ep_scatter: ['scales=1', 'pad=1,', 'spare=128', 'routing=single', 'values=special'],
  ep_gather: ['weights=same', 'routing=skewed', 'values=special', 'shift=1'],
}

function epmoe(...args: string[]) {
  return spawnSync(process.execPath, [bin, ...args], { encoding: 'utf8' })
}

test('the standard run passes, detects every control, and reports in the documented shape', (t) => {
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
  t.true(report.controls.length >= 300)
  t.true(report.controls.every(({ detected }) => detected))
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
  }
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
