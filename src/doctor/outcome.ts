import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** How a child process ended. */
export interface Outcome {
  /** What it printed after the marker, parsed; undefined when it did not get that far. */
  facts: unknown
  stdout: string
  /** In one line, why there are no facts. */
  problem: string
}

/** A probe prints its facts as JSON behind this, whatever else the modules it loads may print. */
export const marker = 'epmoe-doctor:'

/** Runs a command that may be missing, hang or crash. */
export function outcomeOf(command: string, args: string[], environment: NodeJS.ProcessEnv = {}): Promise<Outcome> {
  return new Promise((resolve) => {
    const child = spawn(command, args, {
      env: { ...process.env, ...environment },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    const limit = setTimeout(() => child.kill('SIGKILL'), 120_000)
    let stdout = ''
    let stderr = ''
    child.stdout.on('data', (chunk) => (stdout += chunk))
    child.stderr.on('data', (chunk) => (stderr += chunk))
    child.on('error', (error) => {
      clearTimeout(limit)
      resolve({ facts: undefined, stdout: '', problem: error.message })
    })
    child.on('close', (code, signal) => {
      clearTimeout(limit)
      const line = stdout.split('\n').find((each) => each.startsWith(marker))
      const ending = signal === null ? `ended with code ${code}` : `was ended by ${signal}`
      const said = stderr.trim().split('\n')
      const error = said.find((each) => /^\w*(Error|Exception)\b.*:/.test(each)) ?? said.at(-1) ?? ''
      resolve({
        facts: code === 0 && line !== undefined ? JSON.parse(line.slice(marker.length)) : undefined,
        stdout: code === 0 ? stdout : '',
        problem: signal !== null || error === '' ? `${command} ${ending}` : error,
      })
    })
  })
}

/** Runs a module of this folder in a process of its own, so that a crash is a finding and not the end. */
export function outcomeOfModule(name: string): Promise<Outcome> {
  const source = import.meta.url.endsWith('.ts')
  const file = fileURLToPath(new URL(`./${name}.${source ? 'ts' : 'js'}`, import.meta.url))
  return outcomeOf(process.execPath, [...(source ? ['--import', import.meta.resolve('tsx')] : []), file])
}
