import type { DType } from '../dtype.js'
import { native } from '../native.js'
import type { Tensor } from '../tensor.js'
import { Guarded } from './guard.js'
import type { Random } from './random.js'
import { encoderOf } from './values.js'

/** An index tensor whose element i is `value(i)`. */
export function indexTensor(shape: number[], dtype: 'int32' | 'int64', value: (slot: number) => number): Guarded {
  const guarded = Guarded.create(shape, dtype)
  const { data } = guarded.tensor
  if (data instanceof BigInt64Array) for (let i = 0; i < data.length; i++) data[i] = BigInt(value(i))
  else for (let i = 0; i < data.length; i++) data[i] = value(i)
  return guarded
}

/** A tensor of any float dtype whose element i is `value(i)`, rounded. */
export function floatTensor(shape: number[], dtype: DType, value: (i: number) => number, shift = 0): Guarded {
  const guarded = Guarded.create(shape, dtype, shift)
  const { data } = guarded.tensor
  const encode = encoderOf(dtype)
  for (let i = 0; i < data.length; i++) data[i] = encode(value(i))
  return guarded
}

/** Bell-shaped values of mean 0. */
export function normalTensor(shape: number[], dtype: DType, seed: number, deviation = 1, shift = 0): Guarded {
  const guarded = Guarded.create(shape, dtype, shift)
  if (guarded.tensor.nbytes > 0) native().parity.fillNormal(guarded.tensor.handleFor('fillNormal'), seed, deviation)
  return guarded
}

/** Scales between 0.2 and 1, as checkpoints and tests of these kernels have them. */
export function scaleTensor(shape: number[], random: Random): Guarded {
  return floatTensor(shape, 'float32', () => 0.2 + 0.8 * random.next())
}

/** A NaN that is not the one arithmetic makes. */
export function nanBits(dtype: DType): number {
  return { float32: Number.NaN, float16: 0x7e01, bfloat16: 0x7fc1, float8_e4m3fn: 0x7f }[dtype as string] ?? -1
}

/** NaN, infinities, the largest number, the smallest subnormal and negative zero, here and there. */
export function sprinkle(tensor: Tensor): void {
  const specials: Record<string, number[]> = {
    float32: [Number.NaN, Infinity, -Infinity, 3.4028234663852886e38, 1.401298464324817e-45, -0],
    float16: [0x7e00, 0x7c00, 0xfc00, 0x7bff, 0x0001, 0x8000],
    bfloat16: [0x7fc0, 0x7f80, 0xff80, 0x7f7f, 0x0001, 0x8000],
    float8_e4m3fn: [0x7f, 0x7e, 0xfe, 0x01, 0x80],
  }
  const values = specials[tensor.dtype] ?? []
  const { data } = tensor
  for (let i = 0, k = 0; i < data.length; i += 37, k++) data[i] = values[k % values.length]!
}

/** Element i of a tensor becomes `value`, as an index or as bits. */
export function write(guarded: Guarded, index: number, value: number): void {
  const { data } = guarded.tensor
  if (data instanceof BigInt64Array) data[index] = BigInt(value)
  else data[index] = value
}

/** A scale becomes a quarter of itself: far enough for a comparison of norms to see one row of a few hundred. */
export function quarter(guarded: Guarded, index: number): void {
  const data = guarded.tensor.data as Float32Array
  data[index]! /= 4
}

/** Two elements of an index tensor change places. */
export function swap(guarded: Guarded, a: number, b: number): void {
  const kept = Number(guarded.tensor.data[a])
  write(guarded, a, Number(guarded.tensor.data[b]))
  write(guarded, b, kept)
}
