import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { ExecutionContext } from 'ava'
import type { PassResult, PassRow } from '../src/serve/model.js'
import type { Server } from '../src/serve/server.js'
import { complete, post, start, until } from './helpers/serve.js'
import { served, shutGate, test } from './helpers/served.js'

/** Every token is this text; for what depends on the text alone. */
function says(server: Server, text: string): void {
  const shadow = { identical: 0, close: 0, worse: 0, elements: 0, own: 0, other: 0 }
  const step = async (rows: PassRow[]): Promise<PassResult> => ({
    rows: rows.filter(({ wish }) => wish !== undefined).map(() => ({ token: 5, text, held: '' })),
    seconds: 0,
    expert_seconds: 0,
    shadow,
  })
  Object.assign(server.model, { step })
}

/** The server's side of what comes from now on. */
function responses(t: ExecutionContext, server: Server): ServerResponse[] {
  const { host } = new URL(server.url)
  const seen: ServerResponse[] = []
  const see = (message: unknown) => {
    const { request, response } = message as { request: IncomingMessage; response: ServerResponse }
    if (request.headers.host === host) seen.push(response)
  }
  subscribe('http.server.request.start', see)
  t.teardown(() => unsubscribe('http.server.request.start', see))
  return seen
}

function visitor(t: ExecutionContext, server: Server): Socket {
  const { hostname, port } = new URL(server.url)
  const socket = connect(Number(port), hostname).on('error', () => undefined)
  t.teardown(() => socket.destroy())
  return socket
}

/** It may be reset where the server has not read everything; its answer has come by then. */
const ended = (socket: Socket) => new Promise((resolve) => socket.once('close', resolve))

const get = (server: Server, path: string) => `GET ${path} HTTP/1.1\r\nhost: ${new URL(server.url).host}\r\n\r\n`

function completion(server: Server, body: object): string {
  const text = JSON.stringify({ model: server.name, prompt: [5], ...body })
  const headers = `content-type: application/json\r\ncontent-length: ${Buffer.byteLength(text)}`
  return `POST /v1/completions HTTP/1.1\r\nhost: ${new URL(server.url).host}\r\n${headers}\r\n\r\n${text}`
}

/** Sends a request as it is; what comes until the server ends the connection. */
async function raw(t: ExecutionContext, server: Server, text: string) {
  const socket = visitor(t, server)
  socket.write(text)
  let answer = ''
  socket.on('data', (data: Buffer) => (answer += data.toString()))
  await ended(socket)
  const [head = '', body = ''] = answer.split('\r\n\r\n')
  return { status: Number(/^HTTP\/1\.1 (\d+)/.exec(head)?.[1]), body, answer }
}

interface Refused {
  error: { message: string; type: string; param: string | null; code: string | null }
}

test('who leaves takes along what waits behind another answer on the connection', async (t) => {
  const server = await served(t, { slots: 1 })
  const seen = responses(t, server)
  const gate = shutGate(t, server)
  const socket = visitor(t, server)
  const asked = [completion(server, { stream: true }), completion(server, {}), completion(server, { stream: true })]
  socket.write([...asked, get(server, '/events'), get(server, '/metrics')].join(''))
  await until(() => server.batcher.running === 1 && server.batcher.waiting === 2 && seen.length === 5)
  const over = seen.map((response) => once(response, 'close'))
  socket.destroy()
  await Promise.all(over)
  t.is(server.batcher.waiting, 0)
  gate.method('open').dispose()
  await until(() => server.batcher.running === 0)
  t.deepEqual(server.metrics.totals.requests, { cancelled: 3 })
  t.deepEqual(server.errors, [], 'that a client leaves is no failure')
})

test('HEAD has nothing to wait for in the events', async (t) => {
  const server = await served(t)
  t.is((await fetch(`${server.url}/events`, { method: 'HEAD' })).status, 404)
  for (const path of ['/', '/healthz', '/metrics', '/mode', '/v1/models'])
    t.is((await fetch(server.url + path, { method: 'HEAD' })).status, 200, path)
})

