import { postReorder, preprocess, preReorder } from '../generated/ops.js'
import type { MoeForwardArguments } from '../moe/arguments.js'
import type { Axes } from '../moe/check.js'
import type { MoeLayer, MoeLayerOptions } from '../moe-layer.js'
import { kw } from '../python/encode.js'
import type { PyRef } from '../python/ref.js'
import { startPython } from '../python/start.js'
import type { RankGroup } from './group.js'
import { checkIds, type Plan, type Scheme } from './scheme.js'

export interface AllToAllOptions {
  /** The layer's number in the group. */
  number: number
  chunks: number
  /** The ranks' first experts, and the number of all. */
  starts: number[]
  /** Of the layer. */
  options: MoeLayerOptions
}

/**
 * Every rank has tokens of its own and sends them to the ranks of their experts; these send back weighted sums. One
 * chunk of tokens is under way while the experts work on another. python/epmoe/dispatch.py says what travels.
 */
export class AllToAll implements Scheme {
  readonly #group: RankGroup
  readonly #layer: MoeLayer
  readonly #chunks: number
  readonly #numExperts: number
  readonly #factor: number | undefined
  readonly #route: PyRef
  readonly #int32: PyRef
  readonly #int64: PyRef

  /** The layer's experts are counted from 0. */
  constructor(group: RankGroup, layer: MoeLayer, { number, chunks, starts, options }: AllToAllOptions) {
    this.#group = group
    this.#layer = layer
    this.#chunks = chunks
    this.#numExperts = starts.at(-1)!
    this.#factor = options.routedScalingFactor
    const python = startPython()
    using module = python.import('epmoe.dispatch')
    using torch = python.import('torch')
    using device = options.w13.get('device')
    this.#route = module.method('Route', group.python, number, starts, chunks, device)
    this.#int32 = torch.get('int32')
    this.#int64 = torch.get('int64')
  }

  plan(args: MoeForwardArguments): Plan {
    const axes = this.#layer.check(args)
    checkIds(args, axes, this.#numExperts)
    const { topkIds, topkWeights, hiddenStates } = args
    const exchange = this.#route.method('exchange', topkIds, topkWeights)
    // Ranks and chunks stand where preprocess has experts.
    using destinations = exchange.get('destinations')
    const slots = axes.size('T') * axes.size('K')
    const src2dst = hiddenStates.method('new_empty', [slots], kw({ dtype: this.#int32 }))
    const ends = [this.#chunks * this.#group.size + 1]
    const segIndptr = hiddenStates.method('new_empty', ends, kw({ dtype: this.#int64 }))
    preprocess({ topkIds: destinations, src2dst, segIndptr, negatives: 'dropped' })
    let rows = 0
    return {
      agree: () => {
        using count = exchange.method('agree', segIndptr)
        rows = count.toJS() as number
      },
      compute: () => this.#compute(args, axes, exchange, src2dst, rows),
      dispose: () => {
        for (const each of [exchange, src2dst, segIndptr]) each.dispose()
      },
    }
  }

  dispose(): void {
    for (const each of [this.#route, this.#int32, this.#int64]) each.dispose()
  }

  #compute(args: MoeForwardArguments, axes: Axes, exchange: PyRef, src2dst: PyRef, rows: number): PyRef {
    const { hiddenStates, sharedOutput, residual } = args
    using sent = hiddenStates.method('new_empty', [rows, axes.size('H')])
    preReorder({ input: hiddenStates, gateupInput: sent, src2dst })
    using choices = exchange.get('choices')
    using chosen = choices.method('new_empty', [rows, 2 * axes.size('K')])
    preReorder({ input: choices, gateupInput: chosen, src2dst })
    exchange.method('pack', sent, chosen).dispose()
    exchange.method('dispatch', 0).dispose()
    for (let chunk = 0; chunk < this.#chunks; chunk++) {
      if (chunk + 1 < this.#chunks) exchange.method('dispatch', chunk + 1).dispose()
      this.#serve(exchange, chunk)
    }
    using downOutput = exchange.method('finish')
    using topkWeights = exchange.get('ones')
    const output = args.output ?? hiddenStates.method('new_empty', [axes.size('T'), axes.size('H')])
    return postReorder({
      downOutput,
      output,
      src2dst,
      topkWeights,
      sharedOutput,
      residual,
      routedScalingFactor: this.#factor,
    })
  }

  /** This rank's experts on the tokens that have come to it. */
  #serve(exchange: PyRef, chunk: number): void {
    using arrived = exchange.method('arrived', chunk)
    using hiddenStates = arrived.item(0)
    using topkIds = arrived.item(1)
    using topkWeights = arrived.item(2)
    using output = arrived.item(3)
    this.#layer.forward({ hiddenStates, topkIds, topkWeights, output })
    exchange.method('combine', chunk, output).dispose()
  }
}
