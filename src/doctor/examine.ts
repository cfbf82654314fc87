import { packageVersion } from '../package-root.js'
import { type Ability, type Finding, fail, ok } from './finding.js'
import { examineNative, type NativeFacts } from './native.js'
import { outcomeOfModule } from './outcome.js'
import { examinePython, type PythonFacts } from './python.js'
import { rebuildAddon } from './remedy.js'
import { examineTools } from './tools.js'

export interface Report {
  epmoe: string
  /** Whether the parity run on the CPU can run. */
  ok: boolean
  findings: Finding[]
  abilities: Ability[]
}

/** Looks at everything epmoe needs. Nothing that is missing or broken makes it throw. */
export async function examine(): Promise<Report> {
  const nativePart = examineNative()
  const [native, python, bridge] = await Promise.all([
    nativePart,
    examinePython(nativePart.then(({ gpus }) => gpus)),
    examineBridge(),
  ])
  const findings = [...examineTools(), ...native.findings, ...python.findings, bridge]
  const abilities = abilitiesOf(findings, native.facts, python.facts)
  return { epmoe: packageVersion, ok: findings.every(({ state }) => state !== 'fail'), findings, abilities }
}

async function examineBridge(): Promise<Finding> {
  const { facts, problem } = await outcomeOfModule('probe-bridge')
  if (typeof facts === 'string') return ok('bridge', facts)
  return fail('bridge', problem, `mend what fails above; then ${rebuildAddon}`)
}

function abilitiesOf(findings: Finding[], native?: NativeFacts, python?: PythonFacts): Ability[] {
  /** Works when none of these fails; otherwise the first reason counts. */
  const ability = (name: string, needs: string[], ...obstacles: (string | false | null | undefined)[]): Ability => {
    const failed = findings.find((finding) => needs.includes(finding.name) && finding.state === 'fail')
    const why = failed === undefined ? obstacles.find((each) => each) : `${failed.name}: ${failed.value}`
    return { name, works: why === undefined, why: why || '' }
  }
  const kernels = ['Node', 'npm packages', 'addon', 'libepmoe']
  const bridge = [...kernels, 'pymport', 'interpreter', 'torch', 'bridge']
  const parity = [...bridge, 'triton', 'numpy']
  const noCuda = native?.cudaCompiled !== true && 'the library is built without CUDA'
  const noGpu = native?.gpus.length === 0 && 'there is no GPU'
  const interprets = python?.torch.available !== true && 'torch reaches no GPU, so Triton interprets'
  const noOriginal = python?.sglang.problem
  return [
    ability('kernels on the CPU, from TypeScript', kernels),
    ability('kernels on CUDA, from TypeScript', kernels, noCuda, noGpu),
    ability('kernels on torch tensors', bridge),
    ability('epmoe parity on the CPU', parity),
    ability('epmoe parity on CUDA, against compiled Triton', parity, noCuda, noGpu, interprets),
    ability("epmoe parity against SGLang's own kernel", parity, noOriginal),
  ]
}
