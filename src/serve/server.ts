import { once } from 'node:events'
import type { ServerResponse } from 'node:http'
import { type AddressInfo, createServer } from 'node:net'
import { basename } from 'node:path'
import { PassThrough, Readable } from 'node:stream'
import { setTimeout } from 'node:timers/promises'
import fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import { EpmoeError } from '../errors.js'
import { startPython } from '../python/start.js'
import { chatForm, event, type Form, textForm } from './answers.js'
import { Arrivals } from './arrivals.js'
import { Batcher, type BatcherOptions, Refusal } from './batcher.js'
import { Connections } from './connections.js'
import type { Generation, Piece, TokenLogprob } from './generation.js'
import { Live } from './live.js'
import { Metrics, type RequestOutcome } from './metrics.js'
import { kernelMode, kernelModes, type ModelOptions, ServedModel } from './model.js'
import { page, pagePolicy } from './page.js'
import { ApiError, problemOf } from './problems.js'
import {
  beyondContext,
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
  /** How long a client may take for its request. Default 30. @internal */
  requestSeconds?: number | undefined
  /** How long it may read nothing of an answer that is ready. Default 60. @internal */
  unreadSeconds?: number | undefined
}

/** How long a client may take to read the rest of an answer when the server ends. */
const flushSeconds = 5
/** Milliseconds that a timer can wait for. */
const longestTimer = 2 ** 31 - 1
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
  readonly #unreadTime: number
  readonly #watchers = new Set<PassThrough>()
  readonly #connections = new Connections()
  #closing: Promise<void> | undefined

  /** Made by serve(). */
  constructor(model: ServedModel, options: ServeOptions) {
    this.model = model
    this.#options = options
    this.#unreadTime = (options.unreadSeconds ?? 60) * 1000
    this.name = options.name ?? basename(options.model ?? 'qwen3-moe')
    this.metrics = new Metrics(() => ({
      running: this.batcher.running,
      waiting: this.batcher.waiting,
      mode: model.mode,
    }))
    this.#arrivals = new Arrivals(this.metrics)
    this.batcher = new Batcher(model, this.metrics, options)
    this.#live = new Live(this.name, model, this.batcher, this.metrics)
    // For a request's headers and body together; answers take as long as they take.
    const requestTimeout = (options.requestSeconds ?? 30) * 1000
    this.#app = fastify({
      bodyLimit: options.bodyLimit ?? 1 << 20,
      requestTimeout,
      // What Fastify sets later leaves 60 s for headers, and Node, which applies the longer one, to look every 30 s.
      http: { requestTimeout, headersTimeout: requestTimeout, connectionsCheckingInterval: 1000 },
      // Ends a connection on which nothing moves, but for clients that wait for us: see #start.
      connectionTimeout: this.#unreadTime,
      forceCloseConnections: true,
      frameworkErrors: (error, _, reply) => void this.#refuse(reply, error),
      clientErrorHandler: (error, socket) => this.#connections.refuse(error, socket),
      ajv: {
        // verbose: errors have the schema, whose description they tell.
        customOptions: {
          coerceTypes: false,
          removeAdditional: false,
          useDefaults: false,
          allowUnionTypes: true,
          verbose: true,
        },
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
    await this.#app.listen(addressOf(this.#options))
  }

  /**
   * Takes no more requests, finishes those that it has, and lets go of the model. After `graceSeconds` (default: no end)
   * what is left is given up. The forward pass under way then has `passSeconds`; if it does not end, the model stays
   * and this rejects.
   */
  close({ graceSeconds = Number.POSITIVE_INFINITY, passSeconds = 30 } = {}): Promise<void> {
    this.#closing ??= this.#close(graceSeconds, passSeconds)
    return this.#closing
  }

  async #close(graceSeconds: number, passSeconds: number): Promise<void> {
    const drained = this.batcher.drain()
    let ended = await within(drained, graceSeconds)
    if (!ended) {
      this.batcher.abandon()
      ended = await within(drained, passSeconds)
    }
    for (const watcher of this.#watchers) watcher.end()
    await this.#connections.flush(flushSeconds)
    await this.#app.close()
    if (ended) return this.model.close()
    throw new EpmoeError({
      code: 'ERR_TIMEOUT',
      op: 'close',
      argument: 'passSeconds',
      expected: `the model to be done within ${passSeconds} s`,
      received: 'one still at work',
      hint: 'End the process, or allow more',
    })
  }

  #routes(): void {
    const app = this.#app
    app.addHook('onRequest', (_, { raw }, done) => {
      this.#connections.add(raw)
      done()
    })
    app.setErrorHandler((error, _, reply) => this.#refuse(reply, error))
    app.setNotFoundHandler((request, reply) =>
      this.#refuse(reply, new ApiError(404, `there is no ${request.method} ${request.url.split('?')[0]}`)),
    )
    app.get('/', (_, reply) =>
      reply.type('text/html; charset=utf-8').header('content-security-policy', pagePolicy).send(page),
    )
    // A HEAD would never end.
    app.get('/events', { exposeHeadRoute: false }, (_, reply) => this.#watch(reply))
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
    // A name may have slashes.
    app.get<{ Params: { '*': string } }>('/v1/models/*', (request) => {
      this.#checkName(request.params['*'])
      return this.#described()
    })
    const onRequest = (_: FastifyRequest, { raw }: FastifyReply, done: () => void) => {
      this.#arrivals.add(raw)
      done()
    }
    const text = { onRequest, schema: { body: completionSchema } }
    app.post<{ Body: CompletionBody }>('/v1/completions', text, ({ body }, reply) => {
      const input = () => completionInput(body, this.model.facts)
      const form = textForm(this.name, body)
      return this.#complete(body, input, form, reply)
    })
    const chat = { onRequest, schema: { body: chatSchema } }
    app.post<{ Body: ChatBody }>('/v1/chat/completions', chat, ({ body }, reply) => {
      const input = () => chatInput(body, this.model.facts)
      return this.#complete(body, input, chatForm(this.name, body), reply)
    })
  }

  async #complete(
    body: CompletionBody | ChatBody,
    input: () => Input,
    form: Form,
    reply: FastifyReply,
  ): Promise<unknown> {
    this.#checkName(body.model)
    const generation = await this.#start(body, input(), reply)
    if (body.stream !== true) return this.#whole(generation, form)
    const pieces = generation[Symbol.asyncIterator]()
    // An error before the first token still gets a status of its own.
    const first = await pieces.next()
    checkPresence(reply.raw)
    const stream = Readable.from(this.#stream(first, pieces, generation, form, body.stream_options?.include_usage))
    return reply.header('content-type', 'text/event-stream').header('cache-control', 'no-cache').send(stream)
  }

  async #start(body: CompletionBody | ChatBody, input: Input, { raw }: FastifyReply): Promise<Generation> {
    const { facts } = this.model
    const place = this.batcher.reserve()
    let generation: Generation | undefined
    raw.on('timeout', () => {
      // Either the client waits for us, or we for the client to read.
      if (generation?.outcome === undefined && !raw.writableEnded) raw.setTimeout(this.#unreadTime)
      else raw.destroy()
    })
    try {
      const left = new AbortController()
      // When the connection ends after the answer, nobody takes notice any more.
      raw.once('close', () => {
        left.abort(new ApiError(400, 'the client has left'))
        generation?.cancel()
      })
      const prompt = 'tokens' in input ? input.tokens : await this.model.encode(input, left.signal)
      if (typeof prompt === 'number') throw beyondContext(body, `at least ${prompt}`, facts.context)
      const limit = this.#options.tokenLimit ?? facts.context
      const maxTokens = maxTokensOf(body, prompt, facts.context, limit)
      checkPresence(raw)
      generation = place.start(prompt, { ...wishOf(body), maxTokens })
      this.#arrivals.generating(raw)
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
    // A stream breaks when its client leaves, which is no failure.
    if (!reply.raw.destroyed) this.#report(error)
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

function checkPresence(response: ServerResponse): void {
  if (response.destroyed) throw new ApiError(400, 'the client has left')
}

function addressOf({ host = '127.0.0.1', port = 8000 }: ServeOptions): { host: string; port: number } {
  return { host, port }
}

/** Rejects with Node's error when there is nothing to listen at. */
async function tryAddress(options: ServeOptions): Promise<void> {
  const probe = createServer().listen(addressOf(options))
  await once(probe, 'listening')
  probe.close()
  await once(probe, 'close')
}

/** Whether a promise is fulfilled within so many seconds; more than a timer can wait for are no limit. */
async function within(promise: Promise<void>, seconds: number): Promise<boolean> {
  const fulfilled = promise.then(() => true)
  if (seconds * 1000 > longestTimer) return fulfilled
  const over = new AbortController()
  const late = setTimeout(seconds * 1000, false, { signal: over.signal })
  return Promise.race([fulfilled, late]).finally(() => over.abort())
}

/** Loads a model and serves it over HTTP, with OpenAI's completions. */
export async function serve(options: ServeOptions = {}): Promise<Server> {
  await tryAddress(options) // before the model is loaded, which takes longer
  const model = await ServedModel.load(options)
  const server = new Server(model, options)
  // Every request inside may have a text to be encoded.
  const python = startPython()
  python.queueLimit = Math.max(python.queueLimit, server.batcher.capacity)
  try {
    await server.listen()
  } catch (error) {
    await server.close()
    throw error
  }
  return server
}
