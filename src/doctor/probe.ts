import { spawnSync } from 'node:child_process'

/** What a command prints, or undefined when it is absent or fails. */
export function commandOutput(command: string, args: string[]): string | undefined {
  const result = spawnSync(command, args, { encoding: 'utf8', timeout: 60_000 })
  return result.status === 0 ? result.stdout.trim() : undefined
}

/** A JSON value that a Python program prints, in a process of its own: what is broken there breaks nothing here. */
export function askPython(python: string, source: string): Record<string, unknown> | undefined {
  const output = commandOutput(python, ['-c', source])
  if (output === undefined) return undefined
  try {
    return JSON.parse(output.split('\n').at(-1) ?? '') as Record<string, unknown>
  } catch {
    return undefined
  }
}

/** The same for JavaScript. */
export function askNode(source: string): { value?: Record<string, unknown>; error?: string } {
  const result = spawnSync(process.execPath, ['--input-type=commonjs', '--eval', source], {
    encoding: 'utf8',
    timeout: 60_000,
  })
  if (result.status === 0) return { value: JSON.parse(result.stdout) as Record<string, unknown> }
  const reason = /^\w*Error: (.*)$/m.exec(result.stderr)?.[1]
  return { error: reason ?? `ended with ${result.signal ?? `code ${result.status}`}` }
}
