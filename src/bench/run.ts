import type { Device } from '../device.js'
import { deviceFacts, devices } from '../device.js'
import type { Case } from '../parity/case.js'
import { environmentOf } from '../parity/environment.js'
import type { Guarded } from '../parity/guard.js'
import { PythonReferences } from '../parity/references.js'
import type { Python } from '../python/python.js'
import type { PyRef } from '../python/ref.js'
import type { BenchReport, Timing } from './result.js'
import { summarise } from './statistics.js'

/** `epmoe` and epmoe with the original's arithmetic, and what they are compared with. */
export const implementationNames = [
  'epmoe',
  'epmoe:triton-numerics',
  'triton',
  'triton-original',
  'torch',
  'torch.compile',
] as const

export interface BenchOptions {
  cases: Case[]
  implementations: readonly string[]
  device: Device
  python: Python
  /** Longest time for one case. */
  seconds: number
  /** Rotate the arguments over so many bytes; 0 keeps them in the caches. */
  coldBytes: number
  onCase?: (name: string, index: number, total: number) => void
}

/** What _bench.measure() returns of one implementation. */
interface Measured {
  samples: number[]
  launch: number | null
  problem: string | null
  note: string
  cold: boolean
}

/** Times every case's implementations side by side. */
export function runBench(options: BenchOptions): BenchReport {
  const { python, device } = options
  const bench = python.import('epmoe._bench')
  const references = new PythonReferences(python)
  // Beyond any cache: what a kernel that moves as much could reach at best.
  const copyBytes = device === 'cpu' ? 2 ** 28 : 2 ** 30
  using copy = bench.method('Copy', device, copyBytes)
  const copyRate = () => copy.method('rate').toJS() as number
  const rates = [copyRate()]
  const timings: Timing[] = []
  options.cases.forEach((each, index) => {
    options.onCase?.(each.name, index, options.cases.length)
    // What memory gives may change within a run, as on a virtual machine: it is asked on both sides of each case.
    const { results, bytes } = measure(each, options, bench)
    rates.push(copyRate())
    const rate = (rates.at(-1)! + rates.at(-2)!) / 2
    for (const [implementation, result] of Object.entries(results)) {
      timings.push(timingOf(each, implementation, device, result, bytes, rate))
    }
    references.release()
  })
  const described = [...new Set(options.cases.map(({ op }) => op))].flatMap((op) => references.describe(op))
  return {
    schema: 'epmoe.bench/1',
    environment: environmentOf(python, described),
    copy: { [device]: summarise(rates).median / 1e9 },
    timings,
    invalid: invalidIn(timings, options),
  }
}

function measure(
  each: Case,
  options: BenchOptions,
  bench: PyRef,
): { results: Record<string, Measured>; bytes: number } {
  using problem = each.build()
  const made: Guarded[] = []
  const outputs = problem.outputs()
  const refs: PyRef[] = []
  const there = (tensors: Record<string, Guarded>) =>
    Object.fromEntries(
      Object.entries(tensors).map(([name, tensor]) => {
        const copied = options.device === 'cpu' ? tensor : tensor.to(options.device)
        if (copied !== tensor) made.push(copied)
        const ref = copied.tensor.toTorch() as PyRef
        refs.push(ref)
        return [name, ref]
      }),
    )
  try {
    const args = { ...there(problem.inputs), ...there(outputs), ...problem.scalars }
    const names = Object.keys(outputs)
    using measured = bench.method(
      'measure',
      each.op,
      [...options.implementations],
      args,
      names,
      options.seconds,
      options.coldBytes,
    )
    return { results: measured.toJS() as Record<string, Measured>, bytes: problem.bytes }
  } finally {
    for (const ref of refs) ref.dispose()
    for (const tensor of [...made, ...Object.values(outputs)]) tensor[Symbol.dispose]()
  }
}

function timingOf(
  each: Case,
  implementation: string,
  device: Device,
  { samples, launch, problem, note, cold }: Measured,
  bytes: number,
  copy: number,
): Timing {
  const { median, spread, stable } = summarise(samples)
  const rate = bytes / median
  return {
    name: each.name,
    op: each.op,
    implementation,
    device,
    cold,
    microseconds: median * 1e6,
    spread,
    samples: samples.length,
    stable,
    gigabytesPerSecond: rate / 1e9,
    ofCopy: rate / copy,
    ...(launch === null ? {} : { launchMicroseconds: launch * 1e6 }),
    ...(problem === null ? {} : { problem }),
    ...(note === '' ? {} : { note }),
    tokens: each.axes['T'] ?? 0,
    hidden: each.axes['H'] ?? 0,
  }
}

/** A kernel that seems to move data from memory faster than a copy does has not been timed, but a cache has. */
function invalidIn(timings: Timing[], { device, coldBytes }: BenchOptions): string[] {
  const cache = device === 'cpu' ? 2 ** 26 : 2 * l2Bytes(device)
  // A copy on the CPU reads what it writes, too: three transfers where writing past the caches takes two.
  const most = device === 'cpu' ? 1.5 : 1.05
  return timings.flatMap(({ name, implementation, ofCopy, gigabytesPerSecond, microseconds, problem }) => {
    const moved = gigabytesPerSecond * microseconds * 1e3
    const fromMemory = coldBytes > 0 || moved > 4 * cache
    if (problem !== undefined || !fromMemory || !(ofCopy > most)) return []
    return [`${implementation} on ${name}: ${(100 * ofCopy).toFixed(0)} % of a copy's rate from memory cannot be`]
  })
}

function l2Bytes(device: Device): number {
  return devices().includes(device) ? deviceFacts(device).l2Bytes : 0
}
