import type { DType } from '../dtype.js'
import type { Tensor } from '../tensor.js'

/** Bits of a float's significand, the hidden one included. */
export function significantBits(dtype: DType): number {
  return dtype === 'float32' ? 24 : dtype === 'float16' ? 11 : 8
}

/** A function that gives element i of a CPU tensor as a float64. Written apart from the native conversions it checks. */
export function toFloat64(tensor: Tensor): (index: number) => number {
  const { data } = tensor
  if (tensor.dtype === 'float32') return (index) => (data as Float32Array)[index]!
  const table = tensor.dtype === 'float16' ? halves() : bfloats()
  return (index) => table[(data as Uint16Array)[index]!]!
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
