// npm run bench -- serve [seconds]: served tokens a second with the original's blocks and with epmoe's, A B A B in one run,
// the time in the experts, and memory.
// npm run bench -- serve soak [requests] [--seconds N]: whether memory stays flat over so many requests in changing modes,
// and whether each has an outcome.
// Options of both: --device cpu | cuda:0 (default: the first GPU), --size small | large (default: large on a GPU, small for
// soak), --layers N of a large model (default 4), --cuda-graph-tokens N (default: as many as slots; 0 for no graphs).
import { parseArgs } from 'node:util'
import { type Device, devices, startPython, stats } from 'epmoe'
import { Progress } from '../src/cli/progress.js'
import { MoeLayer } from '../src/moe-layer.js'
import { type KernelMode, kernelModes, type ServeOptions, type Server, serve } from '../src/serve/index.js'
import { type Memory, memoryOf, peakFromNow } from './device-memory.js'
import { MemoryMeter, memoryParts, slopeOf } from './memory.js'

/** Blocks of the shape of Qwen3-30B-A3B, 1.2 GB each. */
const large = (layers: number): ServeOptions => ({
  slots: 32,
  context: 1024,
  batchTokens: 2048,
  config: {
    hidden_size: 2048,
    intermediate_size: 6144,
    moe_intermediate_size: 768,
    num_experts: 128,
    num_experts_per_tok: 8,
    num_hidden_layers: layers,
    num_attention_heads: 32,
    num_key_value_heads: 4,
    head_dim: 128,
  },
})
const small: ServeOptions = { slots: 8, context: 512 }

export default async function bench(): Promise<void> {
  const { values, positionals } = parseArgs({
    args: process.argv.slice(3),
    allowPositionals: true,
    options: {
      device: { type: 'string', default: devices()[1] ?? 'cpu' },
      size: { type: 'string' },
      layers: { type: 'string', default: '4' },
      'cuda-graph-tokens': { type: 'string' },
      seconds: { type: 'string' },
    },
  })
  const soaking = positionals[0] === 'soak'
  const device = values.device as Device
  const size = values.size ?? (device === 'cpu' || soaking ? 'small' : 'large')
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const before = memoryOf(device)
  const options = size === 'large' ? large(Number(values.layers)) : small
  const graphs = values['cuda-graph-tokens']
  const cudaGraphTokens = graphs === undefined ? undefined : Number(graphs)
  // Comparing with float64 takes as long as ten passes, and is the same each time.
  const shadowEvery = soaking ? 8 : 1
  const server = await serve({ port: 0, queue: 1000, device, dtype, cudaGraphTokens, shadowEvery, ...options })
  const { architecture, parameters, layers } = server.model.facts
  console.log(`${architecture}, ${(parameters / 1e6).toFixed(1)} M parameters, ${layers} blocks, ${dtype} on ${device}`)
  try {
    const [first, second] = positionals
    const log = new MemoryLog(device, before)
    if (soaking) await soak(server, log, Number(second ?? 10_000), Number(values.seconds ?? Number.POSITIVE_INFINITY))
    else await compare(server, log, Number(first ?? values.seconds ?? 40), size === 'large' ? [128, 64] : [32, 32])
  } finally {
    await server.close()
  }
}

/** Memory at moments that have a name. */
class MemoryLog {
  readonly #lines: [string, Memory][]

  constructor(
    readonly device: Device,
    before: Memory,
  ) {
    this.#lines = [['before the model', before]]
    this.add('with the model')
  }

  add(moment: string): Memory {
    const now = memoryOf(this.device)
    this.#lines.push([moment, now])
    return now
  }

  print(): void {
    const gpu = this.device === 'cpu' ? [] : (['allocated', 'reserved', 'peak'] as const)
    const keys = ['rss', ...gpu] as const
    const names = { rss: 'RSS, MB', allocated: 'CUDA allocated', reserved: 'reserved', peak: 'most allocated' }
    console.log(`| memory | ${keys.map((key) => names[key]).join(' | ')} |\n|---${'|---'.repeat(keys.length)}|`)
    for (const [moment, memory] of this.#lines) {
      console.log(`| ${moment} | ${keys.map((key) => memory[key].toFixed(1)).join(' | ')} |`)
    }
  }
}

interface Round {
  mode: KernelMode
  tokensPerSecond: number
  millisecondsPerPass: number
  share: number
}

