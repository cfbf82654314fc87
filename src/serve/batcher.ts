import { Generation, type Wish } from './generation.js'
import type { Metrics } from './metrics.js'
import type { PassResult, PassRow, ServedModel } from './model.js'

export interface BatcherOptions {
  /** Requests that may wait for a slot. Default 64. */
  queue?: number | undefined
  /** Tokens in one forward pass, by which a long prompt is cut into parts. Default 512. */
  batchTokens?: number | undefined
}

/** A sequence in the batch. */
interface Sequence {
  generation: Generation
  slot: number
  /** Tokens that the model has not seen yet: what is left of the prompt, then the last token. */
  tokens: number[]
  /** Tokens that it has seen. */
  seen: number
}

/** Room for one request, taken before its text is looked at. */
export interface Place {
  /** Throws Refusal when what is inside has been given up meanwhile. */
  start(prompt: number[], wish: Wish): Generation
  /** Gives the room back when nothing was started. */
  release(): void
}

/** The server takes no more: it is full, or it is ending. */
export class Refusal extends Error {
  constructor(
    readonly reason: 'full' | 'draining',
    readonly retryAfterSeconds: number,
  ) {
    super(reason === 'full' ? 'all slots are taken and the queue is full' : 'the server is shutting down')
  }
}

/**
 * Continuous batching: before each forward pass sequences that are done leave and waiting ones take their slots. A pass
 * has the next token of every sequence that is being written and as much of new prompts as fits.
 */
export class Batcher {
  readonly #model: ServedModel
  readonly #metrics: Metrics
  /** Requests that may be inside, in slots and waiting for one. */
  readonly capacity: number
  readonly #batchTokens: number
  readonly #waiting: Generation[] = []
  readonly #active: Sequence[] = []
  readonly #free: number[]
  /** Requests that have a place: being read, waiting, or in the batch. */
  #inside = 0
  #meanSeconds = 1
  #running = false
  #draining = false
  #abandoned = false
  #failures = 0
  #onIdle: (() => void)[] = []

  constructor(model: ServedModel, metrics: Metrics, { queue = 64, batchTokens = 512 }: BatcherOptions = {}) {
    this.#model = model
    this.#metrics = metrics
    this.capacity = model.slots + queue
    this.#batchTokens = Math.max(batchTokens, model.slots)
    this.#free = Array.from({ length: model.slots }, (_, slot) => slot)
  }

  /** Sequences in the batch. */
  get running(): number {
    return this.#active.length
  }

  /** Requests that wait for a slot. */
  get waiting(): number {
    return this.#inside - this.#active.length
  }

  get draining(): boolean {
    return this.#draining
  }

  /** Forward passes that have failed in a row. */
  get failures(): number {
    return this.#failures
  }

