import anyTest from 'ava'
import { startPython } from 'epmoe'
import { textForm } from '../src/serve/answers.js'
import { Generation } from '../src/serve/generation.js'
import type { Server } from '../src/serve/server.js'
import { complete, helpers, post, until } from './helpers/serve.js'
import { served, test } from './helpers/served.js'

const messages = (content: string) => [{ role: 'user', content }]

/** The answer as it comes whole, or the chunks that it comes in. */
async function asked(server: Server, path: string, body: object): Promise<Answer[]> {
  const text = await (await post(server, path, { model: server.name, temperature: 0, max_tokens: 64, ...body })).text()
  if (!('stream' in body)) return [JSON.parse(text) as Answer]
  const events = text.split('\n\n').slice(0, -2)
  return events.map((each) => JSON.parse(each.slice('data: '.length)) as Answer)
}

interface Answer {
  usage?: object | null
  choices: {
    text: string
    logprobs: {
      tokens: string[]
      text_offset: number[]
      content: { token: string; bytes: number[]; top_logprobs: [] }[]
    }
  }[]
}

for (const [path, input] of [
  ['/v1/completions', { prompt: 'Hello', logprobs: 0 }],
  ['/v1/chat/completions', { messages: messages('Hello') }],
] as const) {
  test(`${path}: chunks have a usage if it is asked for, null but for the last`, async (t) => {
    const server = await served(t)
    const body = { ...input, max_tokens: 3, stream: true }
    for (const each of await asked(server, path, body)) t.false('usage' in each)
    const chunks = await asked(server, path, { ...body, stream_options: { include_usage: true } })
    const last = chunks.pop()
    t.true(chunks.length >= 3)
    for (const each of chunks) t.is(each.usage, null)
    t.like(last?.usage, { completion_tokens: 3 })
    t.deepEqual(last?.choices, [])
  })

  test(`${path}: a text that cannot fit is refused in the same words, counted or not`, async (t) => {
    const server = await served(t, { context: 128 })
    for (const [count, said] of [
      [500, /received \d+ tokens of prompt and 7 to generate/],
      [100_000, /received at least 11\d\d\d tokens of prompt and 7 to generate/],
    ] as const) {
      const text = 'x'.repeat(count)
      const long = 'prompt' in input ? { prompt: text } : { messages: messages(text) }
      const answer = await post(server, path, { model: server.name, max_tokens: 7, ...long })
      t.is(answer.status, 400)
      const { error } = (await answer.json()) as { error: { message: string; code: string; param: string } }
      t.like(error, { code: 'context_length_exceeded', param: 'max_tokens' })
      t.regex(error.message, said)
    }
  })
}

test('offsets tell where in the text a token begins, whole and in streams', async (t) => {
  const server = await served(t)
  let [own, parts] = [0, 0]
  for (let seed = 0; seed < 8; seed++) {
    const body = { prompt: 'Hello', logprobs: 0, temperature: 1, seed, max_tokens: 16 }
    const [whole] = (await asked(server, '/v1/completions', body)) as [Answer]
    const { text, logprobs } = whole.choices[0]!
    const characters = Array.from(text)
    logprobs.tokens.forEach((token, i) => {
      const there = characters[logprobs.text_offset[i]!]
      // Marks are no part of the text; and a letter that ends the wait for the rest of a character comes in one piece
      // with what was held.
      if (token === '\ufffd') parts++
      else if (token.length === 1 && there !== '\ufffd') {
        own++
        t.is(there, token)
      }
    })
    const streamed = await asked(server, '/v1/completions', { ...body, stream: true })
    const offsets = streamed.flatMap(({ choices }) => choices[0]!.logprobs.text_offset)
    t.deepEqual(offsets, logprobs.text_offset)
  }
  t.true(own > 10 && parts > 10, `${own} ${parts}`)
})

anyTest('offsets count code points, and the parts of one are at the same place', async (t) => {
  const wish = { maxTokens: 9, temperature: 0, topP: 1, stop: ['never'], logprobs: 0 }
  const generation = new Generation([1], wish, () => undefined)
  const likely = { token: '\ufffd', logprob: -1, bytes: null }
  for (const [text, held] of [
    ['n', ''],
    ['', '\ufffd'],
    ['😀', ''],
    ['ä', ''],
    ['b', ''],
  ] as const) {
    generation.take({ token: 1, text, held, own: likely, top: [] }, [], 99)
  }
  generation.cancel()
  const form = textForm('m', { model: 'm', prompt: 'p', logprobs: 0 })
  const offsets = []
  for await (const piece of generation) offsets.push(...(form.chunk(piece) as Answer).choices[0]!.logprobs.text_offset)
  t.deepEqual(offsets, [0, 1, 1, 2, 3])
})

test('a token that is part of a character has its bytes told', async (t) => {
  const server = await served(t)
  const body = { messages: messages('Hello'), logprobs: true, top_logprobs: 3, temperature: 1, seed: 3, max_tokens: 24 }
  const [{ choices }] = (await asked(server, '/v1/chat/completions', body)) as [Answer]
  const content = choices[0]!.logprobs.content
  const all = content.flatMap((each) => [each, ...(each.top_logprobs as typeof content)])
  t.is(all.length, 4 * content.length)
  for (const { token, bytes } of all) t.is(Buffer.from(bytes).toString(), token)
  const parts = new Set(all.filter(({ token }) => token === '\ufffd').map(({ bytes }) => bytes.join()))
  t.true(parts.size > 10, [...parts].join(' '))
})

test('whoever has a place may have a text, however short Python’s queue was', async (t) => {
  const python = startPython()
  const limit = python.queueLimit
  python.queueLimit = 1
  t.teardown(() => (python.queueLimit = limit))
  const server = await served(t, { slots: 1, queue: 3 })
  const encoding = helpers().method('Encoding', server.model.engine)
  t.teardown(() => encoding.method('open'))
  const asked = ['a', 'b', 'c', 'd'].map((prompt) => complete(server, prompt, { max_tokens: 1 }))
  await until(() => server.batcher.waiting === 4 || server.errors.length > 0)
  encoding.method('open').dispose()
  t.deepEqual(server.errors, [])
  for (const { usage } of await Promise.all(asked)) t.is(usage.completion_tokens, 1)
})

test('who leaves while others are encoded makes room at once, and is not encoded', async (t) => {
  const server = await served(t, { slots: 1, queue: 2 })
  const encoding = helpers().method('Encoding', server.model.engine)
  t.teardown(() => encoding.method('open'))
  const requests = () => encoding.get('requests').toJS() as string[]
  const first = complete(server, 'first', { max_tokens: 1 })
  await until(() => requests().length === 1)
  const leaving = new AbortController()
  const body = JSON.stringify({ model: server.name, prompt: 'left' })
  const headers = { 'content-type': 'application/json' }
  const options = { method: 'POST', headers, body, signal: leaving.signal }
  const left = fetch(`${server.url}/v1/completions`, options).catch(() => 'left')
  await until(() => server.batcher.waiting === 2)
  leaving.abort()
  await until(() => server.batcher.waiting === 1)
  const last = complete(server, 'last', { max_tokens: 1 })
  await until(() => server.batcher.waiting === 2)
  encoding.method('open').dispose()
  await Promise.all([first, last])
  t.is(await left, 'left')
  t.deepEqual(
    requests().map((each) => JSON.parse(each) as object),
    [{ text: 'first' }, { text: 'last' }],
  )
  t.is(server.metrics.totals.requests['cancelled'], 1)
  t.is(server.errors.length, 0)
})
