import { camelCase, describeValue, EpmoeError } from '../errors.js'
import { kw } from '../python/encode.js'
import type { Python } from '../python/python.js'
import type { PyRef } from '../python/ref.js'
import { startPython } from '../python/start.js'

/** Whose kernel serves: `shadow` is Triton's with epmoe's compared beside it; `off` as if there were no shim. */
export type ShimMode = 'triton' | 'epmoe' | 'shadow' | 'off'

export interface ShimEvent {
  /** Counted from 1, without gaps. */
  number: number
  /** Seconds since 1970. */
  time: number
  /** SGLang's name. */
  kernel: string
  /** `error`: epmoe's, in shadow. `tripped`: after so many of the others the kernel went back to Triton. */
  kind: 'mismatch' | 'error' | 'tripped' | 'captured' | 'record_failed'
  what: string
  generation?: string
  findings?: Record<string, unknown>[]
  launch?: Record<string, unknown> | null
  /** The file that a mismatch was kept in. */
  capsule?: string | null
}

/** Of one kernel. Counts of launches, but for seconds. */
export interface ShimStats {
  mode: ShimMode
  chosenBy: string
  launches: number
  triton: number
  epmoe: number
  /** Asked of epmoe, served by Triton; by reason in `reasons`. */
  fallbacks: number
  reasons: Record<string, number>
  sampled: number
  /** Picked by the rate, and passed over for what comparing takes (`maxOverhead`). */
  putOff: number
  compared: number
  matched: number
  mismatches: number
  errors: number
  uncovered: number
  /** Launches under CUDA graph capture, and those of them whose replays are compared. */
  captured: number
  staged: number
  /** Those that should be and are not. */
  uncompared: number
  pending: number
  recorded: number
  recordFailures: number
  /** Why it went back to Triton by itself; empty otherwise. */
  tripped: string
  /** Since counting began. */
  elapsedSeconds: number
  /** That comparing has taken on the host, and recording. */
  shadowSeconds: number
  recordSeconds: number
  /** Of the time, that comparing has taken. */
  shadowOverhead: number
  shapes: number
  /** The shortest times of each shape that shadow compared. */
  timings: Record<string, { samples: number; tritonSeconds: number; epmoeSeconds: number }>
}

export interface ShimInstallOptions {
  /** The path of an epmoe.migrate.json. What else is said here wins over it. */
  config?: string
  /** For all kernels. */
  mode?: ShimMode
  /** By kernel: `{ post_reorder: 'epmoe' }`. */
  modes?: Record<string, ShimMode>
  /** Names of the loaded modules in which definitions are looked for; all when absent. */
  modules?: string[]
}

export interface ShimSettings {
  numerics?: 'triton' | 'fp32'
  strict?: boolean
  rate?: number
  firstPerShape?: number
  maxUlp?: number
  tripAfter?: number
  /** Share of the time that comparing may take, all kernels together; 0: no bound. */
  maxOverhead?: number
}

export interface ShimRecordOptions {
  rate?: number
  firstPerShape?: number
  maxBytes?: number
  minFreeBytes?: number
}

/** Where the shim was put, and where not. */
export interface ShimInstallation {
  replaced: { module: string; name: string; kernel: string }[]
  skipped: { module: string; kernel: string; reason: string }[]
}

/**
 * epmoe.shim of the Python in this process: SGLang's Triton kernels replaced where loaded modules hold them. There is one
 * for all; `shim()` returns it.
 */
export class Shim implements Disposable {
  readonly #python: Python
  readonly #module: PyRef

  /** Use shim(). */
  constructor(python: Python) {
    this.#python = python
    this.#module = python.import('epmoe.shim')
  }

  /** Puts the shim into the modules that are loaded; again, to those loaded since. */
  install({ config, mode, modes = {}, modules }: ShimInstallOptions = {}): ShimInstallation {
    const named = { ...(config === undefined ? {} : { config }), ...(mode === undefined ? {} : { mode }) }
    using done = this.#module.method('install', modules ?? null, kw({ ...modes, ...named }))
    return installationOf(done)
  }

  /** Puts every original back, the same object as before. */
  uninstall(): ShimInstallation {
    using done = this.#module.method('uninstall')
    return installationOf(done)
  }

  get installed(): boolean {
    return this.#value('is_installed') as boolean
  }

  /** From the next launch on. `kernel` is `post_reorder`, SGLang's full name, or `*`. */
  setMode(kernel: string, mode: ShimMode): void {
    this.#value('set_mode', kernel, mode)
  }

  getMode(kernel: string): ShimMode {
    return this.#value('get_mode', kernel) as ShimMode
  }

  configure(kernel: string, settings: ShimSettings): void {
    this.#value('configure', kernel, kw(snakeKeys(settings)))
  }

  /** Keeps capsules in a folder; null ends it. */
  record(folder: string | null, options: ShimRecordOptions = {}): void {
    this.#value('record', folder, kw(snakeKeys(options)))
  }

