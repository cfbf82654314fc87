import type { Batcher } from './batcher.js'
import type { Metrics, RequestOutcome } from './metrics.js'
import type { ServedModel } from './model.js'

const interval = 1000

/** Figures for the page, once a second for as long as somebody looks. */
export class Live {
  readonly #listeners = new Set<(text: string) => void>()
  #timer: NodeJS.Timeout | undefined
  #before = { at: 0, tokens: 0 }

  constructor(
    private readonly name: string,
    private readonly model: ServedModel,
    private readonly batcher: Batcher,
    private readonly metrics: Metrics,
  ) {}

  /** Calls `listener` now and from now on; returns how to end that. */
  listen(listener: (text: string) => void): () => void {
    this.#listeners.add(listener)
    if (this.#timer === undefined) {
      this.#before = this.#now()
      this.#timer = setInterval(() => this.tell(), interval)
    }
    listener(this.#text(0))
    return () => {
      this.#listeners.delete(listener)
      if (this.#listeners.size > 0) return
      clearInterval(this.#timer)
      this.#timer = undefined
    }
  }

  tell(): void {
    const now = this.#now()
    const rate = (now.tokens - this.#before.tokens) / Math.max(1e-3, (now.at - this.#before.at) / 1000)
    this.#before = now
    const text = this.#text(rate)
    for (const listener of this.#listeners) listener(text)
  }

  #now(): { at: number; tokens: number } {
    return { at: performance.now(), tokens: this.metrics.totals.completionTokens }
  }

  #text(rate: number): string {
    const { batcher, model } = this
    const { requests, completionTokens, seconds, expertSeconds, shadow } = this.metrics.totals
    const sum = (...outcomes: RequestOutcome[]) => outcomes.reduce((total, each) => total + (requests[each] ?? 0), 0)
    return JSON.stringify({
      model: `${this.name} (${model.facts.architecture}, ${model.facts.dtype} on ${model.facts.device})`,
      state: batcher.draining ? 'shutting down' : batcher.failures > 0 ? 'failing' : 'serving',
      mode: model.mode,
      running: batcher.running,
      waiting: batcher.waiting,
      requests: {
        done: sum('stop', 'length'),
        refused: sum('refused_full', 'refused_draining', 'refused_invalid'),
        failed: sum('error'),
        cancelled: sum('cancelled'),
      },
      rate,
      tokens: completionTokens,
      share: seconds > 0 ? expertSeconds / seconds : 0,
      shadow,
      ratio: this.metrics.errorRatio,
    })
  }
}
