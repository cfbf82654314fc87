import type { Device } from '../device.js'
import { describeValue, EpmoeError, PythonError } from '../errors.js'
import { onlyKnown } from '../moe/check.js'
import { kw } from '../python/encode.js'
import type { PyRef } from '../python/ref.js'
import { startPython } from '../python/start.js'

export interface JoinOptions {
  /** Default: `nccl` where torch has it and a GPU, otherwise `gloo`. With gloo, tensors of a GPU go through the host. */
  backend?: 'nccl' | 'gloo' | undefined
  /** How many ranks the program expects. Default: as many as were started. */
  worldSize?: number | undefined
  /** Milliseconds after which no rank is waited for any more, nor a dead one left unnoticed. Default 30,000. */
  timeoutMs?: number | undefined
  /** A process group of torch.distributed that this rank is in. Default: all ranks. */
  group?: PyRef | undefined
}

/**
 * Joins the job that torchrun started this process for, on torch.distributed; every rank must call it. Where
 * torch.distributed is initialised already, it is used as it is. Throws ERR_RANKS_START, which names ranks that did not
 * come.
 */
export function joinRanks(options: JoinOptions = {}): RankGroup {
  onlyKnown(options, optionNames, 'joinRanks')
  const { backend, worldSize, timeoutMs = 30_000, group } = options
  demand('backend', backend, "'nccl' or 'gloo'", [undefined, 'nccl', 'gloo'].includes(backend))
  demand('worldSize', worldSize, 'a whole number', worldSize === undefined || Number.isSafeInteger(worldSize))
  demand('timeoutMs', timeoutMs, 'milliseconds, 1000 or more', Number.isFinite(timeoutMs) && timeoutMs >= 1000)
  using module = startPython().import('epmoe.distributed')
  const keywords = kw({ backend, world_size: worldSize, timeout: timeoutMs / 1000, group })
  return new RankGroup(inOwnTerms(() => module.method('join_ranks', keywords)))
}

const optionNames = ['backend', 'worldSize', 'timeoutMs', 'group'] satisfies (keyof JoinOptions)[]

/** The ranks that share a model's experts. Made by joinRanks(). */
export class RankGroup implements Disposable {
  /** This rank's place in the group, from 0. */
  readonly rank: number
  /** How many ranks the group has. */
  readonly size: number
  readonly backend: string
  /** Where this rank's tensors belong: with NCCL its GPU, otherwise the CPU. */
  readonly device: Device
  /** @internal epmoe.distributed.RankGroup */
  readonly python: PyRef
  /** @internal How many layers the ranks have made together. */
  layers = 0

  /** Made by joinRanks(). */
  constructor(python: PyRef) {
    this.python = python
    const fact = (name: string) => {
      using value = python.get(name)
      return value.toJS()
    }
    this.rank = fact('rank') as number
    this.size = fact('size') as number
    this.backend = fact('backend') as string
    this.device = fact('device') as Device
  }

  /**
   * The part of a model's experts that this rank is to hold: from `start` up to, not including, `end`. Parts differ by
   * one at most. Throws ERR_VALUE when there are fewer experts than ranks.
   */
  expertRange(numExperts: number): { start: number; end: number } {
    const { rank, size } = this
    if (!Number.isSafeInteger(numExperts) || numExperts < size) {
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op: 'expertRange',
        argument: 'numExperts',
        expected: `${size} or more, an expert for each rank`,
        received: describeValue(numExperts),
        hint: 'Start fewer ranks',
      })
    }
    const before = (ranks: number) => ranks * Math.floor(numExperts / size) + Math.min(ranks, numExperts % size)
    return { start: before(rank), end: before(rank + 1) }
  }

  /** Waits until every rank has called it. Through the job's store: milliseconds, not for the path of every token. */
  barrier(): void {
    this.gather('a barrier', null)
  }

  /** @internal Every rank's value, in their order; they have to meet for the same. */
  gather<Value>(what: string, value: Value): Value[] {
    return inOwnTerms(() => {
      using values = this.python.method('gather', what, value)
      return values.toJS() as Value[]
    })
  }

  /** This rank leaves the group; at the end of the process it does so by itself. Harmless when repeated. */
  dispose(): void {
    if (this.python.disposed) return
    this.python.method('close').dispose()
    this.python.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Errors that epmoe's Python side found come as what they are. */
export function inOwnTerms<Result>(work: () => Result): Result {
  try {
    return work()
  } catch (error) {
    if (!(error instanceof PythonError && error.cause instanceof EpmoeError)) throw error
    const { code, op, argument, expected, received, hint } = error.cause
    throw new EpmoeError({ code, op, argument, expected, received, hint }, { cause: error })
  }
}

function demand(argument: string, value: unknown, expected: string, met: boolean): void {
  if (met) return
  throw new EpmoeError({ code: 'ERR_VALUE', op: 'joinRanks', argument, expected, received: describeValue(value) })
}
