import type { Random } from './random.js'

/** `single`: every token goes to the last experts, so that all other segments are empty. */
export type RoutingKind = 'uniform' | 'skewed' | 'single'

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
      // Experts of a token are distinct, as long as there are enough of them.
      while (slot < experts && chosen[expert] === token) expert = (expert + 1) % experts
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
  if (kind === 'single') return experts - 1
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

/** The local expert range of the rank that is tested, the middle one when `rank` is -1; never empty. */
export function localRange({ E, ep, rank }: { E: number; ep: number; rank: number }): [number, number] {
  const each = Math.max(1, Math.floor(E / ep))
  const start = Math.min(E - each, (rank < 0 ? Math.floor(ep / 2) : rank) * each)
  return [start, start + each - 1]
}

/** Which slots are local, as 0 and 1; some of the others get the id -1, as padded tokens have it. */
export function markLocal(topkIds: Int32Array, [start, end]: [number, number], random: Random): Int32Array {
  const local = topkIds.map((id) => (id >= start && id <= end ? 1 : 0))
  for (let slot = 0; slot < local.length; slot++) {
    if (local[slot] === 0 && random.below(4) === 0) topkIds[slot] = -1
  }
  return local
}

/** The range of local experts that a call names; without one, every expert from 0 on. */
export function rangeOf(scalars: Record<string, number | string>): [number, number] {
  return [Number(scalars['start_expert_id'] ?? 0), Number(scalars['end_expert_id'] ?? 2 ** 31 - 1)]
}

/** 1 for each id in the range. */
export function localOf(ids: ArrayLike<number | bigint>, [start, end]: [number, number]): Int32Array {
  return Int32Array.from({ length: ids.length }, (_, slot) => {
    const id = Number(ids[slot])
    return id >= start && id <= end ? 1 : 0
  })
}
