import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import anyTest, { type ExecutionContext } from 'ava'
import type { PyRef } from 'epmoe'
import fc from 'fast-check'
import OpenAI from 'openai'
import type { KernelMode } from '../src/serve/model.js'
import type { Server } from '../src/serve/server.js'
import { StopFilter } from '../src/serve/stop.js'
import { allowedError, allowedOverSamples, reference } from './helpers/golden.js'
import { python, torchGpu, valueOf } from './helpers/python.js'
import { complete, helpers, metric, post, type start, until } from './helpers/serve.js'
import { served, test } from './helpers/served.js'

const models = ['qwen3-moe', 'mixtral']
const prompts = ['Hello', 'a', 'The quick brown fox jumps over', '{"key": [1, 2, 3]}', 'Ünïcödé 😀', 'x'.repeat(90)]

/** One whose grouped GEMM is off by so little that only a comparison tells. */
async function spoiltServer(t: ExecutionContext, options: Parameters<typeof start>[0]) {
  const module = python.import('epmoe.moe')
  const sound = module.get('grouped_gemm')
  module.set('grouped_gemm', helpers().method('spoilt', sound))
  return await served(t, options).finally(() => module.set('grouped_gemm', sound))
}

function promptsOfTokens(count: number): number[][] {
  return Array.from({ length: count }, (_, i) =>
    Array.from({ length: 5 + (i % 40) }, (_, k) => (i * 37 + k * 11) % 256),
  )
}

function errorOf(logits: PyRef, exact: PyRef): number {
  return reference.method('error', logits, exact).toJS() as number
}

function clientOf(server: Server): OpenAI {
  return new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 })
}

