import { Command, CommanderError } from 'commander'
import { env } from '../env.js'
import { EpmoeError, PythonError } from '../errors.js'
import { defaultsIn } from '../modules.js'
import { packageVersion } from '../package-root.js'
import { exitCodes, type Verb } from './verb.js'

/** Errors that say something about the machine rather than about the kernels. */
const environmental = new Set([
  'ERR_NATIVE',
  'ERR_PYTHON_START',
  'ERR_NO_CUDA',
  'ERR_OUT_OF_MEMORY',
  'ERR_NO_SAFETENSORS',
])

function exitCodeOf(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? exitCodes.passed : exitCodes.usage
  if (!(error instanceof EpmoeError)) return exitCodes.failed
  if (['ERR_USAGE', 'ERR_CAPSULE', 'ERR_CONFIG'].includes(error.code)) return exitCodes.usage
  const absentModule = error instanceof PythonError && /^(ModuleNotFound|Import)Error$/.test(error.pythonType)
  return absentModule || environmental.has(error.code) ? exitCodes.environment : exitCodes.failed
}

/** Commander has printed its own errors already. */
function tell(error: unknown, code: number): void {
  if (error instanceof CommanderError) return
  if (!(error instanceof EpmoeError) || program.opts<{ debug?: boolean }>().debug || env.debug) console.error(error)
  else console.error(`epmoe: ${error.message}`)
  if (code === exitCodes.environment) console.error('epmoe doctor tells what is missing and how to mend it')
}

// Whoever reads the output may stop early, as head does; that is no failure of ours.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(exitCodes.passed)
  throw error
})

const program = new Command('epmoe')
  .description('EP-MoE kernels for CUDA and CPU, proved against the Triton originals')
  .version(packageVersion)
  .option('--debug', 'print the stack of an error (also: EPMOE_DEBUG=1)')
  .showHelpAfterError('(epmoe --help tells what there is)')
  .addHelpText('after', '\nExit codes: 0 passed, 1 a mismatch, 2 wrong usage, 3 something is missing on this machine')
  .exitOverride()

// Every verb is a module in verbs/.
for (const verb of await defaultsIn<Verb>(new URL('./verbs/', import.meta.url))) {
  const command = program
    .command(verb.name)
    .description(verb.summary)
    .exitOverride()
    .showHelpAfterError(`(epmoe ${verb.name} --help tells its options)`)
  verb.configure(command)
  command.action(async (...args: unknown[]) => {
    process.exitCode = await verb.run(command.opts<never>(), args.slice(0, -2) as string[])
  })
}

try {
  await program.parseAsync()
} catch (error) {
  const code = exitCodeOf(error)
  tell(error, code)
  process.exitCode = code
}
