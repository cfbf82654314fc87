import type { Command } from 'commander'
import { isMigrated, scan } from '../../migrate/scan.js'
import { scanText } from '../../migrate/scan-text.js'
import { exitCodes, usageError, type Verb } from '../verb.js'

interface Options {
  json?: boolean
  check?: boolean
  diff?: boolean
  write?: boolean
  revert?: boolean
  sglang?: string
}

const verb: Verb = {
  name: 'scan',
  summary: "find launches of SGLang's kernels in Python sources, and rewrite them to epmoe.shim's drop-in objects",
  configure(command: Command) {
    command
      .argument('<paths...>', 'files and folders')
      .option('--check', 'exit 1 if sites remain that are not migrated')
      .option('--diff', 'print the change: what --write would do, or what --write and --revert did')
      .option('--write', 'rewrite every site that nothing stands against')
      .option('--revert', 'take the rewrite back, byte for byte')
      .option('--sglang <path>', "the SGLang whose kernels imports lead to; default: EPMOE_SGLANG, or Python's own")
      .option('--json', 'as JSON')
      .addHelpText('after', '\nIt exits with 1 also for a file that could not be written. Files are read, never run.')
  },
  async run(options: Options, args: string[]) {
    if (options.write && options.revert) throw usageError('--revert', 'one of --write and --revert', 'both')
    const action = options.write ? 'write' : options.revert ? 'revert' : 'report'
    const report = await scan(args.flat(), { action, diff: options.diff, sglang: options.sglang })
    if (options.json) console.log(JSON.stringify(report, null, 1))
    else {
      for (const { diff } of report.changes) if (diff !== undefined) process.stdout.write(diff)
      console.log(scanText(report))
    }
    const failed = report.problems.some(({ kind }) => kind === 'not-written')
    return failed || (options.check && !isMigrated(report)) ? exitCodes.failed : exitCodes.passed
  },
}
export default verb
