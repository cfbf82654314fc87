import { preprocess } from '../generated/ops.js'
import type { MoeForwardArguments } from '../moe/arguments.js'
import type { Axes } from '../moe/check.js'
import type { PyRef } from '../python/ref.js'
import { Tensor } from '../tensor.js'

/** How tokens meet experts of other ranks. */
export interface Scheme {
  /** What this rank does alone: checks, and whatever may fail without another rank's part in it. */
  plan(args: MoeForwardArguments): Plan
}

/** One call. */
export interface Plan {
  /** Makes sure, together with the other ranks, that all are about to make the same call. */
  agree(): void
  compute(): PyRef
  dispose?(): void
}

/**
 * On the CPU, throws for an id that the model does not have, before another rank counts on this one. On CUDA the ops
 * report it with the next synchronize(), and the slot is skipped.
 */
export function checkIds({ topkIds }: MoeForwardArguments, axes: Axes, numExperts: number): void {
  if (axes.device !== 'cpu') return
  using src2dst = Tensor.empty([axes.size('T') * axes.size('K')], { dtype: 'int32' })
  using segIndptr = Tensor.empty([numExperts + 1], { dtype: 'int64' })
  preprocess({ topkIds, src2dst, segIndptr, negatives: 'dropped' })
}
