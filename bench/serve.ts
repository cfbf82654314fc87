// npm run bench -- serve [seconds]: served tokens a second with the original's blocks and with epmoe's, A B A B in one run.
// npm run bench -- serve soak [requests]: whether memory stays flat over so many requests in changing modes.
import { devices, startPython, stats } from 'epmoe'
import { type KernelMode, kernelModes, type ServeOptions, type Server, serve } from '../src/serve/index.js'

const gpu = devices().find((device) => device !== 'cpu')

/** On a GPU, blocks of the shape of Qwen3-30B-A3B, an eighth of its layers; else the small model. */
const options: ServeOptions =
  gpu === undefined
    ? { slots: 8, context: 512 }
    : {
        slots: 32,
        context: 1024,
        batchTokens: 2048,
        dtype: 'bfloat16',
        config: {
          hidden_size: 2048,
          intermediate_size: 6144,
          moe_intermediate_size: 768,
          num_experts: 128,
          num_experts_per_tok: 8,
          num_hidden_layers: 6,
          num_attention_heads: 32,
          num_key_value_heads: 4,
          head_dim: 128,
        },
      }

export default async function bench(): Promise<void> {
  const [first, second] = process.argv.slice(3)
  const server = await serve({ port: 0, queue: 1000, ...(first === 'soak' ? { slots: 8, context: 512 } : options) })
  const { architecture, parameters, dtype, device, layers } = server.model.facts
  console.log(
    `${architecture}, ${(parameters / 1e6).toFixed(1)} M parameters, ${layers} MoE blocks, ${dtype} on ${device}`,
  )
  try {
    if (first === 'soak') await soak(server, Number(second ?? 10_000))
    else await compare(server, Number(first ?? 40))
  } finally {
    await server.close()
  }
}

interface Round {
  mode: KernelMode
  tokensPerSecond: number
  millisecondsPerPass: number
  share: number
}

async function compare(server: Server, seconds: number): Promise<void> {
  const [prompt, tokens] = [gpu === undefined ? 32 : 128, gpu === undefined ? 32 : 64]
  const modes: KernelMode[] = ['original', 'epmoe']
  const load = () =>
    Promise.all(Array.from({ length: server.model.slots * 2 }, (_, i) => request(server, i, prompt, tokens)))
  for (const mode of modes) {
    server.model.mode = mode
    await load()
  }
  const health = new Health(server)
  const rounds: Round[] = []
  const end = performance.now() + seconds * 1000
  while (performance.now() < end || rounds.length < 4) {
    for (const mode of modes) {
      server.model.mode = mode
      rounds.push(await measured(server, mode, load))
    }
  }
  await health.end()
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
  console.log(`/healthz meanwhile: ${health.text()}`)
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

async function soak(server: Server, requests: number): Promise<void> {
  const samples: { done: number; rss: number; cuda: number }[] = []
  const torch = startPython().import('torch')
  let [done, left] = [0, 0]
  const begin = performance.now()
  const client = async () => {
    while (done < requests) {
      const number = done++
      if (number % 500 === 0) {
        server.model.mode = kernelModes[(number / 500) % kernelModes.length]!
        const cuda = gpu === undefined ? 0 : Number(torch.get('cuda').method('memory_allocated').toJS())
        samples.push({ done: number, rss: process.memoryUsage.rss() / 1e6, cuda: cuda / 1e6 })
        process.stderr.write(`\r${number} requests, RSS ${samples.at(-1)?.rss.toFixed(0)} MB `)
      }
      // One in ten clients goes away while it is served.
      const leaving = number % 10 === 9 ? AbortSignal.timeout(5 + (number % 50)) : null
      await request(server, number, 4 + (number % 60), 8, leaving).catch(() => left++)
    }
  }
  await Promise.all(Array.from({ length: 16 }, client))
  process.stderr.write('\n')
  const warm = samples.slice(Math.floor(samples.length / 4))
  const [a, z] = [warm[0]!, warm.at(-1)!]
  const { requests: outcomes, passes, shadow } = server.metrics.totals
  console.log(
    `${requests} requests in ${((performance.now() - begin) / 1000).toFixed(0)} s, ${left} clients left early`,
  )
  console.log(`outcomes ${JSON.stringify(outcomes)}, ${passes} passes, shadow ${JSON.stringify(shadow)}`)
  console.log(`RSS ${a.rss.toFixed(0)} MB after ${a.done}, ${z.rss.toFixed(0)} MB after ${z.done}`)
  if (gpu !== undefined)
    console.log(`CUDA ${a.cuda.toFixed(1)} MB after ${a.done}, ${z.cuda.toFixed(1)} MB after ${z.done}`)
  console.log(`live at the end: ${JSON.stringify(stats())}`)
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
