// npm run bench -- ranks: time of a layer against the number of ranks, and the share of communication in it. Without
// ranks of its own it starts them by torchrun, one job for each number; what it computes from the figures is marked so.
import { spawnSync } from 'node:child_process'
import { devices, expertParallel, joinRanks, kw, moeLayer, type PyRef, setCpuThreads, startPython } from 'epmoe'
import { certain, extrapolate, type Measured, type Setting, touched } from './ranks-model.js'

const gpus = devices().length - 1
const python = startPython()
/** On the CPU a layer small enough for two cores; on GPUs Qwen3-30B-A3B's. */
const setting: Setting =
  gpus === 0
    ? { tokens: 512, topk: 4, hidden: 1024, half: 512, experts: 32, bytes: 2 }
    : { tokens: 4096, topk: 8, hidden: 2048, half: 768, experts: 128, bytes: 2 }

export default function ranks(): void {
  if (process.env['TORCHELASTIC_RUN_ID'] === undefined) start()
  else measure()
}

function start(): void {
  const { tokens, topk, hidden, half, experts } = setting
  const where = gpus === 0 ? 'CPU, gloo, a thread a rank' : `${gpus} GPU, NCCL`
  console.log(`bf16, ${tokens} tokens in all, K ${topk}, H ${hidden}, I ${half}, E ${experts}; ${where}; ms a layer`)
  const found: Measured[] = []
  for (const size of gpus === 0 ? [1, 2, 4] : [1, 2, 4, 8].filter((each) => each <= gpus)) {
    const torchrun = ['-m', 'torch.distributed.run', '--no-python', '--standalone', '--nproc-per-node', String(size)]
    const program = [process.execPath, ...process.execArgv, process.argv[1] ?? '', 'ranks']
    const env = { ...process.env, OMP_NUM_THREADS: '1', EPMOE_PYTHON: python.executable }
    const job = spawnSync(python.executable, [...torchrun, ...program], { encoding: 'utf8', env })
    if (job.status !== 0) throw new Error(job.stdout + job.stderr)
    found.push(
      ...job.stdout.split('\n').flatMap((line) => (line.startsWith('{') ? [JSON.parse(line) as Measured] : [])),
    )
  }
  const titles = [
    'scheme',
    'ranks',
    'chunks',
    'layer',
    'experts alone',
    'communication alone',
    'its share',
    'not experts',
    '±',
  ]
  const rows = found.map(({ scheme, ranks: size, chunks, layer, experts: alone, communication, spread }) => {
    const percent = (ms: number) => `${Math.max(0, (100 * ms) / layer).toFixed(0)} %`
    const shares = [percent(communication), percent(layer - alone), `${(100 * spread).toFixed(0)} %`]
    return [
      scheme,
      String(size),
      String(chunks),
      ...[layer, alone, communication].map((ms) => ms.toFixed(2)),
      ...shares,
    ]
  })
  print([titles, ...rows])
  const computed = extrapolate(setting, found, [8, 64])
  if (computed.length === 0) {
    console.log(`\nNothing is computed for more ranks: it takes figures of 1 and 2 ranks known to ±${100 * certain} %`)
  } else {
    console.log('\nComputed from the above, nothing of it run: ranks with a core or GPU and a link as good as these')
    print([['scheme', 'ranks', 'experts', 'communication', 'one after the other', 'overlapped'], ...computed])
  }
}

