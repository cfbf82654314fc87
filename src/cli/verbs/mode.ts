import type { Command } from 'commander'
import { setModes } from '../../migrate/config.js'
import { exitCodes, usageError, type Verb } from '../verb.js'

const verb: Verb = {
  name: 'mode',
  summary: 'write modes of kernels to the configuration: post_reorder=shadow, =epmoe, or back by *=triton',
  configure(command: Command) {
    command
      .argument('[modes...]', 'KERNEL=MODE; * is all kernels. None: print what the file says')
      .option('--config <file>', 'default: EPMOE_MIGRATE, or ./epmoe.migrate.json')
      .addHelpText('after', '\nA process that runs shim.watch() follows within a second; others when they start.')
  },
  async run(options: { config?: string }, args: string[]) {
    const modes = Object.fromEntries(
      args.flat().map((text) => {
        const [kernel, mode, ...rest] = text.split('=')
        if (!kernel || !mode || rest.length > 0) throw usageError('MODES', 'KERNEL=MODE', text)
        return [kernel, mode]
      }),
    )
    const { path, modes: now } = setModes(modes, options.config)
    console.log(
      `${path}: ${
        Object.entries(now)
          .map((pair) => pair.join('='))
          .join(' ') || 'no modes'
      }`,
    )
    return exitCodes.passed
  },
}
export default verb
