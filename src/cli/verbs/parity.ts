import { writeFileSync } from 'node:fs'
import type { Command } from 'commander'
import { devices } from '../../device.js'
import { availableBackends, backendNames } from '../../parity/backends.js'
import { controlCases } from '../../parity/controls.js'
import { junitOf } from '../../parity/junit.js'
import { referenceNames } from '../../parity/references.js'
import { succeeded } from '../../parity/result.js'
import { runParity } from '../../parity/run.js'
import { summaryOf, tableOf } from '../../parity/table.js'
import { startPython } from '../../python/start.js'
import { Progress } from '../progress.js'
import { type CaseOptions, caseOptions, selectCases } from '../select.js'
import { exitCodes, namesOf, type Verb, wholeNumbers } from '../verb.js'

interface Options extends CaseOptions {
  backend?: string[]
  reference?: string[]
  interpreterBudget: number[]
  list?: boolean
  json?: string
  junit?: string
  quiet?: boolean
}

const verb: Verb = {
  name: 'parity',
  summary: 'compare every kernel with its references; exit 0 when all pass and every control is detected',
  configure(command: Command) {
    caseOptions(command)
      .option('--backend <names>', `all, or ${backendNames.join(', ')}`, namesOf('--backend', backendNames))
      .option('--reference <names>', `all, or ${referenceNames.join(', ')}`, namesOf('--reference', referenceNames))
      .option(
        '--interpreter-budget <steps>',
        'largest case for interpreted Triton',
        wholeNumbers('--interpreter-budget', 0),
        [2500],
      )
      .option('--list', 'print the names of the cases and stop')
      .option('--json <file>', 'write the report')
      .option('--junit <file>', 'write the report as JUnit XML')
      .option('--quiet', 'no progress')
  },
  async run(options: Options) {
    const cases = await selectCases(options)
    if (options.list) {
      for (const { name } of cases) console.log(name)
      return exitCodes.passed
    }
    const backends = availableBackends(options.backend ?? backendNames)
    if (backends.length === 0) {
      console.error(`epmoe: none of ${options.backend?.join(', ')} is here; epmoe doctor says why`)
      return exitCodes.environment
    }
    // Triton decides how to run when it is imported: without a GPU, its kernels are interpreted.
    if (devices().length === 1) process.env['TRITON_INTERPRET'] ??= '1'
    const progress = new Progress(options.quiet === true)
    const report = runParity({
      cases,
      backends,
      references: options.reference ?? [...referenceNames],
      python: startPython(),
      interpreterBudget: options.interpreterBudget[0]!,
      controlCases: await controlCases(cases),
      onCase: (name, index, total) => progress.show(index, total, name),
    })
    progress.end()
    console.log(tableOf(report))
    console.log(summaryOf(report))
    if (report.summary.total === 0) {
      console.error('epmoe: nothing was compared; ops without numerics run on cpu and cuda only')
    }
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 1)}\n`)
    if (options.junit !== undefined) writeFileSync(options.junit, junitOf(report))
    return succeeded(report) ? exitCodes.passed : exitCodes.failed
  },
}
export default verb
