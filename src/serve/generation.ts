import { Random } from '../parity/random.js'
import type { Likely, TokenWish, Told } from './model.js'
import { StopFilter } from './stop.js'

/** What is asked for. */
export interface Wish {
  maxTokens: number
  /** 0: the likeliest token each time. */
  temperature: number
  topP: number
  /** The same seed gives the same tokens, whatever else is served. Default: chance. */
  seed?: number | undefined
  stop: string[]
  /** How many alternatives to tell for each token; undefined: not even its own probability. */
  logprobs?: number | undefined
}

export interface TokenLogprob extends Likely {
  top: Likely[]
  /** How much text was certain before it, in code points, as Python counts. */
  offset: number
}

/** A piece of what is generated. */
export interface Piece {
  text: string
  logprobs: TokenLogprob[]
}

export type Finish = 'stop' | 'length'
export type Outcome = Finish | 'cancelled' | 'error'

/** One sequence on its way: the batcher feeds it, a request reads it. */
export class Generation implements AsyncIterable<Piece> {
  readonly prompt: number[]
  readonly wish: Wish
  readonly begun = performance.now()
  /** Tokens generated so far, the one that ends the sequence not counted. */
  completionTokens = 0
  outcome: Outcome | undefined
  /** When the first token came. */
  firstAt: number | undefined
  readonly #pieces: Piece[] = []
  readonly #filter: StopFilter
  readonly #random: Random | undefined
  readonly #onCancel: () => void
  #held = ''
  #offset = 0
  #error: unknown
  #wake: () => void = () => undefined

  constructor(prompt: number[], wish: Wish, onCancel: () => void) {
    this.prompt = prompt
    this.wish = wish
    this.#filter = new StopFilter(wish.stop)
    this.#random = wish.seed === undefined ? undefined : new Random(wish.seed)
    this.#onCancel = onCancel
  }

  get finish(): Finish | undefined {
    return this.outcome === 'stop' || this.outcome === 'length' ? this.outcome : undefined
  }

  /** Nobody reads any more: it leaves the batch before the next forward pass. */
  cancel(): void {
    if (this.outcome !== undefined) return
    this.#end('cancelled')
    this.#onCancel()
  }

  /** How the next token is to be chosen. */
  tokenWish(): TokenWish {
    const { temperature, topP, logprobs } = this.wish
    return {
      temperature,
      top_p: topP,
      uniform: temperature === 0 ? 0 : (this.#random?.next() ?? Math.random()),
      first: this.firstAt === undefined,
      ...(logprobs === undefined ? {} : { logprobs }),
    }
  }

  /** Takes the next token; `ends` are the tokens that end a sequence, `room` how many more the context has room for. */
  take(told: Told, ends: readonly number[], room: number): void {
    this.firstAt ??= performance.now()
    if (ends.includes(told.token)) {
      this.#close('stop', this.#held)
      return
    }
    this.completionTokens++
    this.#held = told.held
    const text = this.#filter.push(told.text)
    const logprobs = told.own === undefined ? [] : [{ ...told.own, top: told.top ?? [], offset: this.#offset }]
    this.#offset += Array.from(told.text).length
    if (text !== '' || logprobs.length > 0) this.#pieces.push({ text, logprobs })
    if (this.#filter.hit) this.#end('stop')
    else if (this.completionTokens >= this.wish.maxTokens || room < 1) this.#close('length', told.held)
    this.#wake()
  }

  fail(error: unknown): void {
    if (this.outcome !== undefined) return
    this.#error = error
    this.#end('error')
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Piece, void> {
    for (;;) {
      for (const piece of this.#pieces.splice(0)) yield piece
      if (this.#pieces.length > 0) continue
      if (this.outcome === 'error') throw this.#error
      if (this.outcome !== undefined) return
      await new Promise<void>((resolve) => (this.#wake = resolve))
    }
  }

  #close(finish: Finish, held: string): void {
    const text = this.#filter.push(held) + this.#filter.flush()
    if (text !== '') this.#pieces.push({ text, logprobs: [] })
    this.#end(this.#filter.hit ? 'stop' : finish)
  }

  #end(outcome: Outcome): void {
    this.outcome = outcome
    this.#wake()
  }
}
