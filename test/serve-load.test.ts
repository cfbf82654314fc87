import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import type { IncomingMessage } from 'node:http'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { ExecutionContext } from 'ava'
import { PythonError, stats } from 'epmoe'
import { Random } from '../src/parity/random.js'
import { kernelModes } from '../src/serve/model.js'
import type { Server } from '../src/serve/server.js'
import { type Completion, complete, helpers, metric, post, until } from './helpers/serve.js'
import { served, shutGate, test } from './helpers/served.js'

const tokens = 16

/** What goes with a prompt in these tests. */
function chat(server: Server, prompt: string) {
  const messages = [{ role: 'user', content: prompt }]
  return { model: server.name, messages, temperature: 0, max_tokens: tokens }
}

interface Chat {
  choices: {
    message: { content: string }
    delta?: { content?: string }
    logprobs?: { content: { top_logprobs: { logprob: number }[] }[] }
  }[]
}

async function answered(server: Server, prompt: string, more: object = {}): Promise<Chat['choices'][0]> {
  const answer = await post(server, '/v1/chat/completions', { ...chat(server, prompt), ...more })
  if (answer.status !== 200) throw new Error(`${answer.status}: ${await answer.text()}`)
  return ((await answer.json()) as Chat).choices[0]!
}

/**
 * Prompts with what they get alone. The order of additions depends on the batch, so that logits move by some 1e-6; a
 * prompt whose best two tokens are ever closer than 1e-3 proves nothing and is left out.
 */
async function expectations(server: Server, count: number): Promise<Map<string, string>> {
  const expected = new Map<string, string>()
  for (let i = 0; expected.size < count; i++) {
    const prompt = `${'many words '.repeat(i % 7)}prompt ${i}`
    const { message, logprobs } = await answered(server, prompt, { logprobs: true, top_logprobs: 2 })
    const margins = logprobs!.content.map(({ top_logprobs: [first, second] }) => first!.logprob - second!.logprob)
    if (Math.min(...margins) > 1e-3) expected.set(prompt, message.content)
  }
  return expected
}

