import { devices } from '../device.js'
import { EpmoeError } from '../errors.js'
import type { MoeForwardArguments } from '../moe/arguments.js'
import { type MoeLayer, moeLayer } from '../moe-layer.js'
import { job } from '../python/executor.js'
import type { PyRef } from '../python/ref.js'
import { startPython } from '../python/start.js'

/** Who computes the experts: transformers; transformers with epmoe beside it, compared; epmoe. */
export const kernelModes = ['original', 'shadow', 'epmoe'] as const
export type KernelMode = (typeof kernelModes)[number]

export interface ModelOptions {
  /** `qwen3-moe` or `mixtral`, made with random weights, or a folder of a Hugging Face model. Default `qwen3-moe`. */
  model?: string | undefined
  /** As torch spells it. Default: the first GPU, or `cpu`. */
  device?: string | undefined
  /** `float32`, `bfloat16`, `float16`. Default: what the folder says; float32 for random weights. */
  dtype?: string | undefined
  /** Of the random weights. Default 0. */
  seed?: number | undefined
  /** Changes to the configuration of a model with random weights, as `{ num_hidden_layers: 8 }`. */
  config?: Record<string, unknown> | undefined
  /** Sequences in a forward pass. Default 8. */
  slots?: number | undefined
  /** Tokens of a sequence, prompt included, for which each slot has memory. Default 2048, at most what the model takes. */
  context?: number | undefined
  /** The arithmetic of epmoe's ops. Default `fp32`. */
  numerics?: 'fp32' | 'triton' | undefined
  /** On CUDA, the most tokens of a pass whose blocks are replayed as CUDA graphs. Default: as many as there are slots. */
  cudaGraphTokens?: number | undefined
  /** Default `epmoe`. */
  mode?: KernelMode | undefined
  /** In shadow mode, one of so many forward passes is compared. Default 1. */
  shadowEvery?: number | undefined
}

export interface ModelFacts {
  architecture: string
  parameters: number
  vocabulary: number
  context: number
  /** Tokens that end a sequence. */
  ends: number[]
  /** Mixture-of-experts blocks. */
  layers: number
  device: string
  dtype: string
  /** Whether the tokenizer has a chat template. */
  chat: boolean
}

/** How the token behind a row's last one is chosen. */
export interface TokenWish {
  temperature: number
  top_p: number
  /** In [0, 1): decides at temperatures above 0. */
  uniform: number
  /** How many alternatives to tell. */
  logprobs?: number
  /** Whether it is the sequence's first. */
  first: boolean
}

/** A sequence's part of a forward pass. */
export interface PassRow {
  slot: number
  /** Position of the first of the tokens. */
  start: number
  tokens: number[]
  wish?: TokenWish
}

/** A token and how likely it was. */
export interface Likely {
  token: string
  logprob: number
  /** Its own bytes, which may be part of a character; null where the tokenizer does not say. */
  bytes: number[] | null
}

export interface Told {
  token: number
  /** What the token adds to the text for certain. */
  text: string
  /** What it would add if it were the last. */
  held: string
  /** Where alternatives were asked for: the token itself, and they. */
  own?: Likely
  top?: Likely[]
}

/** Blocks that were compared. */
export interface ShadowCounts {
  /** Bit for bit the same. */
  identical: number
  /** Not the same; epmoe's error against float64 is at most twice the original's. */
  close: number
  /** More than twice. */
  worse: number
  /** Elements of the blocks that were not the same, and the sums of the squares of both errors. */
  elements: number
  own: number
  other: number
}

export interface PassResult {
  /** For each row with a wish. */
  rows: Told[]
  seconds: number
  /** Of these, in the experts. */
  expert_seconds: number
  shadow: ShadowCounts
}

export interface Message {
  role: string
  content: string
}

/**
 * A model of transformers in this process. Its forward passes run on a thread of Python's; where they come to a
 * mixture-of-experts block, they rest, and the block is computed from here by `moeLayer`. What that has captured in a
 * CUDA graph, they replay without a rest.
 */
export class ServedModel {
  readonly facts: ModelFacts
  readonly slots: number
  /** What the next forward pass does. */
  mode: KernelMode
  /** The Python side: python/epmoe/serve/engine.py. */
  readonly engine: PyRef
  readonly #layers: MoeLayer[]
  readonly #weights: PyRef[]
  readonly #shadowEvery: number
  #passes = 0
  #rung: () => void = () => undefined
  readonly #unlisten: () => void

  private constructor(engine: PyRef, facts: ModelFacts, options: ModelOptions & { slots: number }) {
    this.engine = engine
    this.facts = facts
    this.slots = options.slots
    this.mode = options.mode ?? 'epmoe'
    this.#shadowEvery = options.shadowEvery ?? 1
    this.#weights = []
    using described = engine.method('layers')
    this.#layers = [...described].map((each) => this.#layer(each, options))
    engine
      .method(
        'replay_with',
        this.#layers.map((layer) => layer.graphs?.ref),
      )
      .dispose()
    this.#unlisten = startPython().listen(() => this.#rung())
  }

