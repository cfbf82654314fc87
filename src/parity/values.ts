import type { DType, TypedArray } from '../dtype.js'
import type { Tensor } from '../tensor.js'

/** Bits of a float's significand, the hidden one included. */
export function significantBits(dtype: DType): number {
  return dtype === 'float32' ? 24 : dtype === 'float16' ? 11 : 8
}

/** Turns stored elements into float64. Written apart from the native conversions that it checks. */
export function decoderOf(dtype: DType): (data: TypedArray, index: number) => number {
  if (dtype === 'float32') return (data, index) => (data as Float32Array)[index]!
  const table = dtype === 'float16' ? halves() : bfloats()
  return (data, index) => table[(data as Uint16Array)[index]!]!
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

let halfTable: Float64Array | undefined
let bfloatTable: Float64Array | undefined

function halves(): Float64Array {
  halfTable ??= Float64Array.from({ length: 65536 }, (_, bits) => decode(bits, 5, 10))
  return halfTable
}

function bfloats(): Float64Array {
  bfloatTable ??= Float64Array.from({ length: 65536 }, (_, bits) => decode(bits, 8, 7))
  return bfloatTable
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