  /** Room for one more request; throws Refusal when there is none. */
  reserve(): Place {
    if (this.#draining) throw new Refusal('draining', 1)
    const excess = this.#inside - this.capacity
    if (excess >= 0) throw new Refusal('full', this.#retryAfter(excess + 1))
    this.#inside++
    let open = true
    const close = () => {
      if (!open) throw new Error('a place is good for one request')
      open = false
    }
    return {
      start: (prompt, wish) => {
        if (this.#abandoned) throw new Refusal('draining', 1)
        close()
        return this.#enter(prompt, wish)
      },
      release: () => {
        if (!open) return
        close()
        this.#leave()
      },
    }
  }

  /** Takes no more requests; resolves when those inside are done. */
  async drain(): Promise<void> {
    this.#draining = true
    while (this.#inside > 0 || this.#running) await new Promise<void>((resolve) => this.#onIdle.push(resolve))
  }

  /** Gives up what is inside, and what has a place once it comes to start. */
  abandon(): void {
    this.#draining = true
    this.#abandoned = true
    for (const each of [...this.#waiting, ...this.#active.map((sequence) => sequence.generation)]) each.cancel()
  }

  #enter(prompt: number[], wish: Wish): Generation {
    const generation: Generation = new Generation(prompt, wish, () => this.#cancelled(generation))
    this.#waiting.push(generation)
    if (!this.#running) {
      this.#running = true
      void this.#run()
    }
    return generation
  }

  #cancelled(generation: Generation): void {
    const place = this.#waiting.indexOf(generation)
    if (place < 0) return // in the batch: it leaves before the next pass
    this.#waiting.splice(place, 1)
    this.#finished(generation)
  }

  async #run(): Promise<void> {
    for (;;) {
      this.#retire()
      this.#admit()
      if (this.#active.length === 0) break
      await this.#pass()
    }
    this.#running = false
    this.#wakeIdle()
  }

  #retire(): void {
    for (const sequence of [...this.#active]) {
      if (sequence.generation.outcome === undefined) continue
      this.#active.splice(this.#active.indexOf(sequence), 1)
      this.#free.push(sequence.slot)
      this.#finished(sequence.generation)
    }
  }

  #admit(): void {
    while (this.#free.length > 0 && this.#waiting.length > 0) {
      const generation = this.#waiting.shift()!
      this.#active.push({ generation, slot: this.#free.pop()!, tokens: generation.prompt, seen: 0 })
    }
  }

  async #pass(): Promise<void> {
    const sequences = this.#chosen()
    const rows = sequences.map(({ sequence, count }) => rowOf(sequence, count))
    let result: PassResult
    try {
      result = await this.#model.step(rows)
    } catch (error) {
      // What the pass has written into the slots counts for nothing any more.
      this.#failures++
      this.#metrics.passFailed()
      for (const { sequence } of sequences) sequence.generation.fail(error)
      return
    }
    this.#failures = 0
    this.#metrics.passed(rows, result)
    const told = result.rows.values()
    sequences.forEach(({ sequence, count }, i) => {
      sequence.seen += count
      sequence.tokens = sequence.tokens.slice(count)
      if (rows[i]?.wish !== undefined) this.#take(sequence, told.next().value!)
    })
  }

  #take(sequence: Sequence, told: PassResult['rows'][number]): void {
    const { generation, seen } = sequence
    sequence.tokens = [told.token]
    if (generation.outcome === undefined)
      generation.take(told, this.#model.facts.ends, this.#model.facts.context - seen)
  }

  /** Who takes part in the next pass, with how many tokens: writers first, then prompts in order of arrival. */
  #chosen(): { sequence: Sequence; count: number }[] {
    const single = this.#active.filter(({ tokens }) => tokens.length === 1)
    const chosen = single.map((sequence) => ({ sequence, count: 1 }))
    let room = this.#batchTokens - chosen.length
    for (const sequence of this.#active) {
      if (sequence.tokens.length === 1 || room === 0) continue
      const count = Math.min(room, sequence.tokens.length)
      chosen.push({ sequence, count })
      room -= count
    }
    return chosen
  }

  #finished(generation: Generation): void {
    const seconds = (performance.now() - generation.begun) / 1000
    this.#meanSeconds += (seconds - this.#meanSeconds) / 16
    this.#metrics.finished(generation, seconds)
    this.#leave()
  }

  #leave(): void {
    this.#inside--
    this.#wakeIdle()
  }

  #wakeIdle(): void {
    if (this.#inside > 0 || this.#running) return
    for (const wake of this.#onIdle.splice(0)) wake()
  }

  /** Whole seconds until so many requests more than now may have a place. */
  #retryAfter(excess: number): number {
    return Math.min(60, Math.max(1, Math.ceil((excess / this.#model.slots) * this.#meanSeconds)))
  }
}

function rowOf({ generation, slot, tokens, seen }: Sequence, count: number): PassRow {
  const row = { slot, start: seen, tokens: tokens.slice(0, count) }
  return count === tokens.length ? { ...row, wish: generation.tokenWish() } : row
}
