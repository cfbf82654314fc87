// Programs that embed Python, each in a process of its own.
import { spawnSync } from 'node:child_process'
import { chmodSync, mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { startPython } from 'epmoe'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** The interpreter whose environment the programs use. */
export const executable: string = startPython().executable

export function temporaryFolder(): string {
  return mkdtempSync(join(tmpdir(), 'epmoe-embedding-'))
}

interface Circumstances {
  environment?: Record<string, string>
  /** Of Node. */
  flags?: string[]
  /** What the process is to end with; 0 where not said. */
  code?: number
}

/** Runs a program that knows `startPython` and `kw`, and returns what it printed as JSON. */
export function run(body: string, { environment = {}, flags = [], code = 0 }: Circumstances = {}): unknown {
  const program = `
    import { kw, startPython } from 'epmoe'
    ${body}`
  const args = [...flags, '--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', program]
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, args, {
    cwd: root,
    encoding: 'utf8',
    timeout: 120_000,
    env: { ...process.env, EPMOE_PYTHON: executable, ...environment },
  })
  if (status !== code) throw new Error(`${status ?? signal}\n${stdout}${stderr}`)
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? '')
}

/** Begins a program: `python` is started, and `work` is a module of this source, which spawned processes can import. */
export function begin(source: string): string {
  const where = temporaryFolder()
  writeFileSync(join(where, 'embedded_work.py'), source)
  return `
    const python = startPython()
    python.import('sys').get('path').method('insert', 0, ${JSON.stringify(where)})
    process.env.PYTHONPATH = ${JSON.stringify(where)}
    python.import('os').get('environ').setItem('PYTHONPATH', ${JSON.stringify(where)})
    const work = python.import('embedded_work')`
}

/** A PATH whose first python3 is good for nothing. */
export function hostilePath(): string {
  const hostile = temporaryFolder()
  for (const name of ['python', 'python3']) {
    writeFileSync(join(hostile, name), '#!/bin/sh\nexit 42\n')
    chmodSync(join(hostile, name), 0o755)
  }
  return `${hostile}:${process.env['PATH'] ?? ''}`
}
