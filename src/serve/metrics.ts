import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import type { Generation, Outcome } from './generation.js'
import { type KernelMode, kernelModes, type PassResult, type PassRow, type ShadowCounts } from './model.js'

const seconds = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]

/** What becomes of a request for completions. */
export type RequestOutcome = Outcome | 'refused_full' | 'refused_draining' | 'refused_invalid'

/** What /metrics tells, and where the page's figures come from. */
export class Metrics {
  readonly registry = new Registry()
  readonly #registers = [this.registry]
  readonly #requests = new Counter({
    name: 'epmoe_requests_total',
    help: 'Requests for completions by what became of them',
    labelNames: ['outcome'] as const,
    registers: this.#registers,
  })
  readonly #received = new Counter({
    name: 'epmoe_requests_received_total',
    help: 'Requests for completions that have come',
    registers: this.#registers,
  })
  readonly #tokens = new Counter({
    name: 'epmoe_tokens_total',
    help: 'Tokens that went through the model, by kind',
    labelNames: ['kind'] as const,
    registers: this.#registers,
  })
  readonly #passes = new Counter({
    name: 'epmoe_forward_passes_total',
    help: 'Forward passes',
    labelNames: ['result'] as const,
    registers: this.#registers,
  })
  readonly #forward = new Counter({
    name: 'epmoe_forward_seconds_total',
    help: 'Time in forward passes',
    registers: this.#registers,
  })
  readonly #experts = new Counter({
    name: 'epmoe_expert_seconds_total',
    help: 'Time of forward passes in the experts, whoever computed them',
    registers: this.#registers,
  })
  readonly #shadow = new Counter({
    name: 'epmoe_shadow_blocks_total',
    help: 'Blocks compared in shadow mode, by result',
    labelNames: ['result'] as const,
    registers: this.#registers,
  })
  readonly #shadowRatio = new Gauge({
    name: 'epmoe_shadow_error_ratio',
    help: "Error of epmoe over the original's, both against float64, in all blocks compared; 1 or less is golden",
    registers: this.#registers,
  })
  readonly #rows = new Histogram({
    name: 'epmoe_forward_pass_rows',
    help: 'Sequences in a forward pass',
    buckets: [1, 2, 4, 8, 16, 32, 64, 128],
    registers: this.#registers,
  })
  readonly #duration = new Histogram({
    name: 'epmoe_request_seconds',
    help: 'Time from a place in the queue to the last token',
    buckets: seconds,
    registers: this.#registers,
  })
  readonly #first = new Histogram({
    name: 'epmoe_time_to_first_token_seconds',
    help: 'Time from a place in the queue to the first token',
    buckets: seconds,
    registers: this.#registers,
  })
  /** The same numbers for the page, without a detour by text. */
  readonly totals = {
    received: 0,
    requests: {} as Partial<Record<RequestOutcome, number>>,
    promptTokens: 0,
    completionTokens: 0,
    passes: 0,
    failedPasses: 0,
    seconds: 0,
    expertSeconds: 0,
    shadow: { identical: 0, close: 0, worse: 0, elements: 0, own: 0, other: 0 } satisfies ShadowCounts,
  }

  /** `now` is asked when metrics are read. */
  constructor(now: () => { running: number; waiting: number; mode: KernelMode }) {
    collectDefaultMetrics({ register: this.registry })
    for (const [name, help] of [
      ['running', 'Sequences in the batch'],
      ['waiting', 'Requests that wait for a slot'],
    ] as const) {
      new Gauge({
        name: `epmoe_requests_${name}`,
        help,
        registers: this.#registers,
        collect() {
          this.set(now()[name])
        },
      })
    }
    new Gauge({
      name: 'epmoe_kernel_mode',
      help: 'Who computes the experts: 1 for the mode that is on',
      labelNames: ['mode'] as const,
      registers: this.#registers,
      collect() {
        for (const mode of kernelModes) this.set({ mode }, now().mode === mode ? 1 : 0)
      },
    })
  }

  passed(rows: PassRow[], result: PassResult): void {
    const prompt = rows.reduce((sum, row) => sum + (row.wish?.first === false ? 0 : row.tokens.length), 0)
    const { totals } = this
    totals.passes++
    totals.promptTokens += prompt
    totals.completionTokens += result.rows.length
    totals.seconds += result.seconds
    totals.expertSeconds += result.expert_seconds
    this.#passes.inc({ result: 'passed' })
    this.#tokens.inc({ kind: 'prompt' }, prompt)
    this.#tokens.inc({ kind: 'completion' }, result.rows.length)
    this.#forward.inc(result.seconds)
    this.#experts.inc(result.expert_seconds)
    this.#rows.observe(rows.length)
    for (const kind of ['identical', 'close', 'worse'] as const) {
      this.#shadow.inc({ result: kind }, result.shadow[kind])
    }
    for (const key of Object.keys(totals.shadow) as (keyof ShadowCounts)[]) totals.shadow[key] += result.shadow[key]
    this.#shadowRatio.set(this.errorRatio)
  }

  /** Error of epmoe over the original's in all blocks that shadow compared; 0 before there are any. */
  get errorRatio(): number {
    const { own, other } = this.totals.shadow
    return own > 0 ? Math.sqrt(other / own) : 0
  }

  passFailed(): void {
    this.totals.failedPasses++
    this.#passes.inc({ result: 'failed' })
  }

  finished(generation: Generation, duration: number): void {
    const outcome = generation.outcome ?? 'error'
    this.count(outcome)
    this.#duration.observe(duration)
    if (generation.firstAt !== undefined) this.#first.observe((generation.firstAt - generation.begun) / 1000)
  }

  /** A request has come. */
  received(): void {
    this.totals.received++
    this.#received.inc()
  }

  /** What became of one. */
  count(outcome: RequestOutcome): void {
    this.totals.requests[outcome] = (this.totals.requests[outcome] ?? 0) + 1
    this.#requests.inc({ outcome })
  }
}
