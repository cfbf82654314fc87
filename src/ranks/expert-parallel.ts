import { describeValue, EpmoeError } from '../errors.js'
import type { MoeForwardArguments } from '../moe/arguments.js'
import { oneOf, onlyKnown } from '../moe/check.js'
import { type MoeLayer, type MoeLayerOptions, moeLayer, weightAxes } from '../moe-layer.js'
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
  readonly #layer: MoeLayer
  readonly #scheme: Scheme & { dispose?(): void }

  /** Made by expertParallel(). */
  constructor(options: ExpertParallelOptions) {
    onlyKnown(options, optionNames, 'expertParallel')
    const { group, scheme, chunks = 1, agreement, reduceIn, numExperts, ...weights } = options
    if (!(group instanceof RankGroup)) throw wrong('group', 'the group that joinRanks() gave', group)
    const brought = inAgreement(group, () => {
      if (!['all-reduce', 'all-to-all'].includes(scheme)) throw wrong('scheme', "'all-reduce' or 'all-to-all'", scheme)
      oneOf('agreement', agreement, ['each-call', 'none'], 'expertParallel')
      oneOf('reduceIn', reduceIn, ['float32', 'activations'], 'expertParallel')
      if (!Number.isSafeInteger(chunks) || chunks < 1 || chunks > 64) throw wrong('chunks', '1 to 64', chunks)
      const axes = weightAxes(weights)
      if (axes.size('E') === 0) throw wrong('w13', 'at least one expert on every rank', 0)
      const [hidden, experts] = [axes.size('H'), axes.size('E')]
      return { hidden, experts, dtype: axes.dtype, scheme, chunks, agreement, reduceIn, numExperts }
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
    if (scheme === 'all-reduce') {
      this.#layer = moeLayer({ ...weights, startExpertId: this.startExpertId, numExperts: this.numExperts })
      this.#scheme = new AllReduce(group, this.#layer, {
        chunks,
        numExperts: this.numExperts,
        agreement,
        reduceIn,
      })
    } else {
      // The factor is applied once, to the sum of what the ranks send back.
      this.#layer = moeLayer({ ...weights, routedScalingFactor: undefined })
      this.#scheme = new AllToAll(group, this.#layer, chunks, starts, weights)
    }
  }

  /**
   * The same as MoeLayer.forward(), over all ranks. `sharedOutput` and `residual` are added once, by all-reduce those of
   * rank 0.
   *
   * A call that one rank cannot make is refused on all (ERR_RANK_REFUSED), and the next may follow. A rank that is dead,
   * or does not come within the group's timeout, ends it for good: ERR_RANK_LOST and ERR_RANK_LATE name it. On CUDA,
   * where the host need not wait for the end of a call, the process is ended with that message instead of hanging.
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
    this.#scheme.dispose?.()
    this.#layer.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #run(args: MoeForwardArguments): PyRef {
    let plan: Plan
    try {
      plan = this.#scheme.plan(args)
    } catch (error) {
      refuse(this.#scheme, error)
      throw error
    }
    try {
      plan.agree()
      return this.#compute(plan)
    } finally {
      plan.dispose?.()
    }
  }

  /** From here on the others count on this rank. */
  #compute(plan: Plan): PyRef {
    try {
      return plan.compute()
    } catch (error) {
      this.#group.python.method('fail', messageOf(error)).dispose()
      throw error
    }
  }
}

/** The caller gets the error itself, whatever telling the others leads to. */
function refuse(scheme: Scheme, error: unknown): void {
  try {
    scheme.refuse(messageOf(error))
  } catch {}
}

interface Brought {
  hidden: number
  experts: number
  dtype: string
  scheme: string
  chunks: number
  agreement: string | undefined
  reduceIn: string | undefined
  numExperts: number | undefined
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
  const all = group.gather(own)
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
  same(brought, 'w13', 'hidden size', ({ hidden }) => hidden)
  same(brought, 'w13', 'dtype', ({ dtype }) => dtype)
  same(brought, 'scheme', 'scheme', ({ scheme }) => scheme)
  same(brought, 'chunks', 'number of chunks', ({ chunks }) => chunks)
  same(brought, 'agreement', 'agreement', ({ agreement }) => agreement ?? 'each-call')
  same(brought, 'reduceIn', 'reduceIn', ({ reduceIn }) => reduceIn ?? 'float32')
  same(brought, 'numExperts', 'number of experts', ({ numExperts }) => numExperts ?? 'none said')
  return brought
}

function same(all: Brought[], argument: string, what: string, of: (each: Brought) => unknown): void {
  if (new Set(all.map(of)).size === 1) return
  throw new EpmoeError({
    code: 'ERR_RANKS_DISAGREE',
    op: 'expertParallel',
    argument,
    expected: `the same ${what} on every rank`,
    received: all.map((each, rank) => `rank ${rank} has ${String(of(each))}`).join(', '),
    hint: 'Every rank makes the layer with the same options and its own experts',
  })
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

function wrong(argument: string, expected: string, value: unknown): EpmoeError {
  const received = describeValue(value)
  return new EpmoeError({ code: 'ERR_VALUE', op: 'expertParallel', argument, expected, received })
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
