import type { Comparison } from './baseline.js'
import type { BenchReport, Timing } from './result.js'

/** Cases down, implementations across: microseconds, percent of a copy's rate, and how many times faster epmoe is. */
export function benchTable({ timings, copy, invalid }: BenchReport): string {
  const lines: string[] = []
  for (const [name, own] of groupBy(timings, ({ name }) => name)) {
    const ours = own.find(({ implementation, problem }) => implementation === 'epmoe' && problem === undefined)
    lines.push(name)
    for (const timing of own) lines.push(`  ${timing.implementation.padEnd(22)} ${textOf(timing, ours)}`)
  }
  for (const [device, rate] of Object.entries(copy))
    lines.push(`copy on ${device}: ${rate.toFixed(1)} GB/s read and written`)
  for (const reason of invalid) lines.push(`INVALID ${reason}`)
  return lines.join('\n')
}

function textOf(timing: Timing, ours: Timing | undefined): string {
  const { microseconds, spread, stable, ofCopy, launchMicroseconds, problem, note, implementation } = timing
  if (problem !== undefined) return problem
  const columns = [
    `${microseconds.toFixed(microseconds < 100 ? 2 : 1).padStart(10)} µs ±${(100 * spread).toFixed(1).padStart(4)} %${stable ? ' ' : '?'}`,
    `${(100 * ofCopy).toFixed(1).padStart(6)} % of copy`,
    launchMicroseconds === undefined ? '' : `launch ${launchMicroseconds.toFixed(1)} µs`,
    ours === undefined || implementation === 'epmoe'
      ? ''
      : `epmoe is ${(microseconds / ours.microseconds).toFixed(2)} ×`,
    note ?? '',
  ]
  return columns.filter(Boolean).join('  ')
}

export function comparisonTable(comparisons: Comparison[]): string {
  return comparisons
    .map(({ timing, before, ratio, change }) =>
      [
        change.padEnd(9),
        `${before.toFixed(2)} → ${timing.microseconds.toFixed(2)} µs (${ratio.toFixed(3)})`.padEnd(36),
        `${timing.implementation} ${timing.name}`,
      ].join('  '),
    )
    .join('\n')
}

export function groupBy<Item>(items: readonly Item[], keyOf: (item: Item) => string): Map<string, Item[]> {
  const groups = new Map<string, Item[]>()
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item])
  return groups
}
