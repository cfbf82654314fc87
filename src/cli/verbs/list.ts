import { devices } from '../../device.js'
import { ops } from '../../ops.js'
import { referenceNames } from '../../parity/references.js'
import { loadCases } from '../../parity/run.js'
import { exitCodes, type Verb } from '../verb.js'

const verb: Verb = {
  name: 'list',
  summary: 'the ops, where they run, what they are compared with, and their cases',
  configure(command) {
    command.option('--json', 'as JSON')
  },
  async run(options: { json?: boolean }) {
    const cases = await loadCases()
    const gpus = devices().length - 1
    const rows = ops().map((op) => {
      const own = cases.find((each) => each.op === op.name)
      return {
        op: op.name,
        backends: ['cpu', ...(op.cuda ? [gpus > 0 ? 'cuda' : 'cuda (built, no GPU here)'] : [])],
        references: own?.references ?? referenceNames,
        standardCases: own?.standard().length ?? 0,
      }
    })
    if (options.json) console.log(JSON.stringify(rows, null, 1))
    else
      for (const row of rows)
        console.log(
          `${row.op}: on ${row.backends.join(', ')}; against ${row.references.join(', ')}; ${row.standardCases} standard cases`,
        )
    return exitCodes.passed
  },
}
export default verb