/** Reads a stream; after `leaveAfter` events the client goes away. */
async function stream(
  server: Server,
  prompt: string,
  leaveAfter = Number.POSITIVE_INFINITY,
): Promise<string | undefined> {
  const controller = new AbortController()
  const answer = await fetch(`${server.url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...chat(server, prompt), stream: true }),
    signal: controller.signal,
  })
  if (answer.status !== 200) throw new Error(`${answer.status}`)
  let [text, left, events, done] = ['', '', 0, false]
  const decoder = new TextDecoder()
  try {
    for await (const bytes of answer.body!) {
      left += decoder.decode(bytes as Uint8Array, { stream: true })
      const parts = left.split('\n\n')
      left = parts.pop() ?? ''
      for (const part of parts) {
        if (part === 'data: [DONE]') done = true
        else text += (JSON.parse(part.slice(6)) as Chat).choices[0]?.delta?.content ?? ''
        if (++events >= leaveAfter) controller.abort()
      }
    }
  } catch (error) {
    if (!controller.signal.aborted) throw error
    return undefined
  }
  return done ? text : undefined
}

test('more clients than slots, some of whom leave, while modes change: nothing is lost or mixed up', async (t) => {
  const server = await served(t, { slots: 4, queue: 200, batchTokens: 24 })
  const expected = await expectations(server, 12)
  const before = server.metrics.totals.passes
  const outcome: Record<string, number> = { ...server.metrics.totals.requests }
  const flips = setInterval(() => {
    server.model.mode = kernelModes[(kernelModes.indexOf(server.model.mode) + 1) % 3]!
  }, 20)
  t.teardown(() => clearInterval(flips))
  const clients = Array.from({ length: 48 }, async (_, i) => {
    const [prompt, text] = [...expected][i % expected.size]!
    // Two of six leave.
    if (i % 6 >= 4) return void (await stream(server, prompt, 3))
    const got = i % 2 === 0 ? await stream(server, prompt) : (await answered(server, prompt)).message.content
    t.is(got, text, `${i}: ${prompt}`)
  })
  await Promise.all(clients)
  clearInterval(flips)
  await until(() => server.batcher.running + server.batcher.waiting === 0)
  const { passes, shadow } = server.metrics.totals
  const requests: Record<string, number> = server.metrics.totals.requests
  const since = (key: string) => (requests[key] ?? 0) - (outcome[key] ?? 0)
  t.is(since('stop') + since('length') + since('cancelled'), 48)
  t.true(since('cancelled') > 0, 'nobody left in time')
  t.true(shadow.close + shadow.identical > 0, 'shadow was never on')
  t.is(shadow.worse, 0)
  t.is(server.errors.length, 0)
  t.true(passes - before < 48 * tokens * 0.75, 'requests did not share forward passes')
})

/** Sends a request in parts, and goes away when `leave` resolves, whatever has come by then. */
async function visit(server: Server, parts: string[], leave: Promise<'end' | 'reset'> | undefined): Promise<void> {
  const { hostname, port } = new URL(server.url)
  const socket = connect(Number(port), hostname)
  const gone = new Promise((resolve) => socket.once('close', resolve).on('error', () => undefined))
  socket.resume()
  for (const part of parts) {
    socket.write(part)
    await new Promise(setImmediate)
  }
  const how = await leave
  if (how === 'end') socket.destroy()
  if (how === 'reset') socket.resetAndDestroy()
  await gone
}

/** How many requests Node's HTTP server has read for this server's completions, whatever the server makes of them. */
function arrivals(t: ExecutionContext, server: Server): () => number {
  const { host } = new URL(server.url)
  let count = 0
  const see = (message: unknown) => {
    const { url, headers } = (message as { request: IncomingMessage }).request
    if (url?.endsWith('/completions') && headers.host === host) count++
  }
  subscribe('http.server.request.start', see)
  t.teardown(() => unsubscribe('http.server.request.start', see))
  return () => count
}

const sumOf = (outcomes: Record<string, number>) => Object.values(outcomes).reduce((sum, each) => sum + each, 0)

test('whoever leaves, and when: each request that has come has one outcome', async (t) => {
  const server = await served(t, { slots: 2, queue: 12 })
  helpers().method('without', server.model.engine, 'unspeakable').dispose()
  const arrived = arrivals(t, server)
  const random = new Random(7)
  const { host } = new URL(server.url)
  // Every fifth client stays, so that each kind of outcome is there however slow the machine is.
  const clients = Array.from({ length: 400 }, async (_, i) => {
    const prompt = `${'many words '.repeat(1 + random.below(20))}${i % 10 === 9 || i % 20 === 5 ? 'unspeakable' : ''}`
    const [path, asked] =
      i % 2 === 0
        ? ['completions', { prompt }]
        : ['chat/completions', { messages: [{ role: 'user', content: prompt }] }]
    const wrong = i % 10 === 3 || i % 20 === 15 ? { temperature: -1 } : i % 10 === 7 ? { max_tokens: 1e6 } : {}
    const body = JSON.stringify({ model: server.name, max_tokens: 8, stream: i % 3 === 0, ...asked, ...wrong })
    const length = `content-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}`
    const head = `POST /v1/${path} HTTP/1.1\r\nhost: ${host}\r\nconnection: close\r\n${length}\r\n\r\n`
    const half = random.below(body.length)
    const all = [head, body.slice(0, half), body.slice(half)]
    const how = random.below(2) === 0 ? 'end' : 'reset'
    const [begin, end] = [random.below(4000), i % 5 === 1 ? 0 : random.below(60)]
    const parts = i % 5 === 0 ? all : [[head], all.slice(0, 2), all, [all.join('')]][random.below(4)]!
    await sleep(begin)
    await visit(server, parts, i % 5 === 0 ? undefined : sleep(end, how))
  })
  await Promise.all(clients)
  await until(() => server.batcher.running + server.batcher.waiting === 0)
  const { requests, received } = server.metrics.totals
  t.log(`${arrived()} of 400 came: ${JSON.stringify(requests)}`)
  t.is(sumOf(requests), arrived())
  t.is(received, arrived())
  t.is(await metric(server, 'epmoe_requests_received_total'), arrived())
  for (const outcome of ['length', 'cancelled', 'error', 'refused_invalid'] as const) t.true(requests[outcome]! > 0)
})

test('what leaves no generation behind is counted too', async (t) => {
  const server = await served(t)
  helpers().method('without', server.model.engine, 'unspeakable').dispose()
  const arrived = arrivals(t, server)
  const { host } = new URL(server.url)
  const head = `POST /v1/completions HTTP/1.1\r\nhost: ${host}\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n`
  await visit(server, [head], sleep(100, 'end'))
  await visit(server, [head, '{"model": '], sleep(100, 'reset'))
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: 'unspeakable' })).status, 500)
  await post(server, '/v1/nothing', {})
  const gate = shutGate(t, server)
  const inside = complete(server, [5], { max_tokens: 1 })
  await until(() => server.batcher.running === 1)
  const closed = server.close()
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: [5] })).status, 503)
  gate.method('open').dispose()
  await Promise.all([inside, closed])
  t.deepEqual(server.metrics.totals.requests, { cancelled: 2, error: 1, refused_draining: 1, length: 1 })
  t.is(arrived(), 5)
})

test('beyond the queue requests are told when to come back', async (t) => {
  const server = await served(t, { slots: 2, queue: 3 })
  const gate = shutGate(t, server)
  const inside = Array.from({ length: 5 }, (_, i) => complete(server, `a${i}`, { max_tokens: 2 }))
  await until(() => server.batcher.running + server.batcher.waiting === 5)
  const refused = await post(server, '/v1/completions', { model: server.name, prompt: 'a' })
  t.is(refused.status, 429)
  t.true(Number(refused.headers.get('retry-after')) >= 1)
  const { error } = (await refused.json()) as { error: { type: string } }
  t.is(error.type, 'rate_limit_error')
  gate.method('open').dispose()
  for (const each of await Promise.all(inside)) t.is(each.choices[0]?.finish_reason, 'length')
  t.is((await complete(server, 'a', { max_tokens: 1 })).usage.completion_tokens, 1)
  t.is(await metric(server, 'epmoe_requests_total{outcome="refused_full"}'), 1)
})

test('who leaves makes room: from the queue at once, from the batch before the next pass', async (t) => {
  const server = await served(t, { slots: 1, queue: 2 })
  const gate = shutGate(t, server)
  const leaving = new AbortController()
  const ask = (body: object) =>
    fetch(`${server.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      // Tokens: text would have to wait for Python, which the gate keeps busy.
      body: JSON.stringify({ model: server.name, prompt: [5], max_tokens: 2000, ...body }),
      signal: leaving.signal,
    }).catch(() => 'left')
  const gone = [ask({}), ask({ stream: true }), ask({})]
  await until(() => server.batcher.running === 1 && server.batcher.waiting === 2)
  leaving.abort()
  await until(() => server.batcher.waiting === 0)
  t.is(server.batcher.running, 1)
  gate.method('open').dispose()
  await until(() => server.batcher.running === 0)
  t.deepEqual(await Promise.all(gone), ['left', 'left', 'left'])
  t.is(server.metrics.totals.requests['cancelled'], 3)
  t.is(server.metrics.totals.passes, 1)
  t.deepEqual(server.errors, [], 'that a client leaves is no failure')
})

