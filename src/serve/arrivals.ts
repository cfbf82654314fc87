import type { ServerResponse } from 'node:http'
import type { Metrics, RequestOutcome } from './metrics.js'

/** Requests for completions that have come and of which nothing is decided yet: each is to have one outcome. */
export class Arrivals {
  readonly #open = new Set<ServerResponse>()

  constructor(private readonly metrics: Metrics) {}

  /** Of a request that has just come. If nothing else is decided before its connection ends, its client has left. */
  add(response: ServerResponse): void {
    this.metrics.received()
    this.#open.add(response)
    response.once('close', () => this.settle(response, 'cancelled'))
  }

  /** From here on the outcome is that of a generation, which the batcher counts. */
  generating(response: ServerResponse): void {
    this.#open.delete(response)
  }

  /** Counts what became of a request, unless that is known. */
  settle(response: ServerResponse, outcome: RequestOutcome): void {
    if (this.#open.delete(response)) this.metrics.count(outcome)
  }
}
