// npm run bench -- soak [minutes]: the bridge under mixed load for as long as asked, whether memory stays flat, and whose it
// is. Ends with 1 when an object is left over.
import { setImmediate as turn } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import {
  type Device,
  devices,
  EpmoeError,
  Event,
  Graph,
  job,
  kw,
  moeLayer,
  type PyRef,
  postReorder,
  preprocess,
  preReorder,
  Stream,
  scope,
  siluAndMul,
  startPython,
  stats,
  Tensor,
} from 'epmoe'
import { liveObjects, type Memory, MemoryMeter, memoryParts, slopeOf } from './memory.js'

interface Sample extends Memory {
  seconds: number
  calls: number
  /** MB that torch has allocated on the GPU. */
  cuda: number
}

const worker = fileURLToPath(new URL('../test/fixtures/worker.mjs', import.meta.url))

export default async function soak(): Promise<void> {
  const minutes = Number(process.argv[3] ?? 10)
  await scope(() => run(minutes))
  console.log(`live at the end: ${JSON.stringify(stats())}`)
  if (liveObjects() > 0) process.exitCode = 1
}

async function run(minutes: number): Promise<void> {
  const device = devices().find((each) => each !== 'cpu') ?? 'cpu'
  const python = startPython()
  const torch = python.import('torch')
  const load = new Load(python, torch, device)
  const meter = new MemoryMeter(python)
  const cuda = () => (device === 'cpu' ? 0 : Number(torch.get('cuda').method('memory_allocated').toJS()) / 1e6)
  const samples: Sample[] = []
  const begin = performance.now()
  const gap = new Gap()
  let terminated = 0
  printRow(['s', 'calls', ...columns])
  for (let seconds = 0; seconds < minutes * 60; ) {
    const until = performance.now() + 2000
    for (let round = 0; performance.now() < until; round++) {
      scope(() => load.mixed())
      // A handle's memory is let go of in a turn of the event loop, not before.
      if (round % 20 === 0) await turn()
    }
    await scope(() => load.asynchronous())
    if (samples.length % 5 === 0) {
      await terminateWorker(device)
      terminated++
    }
    const minute = Math.floor(seconds / 60)
    seconds = (performance.now() - begin) / 1000
    samples.push({ seconds, calls: load.calls, ...meter.read(), cuda: scope(cuda) })
    if (Math.floor(seconds / 60) > minute || samples.length === 1) printSample(samples.at(-1)!)
  }
  gap.end()
  // The same again with nothing but Python code on the executor: what a server's timers would see.
  const busy = new Gap()
  await scope(() => load.busy(5))
  busy.end()
  load.end()
  report(samples, load, terminated, device)
  console.log(`event loop beside a busy Python thread: median gap ${busy.text()}; under the whole load ${gap.text()}`)
  meter.trim()
  const { rss, mallocKept } = meter.read()
  console.log(`malloc_trim: RSS ${rss.toFixed(1)} MB, kept by malloc ${mallocKept.toFixed(1)} MB`)
}

class Load {
  calls = 0
  errors = 0
  jobs = 0
  cancelled = 0
  readonly #python: ReturnType<typeof startPython>
  readonly #device: Device
  readonly #work: PyRef
  readonly #layer: ReturnType<typeof moeLayer>

