import { describeValue, EpmoeError } from '../errors.js'
import type { MoeForwardArguments } from '../moe/arguments.js'
import { type Axes, oneOf, onlyKnown } from '../moe/check.js'
import { layerAxes, type MoeLayer, type MoeLayerOptions, moeLayer, mostSegments } from '../moe-layer.js'
import type { PyRef } from '../python/ref.js'
import { AllReduce } from './all-reduce.js'
import { AllToAll } from './all-to-all.js'
import { inOwnTerms, RankGroup } from './group.js'
import type { Plan, Scheme } from './scheme.js'

/** What a rank brings. Weights are those of its own experts; the ranks' experts follow each other in their order. */
export interface ExpertParallelOptions extends Omit<MoeLayerOptions, 'startExpertId'> {
  /** Who shares the experts, from joinRanks(). */
  group: RankGroup
  /**
   * `all-reduce`: every rank calls with the same tokens, and every rank gets their outputs. `all-to-all`: every rank
   * calls with tokens of its own, as many as it has, none included, and gets theirs.
   */
  scheme: 'all-reduce' | 'all-to-all'
  /**
   * Parts that the tokens of a call are cut into, so that one is under way while another is computed. The same on every
   * rank. Default 1: more pay where a part's communication takes longer than starting its kernels does.
   */
  chunks?: number | undefined
  /**
   * Of all-reduce: `each-call` makes sure that the ranks' calls fit each other, for which the host waits; `none` takes
   * the caller's word, so that on CUDA nothing waits. all-to-all always agrees. Default `each-call`.
   */
  agreement?: 'each-call' | 'none' | undefined
  /**
   * Of all-reduce: what the ranks' outputs are summed in. `activations` halves the bytes of 16-bit layers and rounds
   * with every rank that is added. Default `float32`.
   */
  reduceIn?: 'float32' | 'activations' | undefined
}

/**
 * A mixture-of-experts layer whose experts are on several ranks; every rank makes it, and calls it equally often. The
 * ranks compare what they bring: ERR_RANKS_DISAGREE names what differs, on every rank.
 */
export function expertParallel(options: ExpertParallelOptions): ExpertParallelLayer {
  return new ExpertParallelLayer(options)
}

export class ExpertParallelLayer implements Disposable {
  /** Experts in the model, on all ranks. */
  readonly numExperts: number
  /** The model's id of this rank's first expert. */
  readonly startExpertId: number
  readonly #group: RankGroup
  /** Its number in the group, by which ranks know that they are in the same layer. */
  readonly #number: number
  readonly #agreement: ExpertParallelOptions['agreement']
  readonly #layer: MoeLayer
  readonly #scheme: Scheme & { dispose?(): void }
  #disposed = false