test("OpenAI's client: completions, chat, streams, logprobs, models, errors", async (t) => {
  const server = await served(t)
  const client = clientOf(server)
  const model = server.name
  t.deepEqual(
    (await client.models.list()).data.map((each) => each.id),
    ['qwen3-moe'],
  )
  t.is((await client.models.retrieve(model)).id, model)

  const whole = await client.completions.create({ model, prompt: 'Hello', temperature: 0, max_tokens: 24, logprobs: 2 })
  const [choice] = whole.choices
  t.is(choice?.finish_reason, 'length')
  t.deepEqual(whole.usage, { prompt_tokens: 5, completion_tokens: 24, total_tokens: 29 })
  t.is(choice?.logprobs?.tokens?.length, 24)
  // The likeliest token was taken, so that its probability is the first of the alternatives.
  choice?.logprobs?.token_logprobs?.forEach((each, i) => {
    t.is(each, Math.max(...Object.values(choice?.logprobs?.top_logprobs?.[i] ?? {})))
  })

  let text = ''
  let finish: string | null = null
  const options = { model, prompt: 'Hello', temperature: 0, max_tokens: 24, stream: true } as const
  let usage: unknown
  for await (const chunk of await client.completions.create({ ...options, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.text ?? ''
    finish = chunk.choices[0]?.finish_reason ?? finish
    usage = chunk.usage ?? usage
  }
  t.is(text, choice?.text ?? '')
  t.is(finish, 'length')
  t.deepEqual(usage, whole.usage)

  const messages = [
    { role: 'system' as const, content: 'Be brief.' },
    { role: 'user' as const, content: [{ type: 'text' as const, text: 'Hi' }] },
  ]
  const chat = await client.chat.completions.create({ model, messages, temperature: 0, max_completion_tokens: 8 })
  t.is(chat.object, 'chat.completion')
  t.is(chat.usage?.completion_tokens, 8)
  let streamed = ''
  const stream = await client.chat.completions.create({
    model,
    messages,
    temperature: 0,
    max_completion_tokens: 8,
    stream: true,
  })
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta.content ?? ''
  t.is(streamed, chat.choices[0]?.message.content ?? '')
  const told = { logprobs: true, top_logprobs: 3 }
  const likely = await client.chat.completions.create({
    model,
    messages,
    temperature: 0,
    max_completion_tokens: 2,
    ...told,
  })
  t.deepEqual(
    likely.choices[0]?.logprobs?.content?.map((each) => each.top_logprobs.length),
    [3, 3],
  )

  const wrongName = await t.throwsAsync(client.completions.create({ model: 'gpt-x', prompt: 'a' }))
  t.true(wrongName instanceof OpenAI.NotFoundError)
  const wrongValue = await t.throwsAsync(client.completions.create({ model, prompt: 'a', temperature: 3 }))
  t.true(wrongValue instanceof OpenAI.BadRequestError)
  t.is((wrongValue as InstanceType<typeof OpenAI.BadRequestError>).param, 'temperature')
})

for (const model of models) {
  // In float32 original and epmoe differ in the last bits of a sum. That no token can differ is shown, not hoped: each
  // step's two likeliest tokens are further apart than the probabilities of original and epmoe ever were.
  test(`${model}: greedy tokens of original, shadow and epmoe are the same, and cannot differ`, async (t) => {
    const server = await served(t, { model })
    let narrowest = Number.POSITIVE_INFINITY
    let largest = 0
    const texts = new Set<string>()
    for (const prompt of prompts) {
      const answers = []
      for (const mode of ['original', 'shadow', 'epmoe'] satisfies KernelMode[]) {
        server.model.mode = mode
        answers.push(await likeliest(server, prompt, 32))
      }
      const [original, shadow, epmoe] = answers as [(typeof answers)[0], (typeof answers)[0], (typeof answers)[0]]
      t.deepEqual(shadow, original, 'in shadow the original serves')
      t.is(epmoe.text, original.text)
      texts.add(original.text)
      original.top.forEach((values, i) => {
        narrowest = Math.min(narrowest, values[0]! - values[1]!)
        largest = Math.max(largest, ...values.slice(0, 2).map((value, k) => Math.abs(value - epmoe.top[i]![k]!)))
      })
    }
    t.true(largest > 0, 'epmoe was not used')
    t.true(narrowest > 2 * largest, `${narrowest} against ${largest}`)
    t.is(texts.size, prompts.length, 'the text does not depend on the prompt')
  })

  test(`${model}: logits within the golden tier`, async (t) => {
    const many = promptsOfTokens(40)
    const errorIn = async (options: Parameters<typeof start>[0], starting = served) => {
      const server = await starting(t, { model, slots: 1, ...options })
      const logits = helpers().method('Logits', server.model.engine)
      for (const prompt of many) await complete(server, prompt, { max_tokens: 1 })
      const error = errorOf(logits.method('take').item(0), logits.method('exact', many))
      return { error, elements: many.length * server.model.facts.vocabulary }
    }
    const { error: original, elements } = await errorIn({ mode: 'original' })
    const { error: epmoe } = await errorIn({ mode: 'epmoe' })
    const { error: spoilt } = await errorIn({ mode: 'epmoe' }, spoiltServer)
    // The model as it is, with matrix products of other shapes.
    const fewer = [
      await errorIn({ mode: 'original', batchTokens: 1 }),
      await errorIn({ mode: 'original', batchTokens: 8 }),
    ]
    const others = fewer.map(({ error }) => error)
    const allowed = allowedError(original, others, elements)
    t.log(`epmoe ${epmoe}, original ${original}; with fewer tokens at once ${others.join(', ')}`)
    t.true(original > 1e-9 && Math.max(original, ...others) < 1e-4)
    t.true(epmoe <= allowed, `${epmoe} of ${allowed}`)
    t.true(spoilt > allowed, `${spoilt} of ${allowed}`)
  })

  // Where a router's choice is close, bfloat16 may choose other experts than float64, and the logits are others. So float64
  // is given each run's choice: what is left is the rounding on the way, which the blocks have their part in.
  test(`${model} in bfloat16: logits within the golden tier, and a spoilt layer is told`, async (t) => {
    const many = promptsOfTokens(80)
    const measured = async (server: Server, mode: KernelMode) => {
      server.model.mode = mode
      const logits = helpers().method('Logits', server.model.engine)
      for (const prompt of many) await complete(server, prompt, { max_tokens: 1 })
      const taken = logits.method('take')
      logits.method('remove').dispose()
      const exact = logits.method('exact', many, taken.item(1))
      return valueOf('((x - e).norm(dim=1) / e.norm(dim=1)).tolist()', { x: taken.item(0), e: exact }) as number[]
    }
    const server = await served(t, { model, dtype: 'bfloat16' })
    const original = await measured(server, 'original')
    const epmoe = await measured(server, 'epmoe')
    const spoilt = await measured(await spoiltServer(t, { model, dtype: 'bfloat16' }), 'epmoe')
    const share = (errors: number[]) => Math.hypot(...errors) / allowedOverSamples(original, errors)
    const [own, theirs, off] = [epmoe, original, spoilt].map((errors) => Math.hypot(...errors) / Math.sqrt(many.length))
    t.log(
      `epmoe ${own}, original ${theirs}, off by 2^-7 ${off}; ${share(epmoe)} and ${share(spoilt)} of what is allowed`,
    )
    t.true(theirs! > 1e-3 && theirs! < 2e-2)
    t.true(share(epmoe) <= 1)
    t.true(share(spoilt) > 1)
  })

  test(`${model} in bfloat16: blocks in shadow are within the golden tier`, async (t) => {
    const server = await served(t, { model, dtype: 'bfloat16', mode: 'shadow' })
    for (const prompt of prompts) await complete(server, prompt, { max_tokens: 12 })
    const { totals, errorRatio } = server.metrics
    const { identical, close, worse, elements } = totals.shadow
    t.is(worse, 0)
    t.is(identical + close, totals.passes * server.model.facts.layers)
    t.true(elements > 10_000 && errorRatio > 0.5)
    t.true(errorRatio <= allowedError(1, [], elements), `${errorRatio} in ${elements} elements`)
    t.is(await metric(server, 'epmoe_shadow_blocks_total{result="close"}'), close)
    t.is(await metric(server, 'epmoe_shadow_error_ratio'), errorRatio)
  })
}

if (torchGpu !== undefined) {
  test('on a GPU, blocks of few tokens are launched without asking Node, once they are captured', async (t) => {
    const told = async (cudaGraphTokens: number) => {
      const server = await served(t, { dtype: 'bfloat16', slots: 4, cudaGraphTokens })
      const asked = helpers().method('Asked', server.model.engine)
      const count = () => asked.get('count').toJS() as number
      const { layers } = server.model.facts
      const first = await complete(server, 'Hi', { max_tokens: 12 })
      // Two tokens, then one at a time.
      t.is(count(), (cudaGraphTokens === 0 ? 12 : 2) * layers)
      const passes = server.metrics.totals.passes
      const again = await Promise.all([1, 2, 3].map(() => complete(server, 'Hi', { max_tokens: 12 })))
      // Three at once may come to 3 to 6 tokens: one graph more, and passes of more than 4.
      const asks = count() / layers - (cudaGraphTokens === 0 ? 12 : 2)
      t.true(cudaGraphTokens === 0 ? asks === server.metrics.totals.passes - passes : asks <= 3, `${asks}`)
      return [first, ...again].map(({ choices }) => choices[0]?.text)
    }
    const texts = new Set([...(await told(4)), ...(await told(0))])
    t.is(texts.size, 1, [...texts].join(' | '))
  })
}

test('shadow tells a spoilt epmoe, and serves the original', async (t) => {
  const server = await served(t, { mode: 'original' })
  const expected = await complete(server, 'Hello', { max_tokens: 8 })
  const other = await spoiltServer(t, { mode: 'shadow' })
  t.is((await complete(other, 'Hello', { max_tokens: 8 })).choices[0]?.text, expected.choices[0]?.text)
  const { identical, close, worse } = other.metrics.totals.shadow
  t.is(identical + close, 0)
  t.is(worse, other.metrics.totals.passes * 3)
  t.true(other.metrics.errorRatio > 1000)
})

test('shadow compares as often as it is told', async (t) => {
  const server = await served(t, { mode: 'shadow', shadowEvery: 4 })
  await complete(server, 'Hello', { max_tokens: 16 })
  const { passes, shadow } = server.metrics.totals
  t.is(passes, 16)
  t.is(shadow.close + shadow.identical, 4 * 3)
})

test('a folder is served as what was saved there', async (t) => {
  const server = await served(t, { model: 'mixtral' })
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  helpers().method('save', server.model.engine, folder).dispose()
  const other = await served(t, { model: folder, name: 'saved' })
  t.is(other.model.facts.architecture, 'MixtralForCausalLM')
  const [first, second] = await Promise.all([server, other].map((each) => complete(each, 'Hello', { max_tokens: 32 })))
  t.deepEqual(second?.choices, first?.choices)
  // Other weights would have been noticed.
  const third = await served(t, { model: 'mixtral', seed: 2 })
  t.notDeepEqual((await complete(third, 'Hello', { max_tokens: 32 })).choices, first?.choices)
})

test('a seed decides, chance otherwise', async (t) => {
  const server = await served(t)
  const ask = async (body: object) =>
    (await complete(server, 'Hello', { max_tokens: 24, temperature: 1, ...body })).choices
  const first = await ask({ seed: 7 })
  t.deepEqual(await ask({ seed: 7 }), first)
  t.notDeepEqual(await ask({ seed: 8 }), first)
  t.notDeepEqual(await ask({}), await ask({}))
  t.deepEqual(await ask({ seed: 7, top_p: 1e-6 }), await ask({ temperature: 0 }))
})

test('stop strings end the text before them, in streams too', async (t) => {
  const server = await served(t)
  const all = (await complete(server, 'Hello', { max_tokens: 40 })).choices[0]!.text
  const stop = all.slice(12, 15)
  const place = all.indexOf(stop)
  const stopped = (await complete(server, 'Hello', { max_tokens: 40, stop: ['not in there', stop] })).choices[0]!
  t.is(stopped.text, all.slice(0, place))
  t.is(stopped.finish_reason, 'stop')
  const client = clientOf(server)
  let streamed = ''
  const options = { model: server.name, prompt: 'Hello', temperature: 0, max_tokens: 40, stop, stream: true } as const
  for await (const chunk of await client.completions.create(options)) streamed += chunk.choices[0]?.text ?? ''
  t.is(streamed, all.slice(0, place))
})

anyTest('a stop filter lets through what comes before the first stop string, however the text is cut', (t) => {
  const letters = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 12 })
  const stops = fc.array(fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength: 4 }), {
    maxLength: 3,
  })
  fc.assert(
    fc.property(fc.array(letters, { maxLength: 6 }), stops, (pieces, stops) => {
      const filter = new StopFilter(stops)
      let out = ''
      for (const piece of pieces) {
        if (!filter.hit) out += filter.push(piece)
      }
      const hit = filter.hit
      if (!hit) out += filter.flush()
      // The naive way: the shortest beginning of the text that ends in a stop string decides.
      const text = pieces.join('')
      const ends = Array.from({ length: text.length + 1 }, (_, i) => text.slice(0, i))
      const first = ends.find((start) => stops.some((stop) => start.endsWith(stop)))
      const expected =
        first === undefined
          ? text
          : first.slice(0, Math.min(...stops.filter((s) => first.includes(s)).map((s) => first.indexOf(s))))
      return hit === (first !== undefined) && out === expected
    }),
    { examples: [[['cabc'], ['a', 'cabc']]] },
  )
  t.pass()
})