test('an exception in the model ends the requests of its pass and no others', async (t) => {
  const server = await served(t, { slots: 2 })
  const before = await complete(server, 'Hello', { max_tokens: tokens })
  // The letter alone makes passes fail; the byte tokenizer gives it one token of its own.
  const [fault] = (await server.model.encode({ text: '#' })) as number[]
  const faults = helpers().method('Faults', server.model.engine, fault)
  t.teardown(() => faults.method('remove'))
  const failed = await post(server, '/v1/completions', { model: server.name, prompt: 'a#b', max_tokens: 4 })
  t.is(failed.status, 500)
  const { error } = (await failed.json()) as { error: { message: string; type: string; code: string } }
  t.is(error.type, 'server_error')
  t.regex(error.message, /ArithmeticError/)
  t.notRegex(error.message, /purpose|Traceback|\.py/, 'what is inside stays inside')
  t.true(server.errors[0] instanceof PythonError)
  t.regex(String((server.errors[0] as PythonError).traceback), /token \d+ on purpose/)
  const early = await post(server, '/v1/completions', {
    model: server.name,
    prompt: 'a#b',
    max_tokens: 4,
    stream: true,
  })
  t.is(early.status, 500, 'before the first token a stream has a status too')
  t.deepEqual((await complete(server, 'Hello', { max_tokens: tokens })).choices, before.choices)

  // In the middle of a stream the error is its last event.
  const gate = shutGate(t, server)
  const whole = stream(server, 'Hello')
  await until(() => server.batcher.running === 1)
  const other = post(server, '/v1/completions', { model: server.name, prompt: '#', max_tokens: 4 })
  await until(() => server.batcher.running + server.batcher.waiting === 2)
  gate.method('open').dispose()
  await t.throwsAsync(whole.then((text) => text ?? Promise.reject(new Error('no end'))))
  t.is((await other).status, 500)
  t.is((await fetch(`${server.url}/healthz`)).status, 200)
  for (let i = 0; i < 3; i++) await post(server, '/v1/completions', { model: server.name, prompt: '#' })
  t.is((await fetch(`${server.url}/healthz`)).status, 503, 'nothing but failures')
  t.deepEqual((await complete(server, 'Hello', { max_tokens: tokens })).choices, before.choices)
  t.is((await fetch(`${server.url}/healthz`)).status, 200)
})

