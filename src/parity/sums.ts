import type { DType } from '../dtype.js'
import type { Tensor } from '../tensor.js'
import type { Bounds } from './case.js'
import type { Page } from './expectation.js'
import { decoderOf, rowsOf, significantBits } from './values.js'

/**
 * Each rounding is wrong by half a unit in the last place at most. Default: float32 sums of so many terms (and a factor),
 * then one rounding to the dtype. Triton's arithmetic: a rounded weight (and its product with a rounded factor) costs a
 * unit, and each of the sums half of one. A reference that rounds product and sum apart pays twice.
 */
export function sumBounds(terms: number, dtype: DType, factor: number): Bounds {
  const narrow = dtype === 'float32' ? 0 : 0.5
  const single = 0.5 * 2 ** (significantBits(dtype) - 24)
  const scaled = factor === 1 ? 0 : 1
  // A partial sum may round up past a power of two, where the unit doubles: hence a last unit of reserve.
  return {
    fp32: narrow + (terms + scaled) * single * (narrow === 0 ? 2 : 1) + (narrow === 0 ? 0 : single),
    triton: terms / 2 + 1 + 2 * scaled + 1,
    reference: terms + 1 + 2 * scaled + 1,
  }
}

/** Writes the weighted sums of rows: `rowOf(slot)` is negative where a slot is skipped. */
export function sumRows(
  { expected, scale }: Page,
  { T, H, K }: { T: number; H: number; K: number },
  rows: Tensor,
  rowOf: (slot: number) => number,
  weightOf: (slot: number) => number,
): void {
  expected.fill(0)
  const row = rowsOf(rows)
  const decode = decoderOf(rows.dtype)
  for (let slot = 0; slot < T * K; slot++) {
    const source = rowOf(slot)
    if (source < 0) continue
    const { data, offset } = row(source)
    const weight = weightOf(slot)
    const out = Math.floor(slot / K) * H
    for (let column = 0; column < H; column++) {
      const term = decode(data, offset + column) * weight
      expected[out + column]! += term
      scale[out + column]! += Math.abs(term)
    }
  }
}
