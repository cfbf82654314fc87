// Generated from the library's descriptors by `npm run generate`; a test proves it fresh.
/* biome-ignore-all format: generated */
import { Op, type TensorLike } from '../call.js'
import type { Stream } from '../stream.js'

/** Arguments of epGather. Tensors are contiguous and on one device; axes of one name have one length. */
export interface EpGatherArguments {
  /** The experts' rows; rows of no slot may be uninitialised. Shape [M, H]; dtype float32, float16, bfloat16. */
  inputTensor: TensorLike
  /** Expert of each slot, local to the rank; negative: not here. Shape [T, K]; dtype int32, int64. */
  recvTopkIds: TensorLike
  /** Router weight of each slot. Shape [T, K]; dtype float32, that of inputTensor. */
  recvTopkWeight: TensorLike
  /** Row of each slot, as epScatter's outputIndex. Shape [T, K]; dtype int32, int64. */
  inputIndex: TensorLike
  /** Receives one row a token; every element is written. Shape [T, H]; dtype that of inputTensor. */
  outputTensor: TensorLike
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let epGatherOp: Op | undefined

/**
 * Sums, for every token, the rows epScatter placed: outputTensor[t] = sum over slots k with recvTopkIds[t,k] >= 0 of
 * recvTopkWeight[t,k] * inputTensor[inputIndex[t,k]], accumulated in float32 in order and rounded once. Throws
 * EpmoeError; an index out of range inside a tensor is skipped and reported, on the CPU by the call itself and on
 * CUDA by the next synchronize(). Returns outputTensor.
 */
export function epGather<Output extends TensorLike>(args: EpGatherArguments & { outputTensor: Output }): Output {
  const op = (epGatherOp ??= new Op('ep_gather'))
  op.begin(args)
  op.tensor(0, 'inputTensor', args.inputTensor)
  op.tensor(1, 'recvTopkIds', args.recvTopkIds)
  op.tensor(2, 'recvTopkWeight', args.recvTopkWeight)
  op.tensor(3, 'inputIndex', args.inputIndex)
  op.tensor(4, 'outputTensor', args.outputTensor)
  op.run(args, args.stream)
  return args.outputTensor
}

/** Arguments of moeSumReduce. Tensors are contiguous and on one device; axes of one name have one length. */
export interface MoeSumReduceArguments {
  /** The experts' rows, already weighted. Shape [T, K, H]; dtype float32, float16, bfloat16. */
  input: TensorLike
  /** Receives one row a token. Shape [T, H]; dtype that of input. */
  output: TensorLike
  /** Multiplies the sum. Default 1. */
  routedScalingFactor?: number | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let moeSumReduceOp: Op | undefined

/**
 * Sums every token's rows: output[t] = routedScalingFactor * sum over k of input[t,k], accumulated in float32 in
 * order and rounded once. Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the
 * CPU by the call itself and on CUDA by the next synchronize(). Returns output.
 */
export function moeSumReduce<Output extends TensorLike>(args: MoeSumReduceArguments & { output: Output }): Output {
  const op = (moeSumReduceOp ??= new Op('moe_sum_reduce'))
  op.begin(args)
  op.tensor(0, 'input', args.input)
  op.tensor(1, 'output', args.output)
  op.real(2, 'routedScalingFactor', args.routedScalingFactor)
  op.run(args, args.stream)
  return args.output
}

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
  /** Added to the sum, e.g. the shared experts' output. Shape [T, H]; dtype that of downOutput. */
  sharedOutput?: TensorLike | undefined
  /** Added last. Shape [T, H]; dtype that of downOutput. */
  residual?: TensorLike | undefined
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
 * routedScalingFactor * sum over slots k of topkWeights[t,k] * downOutput[src2dst[t,k] - dstStart] + sharedOutput[t]
 * + residual[t]. Slots of experts outside [startExpertId, endExpertId] are skipped, their rows never read; a token
 * without local slots gets zeros and what is added. Throws EpmoeError; an index out of range inside a tensor is
 * skipped and reported, on the CPU by the call itself and on CUDA by the next synchronize(). Returns output.
 */
export function postReorder<Output extends TensorLike>(args: PostReorderArguments & { output: Output }): Output {
  const op = (postReorderOp ??= new Op('post_reorder'))
  op.begin(args)
  op.tensor(0, 'downOutput', args.downOutput)
  op.tensor(1, 'output', args.output)
  op.tensor(2, 'src2dst', args.src2dst)
  op.tensor(3, 'topkIds', args.topkIds)
  op.tensor(4, 'topkWeights', args.topkWeights)
  op.tensor(5, 'sharedOutput', args.sharedOutput)
  op.tensor(6, 'residual', args.residual)
  op.integer(7, 'startExpertId', args.startExpertId)
  op.integer(8, 'endExpertId', args.endExpertId)
  op.integer(9, 'dstStart', args.dstStart)
  op.real(10, 'routedScalingFactor', args.routedScalingFactor)
  op.choice(11, 'numerics', args.numerics, ['fp32', 'triton'])
  op.run(args, args.stream)
  return args.output
}

/** Arguments of shuffleMulSum. Tensors are contiguous and on one device; axes of one name have one length. */
export interface ShuffleMulSumArguments {
  /** Rows in the experts' order. Shape [R, H]; dtype float32, float16, bfloat16. */
  input: TensorLike
  /** Receives one row a token; every element is written. Shape [T, H]; dtype that of input. */
  output: TensorLike
  /** Row of each slot; negative entries are skipped. Shape [T*K] or [T, K]; dtype int32, int64. */
  permutation: TensorLike
  /** Weight of each slot; 1 when absent. Shape [T, K] or [T*K]; dtype float32, that of input. */
  factors?: TensorLike | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let shuffleMulSumOp: Op | undefined

/**
 * Gathers and sums: output[t] = sum over k of input[permutation[t,k]] * factors[t,k], accumulated in float32 in
 * order and rounded once. Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the
 * CPU by the call itself and on CUDA by the next synchronize(). Returns output.
 */
export function shuffleMulSum<Output extends TensorLike>(args: ShuffleMulSumArguments & { output: Output }): Output {
  const op = (shuffleMulSumOp ??= new Op('shuffle_mul_sum'))
  op.begin(args)
  op.tensor(0, 'input', args.input)
  op.tensor(1, 'output', args.output)
  op.tensor(2, 'permutation', args.permutation)
  op.tensor(3, 'factors', args.factors)
  op.run(args, args.stream)
  return args.output
}