test('what is still being read when the grace is over is not begun', async (t) => {
  const server = await served(t)
  const encode = server.model.encode.bind(server.model)
  let release: () => void = () => undefined
  const held = new Promise<void>((resolve) => (release = resolve))
  Object.assign(server.model, {
    encode: (...args: Parameters<typeof encode>) => held.then(() => encode(...args)),
  })
  const gate = shutGate(t, server)
  const inside = post(server, '/v1/completions', { model: server.name, prompt: [5] })
  await until(() => server.batcher.running === 1)
  const beingRead = post(server, '/v1/completions', { model: server.name, prompt: 'a', max_tokens: 5 })
  await until(() => server.batcher.waiting === 1)
  const closed = server.close({ graceSeconds: 0 })
  t.is((await inside).status, 503)
  release()
  gate.method('open').dispose()
  t.is((await beingRead).status, 503)
  await closed
  t.deepEqual(server.metrics.totals.requests, { cancelled: 1, refused_draining: 1 })
})

test('a forward pass that does not end holds nobody up', async (t) => {
  const server = await start()
  const { url } = server
  const gate = shutGate(t, server)
  const inside = post(server, '/v1/completions', { model: server.name, prompt: [5] })
  await until(() => server.batcher.running === 1)
  const error = await t.throwsAsync(server.close({ graceSeconds: 0, passSeconds: 0.1 }), { code: 'ERR_TIMEOUT' })
  t.regex(error?.message ?? '', /passSeconds: expected the model to be done within 0\.1 s/)
  t.is((await inside).status, 503)
  await t.throwsAsync(fetch(url), undefined, 'it listens')
  gate.method('open').dispose()
  await until(() => server.batcher.running === 0)
  await server.model.close()
})

test('a grace may be longer than any timer', async (t) => {
  const server = await served(t)
  const gate = shutGate(t, server)
  const inside = complete(server, [5], { max_tokens: 2 })
  await until(() => server.batcher.running === 1)
  const closed = server.close({ graceSeconds: 2 ** 31 / 1000 })
  await sleep(100) // such a timer would have gone off
  gate.method('open').dispose()
  t.is((await inside).usage.completion_tokens, 2)
  await closed
})

test('a request has to come in time, its body too', async (t) => {
  const server = await served(t, { requestSeconds: 0.5 })
  const over = Promise.all(
    ['POST / HTTP/1.1\r\n', completion(server, {}).slice(0, -1)].map((part) => raw(t, server, part)),
  )
  const answers = await Promise.race([over, sleep(20_000, [], { ref: false })])
  t.deepEqual(
    answers.map(({ status }) => status),
    [408, 408],
  )
  for (const { body } of answers) t.is((JSON.parse(body) as Refused).error.type, 'invalid_request_error')
})

for (const stream of [true, false]) {
  test(`an answer that nobody reads is given up: ${stream ? 'a stream' : 'a whole one'}`, async (t) => {
    const server = await served(t, { unreadSeconds: 0.3 })
    says(server, 'x'.repeat(1 << 20))
    const seen = responses(t, server)
    const socket = visitor(t, server).pause()
    socket.write(completion(server, { max_tokens: 40, stream }))
    await until(() => seen[0]?.req.socket.destroyed === true)
    t.deepEqual(server.metrics.totals.requests, { length: 1 })
    t.deepEqual(server.errors, [])
  })
}

test('who waits for the model is not taken for one that does not read', async (t) => {
  const server = await served(t, { unreadSeconds: 0.1, slots: 1 })
  const gate = shutGate(t, server)
  const asked = [false, true].map((stream) =>
    post(server, '/v1/completions', { model: server.name, prompt: [5], stream }),
  )
  await until(() => server.batcher.running === 1 && server.batcher.waiting === 1)
  await sleep(500)
  gate.method('open').dispose()
  for (const answer of await Promise.all(asked)) {
    t.is(answer.status, 200)
    t.true((await answer.text()).length > 0)
  }
})

