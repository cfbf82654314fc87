// Generated from the library's descriptors by `npm run generate`; a test proves it fresh.
/* biome-ignore-all format: generated */
import { Op, type PreparedCall, type TensorLike } from '../call.js'
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
  putEpGather(op, args)
  op.run(args, args.stream)
  return args.outputTensor
}

function putEpGather(op: Op, args: EpGatherArguments): void {
  op.tensor(0, 'inputTensor', args.inputTensor)
  op.tensor(1, 'recvTopkIds', args.recvTopkIds)
  op.tensor(2, 'recvTopkWeight', args.recvTopkWeight)
  op.tensor(3, 'inputIndex', args.inputIndex)
  op.tensor(4, 'outputTensor', args.outputTensor)
}

/** Checks the arguments once, for a call that is made many times. */
epGather.prepare = (args: EpGatherArguments): PreparedCall => {
  const op = (epGatherOp ??= new Op('ep_gather'))
  op.beginPrepared(args)
  putEpGather(op, args)
  return op.prepare(args, args.stream)
}

/** Arguments of epScatter. Tensors are contiguous and on one device; axes of one name have one length. */
export interface EpScatterArguments {
  /** Received rows. Shape [T, H]; dtype float32, float16, bfloat16, float8_e4m3fn. */
  recvX: TensorLike
  /** Their scales, copied beside them. Shape [T, G]; dtype float32. */
  recvXScale?: TensorLike | undefined
  /** Expert of each slot, local to the rank; -1: not here. Shape [T, K]; dtype int32, int64. */
  recvTopk: TensorLike
  /** Rows reserved for each expert, usually padded to 128. Shape [E]; dtype int32. */
  numRecvTokensPerExpert: TensorLike
  /** Receives each segment's first row. Shape [E]; dtype int32. */
  expertStartLoc: TensorLike
  /** Receives the rows; rows of no slot stay as they are. Shape [M, H]; dtype that of recvX. */
  outputTensor: TensorLike
  /** Receives the scales. Shape [M, G]; dtype float32. */
  outputTensorScale?: TensorLike | undefined
  /** Receives the expert of each reserved row; rows beyond the last segment stay as they are. Shape [M]; dtype int32. */
  mIndices: TensorLike
  /** Receives the row of each slot, -1 where it has none. Shape [T, K]; dtype int32. */
  outputIndex: TensorLike
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let epScatterOp: Op | undefined

/**
 * Places received rows in their experts' segments: segments are as long as numRecvTokensPerExpert says and follow
 * each other; within one, rows are in order of token and slot. Throws EpmoeError; an index out of range inside a
 * tensor is skipped and reported, on the CPU by the call itself and on CUDA by the next synchronize(). Returns
 * expertStartLoc.
 */
export function epScatter<Output extends TensorLike>(args: EpScatterArguments & { expertStartLoc: Output }): Output {
  const op = (epScatterOp ??= new Op('ep_scatter'))
  op.begin(args)
  putEpScatter(op, args)
  op.run(args, args.stream)
  return args.expertStartLoc
}

function putEpScatter(op: Op, args: EpScatterArguments): void {
  op.tensor(0, 'recvX', args.recvX)
  op.tensor(1, 'recvXScale', args.recvXScale)
  op.tensor(2, 'recvTopk', args.recvTopk)
  op.tensor(3, 'numRecvTokensPerExpert', args.numRecvTokensPerExpert)
  op.tensor(4, 'expertStartLoc', args.expertStartLoc)
  op.tensor(5, 'outputTensor', args.outputTensor)
  op.tensor(6, 'outputTensorScale', args.outputTensorScale)
  op.tensor(7, 'mIndices', args.mIndices)
  op.tensor(8, 'outputIndex', args.outputIndex)
}

/** Checks the arguments once, for a call that is made many times. */
epScatter.prepare = (args: EpScatterArguments): PreparedCall => {
  const op = (epScatterOp ??= new Op('ep_scatter'))
  op.beginPrepared(args)
  putEpScatter(op, args)
  return op.prepare(args, args.stream)
}

/** Arguments of geluAndMul. Tensors are contiguous and on one device; axes of one name have one length. */
export interface GeluAndMulArguments {
  /**
   * Rows of the first grouped GEMM: the gate's half, then the up half. Shape [...R, 2*I]; dtype float32, float16,
   * bfloat16.
   */
  gateupOutput: TensorLike
  /** Receives the active rows; float8 saturates at 448. Shape [...R, I]; dtype float8_e4m3fn, that of gateupOutput. */
  downInput: TensorLike
  /**
   * Expert of each row: active when within [startExpertId, endExpertId]; all are when absent. Shape [R]; dtype
   * int32, int64.
   */
  reorderTopkIds?: TensorLike | undefined
  /** Divisor of each local expert. Shape [S]; dtype float32. */
  scales?: TensorLike | undefined
  /** Active rows of each expert, which has R/E of them (DeepGEMM). Shape [E]; dtype int32. */
  maskedM?: TensorLike | undefined
  /** Receives the scales found, one for each 128 columns. Shape [...R, G]; dtype float32. */
  outputScales?: TensorLike | undefined
  /** First local expert. Default 0. */
  startExpertId?: number | bigint | undefined
  /** Last local expert, inclusive. Default 2147483647. */
  endExpertId?: number | bigint | undefined
  /**
   * static: by scales, if any. group: float8 by the largest magnitude of each 128 columns, NaN aside; 448 times the
   * scale is that magnitude, or 1e-10 where it is smaller. Default 'static'.
   */
  quantization?: 'static' | 'group' | undefined
  /** Of the scales found: float32, or powerOfTwo, the next one up. Default 'float32'. */
  scaleFormat?: 'float32' | 'power_of_two' | undefined
  /**
   * fp32: float32 throughout, one final rounding. triton: the original kernel's arithmetic, the activation and each
   * product rounded to the input dtype. Default 'fp32'.
   */
  numerics?: 'fp32' | 'triton' | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let geluAndMulOp: Op | undefined

/**
 * Activates each row: downInput[r] = gelu(gate) * up / scale, gate and up the halves of gateupOutput[r], and gelu in
 * its tanh form. Rows that are not active stay as they are. Throws EpmoeError; an index out of range inside a tensor
 * is skipped and reported, on the CPU by the call itself and on CUDA by the next synchronize(). Returns downInput.
 */
export function geluAndMul<Output extends TensorLike>(args: GeluAndMulArguments & { downInput: Output }): Output {
  const op = (geluAndMulOp ??= new Op('gelu_and_mul'))
  op.begin(args)
  putGeluAndMul(op, args)
  op.run(args, args.stream)
  return args.downInput
}

function putGeluAndMul(op: Op, args: GeluAndMulArguments): void {
  op.tensor(0, 'gateupOutput', args.gateupOutput)
  op.tensor(1, 'downInput', args.downInput)
  op.tensor(2, 'reorderTopkIds', args.reorderTopkIds)
  op.tensor(3, 'scales', args.scales)
  op.tensor(4, 'maskedM', args.maskedM)
  op.tensor(5, 'outputScales', args.outputScales)
  op.integer(6, 'startExpertId', args.startExpertId)
  op.integer(7, 'endExpertId', args.endExpertId)
  op.choice(8, 'quantization', args.quantization, ['static', 'group'])
  op.choice(9, 'scaleFormat', args.scaleFormat, ['float32', 'power_of_two'])
  op.choice(10, 'numerics', args.numerics, ['fp32', 'triton'])
}

/** Checks the arguments once, for a call that is made many times. */
geluAndMul.prepare = (args: GeluAndMulArguments): PreparedCall => {
  const op = (geluAndMulOp ??= new Op('gelu_and_mul'))
  op.beginPrepared(args)
  putGeluAndMul(op, args)
  return op.prepare(args, args.stream)
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
  putMoeSumReduce(op, args)
  op.run(args, args.stream)
  return args.output
}

function putMoeSumReduce(op: Op, args: MoeSumReduceArguments): void {
  op.tensor(0, 'input', args.input)
  op.tensor(1, 'output', args.output)
  op.real(2, 'routedScalingFactor', args.routedScalingFactor)
}

/** Checks the arguments once, for a call that is made many times. */
moeSumReduce.prepare = (args: MoeSumReduceArguments): PreparedCall => {
  const op = (moeSumReduceOp ??= new Op('moe_sum_reduce'))
  op.beginPrepared(args)
  putMoeSumReduce(op, args)
  return op.prepare(args, args.stream)
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
  putPostReorder(op, args)
  op.run(args, args.stream)
  return args.output
}

function putPostReorder(op: Op, args: PostReorderArguments): void {
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
}

/** Checks the arguments once, for a call that is made many times. */
postReorder.prepare = (args: PostReorderArguments): PreparedCall => {
  const op = (postReorderOp ??= new Op('post_reorder'))
  op.beginPrepared(args)
  putPostReorder(op, args)
  return op.prepare(args, args.stream)
}

/** Arguments of preReorder. Tensors are contiguous and on one device; axes of one name have one length. */
export interface PreReorderArguments {
  /**
   * The tokens' rows; float8 rows are copied bit by bit, with their inputScales. Shape [T, H]; dtype float32,
   * float16, bfloat16, float8_e4m3fn.
   */
  input: TensorLike
  /** Receives the rows; float8 saturates at 448. Shape [...R, H]; dtype float8_e4m3fn, that of input. */
  gateupInput: TensorLike
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
  /** Divisors, indexed as scaleAxis says. Shape [S]; dtype float32. */
  a1Scales?: TensorLike | undefined
  /** Scale rows of an already quantised input, copied to outputScales beside the rows. Shape [T, G]; dtype float32. */
  inputScales?: TensorLike | undefined
  /**
   * Receives the scales found, G = 1 a token or one for each 128 columns, or inputScales. Shape [...R, G]; dtype
   * float32.
   */
  outputScales?: TensorLike | undefined
  /** First local expert. Default 0. */
  startExpertId?: number | bigint | undefined
  /** Last local expert, inclusive. Default 2147483647. */
  endExpertId?: number | bigint | undefined
  /** Subtracted from src2dst to give the row. Default 0. */
  dstStart?: number | bigint | undefined
  /** What indexes a1Scales: expert, counted from startExpertId, or token. Default 'expert'. */
  scaleAxis?: 'expert' | 'token' | undefined
  /**
   * static: by a1Scales, if any. token, group: float8 by the largest magnitude of the row or of each 128 columns,
   * NaN aside; 448 times the scale is that magnitude, or 1e-10 where it is smaller. Default 'static'.
   */
  quantization?: 'static' | 'token' | 'group' | undefined
  /** Of the scales found: float32, or powerOfTwo, the next one up. Default 'float32'. */
  scaleFormat?: 'float32' | 'power_of_two' | undefined
  /**
   * fp32: one division in float32, then one rounding. triton: the original's product with an approximate reciprocal.
   * Default 'fp32'.
   */
  numerics?: 'fp32' | 'triton' | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let preReorderOp: Op | undefined

/**
 * Copies each token's row to the rows of its local slots: gateupInput[src2dst[t,k] - dstStart] = input[t], divided
 * by a scale and converted on the way. Slots of experts outside [startExpertId, endExpertId] are skipped; rows of no
 * slot stay as they are. Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the
 * CPU by the call itself and on CUDA by the next synchronize(). Returns gateupInput.
 */
export function preReorder<Output extends TensorLike>(args: PreReorderArguments & { gateupInput: Output }): Output {
  const op = (preReorderOp ??= new Op('pre_reorder'))
  op.begin(args)
  putPreReorder(op, args)
  op.run(args, args.stream)
  return args.gateupInput
}

function putPreReorder(op: Op, args: PreReorderArguments): void {
  op.tensor(0, 'input', args.input)
  op.tensor(1, 'gateupInput', args.gateupInput)
  op.tensor(2, 'src2dst', args.src2dst)
  op.tensor(3, 'topkIds', args.topkIds)
  op.tensor(4, 'a1Scales', args.a1Scales)
  op.tensor(5, 'inputScales', args.inputScales)
  op.tensor(6, 'outputScales', args.outputScales)
  op.integer(7, 'startExpertId', args.startExpertId)
  op.integer(8, 'endExpertId', args.endExpertId)
  op.integer(9, 'dstStart', args.dstStart)
  op.choice(10, 'scaleAxis', args.scaleAxis, ['expert', 'token'])
  op.choice(11, 'quantization', args.quantization, ['static', 'token', 'group'])
  op.choice(12, 'scaleFormat', args.scaleFormat, ['float32', 'power_of_two'])
  op.choice(13, 'numerics', args.numerics, ['fp32', 'triton'])
}

/** Checks the arguments once, for a call that is made many times. */
preReorder.prepare = (args: PreReorderArguments): PreparedCall => {
  const op = (preReorderOp ??= new Op('pre_reorder'))
  op.beginPrepared(args)
  putPreReorder(op, args)
  return op.prepare(args, args.stream)
}

/** Arguments of preprocess. Tensors are contiguous and on one device; axes of one name have one length. */
export interface PreprocessArguments {
  /** Expert of each slot: 0 to E-1, or -1 for none. Shape [T, K]; dtype int32, int64. */
  topkIds: TensorLike
  /** Receives the row of each slot. Shape [T*K] or [T, K]; dtype int32, int64. */
  src2dst: TensorLike
  /** Receives where each expert's rows begin, and the end. Shape [E+1]; dtype int64. */
  segIndptr: TensorLike
  /** Receives the expert of each row. Shape [T*K]; dtype that of topkIds. */
  reorderTopkIds?: TensorLike | undefined
  /** Receives how many slots each expert has. Shape [E]; dtype int32. */
  maskedM?: TensorLike | undefined
  /**
   * 0: rows are packed. Otherwise each expert has mMax rows (DeepGEMM): src2dst is expert * mMax + its place in the
   * expert, and -1 for slots without an expert. Default 0.
   */
  mMax?: number | bigint | undefined
  /**
   * counted: slots of -1 come first and count as rows before expert 0's, within its segment (runMoeEpPreproess).
   * dropped: rows begin with expert 0; slots of -1 get negative rows, and reorderTopkIds ends with their -1
   * (DeepEP). Default 'counted'.
   */
  negatives?: 'counted' | 'dropped' | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let preprocessOp: Op | undefined

/**
 * Orders slots by expert, stably and without a sort: src2dst[i] is the row of slot i when rows are grouped by
 * expert, then by slot, and segIndptr[e] to segIndptr[e+1] are the rows of expert e. Runs without waiting for the
 * device. Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the CPU by the call
 * itself and on CUDA by the next synchronize(). Returns src2dst.
 */
export function preprocess<Output extends TensorLike>(args: PreprocessArguments & { src2dst: Output }): Output {
  const op = (preprocessOp ??= new Op('preprocess'))
  op.begin(args)
  putPreprocess(op, args)
  op.run(args, args.stream)
  return args.src2dst
}

function putPreprocess(op: Op, args: PreprocessArguments): void {
  op.tensor(0, 'topkIds', args.topkIds)
  op.tensor(1, 'src2dst', args.src2dst)
  op.tensor(2, 'segIndptr', args.segIndptr)
  op.tensor(3, 'reorderTopkIds', args.reorderTopkIds)
  op.tensor(4, 'maskedM', args.maskedM)
  op.integer(5, 'mMax', args.mMax)
  op.choice(6, 'negatives', args.negatives, ['counted', 'dropped'])
}

/** Checks the arguments once, for a call that is made many times. */
preprocess.prepare = (args: PreprocessArguments): PreparedCall => {
  const op = (preprocessOp ??= new Op('preprocess'))
  op.beginPrepared(args)
  putPreprocess(op, args)
  return op.prepare(args, args.stream)
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
  putShuffleMulSum(op, args)
  op.run(args, args.stream)
  return args.output
}

function putShuffleMulSum(op: Op, args: ShuffleMulSumArguments): void {
  op.tensor(0, 'input', args.input)
  op.tensor(1, 'output', args.output)
  op.tensor(2, 'permutation', args.permutation)
  op.tensor(3, 'factors', args.factors)
}

/** Checks the arguments once, for a call that is made many times. */
shuffleMulSum.prepare = (args: ShuffleMulSumArguments): PreparedCall => {
  const op = (shuffleMulSumOp ??= new Op('shuffle_mul_sum'))
  op.beginPrepared(args)
  putShuffleMulSum(op, args)
  return op.prepare(args, args.stream)
}

/** Arguments of siluAndMul. Tensors are contiguous and on one device; axes of one name have one length. */
export interface SiluAndMulArguments {
  /**
   * Rows of the first grouped GEMM: the gate's half, then the up half. Shape [...R, 2*I]; dtype float32, float16,
   * bfloat16.
   */
  gateupOutput: TensorLike
  /** Receives the active rows; float8 saturates at 448. Shape [...R, I]; dtype float8_e4m3fn, that of gateupOutput. */
  downInput: TensorLike
  /**
   * Expert of each row: active when within [startExpertId, endExpertId]; all are when absent. Shape [R]; dtype
   * int32, int64.
   */
  reorderTopkIds?: TensorLike | undefined
  /** Divisor of each local expert. Shape [S]; dtype float32. */
  scales?: TensorLike | undefined
  /** Active rows of each expert, which has R/E of them (DeepGEMM). Shape [E]; dtype int32. */
  maskedM?: TensorLike | undefined
  /** Receives the scales found, one for each 128 columns. Shape [...R, G]; dtype float32. */
  outputScales?: TensorLike | undefined
  /** First local expert. Default 0. */
  startExpertId?: number | bigint | undefined
  /** Last local expert, inclusive. Default 2147483647. */
  endExpertId?: number | bigint | undefined
  /**
   * static: by scales, if any. group: float8 by the largest magnitude of each 128 columns, NaN aside; 448 times the
   * scale is that magnitude, or 1e-10 where it is smaller. Default 'static'.
   */
  quantization?: 'static' | 'group' | undefined
  /** Of the scales found: float32, or powerOfTwo, the next one up. Default 'float32'. */
  scaleFormat?: 'float32' | 'power_of_two' | undefined
  /**
   * fp32: float32 throughout, one final rounding. triton: the original kernel's arithmetic, the activation and each
   * product rounded to the input dtype. Default 'fp32'.
   */
  numerics?: 'fp32' | 'triton' | undefined
  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */
  stream?: Stream | undefined
}

let siluAndMulOp: Op | undefined

/**
 * Activates each row: downInput[r] = silu(gate) * up / scale, gate and up the halves of gateupOutput[r], and silu(x)
 * = x / (1 + exp(-x)). Rows that are not active stay as they are. Throws EpmoeError; an index out of range inside a
 * tensor is skipped and reported, on the CPU by the call itself and on CUDA by the next synchronize(). Returns
 * downInput.
 */
export function siluAndMul<Output extends TensorLike>(args: SiluAndMulArguments & { downInput: Output }): Output {
  const op = (siluAndMulOp ??= new Op('silu_and_mul'))
  op.begin(args)
  putSiluAndMul(op, args)
  op.run(args, args.stream)
  return args.downInput
}

function putSiluAndMul(op: Op, args: SiluAndMulArguments): void {
  op.tensor(0, 'gateupOutput', args.gateupOutput)
  op.tensor(1, 'downInput', args.downInput)
  op.tensor(2, 'reorderTopkIds', args.reorderTopkIds)
  op.tensor(3, 'scales', args.scales)
  op.tensor(4, 'maskedM', args.maskedM)
  op.tensor(5, 'outputScales', args.outputScales)
  op.integer(6, 'startExpertId', args.startExpertId)
  op.integer(7, 'endExpertId', args.endExpertId)
  op.choice(8, 'quantization', args.quantization, ['static', 'group'])
  op.choice(9, 'scaleFormat', args.scaleFormat, ['float32', 'power_of_two'])
  op.choice(10, 'numerics', args.numerics, ['fp32', 'triton'])
}

/** Checks the arguments once, for a call that is made many times. */
siluAndMul.prepare = (args: SiluAndMulArguments): PreparedCall => {
  const op = (siluAndMulOp ??= new Op('silu_and_mul'))
  op.beginPrepared(args)
  putSiluAndMul(op, args)
  return op.prepare(args, args.stream)
}
