// Generated from the library's descriptors by `npm run generate`; a test proves it fresh.
/* biome-ignore-all format: generated */
import { Op, type TensorLike } from '../call.js'
import type { Stream } from '../stream.js'

/** Arguments of postReorder. Tensors are contiguous and on one device; axes of one name have one length. */
export interface PostReorderArguments {
  /**
   * Rows of the experts' outputs; rows of skipped slots may be uninitialised. Shape [...R, H]; dtype float32,
   * float16, bfloat16.
   */
  downOutput: TensorLike
  /** Receives one row a token; every element is written. Shape [T, H]; dtype that of downOutput. */
  output: TensorLike
  /**
   * Row of each slot, counted from dstStart; negative entries are skipped when topkIds is absent. Shape [T*K] or [T,
   * K]; dtype int32, int64.
   */
  src2dst: TensorLike
  /**
   * Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP). Shape [T, K]; dtype
   * int32, int64.
   */
  topkIds?: TensorLike | undefined
  /** Router weight of each slot. Shape [T, K]; dtype float32, that of downOutput. */
  topkWeights: TensorLike
  /** First local expert. Default 0. */
  startExpertId?: number | bigint | undefined
  /** Last local expert, inclusive. Default 2147483647. */
  endExpertId?: number | bigint | undefined
  /** Subtracted from src2dst to give the row. Default 0. */
  dstStart?: number | bigint | undefined
  /** Multiplies the sum. Default 1. */
  routedScalingFactor?: number | undefined
  /**
   * fp32: float32 accumulation in slot order, one final rounding. triton: the original kernel's arithmetic, every
   * partial sum and every weight rounded to the activation dtype. Default 'fp32'.
   */
  numerics?: 'fp32' | 'triton' | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let postReorderOp: Op | undefined

/**
 * Sums, for every token, the rows its local experts produced, each times the router's weight: output[t] =
 * routedScalingFactor * sum over slots k of topkWeights[t,k] * downOutput[src2dst[t,k] - dstStart]. Slots of experts
 * outside [startExpertId, endExpertId] are skipped, their rows never read; a token without local slots gets zeros.
 * Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the CPU by the call itself
 * and on CUDA by the next synchronize(). Returns output.
 */
export function postReorder<Output extends TensorLike>(args: PostReorderArguments & { output: Output }): Output {
  const op = (postReorderOp ??= new Op('post_reorder'))
  op.begin(args)
  op.tensor(0, 'downOutput', args.downOutput)
  op.tensor(1, 'output', args.output)
  op.tensor(2, 'src2dst', args.src2dst)
  op.tensor(3, 'topkIds', args.topkIds)
  op.tensor(4, 'topkWeights', args.topkWeights)
  op.integer(5, 'startExpertId', args.startExpertId)
  op.integer(6, 'endExpertId', args.endExpertId)
  op.integer(7, 'dstStart', args.dstStart)
  op.real(8, 'routedScalingFactor', args.routedScalingFactor)
  op.choice(9, 'numerics', args.numerics, ['fp32', 'triton'])
  op.run(args, args.stream)
  return args.output
}