const refused: [string, object, string][] = [
  ['tools', { tools: [] }, 'tools'],
  ['n', { n: 2 }, 'n'],
  ['presence_penalty', { presence_penalty: 0.5 }, 'presence_penalty'],
  ['logit_bias', { logit_bias: { 5: 1 } }, 'logit_bias'],
  ['a temperature below 0', { temperature: -1 }, 'temperature'],
  ['a number as text', { max_tokens: '5' }, 'max_tokens'],
  ['no tokens at all', { max_tokens: 0 }, 'max_tokens'],
  ['top_p 0', { top_p: 0 }, 'top_p'],
  ['five stop strings', { stop: ['a', 'b', 'c', 'd', 'e'] }, 'stop'],
  ['an empty stop string', { stop: '' }, 'stop'],
  ['a role that does not exist', { messages: [{ role: 'wizard', content: 'a' }] }, 'messages.0.role'],
  ['an image', { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: {} }] }] }, 'messages.0.content'],
  ['no messages', { messages: undefined }, 'messages'],
  ['an empty list of messages', { messages: [] }, 'messages'],
  ['top_logprobs alone', { top_logprobs: 2 }, 'top_logprobs'],
  ['json mode', { response_format: { type: 'json_object' } }, 'response_format'],
  ['more than the context', { max_tokens: 100_000 }, 'max_tokens'],
]

