import { type DType, dtypeFacts, type TypedArray } from '../dtype.js'
import type { Tensor } from '../tensor.js'

export function itemsizeOf(dtype: DType): number {
  return dtypeFacts(dtype, 'parity').itemsize
}

/** Bits of a float's significand, the hidden one included. */
export function significantBits(dtype: DType): number {
  return { float32: 24, float16: 11, bfloat16: 8, float8_e4m3fn: 4 }[dtype as string] ?? 53
}

/** The magnitude below which a float's last place no longer shrinks. */
export function smallestNormal(dtype: DType): number {
  return { float16: 2 ** -14, float8_e4m3fn: 2 ** -6 }[dtype as string] ?? 2 ** -126
}

/** A number, or infinity where the dtype would round to it. */
export function roundsToInfinity(dtype: DType, value: number): number {
  const limit = { float32: 2 ** 128 * (1 - 2 ** -25), float16: 65520, bfloat16: 2 ** 128 * (1 - 2 ** -9) }[
    dtype as string
  ]
  return Math.abs(value) >= (limit ?? Infinity) ? Math.sign(value) * Infinity : value
}

/** Turns stored elements into float64. Written apart from the native conversions that it checks. */
export function decoderOf(dtype: DType): (data: TypedArray, index: number) => number {
  const table = tables[dtype as string]?.()
  if (table === undefined) return (data, index) => Number(data[index])
  return (data, index) => table[data[index] as number]!
}

/** Turns a number into what a TypedArray of the dtype stores: the nearest, by search in the table of all values. */
export function encoderOf(dtype: DType): (value: number) => number {
  const table = tables[dtype as string]?.()
  if (table === undefined) return (value) => value
  const half = table.length / 2
  return (value) => {
    if (Number.isNaN(value)) return half - 1
    const size = Math.abs(roundsToInfinity(dtype, value))
    let [low, high] = [0, half - 1]
    while (low < high) {
      const middle = (low + high) >> 1
      // Beyond the finite values the table holds infinity and NaN.
      if (table[middle]! < size) low = middle + 1
      else high = middle
    }
    const below = low > 0 && size - table[low - 1]! < table[low]! - size ? low - 1 : low
    return value < 0 || Object.is(value, -0) ? below + half : below
  }
}

/** The rows of a large CPU tensor [R, H], in windows that a TypedArray can span. */
export function rowsOf(tensor: Tensor): (row: number) => { data: TypedArray; offset: number } {
  const [rows = 0, columns = 1] = tensor.shape
  const each = Math.max(1, Math.floor(2 ** 28 / columns))
  const windows = new Map<number, TypedArray>()
  return (row) => {
    const window = Math.floor(row / each)
    const first = window * each
    let data = windows.get(window)
    if (data === undefined) {
      data = tensor.view([Math.min(each, rows - first), columns], first * columns).data
      windows.set(window, data)
    }
    return { data, offset: (row - first) * columns }
  }
}

const kept = new Map<string, Float64Array>()

/** Every value of a dtype of 8 or 16 bits, by its bits. */
function tableOf(name: string, size: number, value: (bits: number) => number): Float64Array {
  const table = kept.get(name) ?? Float64Array.from({ length: size }, (_, bits) => value(bits))
  kept.set(name, table)
  return table
}

const tables: Record<string, () => Float64Array> = {
  float16: () => tableOf('float16', 65536, (bits) => decode(bits, 5, 10)),
  bfloat16: () => tableOf('bfloat16', 65536, (bits) => decode(bits, 8, 7)),
  float8_e4m3fn: () => tableOf('float8_e4m3fn', 256, decodeFloat8),
}

/** e4m3fn has no infinities: its largest exponent is an ordinary one, but for one NaN a sign. */
function decodeFloat8(bits: number): number {
  const sign = bits >> 7 === 1 ? -1 : 1
  const exponent = (bits >> 3) & 15
  const fraction = (bits & 7) / 8
  if ((bits & 0x7f) === 0x7f) return Number.NaN
  return exponent === 0 ? sign * fraction * 2 ** -6 : sign * (1 + fraction) * 2 ** (exponent - 7)
}

/** By the definition of IEEE 754 formats: sign, exponent, fraction. */
function decode(bits: number, exponentBits: number, fractionBits: number): number {
  const sign = bits >> 15 === 1 ? -1 : 1
  const exponent = (bits >> fractionBits) & (2 ** exponentBits - 1)
  const fraction = (bits & (2 ** fractionBits - 1)) / 2 ** fractionBits
  const bias = 2 ** (exponentBits - 1) - 1
  if (exponent === 2 ** exponentBits - 1) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN
  return exponent === 0 ? sign * fraction * 2 ** (1 - bias) : sign * (1 + fraction) * 2 ** (exponent - bias)
}
