import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { PyRef } from 'epmoe'
import type { ServeOptions } from '../../src/serve/server.js'
import { type Server, serve } from '../../src/serve/server.js'
import { python } from './python.js'

export { whyNot } from '../transformers/measure.js'

/** A server on a free port; what fails inside is kept instead of printed. */
export async function start(options: ServeOptions = {}): Promise<Server & { errors: unknown[] }> {
  const errors: unknown[] = []
  const server = await serve({ port: 0, seed: 1, onError: (error) => errors.push(error), ...options })
  return Object.assign(server, { errors })
}

export async function post(server: Server, path: string, body: unknown): Promise<Response> {
  const text = typeof body === 'string' ? body : JSON.stringify(body)
  return fetch(server.url + path, { method: 'POST', headers: { 'content-type': 'application/json' }, body: text })
}

export interface Completion {
  choices: { text: string; finish_reason: string; logprobs: { top_logprobs: Record<string, number>[] } | null }[]
  usage: { prompt_tokens: number; completion_tokens: number }
}

/** A greedy completion of the server's model; more by `body`. */
export async function complete(server: Server, prompt: string | number[], body: object = {}): Promise<Completion> {
  const answer = await post(server, '/v1/completions', { model: server.name, prompt, temperature: 0, ...body })
  if (answer.status !== 200) throw new Error(`${answer.status}: ${await answer.text()}`)
  return (await answer.json()) as Completion
}

/** What a metric says. */
export async function metric(server: Server, line: string): Promise<number> {
  const text = await (await fetch(`${server.url}/metrics`)).text()
  const found = text.split('\n').find((each) => each.startsWith(`${line} `))
  return found === undefined ? Number.NaN : Number(found.slice(line.length))
}

/** Resolves when it holds; the test's own time limit is the only one. */
export async function until(holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await holds())) await new Promise((resolve) => setTimeout(resolve, 5))
}

let helper: PyRef | undefined

/** test/helpers/serve.py */
export function helpers(): PyRef {
  const file = fileURLToPath(new URL('serve.py', import.meta.url))
  helper ??= python.exec(readFileSync(file, 'utf8'), file)
  return helper
}
