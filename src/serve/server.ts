import type { AddressInfo } from 'node:net'
import { basename } from 'node:path'
import { PassThrough, Readable } from 'node:stream'
import { setTimeout } from 'node:timers/promises'
import fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import { chatForm, event, type Form, textForm } from './answers.js'
import { Arrivals } from './arrivals.js'
import { Batcher, type BatcherOptions, Refusal } from './batcher.js'
import type { Generation, Piece, TokenLogprob } from './generation.js'
import { Live } from './live.js'
import { Metrics, type RequestOutcome } from './metrics.js'
import { kernelMode, kernelModes, type ModelOptions, ServedModel } from './model.js'
import { page, pagePolicy } from './page.js'
import { ApiError, problemOf } from './problems.js'
import {
  type ChatBody,
  type CompletionBody,
  chatInput,
  chatSchema,
  completionInput,
  completionSchema,
  type Input,
  maxTokensOf,
  wishOf,
} from './requests.js'

export interface ServeOptions extends ModelOptions, BatcherOptions {
  /** Default `127.0.0.1`: there is no authentication. */
  host?: string | undefined
  /** 0 takes a free one. Default 8000. */
  port?: number | undefined
  /** What clients call the model. Default: its name, or its folder's. */
  name?: string | undefined
  /** Bytes of a request's body. Default 1 MiB. */
  bodyLimit?: number | undefined
  /** Tokens that one request may ask for. Default: as many as the context has room for. */
  tokenLimit?: number | undefined
  /** Called with what went wrong inside. Default: printed on stderr. */
  onError?: ((error: unknown) => void) | undefined
}

/** Tokens of a text completion that asks for no number, as OpenAI has it. */
const defaultTextTokens = 16
/** How long a client may take to read the rest of an answer when the server ends. */
const flushSeconds = 5
/** After so many failed forward passes in a row the server says that it is not healthy. */
const tooManyFailures = 3

/** A running server. */
export class Server {
  readonly model: ServedModel
  readonly batcher: Batcher
  readonly metrics: Metrics
  readonly name: string
  readonly #app: FastifyInstance
  readonly #live: Live
  readonly #arrivals: Arrivals
  readonly #options: ServeOptions
  readonly #watchers = new Set<PassThrough>()
  readonly #answering = new Set<object>()
  #closing: Promise<void> | undefined