test('an error of the TypeScript side ends the pass and leaves the model usable', async (t) => {
  const server = await served(t)
  const before = await complete(server, 'Hello', { max_tokens: 4 })
  const experts = server.model.engine.get('experts')
  // A layer that does not exist: what the handler throws has to reach the resting pass.
  helpers().method('misdirect', experts).dispose()
  const failed = await post(server, '/v1/completions', { model: server.name, prompt: 'a', max_tokens: 4 })
  t.is(failed.status, 500)
  helpers().method('direct', experts).dispose()
  t.deepEqual((await complete(server, 'Hello', { max_tokens: 4 })).choices, before.choices)
})

const hostile: [string, string, number][] = [
  ['nothing', '', 400],
  ['no JSON', '{"model": ', 400],
  ['a number', '5', 400],
  ['null', 'null', 400],
  ['a list', '[]', 400],
  ['a deep list', '['.repeat(100_000), 400],
  ['a deep list that ends', `${'['.repeat(50_000)}${']'.repeat(50_000)}`, 400],
  ['a prototype', '{"model": "qwen3-moe", "prompt": "a", "__proto__": {"max_tokens": 5}}', 400],
  ['a constructor', '{"model": "qwen3-moe", "prompt": "a", "constructor": {"prototype": {"x": 1}}}', 400],
  ['a lone surrogate', '{"model": "qwen3-moe", "prompt": "\\ud800", "max_tokens": 1}', 200],
  ['zero bytes', '{"model": "qwen3-moe", "prompt": "\\u0000\\u0000", "max_tokens": 1}', 200],
  ['the end of a text as text', '{"model": "qwen3-moe", "prompt": "<|end|><|pad|>", "max_tokens": 1}', 200],
  ['an infinite number', '{"model": "qwen3-moe", "prompt": "a", "temperature": 1e999}', 400],
  ['a huge number', '{"model": "qwen3-moe", "prompt": "a", "max_tokens": 1e300}', 400],
  ['a huge token', '{"model": "qwen3-moe", "prompt": [1e15]}', 400],
  ['a negative token', '{"model": "qwen3-moe", "prompt": [-1]}', 400],
  ['a fraction of a token', '{"model": "qwen3-moe", "prompt": [1.5]}', 400],
  ['a template in a message', '{"model": "qwen3-moe", "messages": [{"role": "user", "content": "{{ 1/0 }}"}]}', 400],
  ['a name full of markup', '{"model": "<script>alert(1)</script>", "prompt": "a"}', 404],
]