/** Within so many seconds, the warm-up included. */
async function compare(server: Server, log: MemoryLog, seconds: number, [prompt, tokens]: number[]): Promise<void> {
  const end = performance.now() + seconds * 1000
  const modes: KernelMode[] = ['original', 'epmoe']
  const load = () =>
    Promise.all(Array.from({ length: server.model.slots * 2 }, (_, i) => request(server, i, prompt!, tokens!)))
  for (const mode of modes) {
    server.model.mode = mode
    peakFromNow(log.device)
    await load()
    log.add(`after the first round, ${mode}`)
  }
  const health = new Health(server)
  const forward = timeOfForward()
  const rounds: Round[] = []
  for (let pair = 0; performance.now() + pair < end || rounds.length < 4; ) {
    const begin = performance.now()
    for (const mode of modes) {
      server.model.mode = mode
      rounds.push(await measured(server, mode, load))
    }
    pair = performance.now() - begin
  }
  await health.end()
  log.add(`after ${rounds.length} more rounds`)
  console.log(`prompts of ${prompt} tokens, ${tokens} to write, ${server.model.slots} slots, twice as many clients`)
  console.log('| blocks | tokens/s | spread | ms a pass | time in the experts |\n|---|---|---|---|---|')
  for (const mode of modes) {
    const own = rounds.filter((round) => round.mode === mode)
    const rate = quartiles(own.map((round) => round.tokensPerSecond))
    const pass = quartiles(own.map((round) => round.millisecondsPerPass))
    const share = quartiles(own.map((round) => round.share))
    const spread = ((rate[2] - rate[0]) / 2 / rate[1]) * 100
    console.log(
      `| ${mode} | ${rate[1].toFixed(1)} | ±${spread.toFixed(1)} % of ${own.length} | ${pass[1].toFixed(2)} | ${(100 * share[1]).toFixed(1)} % |`,
    )
  }
  const pairs = Array.from({ length: rounds.length / 2 }, (_, i) => [rounds[2 * i]!, rounds[2 * i + 1]!] as const)
  const ratio = quartiles(pairs.map(([original, epmoe]) => epmoe.tokensPerSecond / original.tokensPerSecond))
  console.log(`epmoe over original, by pairs: ${ratio.map((each) => each.toFixed(3)).join(', ')} (quartiles)`)
  console.log(`/healthz meanwhile: ${health.text()}`)
  if (forward.calls > 0) {
    const own = forward.milliseconds / forward.calls
    console.log(`of a block, ${own.toFixed(2)} ms on the event loop, in moeLayer`)
  }
  console.log(`a call that does nothing on Python's thread: ${(await emptyCall()).toFixed(2)} ms there and back`)
  log.print()
}

async function measured(server: Server, mode: KernelMode, load: () => Promise<unknown>): Promise<Round> {
  const before = { ...server.metrics.totals }
  const begin = performance.now()
  await load()
  const milliseconds = performance.now() - begin
  const after = server.metrics.totals
  const seconds = after.seconds - before.seconds
  return {
    mode,
    tokensPerSecond: ((after.completionTokens - before.completionTokens) / milliseconds) * 1000,
    millisecondsPerPass: milliseconds / (after.passes - before.passes),
    share: (after.expertSeconds - before.expertSeconds) / seconds,
  }
}

