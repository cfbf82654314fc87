import { writeFileSync } from 'node:fs'
import type { Command } from 'commander'
import { devices } from '../../device.js'
import { Capsule } from '../../migrate/capsule.js'
import { readConfig } from '../../migrate/config.js'
import { capsuleFiles } from '../../migrate/files.js'
import { type ReplayReport, replay, replayReferences } from '../../migrate/replay.js'
import { shrink, writeShrunk } from '../../migrate/shrink.js'
import { availableBackends, type Backend, backendNames } from '../../parity/backends.js'
import { junitOf } from '../../parity/junit.js'
import { succeeded } from '../../parity/result.js'
import { summaryOf, tableOf } from '../../parity/table.js'
import type { Python } from '../../python/python.js'
import { startPython } from '../../python/start.js'
import { Progress } from '../progress.js'
import { exitCodes, namesOf, usageError, type Verb, wholeNumbers } from '../verb.js'

interface Options {
  config?: string
  backend?: string[]
  reference?: string[]
  interpreterBudget: number[]
  shrink?: boolean
  trials: number[]
  json?: string
  junit?: string
  quiet?: boolean
}

const verb: Verb = {
  name: 'replay',
  summary: 'make recorded calls again, on every backend against every reference; verdict and exit codes of parity',
  configure(command: Command) {
    command
      .argument('[files...]', 'capsules, or folders of them; default: the folder that the configuration records to')
      .option('--config <file>', 'default: EPMOE_MIGRATE, or ./epmoe.migrate.json')
      .option('--backend <names>', `all, or ${backendNames.join(', ')}`, namesOf('--backend', backendNames))
      .option('--reference <names>', `all, or ${replayReferences.join(', ')}`, namesOf('--reference', replayReferences))
      .option(
        '--interpreter-budget <steps>',
        'largest call for interpreted Triton',
        wholeNumbers('--interpreter-budget', 0),
        [20000],
      )
      .option('--shrink', 'reduce each call that fails to the smallest that does, beside it as …-small.safetensors')
      .option('--trials <count>', 'replays at most for each call to shrink', wholeNumbers('--trials', 1), [1000])
      .option('--json <file>', 'write the report')
      .option('--junit <file>', 'write the report as JUnit XML')
      .option('--quiet', 'no progress')
      .addHelpText('after', '\nA file that is no capsule, is damaged or is made up: exit code 2, and nothing is run')
  },
  async run(options: Options, args: string[]) {
    const backends = availableBackends(options.backend ?? backendNames)
    if (backends.length === 0) {
      console.error(`epmoe: none of ${options.backend?.join(', ')} is here; epmoe doctor says why`)
      return exitCodes.environment
    }
    const named = args.flat()
    const files = capsuleFiles(named.length > 0 ? named : [recordFolder(options.config)])
    // Triton decides how to run when it is imported: without a GPU, its kernels are interpreted.
    if (devices().length === 1) process.env['TRITON_INTERPRET'] ??= '1'
    const python = startPython()
    const capsules = files.map((file) => Capsule.read(python, file))
    const progress = new Progress(options.quiet === true)
    const interpreterBudget = options.interpreterBudget[0]!
    const report = await replay({
      capsules,
      backends,
      references: options.reference ?? replayReferences,
      python,
      interpreterBudget,
      controls: 'on',
      onCase: (name, index, total) => progress.show(index, total, name),
    })
    progress.end()
    console.log(tableOf(report))
    for (const { name, kernel, generation, reason, passed, conclusion } of report.capsules) {
      if (passed) continue
      const what = [kernel, generation && `generation ${generation}`, reason].filter(Boolean).join(', ')
      console.log(`${name} (${what}): ${conclusion ?? 'nothing was compared'}`)
    }
    console.log(`${report.capsules.filter(({ passed }) => passed).length} of ${capsules.length} capsules passed`)
    console.log(summaryOf(report))
    if (options.shrink) await shrinkAll(capsules, { report, backends, python, interpreterBudget, options, progress })
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 1)}\n`)
    if (options.junit !== undefined) writeFileSync(options.junit, junitOf(report))
    return succeeded(report) ? exitCodes.passed : exitCodes.failed
  },
}
export default verb

function recordFolder(config: string | undefined): string {
  const { record, path } = readConfig(config)
  if (record === null) throw usageError('FILES', 'capsules, or a configuration that records', path)
  return record.folder
}

interface Shrinking {
  report: ReplayReport
  backends: Backend[]
  python: Python
  interpreterBudget: number
  options: Options
  progress: Progress
}

async function shrinkAll(capsules: Capsule[], { options, progress, ...shared }: Shrinking): Promise<void> {
  const trials = options.trials[0]!
  for (const [index, capsule] of capsules.entries()) {
    if (shared.report.capsules[index]?.passed) continue
    const shrunk = await shrink({
      ...shared,
      capsule,
      trials,
      onTrial: (trial, what) => progress.show(trial, trials, what),
    })
    progress.end()
    const sizes = Object.entries(shrunk.sizes).map(([axis, [before, after]]) => `${axis} ${before} to ${after}`)
    console.log(`${writeShrunk(shared.python, shrunk)}: ${sizes.join(', ')}, in ${shrunk.trials} replays`)
  }
}