test('hostile bodies get a clear status, and nothing else happens', async (t) => {
  const server = await served(t)
  for (const [label, body, status] of hostile) {
    const answer = await post(server, '/v1/completions', body)
    const text = await answer.text()
    t.is(answer.status, status, `${label}: ${text}`)
    t.regex(answer.headers.get('content-type') ?? '', /^application\/json/, label)
    if (status >= 400) t.is(typeof (JSON.parse(text) as { error: { message: string } }).error.message, 'string', label)
  }
  const content = '{{ 7*7 }}{% for x in range(99) %}{% endfor %}'
  const chat = await post(server, '/v1/chat/completions', {
    model: server.name,
    messages: [{ role: 'user', content }],
    max_tokens: 1,
  })
  const { usage } = (await chat.json()) as Completion
  t.is(usage.prompt_tokens, `<|user|>\n${content}\n<|assistant|>\n`.length, 'a message is no template')
  const wrongType = await fetch(`${server.url}/v1/completions`, {
    method: 'POST',
    body: 'prompt=a',
    headers: { 'content-type': 'application/x-www-form-urlencoded' },
  })
  t.is(wrongType.status, 415)
  t.is(await raw(server, 'NONSENSE\r\n\r\n'), 400)
  t.is(await raw(server, `GET / HTTP/1.1\r\nHost: a\r\nX: ${'x'.repeat(100_000)}\r\n\r\n`), 431)
  t.is(server.errors.length, 0)
  t.is((await complete(server, 'Hello', { max_tokens: 2 })).usage.completion_tokens, 2)
})

/** Sends bytes as they are; the status that comes back. */
function raw(server: Server, text: string): Promise<number> {
  return new Promise((resolve, reject) => {
    const { hostname, port } = new URL(server.url)
    const socket = connect(Number(port), hostname, () => socket.write(text))
    socket.once('data', (data) => {
      resolve(Number(/^HTTP\/1\.1 (\d+)/.exec(data.toString())?.[1]))
      socket.destroy()
    })
    socket.once('error', reject)
  })
}

test('requests leave nothing behind', async (t) => {
  const server = await served(t, { slots: 4, queue: 100 })
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  // The last pass may still be ending when its clients have their answers, and what earlier tests left may be there yet.
  const some = async () => {
    await Promise.all(Array.from({ length: 100 }, (_, i) => complete(server, `p${i}`, { max_tokens: 3 })))
    for (let [refs, same] = [-1, 0]; same < 20; same = refs === stats().python.refs ? same + 1 : 0) {
      refs = stats().python.refs
      collect()
      await sleep(5)
    }
  }
  await some()
  await some()
  const [refs, bytes, rss] = [stats().python.refs, stats().python.bytes, process.memoryUsage.rss()]
  for (let round = 0; round < 4; round++) await some()
  t.is(stats().python.refs, refs)
  t.is(stats().python.bytes, bytes)
  // 400 requests of a kilobyte each, kept, would not show here; their tensors and connections would.
  t.true(process.memoryUsage.rss() - rss < 64 << 20, `${(process.memoryUsage.rss() - rss) >> 20} MiB more`)
})