async function soak(server: Server, log: MemoryLog, requests: number, seconds: number): Promise<void> {
  const progress = new Progress(false)
  const meter = new MemoryMeter(startPython())
  const read = () => ({ done, ...meter.read(), ...memoryOf(log.device) })
  const samples: ReturnType<typeof read>[] = []
  let [done, left, sampled] = [0, 0, 0]
  const begin = performance.now()
  const client = async () => {
    while (done < requests && performance.now() - begin < seconds * 1000) {
      const number = done++
      if (number % 100 === 0) server.model.mode = kernelModes[(number / 100) % kernelModes.length]!
      if (performance.now() - sampled > 1000) {
        sampled = performance.now()
        samples.push(read())
        progress.show(number, requests, `requests, RSS ${samples.at(-1)?.rss.toFixed(0)} MB`)
      }
      // One in ten clients goes away while it is served.
      const leaving = number % 10 === 9 ? AbortSignal.timeout(5 + (number % 50)) : null
      await request(server, number, 4 + (number % 60), 8, leaving).catch(() => left++)
    }
  }
  await Promise.all(Array.from({ length: 16 }, client))
  const { batcher, metrics } = server
  // Who left the batch is counted when the pass ends.
  while (batcher.running + batcher.waiting > 0) await new Promise((resolve) => setTimeout(resolve, 5))
  progress.end()
  samples.push(read())
  const { requests: outcomes, received, passes, shadow } = metrics.totals
  const sum = Object.values(outcomes).reduce((total, each) => total + each, 0)
  const time = ((performance.now() - begin) / 1000).toFixed(0)
  console.log(`${done} requests in ${time} s, ${left} clients left early, ${done - received} before theirs had come`)
  console.log(`${received} came, ${sum} outcomes: ${JSON.stringify(outcomes)}`)
  console.log(`${passes} passes, shadow ${JSON.stringify(shadow)}`)
  log.add(`after ${done} requests`)
  log.print()
  const warm = samples.slice(Math.floor(samples.length / 4))
  const [first, middle, last] = [warm[0]!, warm[Math.floor(warm.length / 2)]!, warm.at(-1)!]
  console.log(
    `| MB | after ${first.done} | after ${middle.done} | after ${last.done} | in 1,000 requests |\n|---|---|---|---|---|`,
  )
  const gpu = log.device === 'cpu' ? [] : (['allocated', 'reserved'] as const)
  for (const key of [...memoryParts, ...gpu]) {
    const slope = 1000 * slopeOf(warm.map((each) => [each.done, each[key]]))
    const values = [first, middle, last].map((each) => each[key].toFixed(1)).join(' | ')
    console.log(`| ${gpu.includes(key as never) ? 'CUDA ' : ''}${key} | ${values} | ${slope.toFixed(2)} |`)
  }
  console.log(`live at the end: ${JSON.stringify(stats())}`)
  if (sum !== received) process.exitCode = 1
}

async function request(
  server: Server,
  number: number,
  prompt: number,
  tokens: number,
  signal: AbortSignal | null = null,
) {
  const body = {
    model: server.name,
    prompt: Array.from({ length: prompt }, (_, i) => (number * 31 + i * 7) % 256),
    max_tokens: tokens,
    temperature: 0,
  }
  const answer = await fetch(`${server.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
    signal,
  })
  const text = await answer.text()
  if (answer.status !== 200) throw new Error(`${answer.status}: ${text}`)
}

/** What the layers' synchronous calls take from now on, in all. */
function timeOfForward(): { calls: number; milliseconds: number } {
  // oxlint-disable-next-line typescript/unbound-method -- called on its layer below
  const { forward } = MoeLayer.prototype
  const spent = { calls: 0, milliseconds: 0 }
  MoeLayer.prototype.forward = function (args) {
    const begin = performance.now()
    const output = forward.call(this, args)
    spent.calls++
    spent.milliseconds += performance.now() - begin
    return output
  }
  return spent
}

/** Median, in ms. */
async function emptyCall(): Promise<number> {
  using nothing = startPython().eval('lambda: None')
  const times: number[] = []
  for (let i = 0; i < 300; i++) {
    const begin = performance.now()
    ;(await nothing.callAsync()).dispose()
    times.push(performance.now() - begin)
  }
  return quartiles(times)[1]
}

/** How long /healthz takes, asked every 20 ms. */
class Health {
  readonly #times: number[] = []
  #asking = true
  readonly #done: Promise<void>

  constructor(server: Server) {
    this.#done = this.#ask(server)
  }

  async #ask(server: Server): Promise<void> {
    while (this.#asking) {
      const begin = performance.now()
      await (await fetch(`${server.url}/healthz`)).text()
      this.#times.push(performance.now() - begin)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  async end(): Promise<void> {
    this.#asking = false
    await this.#done
    this.#times.sort((a, b) => a - b)
  }

  text(): string {
    const at = (part: number) => this.#times[Math.floor(part * (this.#times.length - 1))]?.toFixed(1)
    return `median ${at(0.5)} ms, 99 % ${at(0.99)} ms, largest ${at(1)} ms of ${this.#times.length}`
  }
}

function quartiles(values: number[]): [number, number, number] {
  const sorted = [...values].sort((a, b) => a - b)
  const at = (part: number) => sorted[Math.round(part * (sorted.length - 1))]!
  return [at(0.25), at(0.5), at(0.75)]
}
