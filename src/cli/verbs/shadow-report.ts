import { readFileSync, writeFileSync } from 'node:fs'
import type { Command } from 'commander'
import { migrationReport } from '../../migrate/report.js'
import { reportPage } from '../../migrate/report-html.js'
import { reportMarkdown } from '../../migrate/report-text.js'
import { exitCodes, usageError, type Verb, wholeNumbers } from '../verb.js'

interface Options {
  shadow?: string
  scan?: string
  parity?: string[]
  bench?: string
  least: number[]
  config: string
  json?: string
  html?: string
}

const collect = (value: string, previous: string[] = []) => [...previous, value]

const verb: Verb = {
  name: 'shadow-report',
  summary: 'is each kernel ready to be switched, what is gained, how to get back; exit 0 when all are ready',
  configure(command: Command) {
    command
      .option('--shadow <file>', 'what shim.save() wrote in the serving process')
      .option('--scan <file>', 'what epmoe scan --json printed')
      .option('--parity <file>', 'a report of epmoe parity or replay --json; may be repeated', collect)
      .option('--bench <file>', 'a report of epmoe bench --json')
      .option('--least <count>', 'comparisons in shadow that a kernel needs', wholeNumbers('--least', 0), [100])
      .option('--config <file>', 'the configuration that the way back names', 'epmoe.migrate.json')
      .option('--json <file>', 'write the report')
      .option('--html <file>', 'write it as one page')
  },
  async run(options: Options) {
    if (options.shadow === undefined && options.scan === undefined) {
      throw usageError('--shadow', 'a file of shim.save(), or --scan', 'neither')
    }
    const report = migrationReport({
      shadow: read('--shadow', options.shadow, 'epmoe.shadow/1'),
      scan: read('--scan', options.scan, 'epmoe.scan/1'),
      parity: (options.parity ?? []).map((file) => read('--parity', file, 'epmoe.parity/1')!),
      bench: read('--bench', options.bench, 'epmoe.bench/1'),
      least: options.least[0]!,
      config: options.config,
    })
    console.log(reportMarkdown(report))
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 1)}\n`)
    if (options.html !== undefined) writeFileSync(options.html, reportPage(report))
    return report.ready ? exitCodes.passed : exitCodes.failed
  },
}
export default verb

function read<Content extends { schema: string }>(
  option: string,
  file: string | undefined,
  schema: Content['schema'],
): Content | undefined {
  if (file === undefined) return undefined
  try {
    const found = JSON.parse(readFileSync(file, 'utf8')) as Content
    if (found?.schema === schema) return found
    throw new Error(`schema ${String(found?.schema)}`)
  } catch (error) {
    throw usageError(option, `a file of schema ${schema}`, `${file}: ${(error as Error).message}`)
  }
}
