import { spawnSync } from 'node:child_process'
import { arch, cpus, platform } from 'node:os'
import { cpuThreads, deviceFacts, devices } from '../device.js'
import { env } from '../env.js'
import { native } from '../native.js'
import { packageRoot, packageVersion } from '../package-root.js'
import type { Python } from '../python/python.js'
import type { ReferenceFacts } from './references.js'

/** Where a run took place: everything its numbers may depend on. */
export function environmentOf(python: Python, references: ReferenceFacts[]): Record<string, unknown> {
  return {
    epmoe: packageVersion,
    ...commitOf(packageRoot),
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

/** The checkout's commit, with a `+` when files differ from it; nothing in an installed package. */
function commitOf(folder: string): { commit?: string } {
  if (env.commit !== undefined) return { commit: env.commit }
  const git = spawnSync('git', ['-C', folder, 'describe', '--always', '--dirty=+', '--exclude=*', '--abbrev=10'], {
    encoding: 'utf8',
  })
  return git.status === 0 ? { commit: git.stdout.trim() } : {}
}