test('what is not supported is refused by name', async (t) => {
  const server = await served(t, { tokenLimit: 100, bodyLimit: 5000 })
  const messages = [{ role: 'user', content: 'a' }]
  for (const [label, change, param] of refused) {
    const body = { model: server.name, messages, max_tokens: 1, ...change }
    const answer = await post(server, '/v1/chat/completions', body)
    const { error } = (await answer.json()) as { error: { message: string; param: string; type: string } }
    t.is(answer.status, 400, label)
    t.true(error.param.startsWith(param), `${label}: ${JSON.stringify(error)}`)
    t.true(error.message.includes(param.split('.').at(-1)!) || param === 'max_tokens', error.message)
    t.is(error.type, 'invalid_request_error')
  }
  const harmless = { n: 1, presence_penalty: 0, frequency_penalty: null, logit_bias: {}, user: 'me', stop: null }
  t.is(
    (await post(server, '/v1/chat/completions', { model: server.name, messages, max_tokens: 1, ...harmless })).status,
    200,
  )
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: [999] })).status, 400)
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: 'a', max_tokens: 101 })).status, 400)
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: 'a'.repeat(6000) })).status, 413)
  t.is((await post(server, '/v1/completions', { model: server.name, prompt: 'a'.repeat(4000) })).status, 400)
  t.is((await fetch(`${server.url}/nowhere`)).status, 404)
  // There is no outcome of what is no request for a completion.
  t.is(server.metrics.totals.requests['refused_invalid'], refused.length + 4)
})