/** One rank of a job. The first prints what it has found. */
function measure(): void {
  setCpuThreads(1)
  const group = joinRanks()
  const torch = python.import('torch')
  const { tokens, topk, hidden, half, experts } = setting
  const { start: from, end } = group.expertRange(experts)
  const device = group.device
  const bfloat16 = torch.get('bfloat16')
  torch.method('manual_seed', group.rank + 1).dispose()
  const random = (...shape: number[]) =>
    torch.method('randn', ...shape, kw({ device, dtype: bfloat16 })).method('mul', 0.05)
  const weights = { w13: random(end - from, 2 * half, hidden), w2: random(end - from, hidden, half) }
  // The tokens of all ranks, alike on every rank; each takes its part where tokens are its own.
  torch.method('manual_seed', 0).dispose()
  const all = {
    hiddenStates: random(tokens, hidden),
    topkIds: torch
      .method('rand', tokens, experts, kw({ device }))
      .method('argsort', 1)
      .method('narrow', 1, 0, topk)
      .method('contiguous'),
    topkWeights: torch.method('rand', tokens, topk, kw({ device })),
  }
  const part = (ref: PyRef) => ref.method('narrow', 0, (group.rank * tokens) / group.size, tokens / group.size)
  const own = { hiddenStates: part(all.hiddenStates), topkIds: part(all.topkIds), topkWeights: part(all.topkWeights) }
  const mine = mineOf(all, from, end)
  using alone = moeLayer({ ...weights, startExpertId: from, numExperts: experts })
  for (const scheme of ['all-reduce', 'all-to-all'] as const) {
    const [call, arriving] = scheme === 'all-reduce' ? [all, all] : [own, mine]
    const traffic = trafficOf(scheme, group, torch)
    const [one, two] = [1, 2].map((chunks) => expertParallel({ ...weights, group, scheme, chunks }))
    const times = interleaved(group, {
      experts: () => alone.forward(arriving),
      communication: traffic(touched(setting, group.size)),
      latency: traffic(0),
      one: () => one!.forward(call),
      two: () => two!.forward(call),
    })
    for (const [index, time] of [times.one, times.two].entries()) {
      const { experts: work, communication, latency } = times
      const rest = { experts: work.median, communication: communication.median, latency: latency.median }
      const spread = Math.max(time.spread, work.spread, communication.spread)
      const found: Measured = { scheme, ranks: group.size, chunks: index + 1, layer: time.median, ...rest, spread }
      if (group.rank === 0) console.log(JSON.stringify(found))
    }
    for (const each of [one, two]) each?.dispose()
  }
  group.dispose()
}

/** The tokens that have an expert from `from` up to, not including, `end`. */
function mineOf(all: { hiddenStates: PyRef; topkIds: PyRef; topkWeights: PyRef }, from: number, end: number) {
  const here = python.eval('((i >= a) & (i < b)).any(1)', { i: all.topkIds, a: from, b: end })
  const take = (x: PyRef) => python.eval('x[here].contiguous()', { x, here })
  return {
    hiddenStates: take(all.hiddenStates),
    topkIds: take(all.topkIds),
    topkWeights: take(all.topkWeights),
  }
}

/** The layer's collectives without the layer: as many rows go to each rank as tokens find an expert there. */
function trafficOf(scheme: string, group: ReturnType<typeof joinRanks>, torch: PyRef) {
  const { tokens, hidden } = setting
  const options = kw({ device: group.device, dtype: torch.get('bfloat16') })
  return (share: number) => () => {
    const waitFor = (name: string, ...args: unknown[]) => {
      using work = group.python.method(name, ...args)
      group.python.method('wait', work).dispose()
    }
    if (scheme === 'all-reduce') {
      const rows = torch.method('zeros', share === 0 ? 1 : tokens, hidden, options)
      waitFor('all_reduce', rows, true)
      return rows
    }
    const each = Math.max(1, Math.round((tokens / group.size) * share))
    const rows = torch.method('zeros', each * group.size, hidden, options)
    using back = rows.method('clone')
    const splits = Array.from({ length: group.size }, () => each)
    waitFor('all_to_all', back, rows, splits, splits)
    waitFor('all_to_all', rows, back, splits, splits)
    return rows
  }
}

/** Calls that all ranks make at the same time, in turn: milliseconds, and half the distance of the quartiles to them. */
function interleaved<Name extends string>(
  group: ReturnType<typeof joinRanks>,
  calls: Record<Name, () => PyRef>,
): Record<Name, { median: number; spread: number }> {
  using cuda = python.import('torch').get('cuda')
  const names = Object.keys(calls) as Name[]
  const times = new Map(names.map((name) => [name, [] as number[]]))
  for (let round = -3; round < 31; round++) {
    for (const name of names) {
      group.barrier()
      const begin = performance.now()
      calls[name]().dispose()
      if (group.device !== 'cpu') cuda.method('synchronize').dispose()
      if (round >= 0) times.get(name)!.push(performance.now() - begin)
    }
  }
  const summary = (name: Name) => {
    const sorted = times.get(name)!.sort((a, b) => a - b)
    const at = (share: number) => sorted[Math.floor(share * (sorted.length - 1))]!
    return [name, { median: at(0.5), spread: (at(0.75) - at(0.25)) / 2 / at(0.5) }] as const
  }
  return Object.fromEntries(names.map(summary)) as Record<Name, { median: number; spread: number }>
}

function print(rows: string[][]): void {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)))
  for (const row of rows) console.log(row.map((text, column) => text.padStart(widths[column]!)).join('  '))
}