  /** By SGLang's name of the kernel. */
  stats(): Record<string, ShimStats> {
    const found = this.#value('stats') as Record<string, Record<string, unknown>>
    return Object.fromEntries(
      Object.entries(found).map(([kernel, stats]) => [
        kernel,
        camelKeys({ ...stats, timings: mapValues(stats['timings'] as Record<string, object>, camelKeys) }) as never,
      ]),
    )
  }

  /** Waits for comparisons whose results are still on a device, without holding up the event loop. */
  async flush(): Promise<void> {
    const done = await this.#module.methodAsync('flush')
    done.dispose()
  }

  /** Forgets counts and events; modes and settings stay. */
  reset(): void {
    this.#value('reset')
  }

  /**
   * Events from now on, as they come. At most `limit` wait to be read; the oldest are dropped beyond that, and counted.
   * Waiting for one keeps no process alive. Ends with `signal`, `dispose()`, or a `break` out of the loop.
   */
  events(options: { limit?: number; signal?: AbortSignal } = {}): ShimEvents {
    return new ShimEvents(this.#python, options)
  }

  /** uninstall() */
  [Symbol.dispose](): void {
    this.uninstall()
  }

  #value(name: string, ...args: unknown[]): unknown {
    using result = this.#module.method(name, ...args)
    return result.toJS()
  }
}

/** A stream of events. */
export class ShimEvents implements AsyncIterableIterator<ShimEvent>, Disposable {
  readonly #feed: PyRef
  readonly #end: () => void
  #waiting: ((result: IteratorResult<ShimEvent>) => void)[] = []
  #ready: ShimEvent[] = []
  #dropped = 0
  #ended = false

  constructor(python: Python, { limit = 1000, signal }: { limit?: number; signal?: AbortSignal }) {
    if (!Number.isSafeInteger(limit) || limit < 1) {
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op: 'shim.events',
        argument: 'limit',
        expected: 'a whole number of 1 or more',
        received: describeValue(limit),
      })
    }
    this.#feed = python.import('epmoe.migrate.feed').method('Feed', limit)
    const unlisten = python.listen(() => this.#hand())
    const abort = () => this.dispose()
    this.#end = () => {
      unlisten()
      signal?.removeEventListener('abort', abort)
    }
    if (signal?.aborted) this.dispose()
    else signal?.addEventListener('abort', abort, { once: true })
  }

  /** Events that nobody read in time. */
  get dropped(): number {
    if (!this.#ended) this.#dropped = this.#value('dropped') as number
    return this.#dropped
  }

  next(): Promise<IteratorResult<ShimEvent>> {
    if (this.#ended) return Promise.resolve({ done: true, value: undefined })
    return new Promise((resolve) => {
      this.#waiting.push(resolve)
      this.#hand()
    })
  }

  return(): Promise<IteratorResult<ShimEvent>> {
    this.dispose()
    return Promise.resolve({ done: true, value: undefined })
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  dispose(): void {
    if (this.#ended) return
    this.#dropped = this.dropped
    this.#ended = true
    this.#end()
    this.#feed.method('close').dispose()
    this.#feed.dispose()
    for (const resolve of this.#waiting.splice(0)) resolve({ done: true, value: undefined })
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Events stay in Python's bounded queue until somebody waits for one. */
  #hand(): void {
    if (this.#ended) return
    if (this.#waiting.length > 0 && this.#ready.length === 0) this.#ready = this.#value('take') as ShimEvent[]
    while (this.#waiting.length > 0 && this.#ready.length > 0) {
      this.#waiting.shift()!({ done: false, value: this.#ready.shift()! })
    }
  }

  #value(name: string): unknown {
    using result = this.#feed.method(name)
    return result.toJS()
  }
}

let one: Shim | undefined

/** The shim of the Python in this process, which is started where it is not running. */
export function shim(python: Python = startPython()): Shim {
  one ??= new Shim(python)
  return one
}

function installationOf(done: PyRef): ShimInstallation {
  const rows = (name: string) => {
    using found = done.get(name)
    return found.toJS() as [string, string, string][]
  }
  return {
    replaced: rows('replaced').map(([module, name, kernel]) => ({ module, name, kernel })),
    skipped: rows('skipped').map(([module, kernel, reason]) => ({ module, kernel, reason })),
  }
}

function camelKeys(values: object): Record<string, unknown> {
  return Object.fromEntries(Object.entries(values).map(([key, value]) => [camelCase(key), value]))
}

function mapValues<From, To>(record: Record<string, From>, change: (value: From) => To): Record<string, To> {
  return Object.fromEntries(Object.entries(record).map(([key, value]) => [key, change(value)]))
}

function snakeKeys(values: object): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(values).map(([key, value]) => [
      key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`),
      value,
    ]),
  )
}
