import type { PyRef } from '../python/ref.js'

/** One call's tensors, contiguous, of the weights' dtype unless said otherwise. */
export interface MoeForwardArguments {
  /** Shape [T, H]. */
  hiddenStates: PyRef
  /**
   * The router's choice in the model's numbering, -1 for none. Shape [T, K]; int32 or int64. An id that is no expert's is
   * reported with its place; over ranks, or with a part of the experts, the id told is the rank's own for it.
   */
  topkIds: PyRef
  /** Shape [T, K]; float32 or the weights' dtype. */
  topkWeights: PyRef
  /** Added to the sum, e.g. the shared experts' output; on one rank only. Shape [T, H]. */
  sharedOutput?: PyRef | undefined
  /** Added last; on one rank only. Shape [T, H]. */
  residual?: PyRef | undefined
  /** Receives the result; allocated when absent. Shape [T, H]. */
  output?: PyRef | undefined
}
