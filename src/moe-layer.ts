import { describeValue, EpmoeError } from './errors.js'
import { geluAndMul, postReorder, preprocess, preReorder, siluAndMul } from './generated/ops.js'
import type { MoeForwardArguments } from './moe/arguments.js'
import { Axes, oneOf, onlyKnown } from './moe/check.js'
import { LayerGraphs } from './moe/graphs.js'
import { kw } from './python/encode.js'
import type { PyRef } from './python/ref.js'
import { startPython } from './python/start.js'

/** Turns the first GEMM's rows [R, N] into the second's [R, I]: a torch function, or a JavaScript one that calls torch. */
export type MoeActivation = 'silu' | 'gelu' | 'swigluoai' | PyRef | ((gateUp: PyRef) => PyRef)

/** What a layer is made of. Tensors are torch's, of one dtype and on one device; they are kept, not copied. */
export interface MoeLayerOptions {
  /** Gate and up projection of the local experts, gate first. Shape [E, 2I, H]; any strides. */
  w13: PyRef
  /** Down projection of the local experts. Shape [E, H, I]; any strides. */
  w2: PyRef
  /** Shape [E, 2I]. */
  w13Bias?: PyRef | undefined
  /** Shape [E, H]. */
  w2Bias?: PyRef | undefined
  /** The model's id of the first local expert. Default 0. */
  startExpertId?: number | undefined
  /** Experts in the model, on all ranks. Default: those up to the last local one. */
  numExperts?: number | undefined
  /** `swigluoai` is gpt-oss's: gate and up interleaved in w13, clamped. Default `silu`. */
  activation?: MoeActivation | undefined
  /** Multiplies the experts' sum; the shared output and the residual stay as they are. Default 1. */
  routedScalingFactor?: number | undefined
  /** As the ops take it: `fp32` (default), or `triton` for the original kernels' roundings. */
  numerics?: 'fp32' | 'triton' | undefined
  /**
   * On CUDA, calls of at most so many tokens are captured in a CUDA graph the first time, which takes some milliseconds,
   * and replayed from then on: a copy of the arguments and a launch instead of a dozen launches. Numbers of tokens up to
   * the next power of two share a graph. An `activation` that is a function is called while capturing only. Where matrix
   * products have to wait (see MoeLayer.waits) and on the CPU nothing is captured. Default 0: nothing.
   */
  cudaGraphTokens?: number | undefined
}

/**
 * The experts of a mixture-of-experts layer on one rank: router output in, layer output out. Inference only.
 *
 * The work is preprocess, preReorder, a grouped GEMM by torch, the activation, another GEMM, postReorder, all on torch's
 * current stream and without waiting for it, so that on CUDA a bfloat16 layer can be captured in a graph
 * (python/epmoe/moe.py says when a GEMM does have to wait). The ranks' outputs add up to the model's. Between calls
 * nothing is kept but the weights and a table of expert ids.
 */
export function moeLayer(options: MoeLayerOptions): MoeLayer {
  return new MoeLayer(options)
}

export class MoeLayer implements Disposable {
  /** Whether matrix products make their caller wait: on CUDA all but those of bfloat16 (python/epmoe/moe.py). */
  readonly waits: boolean
  /** @internal What has been captured; Python may replay it by itself. */
  readonly graphs: LayerGraphs | undefined
  readonly #options: MoeLayerOptions
  /** E, H, I and the first GEMM's width N, with the weights' dtype and device. */
  readonly #axes: Axes
  readonly #groupedGemm: PyRef
  readonly #endsOf: PyRef
  readonly #localIds: PyRef
  /** Maps the model's ids to the rank's; absent when they are the same. */
  readonly #table: PyRef | undefined
  readonly #activation: PyRef | ((gateUp: PyRef) => PyRef) | undefined
  readonly #int32: PyRef
  readonly #int64: PyRef

