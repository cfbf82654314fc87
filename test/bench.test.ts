import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { compareWithBaseline } from '../src/bench/baseline.js'
import { benchPage } from '../src/bench/html.js'
import type { BenchReport, Timing } from '../src/bench/result.js'
import { quantile, summarise } from '../src/bench/statistics.js'

const bin = fileURLToPath(new URL('../src/cli/bin.mjs', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'epmoe-bench-'))

function bench(...args: string[]) {
  return spawnSync(process.execPath, [bin, 'bench', '--quiet', ...args], { encoding: 'utf8' })
}

const timing = (change: Partial<Timing> = {}): Timing => ({
  name: 'post_reorder/T=1',
  op: 'post_reorder',
  implementation: 'epmoe',
  device: 'cpu',
  cold: false,
  microseconds: 100,
  spread: 0.005,
  samples: 50,
  stable: true,
  gigabytesPerSecond: 10,
  ofCopy: 0.5,
  tokens: 1,
  hidden: 8,
  ...change,
})

const report = (...timings: Timing[]): BenchReport => ({
  schema: 'epmoe.bench/1',
  environment: { cpu: 'a <cpu> & more', time: 'now', epmoe: '0' },
  copy: { cpu: 20 },
  timings,
  invalid: [],
})

test('medians and spreads, by the definition', (t) => {
  t.is(quantile([1, 2, 3, 4], 0.5), 2.5)
  t.is(quantile([7], 0.25), 7)
  t.deepEqual(summarise([3, 1, 2]), { median: 2, spread: 0.25, stable: false })
  t.true(summarise(Array.from({ length: 100 }, (_, i) => 100 + (i % 2) * 0.1)).stable)
})

test('a change is told from noise, and from what nobody would act on', (t) => {
  const changeOf = (now: Partial<Timing>, before: Partial<Timing> = {}) =>
    compareWithBaseline(report(timing(now)), report(timing(before)))[0]?.change
  t.is(changeOf({}), 'same')
  t.is(changeOf({ microseconds: 102 }), 'same')
  t.is(changeOf({ microseconds: 120 }), 'slow')
  t.is(changeOf({ microseconds: 80 }), 'fast')
  t.is(changeOf({ microseconds: 120, spread: 0.1 }), 'ambiguous')
  t.is(changeOf({ microseconds: 120 }, { spread: 0.1 }), 'ambiguous')
  t.is(changeOf({ microseconds: 120, implementation: 'triton' }, { implementation: 'triton' }), undefined)
  t.is(changeOf({ name: 'post_reorder/T=2' }), undefined)
  t.is(changeOf({ problem: 'failed' }), undefined)
})

test('the page stands alone, escapes what it shows, and has a line for each implementation', (t) => {
  const page = benchPage(
    report(
      timing(),
      timing({ name: 'post_reorder/T=64', tokens: 64, microseconds: 500 }),
      timing({ implementation: 'torch', microseconds: 300 }),
    ),
  )
  t.is([...page.matchAll(/<polyline /g)].length, 4) // two plots of two implementations
  t.regex(page, /a &#60;cpu&#62; &#38; more/)
  t.notRegex(page, /(src|href)=|@import|url\(/)
  t.notRegex(page, /NaN|undefined|Infinity/)
})

test('a run on the CPU: every implementation checked and timed, and written wherever it was asked to', (t) => {
  const json = join(folder, 'report.json')
  const html = join(folder, 'report.html')
  const lines = join(folder, 'rows.jsonl')
  const small = ['--op', 'post_reorder,preprocess', '--hidden', '256', '--tokens', '4,32', '--seconds', '1']
  const all = [...small, '--device', 'cpu', '--implementation', 'epmoe,epmoe:triton-numerics,torch']
  const first = bench(...all, '--json', json, '--html', html, '--append', lines)
  t.is(first.status, 0, first.stdout + first.stderr)
  const written = JSON.parse(readFileSync(json, 'utf8')) as BenchReport
  t.is(written.schema, 'epmoe.bench/1')
  const timed = written.timings.filter(({ problem }) => problem === undefined)
  for (const op of ['post_reorder', 'preprocess']) {
    const own = timed.filter((each) => each.op === op)
    t.true(own.some(({ implementation }) => implementation === 'torch'))
    t.true(own.every(({ microseconds, gigabytesPerSecond }) => microseconds > 0 && gigabytesPerSecond > 0))
  }
  t.regex(first.stdout, /copy on cpu: [\d.]+ GB\/s/)
  t.regex(readFileSync(html, 'utf8'), /<svg /)
  const rows = readFileSync(lines, 'utf8').trim().split('\n')
  t.is(rows.length, written.timings.length)
  t.truthy((JSON.parse(rows[0] ?? '') as { environment: unknown }).environment)
  // A baseline from a machine of miracles: everything is slower now.
  const faster = {
    ...written,
    timings: written.timings.map((each) => ({ ...each, microseconds: each.microseconds / 50 })),
  }
  const baseline = join(folder, 'faster.json')
  writeFileSync(baseline, JSON.stringify(faster))
  const second = bench(...all, '--baseline', baseline, '--fail-on', 'slow')
  t.is(second.status, 1, second.stdout)
  t.regex(second.stdout, /^slow /m)
})

test('misuse is a usage error, and a GPU that is not here one of the environment', (t) => {
  t.is(bench('--implementation', 'cutlass').status, 2)
  t.is(bench('--baseline', join(folder, 'none.json')).status, 2)
  const { status } = spawnSync(process.execPath, [bin, 'bench', '--device', 'cuda'], {
    encoding: 'utf8',
    env: { ...process.env, CUDA_VISIBLE_DEVICES: '' },
  })
  t.is(status, 3)
})
