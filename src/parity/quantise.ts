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

/**
 * Whether a power-of-two scale for magnitudes up to `most` is a matter of rounding: within `margin`, as a share, of 448
 * times a power of two the scale jumps to twice its size. Data stay away from there, so that oracles know the scale.
 */
export function nearJump(most: number, margin: number): boolean {
  const steps = Math.log2(most / largest)
  return Math.abs(steps - Math.round(steps)) <= margin
}

/** The largest magnitude, NaN aside. */
export function absmaxOf(values: number[]): number {
  let most = 0
  for (const value of values) if (Math.abs(value) > most) most = Math.abs(value)
  return most
}

/** In the range of float8, which saturates; a NaN stays one. */
export function toFloat8(value: number): number {
  return Math.max(-largest, Math.min(largest, value))
}
