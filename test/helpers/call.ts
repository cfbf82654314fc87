import { type Device, type DType, postReorder, Stream, Tensor, type TypedArray } from 'epmoe'
import type { PostReorderArguments } from '../../src/generated/ops.js'
import { standIn } from './devices.js'

/** Arguments of a small valid call: T = 3, K = 2, H = 8, all local, row r holding r + column / 8. */
export function validCall(device: Device = 'cpu') {
  const [T, K, H] = [3, 2, 8]
  const rows = Float32Array.from({ length: T * K * H }, (_, i) => Math.floor(i / H) + (i % H) / 8)
  return {
    downOutput: on(device, rows, [T * K, H]),
    output: on(device, new Float32Array(T * H).fill(Number.NaN), [T, H]),
    src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, 2]), [T * K]),
    topkIds: on(device, new Int32Array([0, 1, 0, 1, 0, 1]), [T, K]),
    topkWeights: on(device, new Float32Array([0.5, 0.25, 0.5, 0.25, 0.5, 0.25]), [T, K]),
    startExpertId: 0,
    endExpertId: 1,
  }
}

/** What validCall() gives: 0.5 * row a + 0.25 * row b, exactly. */
export function validResult(): number[] {
  const pairs = [
    [5, 0],
    [4, 1],
    [3, 2],
  ]
  return pairs.flatMap(([a = 0, b = 0]) => Array.from({ length: 8 }, (_, c) => 0.5 * (a + c / 8) + 0.25 * (b + c / 8)))
}

/** A tensor of these elements on a device. */
export function on(device: Device, array: TypedArray, shape: number[], dtype?: DType): Tensor {
  const host = Tensor.from(array, shape, dtype === undefined ? {} : { dtype })
  return device === 'cpu' ? host : host.to(device)
}

/** The elements, wherever the tensor lives. */
export function read(tensor: Tensor): number[] {
  const host = tensor.device === 'cpu' ? tensor : tensor.toHostSync()
  return Array.from(host.data as Float32Array)
}

/** Runs the op and waits, so that index errors found on a GPU are thrown here as on the CPU. */
export function runPostReorder(args: PostReorderArguments, device: Device): void {
  postReorder(args)
  if (device !== 'cpu') Stream.own(device).synchronizeSync()
}

/** A tensor of bfloat16 ones. */
export function ones(device: Device, shape: number[]): Tensor {
  const count = shape.reduce((product, size) => product * size, 1)
  return on(device, new Uint16Array(count).fill(0x3f80), shape, 'bfloat16')
}

/**
 * Work on a GPU that takes long enough for later work on another stream to overtake it, were it not made to wait:
 * `slow` sums rows of ones to 4 in every element of its output, `move` copies its input.
 */
export function overtakable(device: Device) {
  // The stand-in's streams are as late as can be, so little work shows as much there.
  const [T, K, H] = standIn ? [4, 8, 16] : [4096, 8, 7168]
  const iota = (count: number) =>
    on(
      device,
      Int32Array.from({ length: count }, (_, i) => i),
      [count],
    )
  const rows = ones(device, [T * K, H])
  const sum = { src2dst: iota(T * K), topkWeights: on(device, new Float32Array(T * K).fill(0.5), [T, K]) }
  const copy = { src2dst: iota(T), topkWeights: on(device, new Float32Array(T).fill(1), [T, 1]) }
  const zeros = () => Tensor.zeros([T, H], { dtype: 'bfloat16', device })
  return {
    zeros,
    slow: (output: Tensor, stream: Stream) => postReorder({ downOutput: rows, output, ...sum, stream }),
    move: (input: Tensor, output: Tensor, stream?: Stream) =>
      postReorder({ downOutput: input, output, ...copy, ...(stream && { stream }) }),
    /** The least element. */
    least: (tensor: Tensor) => {
      using host = tensor.toHostSync()
      const bits = host.data as Uint16Array
      return bits.reduce(
        (least, each) => Math.min(least, new Float32Array(Uint32Array.of(each << 16).buffer)[0]!),
        Infinity,
      )
    },
  }
}
