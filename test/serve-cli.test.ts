import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import anyTest, { type ExecutionContext, type TestFn } from 'ava'
import { until, whyNot } from './helpers/serve.js'

const reason = whyNot()
const test = (reason === undefined ? anyTest.serial : anyTest.skip) as TestFn
if (reason !== undefined) anyTest(`nothing is served: ${reason}`, (t) => t.pass())

const bin = fileURLToPath(new URL('../src/cli/bin.mjs', import.meta.url))

interface Running {
  process: ChildProcess
  url: string
  output(): string
  ended: Promise<number | null>
}

async function epmoeServe(t: ExecutionContext, ...args: string[]): Promise<Running> {
  const child = spawn(process.execPath, [bin, 'serve', '--port', '0', ...args])
  t.teardown(() => child.kill('SIGKILL'))
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data: Buffer) => (output += data.toString()))
  const ended = once(child, 'exit').then(([code]) => code as number | null)
  await Promise.race([until(() => /http:\S+ serves/.test(output)), ended])
  const url = /http:\S+/.exec(output)?.[0]
  if (url === undefined) throw new Error(output)
  return { process: child, url, output: () => output, ended }
}

function ask(url: string, body: object): Promise<Response> {
  return fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'qwen3-moe', prompt: 'Hello', temperature: 0, ...body }),
  })
}

async function running(url: string): Promise<number> {
  return ((await (await fetch(`${url}/healthz`)).json()) as { running: number }).running
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  test(`${signal} finishes running requests, takes no more, and ends with 0`, async (t) => {
    const server = await epmoeServe(t, '--context', '600')
    const [whole, stream] = [ask(server.url, { max_tokens: 200 }), ask(server.url, { max_tokens: 200, stream: true })]
    await until(async () => (await running(server.url)) === 2)
    server.process.kill(signal)
    await until(() => /finishing 2 requests/.test(server.output()))
    const late = await ask(server.url, { max_tokens: 1 })
    t.is(late.status, 503)
    t.is((await fetch(`${server.url}/healthz`)).status, 503)
    const { choices, usage } = (await (await whole).json()) as { choices: { text: string }[]; usage: object }
    const events = (await (await stream).text()).trim().split('\n\n')
    t.is(events.at(-1), 'data: [DONE]')
    const pieces = events.slice(0, -1).map((each) => JSON.parse(each.slice(6)) as { choices: { text: string }[] })
    t.is(pieces.map((piece) => piece.choices[0]?.text).join(''), choices[0]?.text ?? '')
    t.true(JSON.stringify(usage).includes('"completion_tokens"'))
    t.is(await server.ended, 0, server.output())
  })
}

test('what is not done within the grace is given up, and said to be', async (t) => {
  const server = await epmoeServe(t, '--grace', '0', '--context', '4000')
  const whole = ask(server.url, { max_tokens: 3000, temperature: 1, seed: 5 })
  await until(async () => (await running(server.url)) === 1)
  server.process.kill('SIGTERM')
  t.is((await whole).status, 503)
  t.is(await server.ended, 0, server.output())
})

for (const [args, said] of [
  [['--model', 'nowhere'], /or a folder of a Hugging Face model/],
  [['--mode', 'fast'], /--mode: expected original, shadow, epmoe, received fast/],
  [['--slots', '0'], /--slots: expected a whole number from 1 on/],
] as const) {
  test(`wrong usage is code 2: epmoe serve ${args.join(' ')}`, async (t) => {
    const child = spawn(process.execPath, [bin, 'serve', ...args])
    let output = ''
    child.stderr.on('data', (data: Buffer) => (output += data.toString()))
    const [code] = (await once(child, 'close')) as [number]
    t.is(code, 2, output)
    t.regex(output, said)
  })
}
