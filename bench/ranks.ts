// npm run bench -- ranks [--seconds N] [--backend gloo|nccl]: time of a layer against the number of ranks, and the share of
// communication in it: on the host's cores by gloo, then on its GPUs by NCCL. A job of torchrun for each number of ranks,
// all within about so many seconds (default 100); what it computes from the figures is marked so.
import { spawnSync } from 'node:child_process'
import { availableParallelism } from 'node:os'
import { parseArgs } from 'node:util'
import { devices, startPython } from 'epmoe'
import { type Backend, certain, extrapolate, type Measured, settings } from './ranks-model.js'

export default async function ranks(): Promise<void> {
  const { values } = parseArgs({
    args: process.argv.slice(3),
    options: { seconds: { type: 'string' }, backend: { type: 'string' }, until: { type: 'string' } },
  })
  if (values.until === undefined) {
    compare(Number(values.seconds ?? 100), values.backend as Backend | undefined)
  } else {
    const { measure } = await import('./ranks-job.js')
    measure(values.backend as Backend, Number(values.until))
  }
}

/** Each backend that is here, with as many ranks as there are cores, or GPUs, for them. */
function compare(seconds: number, asked: Backend | undefined): void {
  const gpus = devices().length - 1
  const places = { gloo: Math.max(2, availableParallelism()), nccl: gpus }
  const jobs = (['gloo', 'nccl'] as const)
    .filter((backend) => asked === undefined || asked === backend)
    .map((backend) => ({ backend, sizes: [1, 2, 4, 8].filter((size) => size <= places[backend]) }))
    .filter(({ sizes }) => sizes.length > 0)
  let left = jobs.reduce((sum, { sizes }) => sum + sizes.length, 0)
  const end = Date.now() + seconds * 1000
  for (const { backend, sizes } of jobs) {
    const { tokens, topk, hidden, half, experts } = settings[backend]
    const where = backend === 'gloo' ? `gloo, ${availableParallelism()} cores, a thread a rank` : `NCCL, ${gpus} GPU`
    console.log(
      `\nbf16, ${tokens} tokens in all, K ${topk}, H ${hidden}, I ${half}, E ${experts}; ${where}; ms a layer`,
    )
    print(
      backend,
      sizes.flatMap((size) => job(backend, size, Date.now() + (end - Date.now()) / left--)),
    )
  }
}

/** What a job of so many ranks has found by `until`, in milliseconds since the epoch. */
function job(backend: Backend, size: number, until: number): Measured[] {
  const { executable } = startPython()
  const torchrun = ['-m', 'torch.distributed.run', '--no-python', '--standalone', '--nproc-per-node', String(size)]
  const program = [process.execPath, ...process.execArgv, process.argv[1] ?? '', 'ranks']
  const options = ['--backend', backend, '--until', String(until)]
  const { status, stdout, stderr } = spawnSync(executable, [...torchrun, ...program, ...options], {
    encoding: 'utf8',
    env: { ...memoryKept, ...process.env, OMP_NUM_THREADS: '1', EPMOE_PYTHON: executable },
    // Nothing is known of a job that hangs; one that has started late still gets through its first samples.
    timeout: Math.ceil(until - Date.now()) + 90_000,
  })
  if (status !== 0) throw new Error(`${size} ranks, ${backend}: exit code ${status}\n${stdout}${stderr}`)
  return stdout.split('\n').flatMap((line) => (line.startsWith('{') ? [JSON.parse(line) as Measured] : []))
}

/**
 * Has glibc keep the memory of intermediate results between calls. As it is, what was allocated before decides whether a
 * call gets its 12 MB from the system page by page: a layer then takes 29 or 62 ms instead of 23.
 */
const memoryKept = {
  MALLOC_MMAP_THRESHOLD_: String(2 ** 30),
  MALLOC_TRIM_THRESHOLD_: String(2 ** 30),
  MALLOC_TOP_PAD_: String(2 ** 26),
}

function print(backend: Backend, found: Measured[]): void {
  const shares = ['its share', 'not experts', '±', 'blocks']
  const titles = ['scheme', 'ranks', 'chunks', 'layer', 'experts alone', 'communication alone', ...shares]
  const rows = found.map(({ scheme, ranks: size, chunks, layer, experts, communication, error, blocks }) => {
    const percent = (ms: number) => `${Math.max(0, (100 * ms) / layer).toFixed(0)} %`
    return [
      ...[scheme, String(size), String(chunks)],
      ...[layer, experts, communication].map((ms) => ms.toFixed(2)),
      ...[percent(communication), percent(layer - experts), `${(100 * error).toFixed(1)} %`, String(blocks)],
    ]
  })
  table([titles, ...rows])
  const computed = extrapolate(settings[backend], found, [4, 8, 64])
  if (computed.length === 0) {
    console.log(`Nothing is computed for more ranks: it takes figures of 1 and 2 ranks known to ±${100 * certain} %`)
    return
  }
  console.log(
    'Computed from 1 and 2 ranks: ranks with a core or GPU and a link as good as these; layer as measured, if it was',
  )
  table([
    ['scheme', 'ranks', 'experts', 'communication', 'one after the other', 'overlapped', 'layer, measured'],
    ...computed,
  ])
}

function table(rows: string[][]): void {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)))
  for (const row of rows) console.log(row.map((text, column) => text.padStart(widths[column]!)).join('  '))
}
