import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
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

/** One that does not come to serve, and what it says. */
async function failed(args: readonly string[]): Promise<{ code: number; output: string }> {
  const child = spawn(process.execPath, [bin, 'serve', ...args])
  let output = ''
  child.stderr.on('data', (data: Buffer) => (output += data.toString()))
  const [code] = (await once(child, 'close')) as [number]
  return { code, output }
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

test('a port that is taken is said in one line, before the model is looked at', async (t) => {
  const other = createServer().listen(0, '127.0.0.1')
  t.teardown(() => other.close())
  await once(other, 'listening')
  const { port } = other.address() as AddressInfo
  const { code, output } = await failed(['--port', `${port}`, '--model', 'nowhere'])
  t.is(code, 2, output)
  t.regex(output, /^epmoe: --host, --port: expected .* free port, received .*EADDRINUSE.*\n$/)
})

for (const [args, said] of [
  [['--model', 'nowhere'], /or a folder of a Hugging Face model/],
  [['--mode', 'fast'], /--mode: expected original, shadow, epmoe, received fast/],
  [['--slots', '0'], /--slots: expected a whole number from 1 on/],
  [['--port', '70000'], /^epmoe: --port: expected a whole number from 0 to 65535, received 70000\n$/],
  [['--device', 'gpu'], /^epmoe: --device: expected cpu, cuda, or cuda:0 and so on, received gpu\n$/],
  // The address is looked at before the model is.
  [['--model', 'nowhere', '--host', '192.0.2.1'], /^epmoe: --host, --port: expected an address of this machine .*\n$/],
] as const) {
  test(`wrong usage is code 2: epmoe serve ${args.join(' ')}`, async (t) => {
    const { code, output } = await failed(args)
    t.is(code, 2, output)
    t.regex(output, said)
  })
}