  /** Made by moeLayer(). */
  constructor(options: MoeLayerOptions) {
    onlyKnown(options, optionNames)
    this.#options = { ...options } // as they have been checked, whatever becomes of the caller's
    this.#axes = layerAxes(options)
    const python = startPython()
    using module = python.import('epmoe.moe')
    using torch = python.import('torch')
    this.#groupedGemm = module.get('grouped_gemm')
    this.#endsOf = module.get('ends_of')
    this.#localIds = module.get('local_ids')
    this.#int32 = torch.get('int32')
    this.#int64 = torch.get('int64')
    using waits = module.method('waits', options.w13, options.w2)
    this.waits = waits.toJS() as boolean
    const { activation, cudaGraphTokens = 0 } = options
    if (activation === 'swigluoai') this.#activation = module.get('swiglu_oai')
    else if (typeof activation !== 'string') this.#activation = activation
    const local = this.#axes.size('E')
    const { start, total } = expertRange(options, local)
    if (start > 0 || total > local) {
      using device = options.w13.get('device')
      this.#table = module.method('expert_table', start, local, total, device)
    }
    if (cudaGraphTokens > 0 && !this.waits) {
      const { w13, w2, w13Bias, w2Bias } = options
      this.graphs = new LayerGraphs(cudaGraphTokens, [w13, w2, w13Bias, w2Bias, this.#table])
    }
  }

  /** Returns output, or the tensor allocated for it. */
  forward(args: MoeForwardArguments): PyRef {
    const axes = this.check(args)
    return this.#replayed(args) ?? this.#launched(args, axes)
  }

  /**
   * The same with the matrix products on Python's executor thread, where they may wait: for torch on the CPU, or for the
   * GPU in other dtypes than bfloat16. The event loop goes on meanwhile; the arguments must stay as they are until then.
   */
  async forwardAsync(args: MoeForwardArguments): Promise<PyRef> {
    const axes = this.check(args)
    const replayed = this.#replayed(args)
    if (replayed !== undefined) return replayed
    const steps = this.#steps(args, axes)
    let step = steps.next()
    while (!step.done) {
      const product: Promise<PyRef> = this.#groupedGemm.callAsync(...step.value)
      step = await product.then(
        (result) => steps.next(result),
        (error: unknown) => steps.throw(error),
      )
    }
    return step.value
  }

  /**
   * The same for who computes the matrix products: yields the arguments of epmoe.moe.grouped_gemm (python/epmoe/moe.py) for
   * each, is given its result, which it disposes, and returns the output.
   */
  *steps(args: MoeForwardArguments): Generator<unknown[], PyRef, PyRef> {
    return yield* this.#steps(args, this.check(args))
  }

  *#steps(args: MoeForwardArguments, axes: Axes): Generator<unknown[], PyRef, PyRef> {
    const { hiddenStates, topkIds, topkWeights, sharedOutput, residual } = args
    const output = args.output ?? hiddenStates.method('new_empty', [axes.size('T'), axes.size('H')])
    const slots = axes.size('T') * axes.size('K')
    using ids = this.#table === undefined ? undefined : this.#localIds.call(topkIds, this.#table)
    using src2dst = hiddenStates.method('new_empty', [slots], kw({ dtype: this.#int32 }))
    using segIndptr = hiddenStates.method('new_empty', [axes.size('E') + 1], kw({ dtype: this.#int64 }))
    using reorderTopkIds = (ids ?? topkIds).method('new_empty', [slots])
    preprocess({ topkIds: ids ?? topkIds, src2dst, segIndptr, reorderTopkIds, negatives: 'dropped' })

    // A slot of another rank has a negative src2dst: it has no row, and the rows behind the last segment stay as they are.
    using gateupInput = hiddenStates.method('new_empty', [slots, axes.size('H')])
    preReorder({ input: hiddenStates, gateupInput, src2dst })
    const { w13, w13Bias, w2, w2Bias, routedScalingFactor, numerics } = this.#options
    using ends = this.#endsOf.call(segIndptr)
    using gateupOutput = yield [gateupInput, w13, ends, w13Bias]
    using downInput = this.#activate(gateupOutput, reorderTopkIds, slots)
    using downOutput = yield [downInput, w2, ends, w2Bias]
    postReorder({ downOutput, output, src2dst, topkWeights, sharedOutput, residual, routedScalingFactor, numerics })
    return output
  }

  /** Lets go of what the layer made; the weights stay the caller's. */
  dispose(): void {
    this.graphs?.dispose()
    const own = [this.#groupedGemm, this.#endsOf, this.#localIds, this.#table, this.#int32, this.#int64]
    for (const ref of own) ref?.dispose()
    if (this.#options.activation === 'swigluoai') (this.#activation as PyRef).dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #replayed(args: MoeForwardArguments): PyRef | undefined {
    return this.graphs?.forward(args, (given) => this.#launched(given, this.check(given)))
  }

  #launched(args: MoeForwardArguments, axes: Axes): PyRef {
    const steps = this.#steps(args, axes)
    let step = steps.next()
    while (!step.done) step = steps.next(this.#groupedGemm.call(...step.value))
    return step.value
  }

  #activate(gateupOutput: PyRef, reorderTopkIds: PyRef, slots: number): PyRef {
    const activation = this.#activation
    if (typeof activation === 'function') return activation(gateupOutput)
    if (activation !== undefined) return activation.call(gateupOutput)
    const downInput = gateupOutput.method('new_empty', [slots, this.#axes.size('I')])
    const op = this.#options.activation === 'gelu' ? geluAndMul : siluAndMul
    return op({ gateupOutput, downInput, reorderTopkIds, numerics: this.#options.numerics })
  }

  /** @internal Throws for arguments that forward() would refuse; returns the lengths of their axes. */
  check(args: MoeForwardArguments): Axes {
    onlyKnown(args, argumentNames)
    const axes = this.#axes.copy()
    axes.check('hiddenStates', args.hiddenStates, ['T', 'H'], { plain: true })
    axes.check('topkIds', args.topkIds, ['T', 'K'], { dtypes: ['int32', 'int64'], plain: true })
    if (axes.size('K') === 0)
      throw wrong('ERR_SHAPE', 'topkIds', '[T, K] with K of 1 or more', `[${axes.size('T')}, 0]`)
    axes.check('topkWeights', args.topkWeights, ['T', 'K'], { dtypes: ['float32', axes.dtype], plain: true })
    for (const name of ['sharedOutput', 'residual', 'output'] as const) {
      if (args[name] !== undefined) axes.check(name, args[name], ['T', 'H'], { plain: true })
    }
    return axes
  }
}

/** Checks what a layer is made of, where its experts stand in the model aside; returns the lengths of the weights' axes. */
export function layerAxes(options: MoeLayerOptions): Axes {
  const { activation = 'silu', cudaGraphTokens = 0, routedScalingFactor = 1 } = options
  oneOf('activation', activation, ['silu', 'gelu', 'swigluoai'])
  oneOf('numerics', options.numerics, ['fp32', 'triton'])
  if (!Number.isSafeInteger(cudaGraphTokens) || cudaGraphTokens < 0) {
    throw wrong('ERR_VALUE', 'cudaGraphTokens', 'a number of tokens, 0 for no graphs', describeValue(cudaGraphTokens))
  }
  if (typeof routedScalingFactor !== 'number' || !Number.isFinite(Math.fround(routedScalingFactor))) {
    throw wrong('ERR_VALUE', 'routedScalingFactor', 'a number that float32 holds', describeValue(routedScalingFactor))
  }
  const axes = new Axes('moeLayer')
  axes.check('w13', options.w13, ['E', 'N', 'H'], { dtypes: ['float32', 'float16', 'bfloat16'] })
  axes.check('w2', options.w2, ['E', 'H', 'I'])
  if (options.w13Bias !== undefined) axes.check('w13Bias', options.w13Bias, ['E', 'N'])
  if (options.w2Bias !== undefined) axes.check('w2Bias', options.w2Bias, ['E', 'H'])
  const [experts, width, half] = [axes.size('E'), axes.size('N'), axes.size('I')]
  if (experts < 1 || experts > mostSegments)
    throw wrong('ERR_SHAPE', 'w13', `1 to ${mostSegments} experts`, `${experts}`)
  if (typeof activation !== 'string' || width === 2 * half) return axes
  throw wrong(
    'ERR_SHAPE',
    'w13',
    `[E, 2I, H] with 2I = ${2 * half}, for w2 has I = ${half}`,
    `2I = ${width}`,
    'w13 holds gate and up projection, one after the other',
  )
}

/** Which of the model's experts are local. */
function expertRange(options: MoeLayerOptions, local: number): { start: number; total: number } {
  const start = options.startExpertId ?? 0
  const total = options.numExperts ?? start + local
  if (Number.isSafeInteger(start) && start >= 0 && Number.isSafeInteger(total) && start + local <= total) {
    return { start, total }
  }
  throw wrong(
    'ERR_VALUE',
    Number.isSafeInteger(start) && start >= 0 ? 'numExperts' : 'startExpertId',
    `${local} experts, which w13 holds, from startExpertId on within numExperts`,
    `startExpertId ${start}, numExperts ${total}`,
    'Both are counted in the model, not on the rank',
  )
}

function wrong(code: string, argument: string, expected: string, received: string, hint = ''): EpmoeError {
  return new EpmoeError({ code, op: 'moeLayer', argument, expected, received, hint })
}

/** What preprocess can order by. */
export const mostSegments = 1024

const optionNames = [
  'w13',
  'w2',
  'w13Bias',
  'w2Bias',
  'startExpertId',
  'numExperts',
  'activation',
  'routedScalingFactor',
  'numerics',
  'cudaGraphTokens',
] satisfies (keyof MoeLayerOptions)[]

const argumentNames = [
  'hiddenStates',
  'topkIds',
  'topkWeights',
  'sharedOutput',
  'residual',
  'output',
] satisfies (keyof MoeForwardArguments)[]
