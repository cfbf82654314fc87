import { readdirSync } from 'node:fs'
import { Command, CommanderError } from 'commander'
import { env } from '../env.js'
import { EpmoeError } from '../errors.js'
import { packageVersion } from '../package-root.js'
import { exitCodes, type Verb } from './verb.js'

/** Every verb is a module in verbs/, found by listing the folder. */
async function verbs(): Promise<Verb[]> {
  const folder = new URL('./verbs/', import.meta.url)
  const files = readdirSync(folder).filter((file) => /\.(ts|js)$/.test(file) && !file.endsWith('.d.ts'))
  return Promise.all(
    files.sort().map(async (file) => ((await import(new URL(file, folder).href)) as { default: Verb }).default),
  )
}

const program = new Command('epmoe')
  .description('EP-MoE kernels for CUDA and CPU, proved against the Triton originals')
  .version(packageVersion)
  .showHelpAfterError('(epmoe --help tells what there is)')
  .exitOverride()

for (const verb of await verbs()) {
  const command = program.command(verb.name).description(verb.summary).exitOverride().showHelpAfterError()
  verb.configure(command)
  command.action(async (...args: unknown[]) => {
    process.exitCode = await verb.run(command.opts<never>(), args.slice(0, -2) as string[])
  })
}

try {
  await program.parseAsync()
} catch (error) {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? exitCodes.passed : exitCodes.usage
  } else if (error instanceof EpmoeError) {
    console.error(env.debug ? error : `epmoe: ${error.message}`)
    process.exitCode = error.code === 'ERR_USAGE' ? exitCodes.usage : exitCodes.environment
  } else {
    console.error(error)
    process.exitCode = exitCodes.failed
  }
}
