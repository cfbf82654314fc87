/** The value below which a part of the sorted samples lies. */
export function quantile(sorted: readonly number[], part: number): number {
  const at = (sorted.length - 1) * part
  const low = sorted[Math.floor(at)] ?? Number.NaN
  return low + (at - Math.floor(at)) * ((sorted[Math.ceil(at)] ?? low) - low)
}

export interface Summary {
  median: number
  /** Half the distance of the quartiles, over the median. */
  spread: number
  /** Whether the median is known to half a percent. */
  stable: boolean
}

export function summarise(samples: readonly number[]): Summary {
  const sorted = [...samples].sort((a, b) => a - b)
  const median = quantile(sorted, 0.5)
  const spread = (quantile(sorted, 0.75) - quantile(sorted, 0.25)) / 2 / median
  return { median, spread, stable: (2 * spread) / Math.sqrt(sorted.length) < 0.005 }
}
