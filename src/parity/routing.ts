import type { Random } from './random.js'

export type RoutingKind = 'uniform' | 'skewed'

export interface Routing {
  /** [T*K], row-major by token: global expert ids, distinct within a token. */
  topkIds: Int32Array
  /** [T*K]: the row of each slot when rows are grouped by expert, in order of token and slot. */
  src2dst: Int32Array
  /** [T*K]: positive, each token's adding up to 1. */
  weights: Float64Array
}

/** What a router and the preprocess step would produce. Skewed routing sends most tokens to few experts. */
export function route(tokens: number, topk: number, experts: number, kind: RoutingKind, random: Random): Routing {
  const topkIds = new Int32Array(tokens * topk)
  const weights = new Float64Array(tokens * topk)
  const chosen = new Int32Array(experts).fill(-1)
  for (let token = 0; token < tokens; token++) {
    let sum = 0
    for (let slot = 0; slot < topk; slot++) {
      let expert = draw(experts, kind, random)
      while (chosen[expert] === token) expert = (expert + 1) % experts
      chosen[expert] = token
      topkIds[token * topk + slot] = expert
      const weight = 0.05 + random.next()
      weights[token * topk + slot] = weight
      sum += weight
    }
    for (let slot = 0; slot < topk; slot++) weights[token * topk + slot]! /= sum
  }
  return { topkIds, src2dst: groupByExpert(topkIds, experts), weights }
}

function draw(experts: number, kind: RoutingKind, random: Random): number {
  const uniform = random.next()
  return Math.floor((kind === 'uniform' ? uniform : uniform ** 4) * experts)
}

/** The stable counting sort that preprocessing is equivalent to. */
function groupByExpert(topkIds: Int32Array, experts: number): Int32Array {
  const next = new Int32Array(experts + 1)
  for (const id of topkIds) next[id + 1]!++
  for (let expert = 0; expert < experts; expert++) next[expert + 1]! += next[expert]!
  return topkIds.map((id) => next[id]!++)
}
