import type { BenchReport, Timing } from './result.js'

export type Change = 'same' | 'fast' | 'slow' | 'ambiguous'

export interface Comparison {
  timing: Timing
  before: number
  /** Of the time now over the time before. */
  ratio: number
  change: Change
}

/** Below this nobody acts on a difference, and machines differ by as much from one hour to the next. */
const worthwhile = 0.03

/**
 * Each timing of epmoe's against the baseline's. A change is told when it is larger than what both runs' spreads
 * explain and worth acting on; one that is worth acting on but may be noise is ambiguous.
 */
export function compareWithBaseline(now: BenchReport, before: BenchReport): Comparison[] {
  const known = new Map(before.timings.map((timing) => [keyOf(timing), timing]))
  return now.timings.flatMap((timing) => {
    const old = known.get(keyOf(timing))
    if (old === undefined || !timing.implementation.startsWith('epmoe')) return []
    if (timing.problem !== undefined || old.problem !== undefined) return []
    const ratio = timing.microseconds / old.microseconds
    return [{ timing, before: old.microseconds, ratio, change: changeOf(ratio, timing, old) }]
  })
}

function keyOf({ name, implementation, device, cold }: Timing): string {
  return [name, implementation, device, cold].join(' ')
}

function changeOf(ratio: number, a: Timing, b: Timing): Change {
  const distance = Math.abs(Math.log(ratio))
  if (distance < worthwhile) return 'same'
  if (distance < 2 * (a.spread + b.spread)) return 'ambiguous'
  return ratio < 1 ? 'fast' : 'slow'
}
