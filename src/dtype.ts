import { describeValue, EpmoeError } from './errors.js'
import { native } from './native.js'

/** Element types, named as in torch. */
export type DType = 'float32' | 'float16' | 'bfloat16' | 'float8_e4m3fn' | 'int32' | 'int64' | 'uint8' | 'float64'

export type TypedArray = Float32Array | Float64Array | Int32Array | BigInt64Array | Uint16Array | Uint8Array

interface Facts {
  /** Position in the library's table. */
  index: number
  /** Bytes. */
  itemsize: number
  /** What holds the elements in JavaScript; the bits of float16, bfloat16 and float8 as unsigned integers. */
  array: new (
    buffer: ArrayBufferLike,
    byteOffset: number,
    length: number,
  ) => TypedArray
}

const arrays: Record<DType, Facts['array']> = {
  float32: Float32Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  float8_e4m3fn: Uint8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  float64: Float64Array,
}

let table: Map<string, Facts> | undefined

function facts(): Map<string, Facts> {
  table ??= new Map(
    native().dtypes.map(({ name, itemsize }, index) => [name, { index, itemsize, array: arrays[name as DType] }]),
  )
  return table
}

export function dtypeFacts(dtype: DType, op: string): Facts {
  const found = facts().get(dtype)
  if (found === undefined) {
    throw new EpmoeError({
      code: 'ERR_DTYPE',
      op,
      argument: 'dtype',
      expected: [...facts().keys()].join(', '),
      received: describeValue(dtype),
      hint: 'Use one of these names',
    })
  }
  return found
}

export function dtypeName(index: number): DType {
  return native().dtypes[index]?.name as DType
}

/** The dtype a typed array holds when nothing else is said. */
export function dtypeOfArray(array: TypedArray): DType | undefined {
  if (array instanceof Float32Array) return 'float32'
  if (array instanceof Float64Array) return 'float64'
  if (array instanceof Int32Array) return 'int32'
  if (array instanceof BigInt64Array) return 'int64'
  if (array instanceof Uint8Array) return 'uint8'
  return undefined
}
