import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { type DeviceFacts, nativeFolder } from '../native.js'
import { absent, type Finding, fail, ok, warn } from './finding.js'
import { outcomeOf, outcomeOfModule } from './outcome.js'
import { rebuildAddon } from './remedy.js'

export interface NativeFacts {
  version: string
  ops: string[]
  cudaCompiled: boolean
  gpus: DeviceFacts[]
  /** Why CUDA finds no GPU, in its own words. */
  cudaProblem: string
  /** Pairs of GPUs of which the first cannot reach the second's memory. */
  withoutPeerAccess: [number, number][]
}

/** The addon and libepmoe, the driver and the GPUs. */
export async function examineNative(): Promise<{ findings: Finding[]; facts: NativeFacts | undefined; gpus: number }> {
  const [smi, probe] = await Promise.all([
    outcomeOf('nvidia-smi', ['--query-gpu=name,memory.total,driver_version', '--format=csv,noheader']),
    outcomeOfModule('probe-native'),
  ])
  const facts = probe.facts as NativeFacts | undefined
  const gpus = smi.stdout.trim() === '' ? [] : smi.stdout.trim().split('\n')
  return {
    findings: [
      driver(smi.stdout),
      gpuFinding(gpus, facts),
      ...peers(facts),
      addon(facts, probe.problem, gpus.length),
      library(facts),
    ],
    facts,
    gpus: gpus.length,
  }
}

function driver(table: string): Finding {
  const version = table.trim().split('\n')[0]?.split(', ')[2]
  return version === undefined
    ? absent('NVIDIA driver', 'nvidia-smi is not here', 'install the NVIDIA driver, if there is a GPU')
    : ok('NVIDIA driver', version)
}

function gpuFinding(listed: string[], facts: NativeFacts | undefined): Finding {
  if (facts !== undefined && facts.gpus.length > 0) {
    const each = facts.gpus.map((gpu) => `${gpu.name}, compute capability ${gpu.computeCapability}, ${gpu.smCount} SMs`)
    return ok('GPUs', each.join('; '))
  }
  if (listed.length === 0) return absent('GPUs', 'none', 'kernels run on the CPU; CUDA needs an NVIDIA GPU')
  if (facts?.cudaCompiled === true) {
    const why = facts.cudaProblem === '' ? '' : `: ${facts.cudaProblem}`
    const old = /InsufficientDriver/.test(facts.cudaProblem)
    const remedy = old
      ? 'update the driver: it is older than the CUDA toolkit that epmoe was built with; or build with an older toolkit'
      : 'check CUDA_VISIBLE_DEVICES and the driver'
    return warn('GPUs', `${listed.join('; ')}: not usable by epmoe${why}`, remedy)
  }
  return warn('GPUs', `${listed.join('; ')}: out of reach, the library has no CUDA`, rebuildAddon)
}

/** Ranks of one host hand tensors to each other over NVLink or PCIe where they can, and through the host where not. */
function peers(facts: NativeFacts | undefined): Finding[] {
  if (facts === undefined || facts.gpus.length < 2) return []
  const without = facts.withoutPeerAccess
  if (without.length === 0) return [ok('peer access', 'between all GPUs')]
  const pairs = without.map(([a, b]) => `${a} to ${b}`).join(', ')
  return [
    warn(
      'peer access',
      `none from GPU ${pairs}`,
      'see `nvidia-smi topo -p2p r`; in a virtual machine, pass ACS through',
    ),
  ]
}

function addon(facts: NativeFacts | undefined, problem: string, gpus: number): Finding {
  const file = join(nativeFolder(), 'epmoe.node')
  if (!existsSync(file)) return fail('addon', `not built: no ${file}`, rebuildAddon)
  if (facts === undefined) return fail('addon', `${file} does not load: ${problem}`, rebuildAddon)
  const ops = `ops: ${facts.ops.join(', ')}`
  if (facts.cudaCompiled) return ok('addon', `${facts.version}, with CUDA; ${ops}`)
  if (gpus === 0) return ok('addon', `${facts.version}, CPU only; ${ops}`)
  return warn('addon', `${facts.version}, CPU only, though there is a GPU`, `put nvcc on PATH, then ${rebuildAddon}`)
}

function library(facts: NativeFacts | undefined): Finding {
  const file = join(nativeFolder(), process.platform === 'darwin' ? 'libepmoe.dylib' : 'libepmoe.so')
  if (!existsSync(file)) return fail('libepmoe', `not built: no ${file}`, rebuildAddon)
  return facts === undefined ? fail('libepmoe', `${file}: not loaded`, rebuildAddon) : ok('libepmoe', file)
}