test('errors look the same wherever they come from', async (t) => {
  const server = await served(t)
  for (const [text, status] of [
    [get(server, '/v1/models/%ff'), 400],
    [get(server, '/%zz'), 400],
    [get(server, `/v1/models/${'a'.repeat(5000)}`), 404],
    [get(server, '/nowhere'), 404],
    ['NONSENSE\r\n\r\n', 400],
    [`GET / HTTP/1.1\r\nhost: a\r\nx: ${'x'.repeat(100_000)}\r\n\r\n`, 431],
  ] as const) {
    const answer = await raw(t, server, text.replace('\r\n\r\n', '\r\nconnection: close\r\n\r\n'))
    const label = `${text.slice(0, 30)}: ${answer.answer}`
    t.is(answer.status, status, label)
    const { error } = JSON.parse(answer.body) as Refused
    t.is(error.type, 'invalid_request_error', label)
    t.true(error.message.length > 0, label)
  }
})

test('nonsense behind a request does not get into its answer', async (t) => {
  const server = await served(t)
  const gate = shutGate(t, server)
  const socket = visitor(t, server)
  let answer = ''
  socket.on('data', (data: Buffer) => (answer += data.toString()))
  socket.write(completion(server, { stream: true, max_tokens: 2000 }))
  await until(() => server.batcher.running === 1)
  gate.method('open').dispose()
  await until(() => answer.includes('data: '))
  socket.write('NONSENSE\r\n\r\n')
  await ended(socket)
  t.is(answer.split('HTTP/1.1').length, 2, answer.slice(-500))
})

test('a name with slashes is a name', async (t) => {
  const server = await served(t, { name: 'org/model' })
  for (const path of ['/v1/models/org/model', '/v1/models/org%2Fmodel'])
    t.is(((await (await fetch(server.url + path)).json()) as { id: string }).id, 'org/model')
  t.is((await fetch(`${server.url}/v1/models/model`)).status, 404)
})

const stops = 'stop: expected a string of 1 to 256 characters, or a list of at most 4'
const prompts = 'prompt: expected a text, a list of one, or a list of tokens, none of them empty'
const contents = 'messages.0.content: expected a string, or a list of {"type": "text", "text": …}'
const refused: [body: object, param: string, message: string][] = [
  [{ stop: '' }, 'stop', stops],
  [{ stop: ['a', 'b', 'c', 'd', 'e'] }, 'stop', stops],
  [{ stop: 'x'.repeat(257) }, 'stop', stops],
  [{ logit_bias: { 5: 1 } }, 'logit_bias', 'logit_bias: expected {}, as it is not supported'],
  [{ prompt: ['a', 'b'] }, 'prompt', prompts],
  [{ prompt: '' }, 'prompt', prompts],
  [
    { response_format: { type: 'json_object' } },
    'response_format',
    'response_format: expected {"type": "text"}, as no other is supported',
  ],
  [{ messages: [{ role: 'user', content: [{ type: 'image_url' }] }] }, 'messages.0.content', contents],
  [{ messages: [{ role: 'user', content: 5 }] }, 'messages.0.content', contents],
  [
    { max_completion_tokens: 99_999 },
    'max_completion_tokens',
    "the model's context is 2048 tokens, received 25 tokens of prompt and 99999 to generate",
  ],
  [
    { max_completion_tokens: 101 },
    'max_completion_tokens',
    "max_completion_tokens: expected 100 or fewer, which is this server's limit, received 101",
  ],
  [{ max_tokens: 101 }, 'max_tokens', "max_tokens: expected 100 or fewer, which is this server's limit, received 101"],
]

test('what is refused is said with what would do, by its own name', async (t) => {
  const server = await served(t, { tokenLimit: 100 })
  for (const [body, param, message] of refused) {
    const path = 'prompt' in body ? '/v1/completions' : '/v1/chat/completions'
    const given = 'prompt' in body ? {} : { messages: [{ role: 'user', content: 'a' }] }
    const answer = await post(server, path, { model: server.name, ...given, ...body })
    const { error } = (await answer.json()) as Refused
    t.is(answer.status, 400, message)
    t.is(error.message, message)
    t.is(error.param, param)
  }
})

test('half a character as a stop string cuts no other in two', async (t) => {
  const server = await served(t)
  says(server, 'a😀')
  const { choices } = await complete(server, 'a', { max_tokens: 2, stop: '\ude00' })
  t.is(choices[0]?.text, 'a😀a😀')
})