  constructor(python: ReturnType<typeof startPython>, torch: PyRef, device: Device) {
    this.#python = python
    this.#device = device
    this.#work = python.exec(`
import torch, epmoe
def spin(n): return sum(i * i for i in range(n))
def fails(): raise ValueError("on purpose")
def product(x): return (x @ x.T).sum().item()
`)
    const dtype = torch.get('bfloat16')
    this.#layer = moeLayer({
      w13: torch.method('randn', 8, 64, 32, kw({ device, dtype })),
      w2: torch.method('randn', 8, 32, 32, kw({ device, dtype })),
    })
    this.#torch = torch
  }
  readonly #torch: PyRef

  /** A few dozen calls of every kind that is synchronous: ops, exchanges both ways, conversions, errors. */
  mixed(): void {
    const [T, K, H, E] = [1 + (this.calls % 13), 4, 32, 8]
    const device = this.#device
    const options = kw({ device, dtype: this.#torch.get('bfloat16') })
    const x = this.#torch.method('randn', T, H, options)
    const topkIds = this.#torch.method('randint', 0, E, [T, K], kw({ device }))
    const topkWeights = this.#torch.method('rand', T, K, kw({ device }))
    const out = this.#layer.forward({ hiddenStates: x, topkIds, topkWeights })
    const ids = Tensor.fromTorch(topkIds)
    const src2dst = Tensor.empty([T * K], { dtype: 'int32', device })
    const segIndptr = Tensor.empty([E + 1], { dtype: 'int64', device })
    const rows = Tensor.empty([T * K, H], { dtype: 'bfloat16', device })
    const half = Tensor.empty([T * K, H / 2], { dtype: 'bfloat16', device })
    const sum = Tensor.empty([T, H], { dtype: 'bfloat16', device })
    for (let round = 0; round < 20; round++) {
      preprocess({ topkIds: ids, src2dst, segIndptr })
      preReorder({ input: x, gateupInput: rows, src2dst, topkIds: ids })
      siluAndMul({ gateupOutput: rows, downInput: half })
      postReorder({ downOutput: rows, output: sum, src2dst, topkIds: ids, topkWeights })
    }
    if (this.#device !== 'cpu')
      this.#onStreams(() => postReorder({ downOutput: rows, output: sum, src2dst, topkIds: ids, topkWeights }))
    const back = sum.toTorch() as PyRef
    const same = this.#python.eval('(a.float() - b.float()).abs().sum().isfinite().item()', { a: back, b: out })
    if (same.toJS() !== true) throw new Error('a result that is not finite')
    this.#mistake(() => postReorder({ downOutput: rows, output: rows, src2dst, topkIds: ids, topkWeights }))
    this.#mistake(() => this.#work.method('fails'))
    this.#mistake(() => x.method('view', 3, 5, 7, 11))
    this.calls += 80 + 12
  }

  /** What only a GPU has: a graph on a stream of its own, events between it and torch's, an index out of range. */
  #onStreams(body: () => void): void {
    using stream = Stream.create(this.#device)
    using graph = Graph.capture(stream, body)
    using event = Event.create(this.#device)
    stream.wait(event.record(Stream.torchCurrent(this.#device)))
    for (let i = 0; i < 10; i++) graph.replay()
    Stream.torchCurrent(this.#device).wait(event.record(stream))
    const wrong = Tensor.from(new Int32Array([9])).to(this.#device)
    const row = Tensor.zeros([1, 8], { device: this.#device })
    const one = Tensor.from(new Float32Array([1]), [1, 1]).to(this.#device)
    const output = Tensor.empty([1, 8], { device: this.#device })
    this.#mistake(() => {
      postReorder({ downOutput: row, output, src2dst: wrong, topkWeights: one, stream })
      stream.synchronizeSync()
    })
    this.calls += 12
  }

  #mistake(call: () => unknown): void {
    try {
      call()
    } catch (error) {
      if (!(error instanceof EpmoeError)) throw error
      this.errors++
      return
    }
    throw new Error('a mistake went through')
  }

  /** Jobs that end well, fail, and are given up. */
  async asynchronous(): Promise<void> {
    const all: Promise<unknown>[] = []
    for (let i = 0; i < 30; i++) {
      all.push(this.#work.methodAsync('product', Tensor.zeros([64, 64], { device: this.#device })))
      all.push(this.#work.methodAsync('fails').catch((error: unknown) => error))
      all.push(
        this.#work
          .methodAsync('spin', 10_000_000, job({ signal: AbortSignal.timeout(1) }))
          .catch(() => void this.cancelled++),
      )
    }
    await Promise.all(all)
    this.jobs += all.length
    this.calls += all.length
  }

  /** Python code without a pause for so many seconds. */
  async busy(seconds: number): Promise<void> {
    const until = performance.now() + seconds * 1000
    while (performance.now() < until) await this.#work.methodAsync('spin', 2_000_000)
  }

  end(): void {
    this.#layer.dispose()
  }
}

/** A worker that is ended in the middle of its calls. */
async function terminateWorker(device: Device): Promise<void> {
  const each = new Worker(worker, { workerData: { mode: 'kernels', calls: 1e9, seed: 1, device }, execArgv: [] })
  await new Promise((resolve, reject) => each.once('message', resolve).once('error', reject))
  await each.terminate()
}

/** How long the event loop was ever kept from a timer. */
class Gap {
  readonly gaps: number[] = []
  #last = performance.now()
  readonly #timer = setInterval(() => {
    const now = performance.now()
    this.gaps.push(now - this.#last)
    this.#last = now
  }, 5)

  end(): void {
    clearInterval(this.#timer)
    this.gaps.sort((a, b) => a - b)
  }

  /** The timer is one of 5 ms. */
  text(): string {
    return `${this.gaps[this.gaps.length >> 1]?.toFixed(1)} ms, largest ${this.gaps.at(-1)?.toFixed(1)} ms`
  }
}

/** The columns of the table, MB but for the last three; the first is the sum of the next five. */
const columns = [
  ...memoryParts,
  'heapUsed',
  'external',
  'cuda',
  'pythonBlocks',
  'live',
  'threads',
] as const satisfies readonly (keyof Sample)[]

function printRow(cells: readonly string[]): void {
  console.log(cells.map((cell) => cell.padStart(Math.max(8, cell.length + 1))).join(''))
}

function printSample(sample: Sample): void {
  const values = columns.map((key) => sample[key].toFixed(1).padStart(key.length))
  printRow([sample.seconds.toFixed(0), String(sample.calls), ...values])
}

function report(samples: Sample[], load: Load, terminated: number, device: string): void {
  const warm = samples.slice(Math.floor(samples.length / 5))
  const [first, last] = [warm[0]!, samples.at(-1)!]
  printRow(['slope', '/ minute', ...columns.map((key) => slope(warm, key).toFixed(2).padStart(key.length))])
  console.log(
    `${load.calls} calls on ${device} in ${last.seconds.toFixed(0)} s: ${load.errors} mistakes caught, ${load.jobs} jobs of which ${load.cancelled} were given up, ${terminated} workers terminated`,
  )
  console.log(
    `RSS ${first.rss.toFixed(1)} MB after warm-up (${first.seconds.toFixed(0)} s), ${last.rss.toFixed(1)} MB at the end, slope ${slope(warm, 'rss').toFixed(2)} MB a minute`,
  )
}

/** How a figure changes in a minute. */
function slope(samples: Sample[], key: keyof Sample): number {
  return slopeOf(samples.map((each) => [each.seconds / 60, each[key]]))
}
