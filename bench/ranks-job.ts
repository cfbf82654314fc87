import { expertParallel, joinRanks, kw, moeLayer, type PyRef, type RankGroup, setCpuThreads, startPython } from 'epmoe'
import { summarise } from '../src/bench/statistics.js'
import { type Backend, type Measured, type Setting, settings, touched } from './ranks-model.js'

const python = startPython()
const cuda = python.import('torch').get('cuda')

/** One rank of a job, which measures until then, in milliseconds since the epoch. The first prints what it has found. */
export function measure(backend: Backend, until: number): void {
  setCpuThreads(1)
  const group = joinRanks({ backend })
  const setting = settings[backend]
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
  for (const [index, scheme] of (['all-reduce', 'all-to-all'] as const).entries()) {
    const [call, arriving] = scheme === 'all-reduce' ? [all, all] : [own, mine]
    const traffic = trafficOf(setting, scheme, group, torch)
    const [one, two] = [1, 2].map((chunks) => expertParallel({ ...weights, group, scheme, chunks }))
    const times = interleaved(group, Date.now() + (until - Date.now()) / (2 - index), {
      experts: () => alone.forward(arriving).dispose(),
      communication: traffic(touched(setting, group.size)),
      latency: traffic(0),
      one: () => one!.forward(call).dispose(),
      two: () => two!.forward(call).dispose(),
    })
    for (const [chunks, time] of [times.one, times.two].entries()) {
      const { experts: work, communication, latency } = times
      const rest = { experts: work.median, communication: communication.median, latency: latency.median }
      const error = Math.max(time.error, work.error, communication.error)
      const { median: layer, blocks } = time
      const found: Measured = { scheme, ranks: group.size, chunks: chunks + 1, layer, ...rest, error, blocks }
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
function trafficOf({ tokens, hidden }: Setting, scheme: string, group: RankGroup, torch: PyRef) {
  const options = kw({ device: group.device, dtype: torch.get('bfloat16') })
  const waitFor = (name: string, ...args: unknown[]) => {
    using work = group.python.method(name, ...args)
    group.python.method('wait', work).dispose()
  }
  return (share: number): (() => void) => {
    if (scheme === 'all-reduce') {
      const rows = torch.method('zeros', share === 0 ? 1 : tokens, hidden, options)
      return () => waitFor('all_reduce', rows, true)
    }
    const each = Math.max(1, Math.round((tokens / group.size) * share))
    const rows = torch.method('zeros', each * group.size, hidden, options)
    const back = rows.method('clone')
    const splits = Array.from({ length: group.size }, () => each)
    return () => {
      waitFor('all_to_all', back, rows, splits, splits)
      waitFor('all_to_all', rows, back, splits, splits)
    }
  }
}

interface Time {
  /** Milliseconds: the median of the blocks' medians. */
  median: number
  /** Of that median, as a share of it: 95 of 100 such intervals hold the true one (the notch of a box plot). */
  error: number
  blocks: number
}

const samplesOfBlock = 5
const fewestBlocks = 8

/**
 * Calls that all ranks make at the same time, in turn, until the time is up. A block's median leaves out what interrupts
 * single calls; how far blocks are apart tells what changes more slowly. A call takes as long as on the slowest rank.
 */
function interleaved<Name extends string>(group: RankGroup, until: number, calls: Record<Name, () => void>) {
  const names = Object.keys(calls) as Name[]
  const together = meeting(group)
  const medians = new Map(names.map((name) => [name, [] as number[]]))
  for (let block = -1, more = true; more; block++) {
    const times = new Map(names.map((name) => [name, [] as number[]]))
    for (let round = 0; round < samplesOfBlock; round++) {
      for (const name of names) {
        together()
        const begin = performance.now()
        calls[name]()
        finish(group)
        times.get(name)!.push(performance.now() - begin)
      }
    }
    const own = names.map((name) => summarise(times.get(name)!).median)
    const all = group.gather('a block', { own, late: Date.now() > until })
    if (block < 0) continue
    for (const [i, name] of names.entries()) medians.get(name)!.push(Math.max(...all.map((each) => each.own[i]!)))
    more = block + 1 < fewestBlocks || !all[0]!.late
  }
  const times = names.map((name): [Name, Time] => {
    const { median, spread } = summarise(medians.get(name)!)
    const blocks = medians.get(name)!.length
    return [name, { median, error: (1.57 * 2 * spread) / Math.sqrt(blocks), blocks }]
  })
  return Object.fromEntries(times) as Record<Name, Time>
}

/** Waits for the rank's GPU, if it has one. */
function finish({ device }: RankGroup): void {
  if (device !== 'cpu') cuda.method('synchronize').dispose()
}

/** Has the ranks go on within microseconds of each other; the store's barrier leaves milliseconds between them. */
function meeting(group: RankGroup): () => void {
  const token = python.import('torch').method('zeros', 1, kw({ device: group.device }))
  return () => {
    using work = group.python.method('all_reduce', token, true)
    group.python.method('wait', work).dispose()
    finish(group)
  }
}
