import { AsyncLocalStorage } from 'node:async_hooks'
import type { Device } from '../device.js'
import { parseDevice } from '../device.js'
import { describeValue, EpmoeError } from '../errors.js'
import { native } from '../native.js'
import { Stream } from '../stream.js'
import type { PyRef } from './ref.js'
import type { Runtime } from './runtime.js'

/** How an asynchronous call is to run. */
export interface JobOptions {
  /**
   * Gives the job up: the promise rejects with the signal's reason at once. A job that waits is dropped; Python code that
   * runs is interrupted; a kernel or library call that runs goes on to its end, and later jobs wait for it.
   */
  signal?: AbortSignal | undefined
  /** torch's grad mode during the job. Default: what the thread has, which is torch's default. */
  grad?: boolean | undefined
  /** torch's current CUDA device during the job, as `'cuda:1'`. */
  device?: Device | undefined
  /** torch's current stream during the job. */
  stream?: Stream | undefined
  /** Called with each value that the job's Python code hands to `epmoe.report_progress()`. */
  onProgress?: ((value: unknown) => void) | undefined
}

/** Marks the last argument of an asynchronous call as its options: `f.callAsync(x, job({ signal }))`. */
export class JobArgument {
  constructor(readonly options: JobOptions) {}
}

export function job(options: JobOptions): JobArgument {
  return new JobArgument(options)
}

interface Pending {
  resolve(result: PyRef): void
  reject(reason: unknown): void
  onProgress: JobOptions['onProgress']
  /** Arguments that Python borrows: kept reachable until the job is done. */
  keep: unknown
  settled: boolean
  release(): void
  /** Runs a function where the call was made, so that its result belongs to the scope of the call. */
  inContext<Result>(work: () => Result): Result
}

/**
 * Asynchronous calls run one after the other on a Python thread of their own (python/epmoe/_executor.py), never on
 * libuv's pool: file system and DNS work of the process is not held up by them.
 */
export class Executor {
  readonly #runtime: Runtime
  readonly #pending = new Map<number, Pending>()
  #started = false
  #last = 0
  #limit = 1000
  #waiters: (() => void)[] = []
  readonly #listeners = new Set<() => void>()

  constructor(runtime: Runtime) {
    this.#runtime = runtime
  }

  /** Jobs that wait or run. */
  get pending(): number {
    return this.#pending.size
  }

  /** Jobs beyond this number are refused with ERR_QUEUE_FULL. */
  get limit(): number {
    return this.#limit
  }

  set limit(limit: number) {
    if (!Number.isSafeInteger(limit) || limit < 1) {
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op: 'queueLimit',
        expected: 'a whole number of 1 or more',
        received: describeValue(limit),
      })
    }
    this.#limit = limit
    this.#wake()
  }

  /** Resolves when the queue has room for a job: what a producer waits for before the next one. */
  async ready(): Promise<void> {
    while (this.#pending.size >= this.#limit) {
      await new Promise<void>((resolve) => this.#waiters.push(resolve))
    }
  }

  /** Resolves with the result when the job is done; rejects with PythonError, or the signal's reason. */
  submit(operation: string, args: readonly unknown[], options: JobOptions = {}): Promise<PyRef> {
    return new Promise((resolve, reject) => {
      const { signal, onProgress } = checked(options)
      if (signal?.aborted) throw signal.reason
      if (this.#pending.size >= this.#limit) throw this.#full()
      this.#start()
      const number = ++this.#last
      const abort = () => {
        this.#runtime.run('cancel', number).dispose()
        this.#settle(number)
        // Python may still be at it: the job leaves the list when it says so, unless it never began.
        reject(signal?.reason)
      }
      const pending: Pending = {
        resolve,
        reject,
        onProgress,
        keep: args,
        settled: false,
        release: () => signal?.removeEventListener('abort', abort),
        inContext: AsyncLocalStorage.snapshot(),
      }
      this.#runtime.run('submit', number, operation, args, contextOf(options)).dispose()
      this.#pending.set(number, pending)
      signal?.addEventListener('abort', abort, { once: true })
      native().bell.hold(true)
    })
  }

  /** Calls `listener` soon after Python code on any thread has rung; returns a function that ends it. */
  listen(listener: () => void): () => void {
    this.#start()
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  #start(): void {
    if (this.#started) return
    this.#started = true
    const address = native().bell.open(() => this.#answer())
    this.#runtime.run('start_executor', address).dispose()
  }

  /** Python has news: results and progress, in the order they came about. */
  #answer(): void {
    const events = this.#runtime.value('events') as [number, 'done' | 'dropped' | 'progress', string][]
    for (const [number, kind, text] of events) {
      const pending = this.#pending.get(number)
      if (pending === undefined) continue
      if (kind === 'progress') {
        if (!pending.settled) report(pending, text)
        continue
      }
      this.#pending.delete(number)
      if (kind === 'done') this.#finish(number, pending)
      pending.release()
    }
    if (this.#pending.size === 0) native().bell.hold(false)
    this.#wake()
    for (const listener of this.#listeners) listener()
  }

  #finish(number: number, pending: Pending): void {
    try {
      const result = pending.inContext(() => this.#runtime.run('collect', number))
      if (pending.settled) result.dispose()
      else pending.resolve(result)
    } catch (error) {
      if (!pending.settled) pending.reject(error)
    }
  }

  #settle(number: number): void {
    const pending = this.#pending.get(number)
    if (pending !== undefined) pending.settled = true
  }

  #wake(): void {
    const waiters = this.#waiters
    this.#waiters = []
    for (const waiter of waiters) waiter()
  }

  #full(): EpmoeError {
    return new EpmoeError({
      code: 'ERR_QUEUE_FULL',
      op: 'Python',
      expected: `fewer than ${this.#limit} asynchronous calls at a time`,
      received: 'one more',
      hint: 'Await python.ready() before the next, or raise python.queueLimit',
    })
  }
}

/** A listener that throws is the listener's affair: it surfaces as an uncaught exception, and the jobs go on. */
function report({ onProgress }: Pending, text: string): void {
  if (onProgress === undefined) return
  queueMicrotask(() => onProgress(JSON.parse(text)))
}

function checked(options: JobOptions): JobOptions {
  const { signal, grad, stream, onProgress } = options
  const wrong = (argument: string, expected: string, value: unknown) =>
    new EpmoeError({ code: 'ERR_VALUE', op: 'job', argument, expected, received: describeValue(value) })
  if (signal !== undefined && !(signal instanceof AbortSignal)) throw wrong('signal', 'an AbortSignal', signal)
  if (grad !== undefined && typeof grad !== 'boolean') throw wrong('grad', 'a boolean', grad)
  if (stream !== undefined && !(stream instanceof Stream)) throw wrong('stream', 'a Stream', stream)
  if (onProgress !== undefined && typeof onProgress !== 'function') {
    throw wrong('onProgress', 'a function', onProgress)
  }
  return options
}

/** What Python's thread sets for the length of one job. */
function contextOf({ grad, device, stream }: JobOptions): Record<string, unknown> {
  return {
    ...(grad === undefined ? {} : { grad }),
    ...(device === undefined ? {} : { device: parseDevice(device, 'job').id }),
    ...(stream === undefined
      ? {}
      : { stream: stream.address, stream_device: Number(stream.device.slice('cuda:'.length)) }),
  }
}
