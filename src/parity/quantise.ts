/** Columns that share a scale. */
const groupSize = 128
/** The largest float8_e4m3fn. */
const largest = 448

export function groupsOf(columns: number): number {
  return Math.ceil(columns / groupSize)
}

/** The scale under which magnitudes up to `most` fit float8. */
export function groupScale(most: number, format: 'float32' | 'power_of_two'): number {
  const scale = Math.max(most, 1e-10) / largest
  return format === 'float32' ? scale : 2 ** Math.ceil(Math.log2(Math.fround(scale)))
}

/** In the range of float8, which saturates; a NaN stays one. */
export function toFloat8(value: number): number {
  return Math.max(-largest, Math.min(largest, value))
}