  /** Made by expertParallel(). */
  constructor(options: ExpertParallelOptions) {
    const { group, scheme, chunks = 1, agreement, reduceIn, numExperts, ...weights } = options ?? {}
    if (!(group instanceof RankGroup)) throw wrong('group', 'the group that joinRanks() gave', group)
    const brought = inAgreement(group, () => {
      onlyKnown(options, optionNames, 'expertParallel')
      if (!['all-reduce', 'all-to-all'].includes(scheme)) throw wrong('scheme', "'all-reduce' or 'all-to-all'", scheme)
      oneOf('agreement', agreement, ['each-call', 'none'], 'expertParallel')
      oneOf('reduceIn', reduceIn, ['float32', 'activations'], 'expertParallel')
      const most = Math.min(64, Math.floor(mostSegments / group.size))
      if (!Number.isSafeInteger(chunks) || chunks < 1 || chunks > most) throw wrong('chunks', `1 to ${most}`, chunks)
      const axes = layerAxes(weights)
      if (group.backend === 'nccl' && axes.device !== group.device) {
        throw wrong('w13', `a tensor on ${group.device}, the rank's own GPU`, axes.device, 'ERR_DEVICE')
      }
      return broughtBy(options, axes)
    })
    const starts = [0]
    for (const { experts } of brought) starts.push(starts.at(-1)! + experts)
    this.numExperts = starts.at(-1)!
    this.startExpertId = starts[group.rank]!
    if (numExperts !== undefined && numExperts !== this.numExperts) {
      const parts = brought.map(({ experts }, rank) => `rank ${rank} has ${experts}`).join(', ')
      throw wrong('numExperts', `${this.numExperts}, which the ranks hold (${parts})`, numExperts)
    }
    this.#group = group
    this.#number = ++group.layers
    this.#agreement = agreement
    const own = { number: this.#number, chunks, numExperts: this.numExperts }
    try {
      if (scheme === 'all-reduce') {
        this.#layer = moeLayer({ ...weights, startExpertId: this.startExpertId, numExperts: this.numExperts })
        this.#scheme = new AllReduce(group, this.#layer, { ...own, agreement, reduceIn })
      } else {
        // The factor is applied once, to the sum of what the ranks send back.
        this.#layer = moeLayer({ ...weights, routedScalingFactor: undefined })
        this.#scheme = new AllToAll(group, this.#layer, { ...own, starts, options: weights })
      }
    } catch (error) {
      fail(group, error)
      throw error
    }
  }

  /**
   * The same as MoeLayer.forward(), over all ranks. `sharedOutput` and `residual` are added once, by all-reduce those of
   * rank 0.
   *
   * A call that one rank cannot make is refused on all (ERR_RANK_REFUSED), and the next may follow; with `agreement:
   * 'none'` it ends the group. So does a rank that is dead, or does not come within the group's timeout: ERR_RANK_LOST
   * and ERR_RANK_LATE name it. On CUDA, where the host need not wait for the end of a call, the process is ended with
   * that message instead of hanging.
   */
  forward(args: MoeForwardArguments): PyRef {
    return inOwnTerms(() => {
      const ranks = this.#group.python
      ranks.method('enter').dispose()
      try {
        return this.#run(args)
      } finally {
        ranks.method('leave').dispose()
      }
    })
  }

  /** Lets go of what the layer made; weights and group stay the caller's. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    this.#scheme.dispose?.()
    this.#layer.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #run(args: MoeForwardArguments): PyRef {
    let plan: Plan
    try {
      if (this.#disposed) throw disposed()
      plan = this.#scheme.plan(args)
    } catch (error) {
      this.#refuse(error)
      throw error
    }
    try {
      this.#agree(() => plan.agree())
      return this.#compute(plan)
    } finally {
      plan.dispose?.()
    }
  }

  /** In place of a plan's agree(). The caller gets the error itself, whatever telling the others leads to. */
  #refuse(error: unknown): void {
    try {
      if (this.#agreement === 'none') fail(this.#group, error)
      else this.#agree(() => this.#group.python.method('decline', this.#number, messageOf(error)).dispose())
    } catch {}
  }

  /** If it does not lead to the same on all ranks, they are out of step. */
  #agree(work: () => void): void {
    try {
      inOwnTerms(work)
    } catch (error) {
      const alike = error instanceof EpmoeError && onEveryRank.includes(error.code)
      if (!alike) fail(this.#group, error)
      throw error
    }
  }

  /** From here on the others count on this rank. */
  #compute(plan: Plan): PyRef {
    try {
      return plan.compute()
    } catch (error) {
      fail(this.#group, error)
      throw error
    }
  }
}

const onEveryRank = ['ERR_RANK_REFUSED', 'ERR_RANKS_DISAGREE']

/** Ends the group, unless it has ended already: this rank cannot do what the others count on. */
function fail(group: RankGroup, error: unknown): void {
  group.python.method('fail', messageOf(error)).dispose()
}

/** What has to be the same on every rank, by option and in words, and what need not. */
interface Brought {
  experts: number
  same: [argument: string, what: string, value: string | number][]
}

function broughtBy(options: ExpertParallelOptions, axes: Axes): Brought {
  const { scheme, chunks = 1, agreement = 'each-call', reduceIn = 'float32', numExperts = 'none said' } = options
  const { activation = 'silu', numerics = 'fp32', routedScalingFactor = 1, w13Bias, w2Bias } = options
  return {
    experts: axes.size('E'),
    same: [
      ['w13', 'hidden size', axes.size('H')],
      ['w13', 'dtype', axes.dtype],
      ['w13Bias', 'bias', w13Bias === undefined ? 'none' : 'one'],
      ['w2Bias', 'bias', w2Bias === undefined ? 'none' : 'one'],
      ['scheme', 'scheme', scheme],
      ['chunks', 'number of chunks', chunks],
      ['agreement', 'agreement', agreement],
      ['reduceIn', 'reduceIn', reduceIn],
      ['numExperts', 'number of experts', numExperts],
      ['activation', 'activation', typeof activation === 'string' ? activation : 'a function'],
      ['numerics', 'numerics', numerics],
      ['routedScalingFactor', 'factor', routedScalingFactor],
    ],
  }
}

/** What every rank brings, compared; a rank whose own options are wrong tells the others so. */
function inAgreement(group: RankGroup, check: () => Brought): Brought[] {
  let own: Brought | { error: string }
  let failure: unknown
  try {
    own = check()
  } catch (error) {
    failure = error
    own = { error: messageOf(error) }
  }
  const all = group.gather('a layer', own)
  if (failure !== undefined) throw failure
  const failed = all.flatMap((each, rank) => ('error' in each ? [`rank ${rank}: ${each.error}`] : []))
  if (failed.length > 0) {
    throw new EpmoeError({
      code: 'ERR_RANK_REFUSED',
      op: 'expertParallel',
      expected: 'options that are right on every rank',
      received: failed.join('; '),
    })
  }
  const brought = all as Brought[]
  for (const [i, [argument, what]] of brought[0]!.same.entries()) {
    const values = brought.map(({ same }) => same[i]![2])
    if (new Set(values).size === 1) continue
    throw new EpmoeError({
      code: 'ERR_RANKS_DISAGREE',
      op: 'expertParallel',
      argument,
      expected: `the same ${what} on every rank`,
      received: values.map((value, rank) => `rank ${rank} has ${value}`).join(', '),
      hint: 'Every rank makes the layer with the same options and its own experts',
    })
  }
  return brought
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

function disposed(): EpmoeError {
  return new EpmoeError({
    code: 'ERR_DISPOSED',
    op: 'expertParallel',
    expected: 'a live layer',
    received: 'one that was disposed',
    hint: 'Keep it until its last use, on every rank',
  })
}

function wrong(argument: string, expected: string, value: unknown, code = 'ERR_VALUE'): EpmoeError {
  return new EpmoeError({ code, op: 'expertParallel', argument, expected, received: describeValue(value) })
}

const optionNames = [
  'w13',
  'w2',
  'w13Bias',
  'w2Bias',
  'numExperts',
  'activation',
  'routedScalingFactor',
  'numerics',
  'cudaGraphTokens',
  'group',
  'scheme',
  'chunks',
  'agreement',
  'reduceIn',
] satisfies (keyof ExpertParallelOptions)[]
