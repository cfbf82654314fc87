import { EpmoeError } from '../errors.js'
import type { PyRef } from '../python/ref.js'
import { startPython } from '../python/start.js'
import type { MoeForwardArguments } from './arguments.js'

/** A layer's calls of at most so many tokens, captured in CUDA graphs as they come: python/epmoe/layer_graphs.py. */
export class LayerGraphs implements Disposable {
  /** Python's LayerGraphs. */
  readonly ref: PyRef

  /** `weights` are what graphs read in place. */
  constructor(most: number, weights: (PyRef | undefined)[]) {
    using module = startPython().import('epmoe.layer_graphs')
    this.ref = module.method('LayerGraphs', most, weights)
  }

  /**
   * What `compute` would return for these arguments, which have been checked; undefined where no graph can stand for it:
   * too many tokens, or a capture under way.
   */
  forward(args: MoeForwardArguments, compute: (args: MoeForwardArguments) => PyRef): PyRef | undefined {
    const { hiddenStates, topkIds, topkWeights, sharedOutput, residual, output } = args
    const given = [hiddenStates, topkIds, topkWeights, sharedOutput, residual]
    const replay = () => present(this.ref.method('replay', output, ...given))
    const result = replay() ?? (this.#capture(given, compute) ? replay() : undefined)
    if (result === undefined || output === undefined) return result
    result.dispose()
    return output
  }

  #capture(given: (PyRef | undefined)[], compute: (args: MoeForwardArguments) => PyRef): boolean {
    using inputs = present(this.ref.method('prepare', ...given))
    if (inputs === undefined) return false
    const [hiddenStates, topkIds, topkWeights, sharedOutput, residual] = [...inputs].map(present)
    const args = { hiddenStates: hiddenStates!, topkIds: topkIds!, topkWeights: topkWeights!, sharedOutput, residual }
    try {
      compute(args).dispose()
      this.#record(() => compute(args))
    } finally {
      for (const each of Object.values(args)) each?.dispose()
    }
    return true
  }

  #record(compute: () => PyRef): void {
    this.ref.method('begin').dispose()
    let output: PyRef
    try {
      output = compute()
    } catch (cause) {
      using said = this.ref.method('abandon')
      throw cannot(cause, said.toJS() as string | null)
    }
    try {
      this.ref.method('end', output).dispose()
    } catch (cause) {
      throw cannot(cause, null)
    } finally {
      output.dispose()
    }
  }

  dispose(): void {
    this.ref.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Undefined for None. */
function present(value: PyRef): PyRef | undefined {
  if (value.plain() === undefined) return value
  value.dispose()
  return undefined
}

function cannot(cause: unknown, said: string | null): EpmoeError {
  const error = cause instanceof Error ? cause.message : String(cause)
  return new EpmoeError(
    {
      code: 'ERR_CAPTURE',
      op: 'moeLayer',
      argument: 'cudaGraphTokens',
      expected: 'a layer that a CUDA graph can hold',
      received: said === null ? error : `${error} (${said})`,
      hint: 'An activation must not wait for the GPU; or leave cudaGraphTokens out',
    },
    { cause },
  )
}
