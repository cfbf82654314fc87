import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import test from 'ava'
import type { BenchReport } from '../src/bench/result.js'
import { type Evidence, migrationReport, type ShadowCounts } from '../src/migrate/report.js'
import { reportPage } from '../src/migrate/report-html.js'
import { reportMarkdown } from '../src/migrate/report-text.js'
import type { ScanReport, ScanSite } from '../src/migrate/scan.js'
import type { CaseResult, Report } from '../src/parity/result.js'
import { emptyFolder, epmoe } from './helpers/migration.js'

const kernel = 'post_reorder_triton_kernel'
const counts: ShadowCounts = {
  op: 'post_reorder',
  mode: 'shadow',
  tripped: '',
  launches: 5000,
  put_off: 0,
  compared: 150,
  matched: 150,
  mismatches: 0,
  errors: 0,
  fallbacks: 0,
  uncovered: 0,
  uncompared: 0,
  captured: 0,
  staged: 0,
  recorded: 0,
  reasons: {},
  shadow_overhead: 0.01,
  timings: { 'T=64, K=8, H=7168, bfloat16': { samples: 9, triton_seconds: 28.8e-6, epmoe_seconds: 3.2e-6 } },
}
const result = { op: 'post_reorder', backend: 'cuda', reference: 'triton', passed: true } as CaseResult
const parity = { cases: [result], controls: [{ name: 'post_reorder/zeros', detected: true }] } as unknown as Report
const site = { file: 'layer.py', line: 7, kernel, op: 'post_reorder', state: 'ready', generation: 'A', blockers: [] }

function evidence(changed: Partial<ShadowCounts> = {}, more: Partial<Evidence> = {}): Evidence {
  const kernels = { [kernel]: { ...counts, ...changed } }
  return {
    shadow: {
      schema: 'epmoe.shadow/1',
      time: 0,
      environment: { device: 'cuda:0', device_name: 'GPU <1>' },
      kernels,
      events: [],
    },
    scan: { sites: [site as unknown as ScanSite], problems: [] } as unknown as ScanReport,
    parity: [parity],
    bench: undefined,
    least: 100,
    config: 'epmoe.migrate.json',
    ...more,
  }
}

test('ready: compared often enough, never different, proved, and nothing stands against a site', (t) => {
  const report = migrationReport(evidence())
  t.true(report.ready)
  t.deepEqual(report.kernels[0]!.reasons, [])
  t.deepEqual(report.caveats, [])
  const text = reportMarkdown(report)
  t.regex(text, /The one kernel is ready\..*GPU <1>/)
  t.regex(text, /\| 5000 \| 150\/150 \| 1\/1 \| 9\.0× \| 1 \|/)
  t.regex(text, /Back: `npx epmoe mode post_reorder=triton/)
  const page = reportPage(report)
  t.true(page.includes('GPU &#60;1&#62;') && !page.includes('GPU <1>'))
  t.notRegex(page, /<script|src=|https?:\/\//)
})

const refusals: [string, Evidence, RegExp][] = [
  ['a mismatch', evidence({ mismatches: 1 }), /1 of 150 comparisons in shadow differ/],
  ['an error', evidence({ errors: 2 }), /epmoe failed 2 times/],
  ['a trip', evidence({ tripped: '3 failures' }), /went back to Triton by itself: 3 failures/],
  ['too few comparisons', evidence({ compared: 99 }), /99 comparisons in shadow, of 100 asked for/],
  [
    'too few, for some were put off',
    evidence({ compared: 99, put_off: 12 }),
    /99 comparisons in shadow, of 100 asked for; max_overhead put 12 more off/,
  ],
  ['launches under capture', evidence({ uncompared: 4 }), /4 launches under graph capture are not compared/],
  ['no shadow', evidence({}, { shadow: undefined }), /not seen in shadow/],
  ['no parity', evidence({}, { parity: [] }), /no parity or replay report/],
  [
    'a failure',
    evidence({}, { parity: [{ ...parity, cases: [result, { ...result, passed: false }] }] }),
    /1 of 2 comparisons of parity/,
  ],
  [
    'a missed control',
    evidence({}, { parity: [{ ...parity, controls: [{ name: 'post_reorder/zeros', detected: false }] }] }),
    /1 controls of parity went unnoticed/,
  ],
  [
    'a blocked site',
    evidence(
      {},
      {
        scan: {
          sites: [{ ...site, blockers: [{ code: 'grid', reason: 'two axes' }] }],
          problems: [],
        } as unknown as ScanReport,
      },
    ),
    /layer\.py:7: two axes/,
  ],
]
for (const [name, given, reason] of refusals) {
  test(`not ready: ${name}`, (t) => {
    const report = migrationReport(given)
    t.false(report.ready)
    t.is(report.kernels[0]!.reasons.length, 1)
    t.regex(report.kernels[0]!.reasons[0]!, reason)
    t.regex(reportMarkdown(report), reason)
    t.true(reportPage(report).includes('not ready'))
  })
}

test('what stays with Triton and what is slower is told, and speed comes from a bench as well', (t) => {
  const timing = { op: 'post_reorder', name: 'post_reorder/T=1', microseconds: 3 }
  const timings = [
    { ...timing, implementation: 'epmoe' },
    { ...timing, implementation: 'triton', microseconds: 2 },
    { ...timing, implementation: 'triton-original', microseconds: 1.5 },
  ]
  const bench = { timings } as unknown as BenchReport
  const report = migrationReport(evidence({ uncovered: 3, reasons: { 'ERR_DTYPE down_output': 3 } }, { bench }))
  t.true(report.ready)
  t.regex(
    report.kernels[0]!.notes.join(),
    /3 launches .* stay with Triton: ERR_DTYPE down_output \(3\),slower than Triton at post_reorder\/T=1/,
  )
  t.deepEqual(report.kernels[0]!.speed[1], { shape: 'post_reorder/T=1', triton: 1.5, epmoe: 3, from: 'bench' })
  t.false(migrationReport(evidence({}, { shadow: undefined, scan: undefined })).ready)
})

test('epmoe mode writes what the configuration takes, and names what it does not', async (t) => {
  const folder = emptyFolder(t)
  const config = join(folder, 'epmoe.migrate.json')
  const mode = (...args: string[]) => epmoe(['mode', ...args, '--config', config])
  t.regex((await mode('post_reorder=shadow', 'pre_reorder=epmoe')).stdout, /post_reorder=shadow pre_reorder=epmoe/)
  t.regex((await mode()).stdout, /post_reorder=shadow pre_reorder=epmoe/)
  for (const [argument, said] of [
    ['post_reoder=shadow', /modes\.post_reoder: .*Did you mean post_reorder\?/],
    ['post_reorder=cuda', /modes\.post_reorder: expected triton, epmoe, shadow, off, received 'cuda'/],
    ['post_reorder', /expected KERNEL=MODE, received post_reorder/],
  ] as const) {
    const { status, stderr } = await mode(argument)
    t.is(status, 2)
    t.regex(stderr, said)
  }
  t.regex((await mode()).stdout, /post_reorder=shadow pre_reorder=epmoe/)
  writeFileSync(join(folder, 'not.json'), '{"schema": "other"}')
  const report = await epmoe(['shadow-report', '--shadow', join(folder, 'not.json')])
  t.is(report.status, 2)
  t.regex(report.stderr, /--shadow: expected a file of schema epmoe\.shadow\/1, received .*schema other/)
})
