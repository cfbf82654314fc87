import { arch, cpus, platform } from 'node:os'
import { cpuThreads, deviceFacts, devices } from '../device.js'
import { native } from '../native.js'
import { packageVersion } from '../package-root.js'
import type { Python } from '../python/python.js'
import type { ReferenceFacts } from './references.js'

/** Where a run took place: everything its numbers may depend on. */
export function environmentOf(python: Python, references: ReferenceFacts[]): Record<string, unknown> {
  return {
    epmoe: packageVersion,
    node: process.version,
    platform: `${platform()}-${arch()}`,
    cpu: cpus()[0]?.model ?? 'unknown',
    cpuThreads: cpuThreads(),
    cuda: native().device.cudaCompiled,
    gpus: devices()
      .filter((device) => device !== 'cpu')
      .map((device) => deviceFacts(device)),
    python: python.version,
    references: references.map(({ name, ...facts }) => ({ name, ...facts })),
    time: new Date().toISOString(),
  }
}
