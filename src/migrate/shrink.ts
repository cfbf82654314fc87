import { EpmoeError } from '../errors.js'
import type { Backend } from '../parity/backends.js'
import type { Python } from '../python/python.js'
import type { PyRef } from '../python/ref.js'
import { Capsule } from './capsule.js'
import { type ReplayReport, replay } from './replay.js'

const axes = ['tokens', 'experts', 'topk', 'hidden'] as const
type Axis = (typeof axes)[number]

export interface ShrinkOptions {
  capsule: Capsule
  /** What the capsule came to, with the comparisons that failed. */
  report: ReplayReport
  backends: Backend[]
  python: Python
  interpreterBudget: number
  /** Replays at most; what is smallest by then is the result. */
  trials: number
  onTrial?: (trial: number, what: string) => void
}

export interface Shrunk {
  capsule: Capsule
  /** Sizes before and after, by axis. */
  sizes: Record<string, [number, number]>
  trials: number
}

/**
 * The smallest call out of a failing one that still fails, by delta debugging over tokens, experts, slots and columns in
 * turn until none gets smaller. "Fails" is one of the comparisons that failed first: a candidate that fails in another
 * way only, or that epmoe refuses, does not count.
 */
export async function shrink(options: ShrinkOptions): Promise<Shrunk> {
  const name = options.report.capsules.find(({ file }) => file === options.capsule.file)?.name
  const failed = options.report.cases.filter((each) => each.name === name && !each.passed)
  if (failed.length === 0) {
    throw new EpmoeError({
      code: 'ERR_USAGE',
      argument: '--shrink',
      expected: 'a capsule whose replay fails',
      received: `${options.capsule.file}, which passes`,
    })
  }
  const search = new Search(options, new Set(failed.map(({ backend, reference }) => `${backend} ${reference}`)))
  return await search.run()
}

class Search {
  readonly #options: ShrinkOptions
  readonly #wanted: Set<string>
  readonly #module: PyRef
  #best: Capsule
  #trials = 0

  constructor(options: ShrinkOptions, wanted: Set<string>) {
    this.#options = options
    this.#wanted = wanted
    this.#module = options.python.import('epmoe.migrate.shrink')
    this.#best = options.capsule
  }

  async run(): Promise<Shrunk> {
    const before = this.#sizes()
    for (let smaller = true; smaller; ) {
      smaller = false
      for (const axis of axes) if (await this.#along(axis)) smaller = true
    }
    const after = this.#sizes()
    const sizes = Object.fromEntries(
      Object.entries(before).map(([axis, size]) => [axis, [size, after[axis] ?? 1] as [number, number]]),
    )
    return { capsule: this.#best, sizes, trials: this.#trials }
  }

  #sizes(): Record<string, number> {
    return this.#module.method('sizes', this.#best.held).toJS() as Record<string, number>
  }

  /** Keeps one part of an axis, or all but one, in parts that get finer; whether that led anywhere. */
  async #along(axis: Axis): Promise<boolean> {
    let smaller = false
    let parts = 2
    for (;;) {
      const size = this.#sizes()[axis] ?? 1
      if (size < 2 || this.#trials >= this.#options.trials) return smaller
      const count = Math.min(parts, size)
      const cuts = Array.from({ length: count + 1 }, (_, i) => Math.floor((i * size) / count))
      const pieces = cuts.slice(1).map((end, i) => range(cuts[i]!, end))
      const others = pieces.map((piece) => range(0, size).filter((at) => at < piece[0]! || at > piece.at(-1)!))
      if (await this.#keepOne(axis, pieces)) {
        smaller = true
        parts = 2
      } else if (count > 2 && (await this.#keepOne(axis, others))) {
        smaller = true
        parts = Math.max(2, count - 1)
      } else if (count === size) return smaller
      else parts = count * 2
    }
  }

  async #keepOne(axis: Axis, choices: number[][]): Promise<boolean> {
    for (const keep of choices) {
      if (this.#trials >= this.#options.trials) return false
      const candidate = await this.#failing(axis, keep)
      if (candidate === undefined) continue
      if (this.#best !== this.#options.capsule) this.#best[Symbol.dispose]()
      this.#best = candidate
      return true
    }
    return false
  }

  async #failing(axis: Axis, keep: number[]): Promise<Capsule | undefined> {
    const { backends, python, interpreterBudget, onTrial } = this.#options
    onTrial?.(++this.#trials, `${axis}: ${keep.length}`)
    let candidate: Capsule | undefined
    try {
      using found = this.#module.method('reduced', this.#best.held, axis, keep)
      candidate = Capsule.of(found, this.#best.file)
      const names = [...this.#wanted].map((pair) => pair.split(' ') as [string, string])
      const report = await replay({
        capsules: [candidate],
        backends: backends.filter((backend) => names.some(([name]) => name === backend.name)),
        references: [...new Set(names.map(([, reference]) => reference))],
        python,
        interpreterBudget,
        controls: 'off',
      })
      const fails = report.cases.some((each) => !each.passed && this.#wanted.has(`${each.backend} ${each.reference}`))
      if (fails) return candidate
    } catch (error) {
      // A candidate that is no valid call is not smaller, it is another thing.
      if (!(error instanceof EpmoeError)) throw error
    }
    candidate?.[Symbol.dispose]()
    return undefined
  }
}

function range(begin: number, end: number): number[] {
  return Array.from({ length: end - begin }, (_, i) => begin + i)
}

/** Writes a shrunk call beside the capsule it came from, and says where. */
export function writeShrunk(python: Python, { capsule }: Shrunk): string {
  const path = capsule.file.replace(/(\.safetensors)?$/, '-small.safetensors')
  return python.import('epmoe.migrate.shrink').method('write', capsule.held, path).toJS() as string
}
