import type { DeviceLike } from '../device.js'
import type { DType } from '../dtype.js'
import { Tensor } from '../tensor.js'
import { itemsizeOf } from './values.js'

const zone = 256 // bytes on either side, a multiple of every alignment a kernel may want
const chunk = 2 ** 30
const pattern = 0xff // as a float of any width: a NaN, so that reading it shows as well

/**
 * A tensor between two guard zones, all of it filled with NaN: an op that reads outside spoils its result, one that
 * writes outside is found by intact(), and one that leaves an element unwritten shows as NaN.
 */
export class Guarded implements Disposable {
  readonly tensor: Tensor
  readonly #whole: Tensor
  readonly #begin: number

  private constructor(whole: Tensor, begin: number, shape: readonly number[]) {
    this.#whole = whole
    this.#begin = begin
    this.tensor = whole.view(shape, begin)
  }

  /** On the CPU. `shift` moves the tensor by that many elements, away from any alignment but its own. */
  static create(shape: readonly number[], dtype: DType, shift = 0): Guarded {
    const count = shape.reduce((product, size) => product * size, 1)
    const itemsize = itemsizeOf(dtype)
    const begin = zone / itemsize + shift
    const whole = Tensor.empty([count + (2 * zone) / itemsize + shift], { dtype })
    for (let from = 0; from < whole.nbytes; from += chunk) bytesOf(whole, from, from + chunk).fill(pattern)
    return new Guarded(whole, begin, shape)
  }

  /** The same bytes, guards included, on another device. */
  to(device: DeviceLike): Guarded {
    return new Guarded(this.#whole.to(device), this.#begin, this.tensor.shape)
  }

  /** The tensor as it is now, on the CPU, and whether the zones around it are untouched. */
  read(): { host: Guarded; intact: boolean } {
    const host = new Guarded(this.#whole.toHostSync(), this.#begin, this.tensor.shape)
    const first = this.#begin * itemsizeOf(this.tensor.dtype)
    const untouched = (begin: number, end: number) => bytesOf(host.#whole, begin, end).every((byte) => byte === pattern)
    return { host, intact: untouched(0, first) && untouched(first + this.tensor.nbytes, host.#whole.nbytes) }
  }

  [Symbol.dispose](): void {
    this.tensor.dispose()
    this.#whole.dispose()
  }
}

/** Bytes begin to end of a tensor; both are multiples of its element size. */
function bytesOf(tensor: Tensor, begin: number, end: number): Uint8Array {
  const itemsize = itemsizeOf(tensor.dtype)
  const part = tensor.view([(Math.min(end, tensor.nbytes) - begin) / itemsize], begin / itemsize)
  const { buffer, byteOffset, byteLength } = part.data
  return new Uint8Array(buffer, byteOffset, byteLength)
}