test('health and metrics answer while a forward pass is under way', async (t) => {
  const server = await served(t)
  const gate = helpers().method('Gate', server.model.engine)
  t.teardown(() => gate.method('remove'))
  gate.method('shut').dispose()
  const request = complete(server, 'Hello', { max_tokens: 2 })
  await until(() => (gate.get('entered').toJS() as number) > 0)
  for (let i = 0; i < 20; i++) {
    const answer = await fetch(`${server.url}/healthz`)
    t.deepEqual(await answer.json(), { status: 'ok', mode: 'epmoe', running: 1, waiting: 0 })
  }
  t.is(await metric(server, 'epmoe_requests_running'), 1)
  t.is(server.metrics.totals.passes, 0, 'the pass has ended meanwhile')
  gate.method('open').dispose()
  await request
  t.is(await metric(server, 'epmoe_requests_total{outcome="length"}'), 1)
  t.is(await metric(server, 'epmoe_tokens_total{kind="prompt"}'), 5)
  t.is(await metric(server, 'epmoe_tokens_total{kind="completion"}'), 2)
  t.is(await metric(server, 'epmoe_kernel_mode{mode="epmoe"}'), 1)
})

test('the mode is switched at run time, and only to one that exists', async (t) => {
  const server = await served(t)
  const put = (body: unknown, type = 'application/json') =>
    fetch(`${server.url}/mode`, { method: 'PUT', headers: { 'content-type': type }, body: JSON.stringify(body) })
  t.deepEqual(await (await put({ mode: 'original' })).json(), { mode: 'original' })
  t.deepEqual(await (await fetch(`${server.url}/mode`)).json(), { mode: 'original' })
  t.is((await put({ mode: 'fast' })).status, 400)
  // A form on some other page could send this without asking first.
  t.is((await put({ mode: 'epmoe' }, 'text/plain')).status, 400)
  t.is(server.model.mode, 'original')
})

/** A greedy answer, and for each of its tokens the log probabilities of the likeliest, falling. */
async function likeliest(server: Server, prompt: string, tokens: number): Promise<{ text: string; top: number[][] }> {
  const { choices } = await clientOf(server).chat.completions.create({
    model: server.name,
    messages: [{ role: 'user', content: prompt }],
    temperature: 0,
    max_completion_tokens: tokens,
    logprobs: true,
    top_logprobs: 20,
  })
  const [choice] = choices
  return {
    text: choice?.message.content ?? '',
    top: choice?.logprobs?.content?.map((each) => each.top_logprobs.map((one) => one.logprob)) ?? [],
  }
}
