import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { env } from '../../src/env.js'
import { packageRoot } from '../../src/package-root.js'
import { findPython } from '../../src/setup/find-python.mjs'

const root = fileURLToPath(new URL('../..', import.meta.url))
export const pythonTests = join(root, 'test/python')

export interface Finished {
  status: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

function finish(command: string, args: string[], options: { cwd: string; env: NodeJS.ProcessEnv }): Promise<Finished> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] })
    const text = { stdout: '', stderr: '' }
    for (const name of ['stdout', 'stderr'] as const) {
      child[name].setEncoding('utf8').on('data', (chunk: string) => {
        text[name] += chunk
      })
    }
    child.on('error', reject)
    child.on('close', (status, signal) => resolve({ status, signal, ...text }))
  })
}

/** A process with the command line. */
export function epmoe(args: string[], environment: Record<string, string> = {}, cwd = root): Promise<Finished> {
  const options = { cwd, env: { ...process.env, EPMOE_DEBUG: '', ...environment } }
  return finish(process.execPath, [join(root, 'src/cli/bin.mjs'), ...args], options)
}

/** A process of plain Python that sees epmoe. */
export function plainPython(args: string[], environment: Record<string, string> = {}): Promise<Finished> {
  const found = findPython({ fromEnvironment: env.python, packageRoot })
  const options = { cwd: pythonTests, env: { ...process.env, PYTHONPATH: join(root, 'python'), ...environment } }
  return finish(found?.python ?? '', args, options)
}

export function emptyFolder(t: { teardown(clean: () => void): void }): string {
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** What test/python/serve.py prints. */
export interface Served {
  device: string
  served: number
  wrong: number
  seconds: number
  digest: string | null
  mode: string
  identical: boolean
  warnings: string[]
  events: { kernel: string; kind: string; what: string; capsule: string | null }[]
  stats: Record<string, { mode: string; [count: string]: unknown }>
}

/** Runs the serving loop in a process of its own. */
export async function serve(
  options: Record<string, unknown>,
  environment: Record<string, string> = {},
): Promise<Served> {
  const { stdout, stderr, status } = await plainPython(['serve.py', JSON.stringify(options)], environment)
  if (status !== 0) throw new Error(`serve.py ended with ${status}: ${stderr}`)
  return JSON.parse(stdout) as Served
}
