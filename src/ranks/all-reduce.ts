import type { MoeForwardArguments } from '../moe/arguments.js'
import type { MoeLayer } from '../moe-layer.js'
import type { PyRef } from '../python/ref.js'
import type { RankGroup } from './group.js'
import { checkIds, type Plan, type Scheme } from './scheme.js'

export interface AllReduceOptions {
  /** The layer's number in the group. */
  number: number
  chunks: number
  numExperts: number
  agreement: 'each-call' | 'none' | undefined
  reduceIn: 'float32' | 'activations' | undefined
}

/**
 * Every rank has all tokens and computes the share of its experts; the shares are summed. One chunk's sum is under way
 * while the next is computed.
 */
export class AllReduce implements Scheme {
  readonly #group: RankGroup
  readonly #layer: MoeLayer
  readonly #options: AllReduceOptions

  constructor(group: RankGroup, layer: MoeLayer, options: AllReduceOptions) {
    this.#group = group
    this.#layer = layer
    this.#options = options
  }

  plan(args: MoeForwardArguments): Plan {
    const axes = this.#layer.check(args)
    checkIds(args, axes, this.#options.numExperts)
    const [tokens, hidden] = [axes.size('T'), axes.size('H')]
    return {
      agree: () => {
        if (this.#options.agreement === 'none') return
        this.#group.python.method('agree_on', this.#options.number, axes.size('K'), tokens).dispose()
      },
      compute: () => this.#compute(args, tokens, hidden),
    }
  }

  #compute(args: MoeForwardArguments, tokens: number, hidden: number): PyRef {
    const ranks = this.#group.python
    const output = args.output ?? args.hiddenStates.method('new_empty', [tokens, hidden])
    const works: PyRef[] = []
    for (let chunk = 0; chunk < this.#options.chunks; chunk++) {
      const [start, end] = [0, 1].map((next) => Math.floor(((chunk + next) * tokens) / this.#options.chunks)) as [
        number,
        number,
      ]
      if (start === end) continue
      const part: Record<string, PyRef> = {}
      for (const [name, tensor] of Object.entries<PyRef | undefined>({ ...args, output })) {
        // What every rank has alike is added by one of them.
        const once = name === 'sharedOutput' || name === 'residual'
        if (tensor === undefined || (once && this.#group.rank > 0)) continue
        part[name] = tensor.method('narrow', 0, start, end - start)
      }
      this.#layer.forward(part as unknown as MoeForwardArguments)
      works.push(ranks.method('all_reduce', part['output'], this.#options.reduceIn !== 'activations'))
      for (const each of Object.values(part)) each.dispose()
    }
    for (const work of works) {
      ranks.method('wait', work).dispose()
      work.dispose()
    }
    return output
  }
}