  /** Made by serve(). */
  constructor(model: ServedModel, options: ServeOptions) {
    this.model = model
    this.#options = options
    this.name = options.name ?? basename(options.model ?? 'qwen3-moe')
    this.metrics = new Metrics(() => ({
      running: this.batcher.running,
      waiting: this.batcher.waiting,
      mode: model.mode,
    }))
    this.#arrivals = new Arrivals(this.metrics)
    this.batcher = new Batcher(model, this.metrics, options)
    this.#live = new Live(this.name, model, this.batcher, this.metrics)
    this.#app = fastify({
      bodyLimit: options.bodyLimit ?? 1 << 20,
      // A client has this long for its request; answers take as long as they take.
      requestTimeout: 30_000,
      forceCloseConnections: true,
      ajv: {
        customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false, allowUnionTypes: true },
      },
    })
    this.#routes()
  }

  /** `http://127.0.0.1:8000` */
  get url(): string {
    const { address, port, family } = this.#app.server.address() as AddressInfo
    return `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`
  }

  async listen(): Promise<void> {
    await this.#app.listen({ host: this.#options.host ?? '127.0.0.1', port: this.#options.port ?? 8000 })
  }

  /**
   * Takes no more requests, finishes those that it has, and lets go of the model. After `graceSeconds` (default: no end)
   * what is left is given up.
   */
  close({ graceSeconds = Number.POSITIVE_INFINITY } = {}): Promise<void> {
    this.#closing ??= this.#close(graceSeconds)
    return this.#closing
  }

  async #close(graceSeconds: number): Promise<void> {
    const drained = this.batcher.drain()
    if (Number.isFinite(graceSeconds)) {
      const given = new AbortController()
      const late = setTimeout(graceSeconds * 1000, undefined, { signal: given.signal }).then(
        () => this.batcher.abandon(),
        () => undefined,
      )
      await Promise.race([drained, late])
      given.abort()
    }
    await drained
    for (const watcher of this.#watchers) watcher.end()
    await this.#answersOut()
    await this.#app.close()
    await this.model.close()
  }

  /** Waits for the last bytes of answers, but not for clients that do not read them. */
  async #answersOut(): Promise<void> {
    const deadline = performance.now() + flushSeconds * 1000
    while (this.#answering.size > 0 && performance.now() < deadline) await setTimeout(10)
  }

  #routes(): void {
    const app = this.#app
    app.addHook('onRequest', (_, { raw }, done) => {
      this.#answering.add(raw)
      raw.once('close', () => this.#answering.delete(raw))
      done()
    })
    app.setErrorHandler((error, _, reply) => this.#refuse(reply, error))
    app.setNotFoundHandler((request, reply) =>
      this.#refuse(reply, new ApiError(404, `there is no ${request.method} ${request.url.split('?')[0]}`)),
    )
    app.get('/', (_, reply) =>
      reply.type('text/html; charset=utf-8').header('content-security-policy', pagePolicy).send(page),
    )
    app.get('/events', (_, reply) => this.#watch(reply))
    app.get('/healthz', (_, reply) => this.#health(reply))
    app.get('/metrics', async (_, reply) =>
      reply.type(this.metrics.registry.contentType).send(await this.metrics.registry.metrics()),
    )
    app.get('/mode', () => ({ mode: this.model.mode }))
    const modeSchema = {
      type: 'object',
      required: ['mode'],
      additionalProperties: false,
      properties: { mode: { enum: kernelModes } },
    }
    app.put<{ Body: { mode: string } }>('/mode', { schema: { body: modeSchema } }, (request) => {
      this.model.mode = kernelMode(request.body.mode)
      this.#live.tell()
      return { mode: this.model.mode }
    })
    app.get('/v1/models', () => ({ object: 'list', data: [this.#described()] }))
    app.get<{ Params: { id: string } }>('/v1/models/:id', (request) => {
      this.#checkName(request.params.id)
      return this.#described()
    })
    const onRequest = (_: FastifyRequest, { raw }: FastifyReply, done: () => void) => {
      this.#arrivals.add(raw)
      done()
    }
    const text = { onRequest, schema: { body: completionSchema } }
    app.post<{ Body: CompletionBody }>('/v1/completions', text, ({ body }, reply) => {
      const input = () => completionInput(body, this.model.facts)
      const form = textForm(this.name, typeof body.logprobs === 'number')
      return this.#complete(body, input, body.max_tokens ?? defaultTextTokens, form, reply)
    })
    const chat = { onRequest, schema: { body: chatSchema } }
    app.post<{ Body: ChatBody }>('/v1/chat/completions', chat, ({ body }, reply) => {
      const input = () => chatInput(body, this.model.facts)
      const asked = body.max_completion_tokens ?? body.max_tokens ?? undefined
      return this.#complete(body, input, asked, chatForm(this.name, body.logprobs === true), reply)
    })
  }

  async #complete(
    body: CompletionBody | ChatBody,
    input: () => Input,
    asked: number | undefined,
    form: Form,
    reply: FastifyReply,
  ): Promise<unknown> {
    this.#checkName(body.model)
    const generation = await this.#start(body, input(), asked, reply)
    if (body.stream !== true) return this.#whole(generation, form)
    const pieces = generation[Symbol.asyncIterator]()
    // An error before the first token still gets a status of its own.
    const first = await pieces.next()
    const stream = Readable.from(this.#stream(first, pieces, generation, form, body.stream_options?.include_usage))
    return reply.header('content-type', 'text/event-stream').header('cache-control', 'no-cache').send(stream)
  }

  async #start(
    body: CompletionBody | ChatBody,
    input: Input,
    asked: number | undefined,
    { raw }: FastifyReply,
  ): Promise<Generation> {
    const { facts } = this.model
    const place = this.batcher.reserve()
    try {
      const prompt = 'tokens' in input ? input.tokens : await this.model.encode(input)
      const limit = this.#options.tokenLimit ?? facts.context
      const maxTokens = maxTokensOf(asked, prompt, facts.context, limit)
      if (raw.destroyed) throw new ApiError(400, 'the client has left')
      const generation = place.start(prompt, { ...wishOf(body), maxTokens })
      this.#arrivals.generating(raw)
      // When the connection ends after the answer, nobody takes notice any more.
      raw.once('close', () => generation.cancel())
      return generation
    } finally {
      place.release()
    }
  }

  async #whole(generation: Generation, form: Form): Promise<object> {
    let text = ''
    const logprobs: TokenLogprob[] = []
    for await (const piece of generation) {
      text += piece.text
      logprobs.push(...piece.logprobs)
    }
    if (generation.outcome === 'cancelled')
      throw new ApiError(503, 'the server is shutting down', null, 'shutting_down')
    return form.whole(text, logprobs, generation)
  }

  async *#stream(
    first: IteratorResult<Piece, void>,
    pieces: AsyncGenerator<Piece, void>,
    generation: Generation,
    form: Form,
    usage = false,
  ): AsyncGenerator<string, void> {
    try {
      for (const opening of form.opening()) yield event(opening)
      for (let next = first; !next.done; next = await pieces.next()) yield event(form.chunk(next.value))
      if (generation.outcome === 'cancelled')
        throw new ApiError(503, 'the server is shutting down', null, 'shutting_down')
      yield event(form.closing(generation))
      if (usage) yield event(form.usage(generation))
      yield 'data: [DONE]\n\n'
    } catch (error) {
      this.#report(error)
      yield event(problemOf(error).body)
    } finally {
      generation.cancel()
    }
  }

  #watch(reply: FastifyReply): FastifyReply {
    const stream = new PassThrough()
    const stop = this.#live.listen((text) => {
      // Whoever reads slower than once a second misses some.
      if (!stream.writableNeedDrain) stream.write(`data: ${text}\n\n`)
    })
    this.#watchers.add(stream)
    stream.once('close', () => {
      stop()
      this.#watchers.delete(stream)
    })
    return reply.header('content-type', 'text/event-stream').header('cache-control', 'no-cache').send(stream)
  }

  #health(reply: FastifyReply): FastifyReply {
    const { draining, failures, running, waiting } = this.batcher
    const status = draining ? 'draining' : failures >= tooManyFailures ? 'failing' : 'ok'
    return reply.status(status === 'ok' ? 200 : 503).send({ status, mode: this.model.mode, running, waiting })
  }

  #described() {
    return { id: this.name, object: 'model', created: 0, owned_by: 'epmoe' }
  }

  #checkName(name: string): void {
    if (name === this.name) return
    throw new ApiError(404, `model: expected ${this.name}, received ${name.slice(0, 80)}`, 'model', 'model_not_found')
  }

  #refuse(reply: FastifyReply, error: unknown): FastifyReply {
    const { status, headers, body } = problemOf(error)
    this.#arrivals.settle(reply.raw, outcomeOf(status, error))
    this.#report(error)
    return reply.status(status).headers(headers).send(body)
  }

  #report(error: unknown): void {
    if (problemOf(error).status !== 500) return
    if (this.#options.onError !== undefined) this.#options.onError(error)
    else console.error(error)
  }
}

function outcomeOf(status: number, error: unknown): RequestOutcome {
  if (error instanceof Refusal) return `refused_${error.reason}`
  return status < 500 ? 'refused_invalid' : 'error'
}

/** Loads a model and serves it over HTTP, with OpenAI's completions. */
export async function serve(options: ServeOptions = {}): Promise<Server> {
  const model = await ServedModel.load(options)
  const server = new Server(model, options)
  try {
    await server.listen()
  } catch (error) {
    await server.close()
    throw error
  }
  return server
}