  /** Reads or makes the model; the event loop goes on. */
  static async load(options: ModelOptions = {}): Promise<ServedModel> {
    const { model = 'qwen3-moe', dtype = 'auto', seed = 0, config = {}, slots = 8, context = 2048 } = options
    const device = options.device ?? devices().find((each) => each !== 'cpu') ?? 'cpu'
    using module = await startPython().importAsync('epmoe.serve.engine')
    const given = JSON.stringify({ model, device, dtype, seed, config, slots, context })
    const engine = await module.methodAsync('Engine', given)
    using facts = await engine.methodAsync('facts')
    return new ServedModel(engine, JSON.parse(facts.toJS() as string) as ModelFacts, { ...options, slots })
  }

  /**
   * Token ids of a text, or of messages by the model's chat template; or at least how many they are, of a text so long
   * that it is certain not to fit.
   */
  async encode(input: { text: string } | { messages: Message[] }, signal?: AbortSignal): Promise<number[] | number> {
    using ids = await this.engine.methodAsync('encode', JSON.stringify(input), job({ signal }))
    return JSON.parse(ids.toJS() as string) as number[] | number
  }

  /** One forward pass over rows of different sequences; one at a time. */
  async step(rows: PassRow[]): Promise<PassResult> {
    const compared = this.mode === 'shadow' && this.#passes % this.#shadowEvery === 0
    this.#passes++
    let event = await this.#next('step', JSON.stringify({ mode: this.mode, compared, rows }))
    for (;;) {
      using current = event
      const result = current.plain()
      if (result !== undefined) return JSON.parse(result.value as string) as PassResult
      event = await this.#answer(current)
    }
  }

  /** Tells the pass something, and resolves with what it comes to next. */
  async #next(method: 'step' | 'resume' | 'fail', what: unknown): Promise<PyRef> {
    const alive = setInterval(() => undefined, 2 ** 30) // the bell keeps no process alive
    try {
      let rung = this.#ring()
      this.engine.method(method, what).dispose()
      for (;;) {
        // Asking before it has rung would mean to wait for Python while the pass is at work in it.
        await rung
        rung = this.#ring()
        using news = this.engine.method('take')
        if (news.length > 0) return news.item(0)
      }
    } finally {
      clearInterval(alive)
    }
  }

  #ring(): Promise<void> {
    return new Promise((resolve) => {
      this.#rung = resolve
    })
  }

  /** Computes a block's experts and lets the pass go on to the next block, or to its end. */
  async #answer(request: PyRef): Promise<PyRef> {
    using what = request.item(0)
    using hiddenStates = request.item(1)
    using topkIds = request.item(2)
    using topkWeights = request.item(3)
    const steps = this.#block(what.toJS() as number, { hiddenStates, topkIds, topkWeights })
    try {
      for (let product: PyRef | undefined; ; ) {
        let answer: PyRef | unknown[]
        let done: boolean | undefined
        try {
          ;({ value: answer, done } = product === undefined ? steps.next() : steps.next(product))
        } catch (error) {
          // The pass ends with this error; nothing of it is left behind on Python's side.
          return await this.#next('fail', error instanceof Error ? error.message : String(error))
        }
        const next = await this.#next('resume', answer).finally(() => {
          if (done) (answer as PyRef).dispose()
        })
        if (done) return next
        product = next
      }
    } finally {
      steps.return(undefined as never)
    }
  }

  /** A block's output; first, the arguments of matrix products that wait. */
  *#block(layer: number, args: MoeForwardArguments): Generator<unknown[], PyRef, PyRef> {
    const experts = this.#layers[layer]!
    // A product that waits is the pass's own work: here it would hold up the event loop, and on any third thread torch
    // would start as many threads again.
    return experts.waits ? yield* experts.steps(args) : experts.forward(args)
  }

  #layer(described: PyRef, { numerics, cudaGraphTokens = this.slots }: ModelOptions): MoeLayer {
    using layer = described
    const part = (name: string): PyRef | undefined => {
      using there = layer.method('__contains__', name)
      if (there.toJS() !== true) return undefined
      const value = layer.item(name)
      this.#weights.push(value)
      return value
    }
    const [w13, w2] = [part('w13')!, part('w2')!]
    const [w13Bias, w2Bias, activation] = [part('w13_bias'), part('w2_bias'), part('activation')]
    return moeLayer({ w13, w2, w13Bias, w2Bias, activation, numerics, cudaGraphTokens })
  }

  /** Lets go of the model. No pass may be under way. */
  async close(): Promise<void> {
    this.#unlisten()
    for (const each of [...this.#layers, ...this.#weights]) each.dispose()
    const closed = await this.engine.methodAsync('close')
    closed.dispose()
    this.engine.dispose()
  }
}

/** Says which mode a text means. */
export function kernelMode(text: unknown): KernelMode {
  const mode = kernelModes.find((each) => each === text)
  if (mode !== undefined) return mode
  throw new EpmoeError({
    code: 'ERR_VALUE',
    op: 'serve',
    argument: 'mode',
    expected: kernelModes.join(', '),
    received: JSON.stringify(text) ?? 'nothing',
  })
}
