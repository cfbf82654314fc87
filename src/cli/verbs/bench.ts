import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import type { Command } from 'commander'
import { compareWithBaseline } from '../../bench/baseline.js'
import { benchPage } from '../../bench/html.js'
import type { BenchReport } from '../../bench/result.js'
import { implementationNames, runBench } from '../../bench/run.js'
import { benchTable, comparisonTable } from '../../bench/table.js'
import { devices } from '../../device.js'
import { ops } from '../../ops.js'
import { startPython } from '../../python/start.js'
import { Progress } from '../progress.js'
import { type CaseOptions, caseOptions, selectCases } from '../select.js'
import { exitCodes, namesOf, usageError, type Verb, wholeNumbers } from '../verb.js'

interface Options extends CaseOptions {
  device?: ('cpu' | 'cuda')[]
  implementation?: string[]
  seconds: number[]
  cold?: boolean
  json?: string
  html?: string
  append?: string
  baseline?: string
  failOn?: 'slow'[]
  quiet?: boolean
}

const verb: Verb = {
  name: 'bench',
  summary: 'time kernels beside Triton and torch, in one run, against the rate of a copy',
  configure(command: Command) {
    caseOptions(command)
      .option(
        '--device <name>',
        'cpu or cuda; default: cuda where there is one',
        namesOf('--device', ['cpu', 'cuda'] as const),
      )
      .option(
        '--implementation <names>',
        `all, or ${implementationNames.join(', ')}`,
        namesOf('--implementation', implementationNames),
      )
      .option('--seconds <count>', 'longest time for a case', wholeNumbers('--seconds', 1), [5])
      .option('--cold', 'rotate arguments beyond the caches')
      .option('--json <file>', 'write the report')
      .option('--html <file>', 'write the report as a page with plots')
      .option('--append <file>', 'add the timings as lines of JSON, with what they depend on')
      .option('--baseline <file>', 'compare with a report written by --json')
      .option(
        '--fail-on <change>',
        'slow: exit 1 when the baseline was faster',
        namesOf('--fail-on', ['slow'] as const),
      )
      .option('--quiet', 'no progress')
  },
  async run(options: Options) {
    const cases = await selectCases({
      ...options,
      dtype: options.dtype ?? ['bfloat16'],
      ids: options.ids ?? ['int32'],
      weights: options.weights ?? ['float32'],
      ep: options.ep ?? [1],
      tokens: options.tokens ?? [1, 8, 64, 512, 4096],
      preset: options.preset ?? (options.hidden === undefined && options.case === undefined ? ['deepseek-v3'] : []),
    })
    const gpu = devices().find((each) => each !== 'cpu')
    const [kind = gpu === undefined ? 'cpu' : 'cuda'] = options.device ?? []
    if (kind === 'cuda' && gpu === undefined) {
      console.error('epmoe: there is no GPU here; epmoe doctor says why')
      return exitCodes.environment
    }
    const device = kind === 'cpu' ? 'cpu' : gpu!
    // Interpreted Triton is no opponent: where Triton does not compile, it is left out.
    const implementations = (options.implementation ?? implementationNames).filter(
      (name) => device !== 'cpu' || !name.startsWith('triton'),
    )
    const before = options.baseline === undefined ? undefined : readBaseline(options.baseline)
    const progress = new Progress(options.quiet === true)
    const report = runBench({
      cases: cases.filter(({ op }) => ops().some(({ name }) => name === op)),
      implementations,
      device,
      python: startPython(),
      seconds: options.seconds[0]!,
      coldBytes: options.cold === true ? 2 ** 28 : 0,
      onCase: (name, index, total) => progress.show(index, total, name),
    })
    progress.end()
    console.log(benchTable(report))
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 1)}\n`)
    if (options.html !== undefined) writeFileSync(options.html, benchPage(report))
    if (options.append !== undefined) append(options.append, report)
    const comparisons = before === undefined ? [] : compareWithBaseline(report, before)
    if (before !== undefined) console.log(comparisonTable(comparisons))
    const slow = options.failOn !== undefined && comparisons.some(({ change }) => change === 'slow')
    return slow || report.invalid.length > 0 ? exitCodes.failed : exitCodes.passed
  },
}
export default verb

function readBaseline(file: string): BenchReport {
  try {
    const report = JSON.parse(readFileSync(file, 'utf8')) as BenchReport
    if (report.schema === 'epmoe.bench/1') return report
    throw new Error(`schema ${String(report.schema)}`)
  } catch (error) {
    throw usageError('--baseline', 'a report of epmoe bench --json', `${file}: ${(error as Error).message}`)
  }
}

/** One line a timing: rows are added, never changed, so that a file tells a history. */
function append(file: string, { environment, copy, timings }: BenchReport): void {
  mkdirSync(dirname(file), { recursive: true })
  const lines = timings.map((timing) => JSON.stringify({ ...timing, copy, environment }))
  appendFileSync(file, `${lines.join('\n')}\n`)
}
