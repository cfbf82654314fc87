import { examine } from '../../doctor/examine.js'
import { textOf } from '../../doctor/text.js'
import { exitCodes, type Verb } from '../verb.js'

const verb: Verb = {
  name: 'doctor',
  summary: 'what is here, what works, and how to mend the rest; exit 3 when parity cannot run',
  configure(command) {
    command.option('--json', 'as JSON')
  },
  async run(options: { json?: boolean }) {
    const report = await examine()
    console.log(options.json ? JSON.stringify(report, null, 1) : textOf(report))
    return report.ok ? exitCodes.passed : exitCodes.environment
  },
}
export default verb
