import type { Wish } from './generation.js'
import type { Message, ModelFacts } from './model.js'
import { ApiError } from './problems.js'

/** Fields of a request body that both kinds of completion have, after validation. */
interface Common {
  model: string
  max_tokens?: number | null
  temperature?: number | null
  top_p?: number | null
  seed?: number | null
  stop?: string | string[] | null
  stream?: boolean | null
  stream_options?: { include_usage?: boolean } | null
}

export interface CompletionBody extends Common {
  prompt: string | number[] | [string]
  logprobs?: number | null
}

export interface ChatBody extends Common {
  messages: { role: string; content: string | { type: 'text'; text: string }[] }[]
  max_completion_tokens?: number | null
  logprobs?: boolean | null
  top_logprobs?: number | null
}

const maxAlternatives = 20
/** Tokens of a text completion that asks for no number, as OpenAI has it. */
const defaultTextTokens = 16
const text = { type: 'string', minLength: 1, maxLength: 256 }
const integer = (minimum: number, maximum: number) => ({ type: ['integer', 'null'], minimum, maximum })
/** A parameter of OpenAI's that is not supported, but for the values that ask for nothing. */
const only = (...values: unknown[]) => ({ enum: [...values, null] })
/** `description` is what a client is told to be expected when it is none of these. */
const anyOf = (description: string, ...schemas: object[]) => ({ description, anyOf: schemas })
const nothing = { type: 'null' }

const common = {
  model: { type: 'string', minLength: 1 },
  max_tokens: integer(1, Number.MAX_SAFE_INTEGER),
  temperature: { type: ['number', 'null'], minimum: 0, maximum: 2 },
  top_p: { type: ['number', 'null'], exclusiveMinimum: 0, maximum: 1 },
  seed: integer(Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER),
  stop: anyOf('a string of 1 to 256 characters, or a list of at most 4', nothing, text, {
    type: 'array',
    items: text,
    maxItems: 4,
  }),
  stream: { type: ['boolean', 'null'] },
  stream_options: {
    type: ['object', 'null'],
    properties: { include_usage: { type: 'boolean' }, include_obfuscation: { const: false } },
    additionalProperties: false,
  },
  user: { type: ['string', 'null'] },
  n: only(1),
  presence_penalty: only(0),
  frequency_penalty: only(0),
  logit_bias: anyOf('{}, as it is not supported', nothing, { type: 'object', maxProperties: 0 }),
}

/** JSON schemas of the bodies. What is not listed is refused by name. */
export const completionSchema = {
  type: 'object',
  required: ['model', 'prompt'],
  additionalProperties: false,
  properties: {
    ...common,
    prompt: anyOf(
      'a text, a list of one, or a list of tokens, none of them empty',
      { type: 'string', minLength: 1 },
      { type: 'array', items: { type: 'string', minLength: 1 }, minItems: 1, maxItems: 1 },
      { type: 'array', items: { type: 'integer', minimum: 0 }, minItems: 1 },
    ),
    logprobs: integer(0, maxAlternatives),
    best_of: only(1),
    echo: only(false),
    suffix: only(),
  },
}

export const chatSchema = {
  type: 'object',
  required: ['model', 'messages'],
  additionalProperties: false,
  properties: {
    ...common,
    messages: {
      type: 'array',
      minItems: 1,
      items: {
        type: 'object',
        required: ['role', 'content'],
        additionalProperties: false,
        properties: {
          role: { enum: ['system', 'developer', 'user', 'assistant'] },
          content: anyOf(
            'a string, or a list of {"type": "text", "text": …}',
            { type: 'string' },
            {
              type: 'array',
              minItems: 1,
              items: {
                type: 'object',
                required: ['type', 'text'],
                additionalProperties: false,
                properties: { type: { const: 'text' }, text: { type: 'string' } },
              },
            },
          ),
        },
      },
    },
    max_completion_tokens: integer(1, Number.MAX_SAFE_INTEGER),
    logprobs: { type: ['boolean', 'null'] },
    top_logprobs: integer(0, maxAlternatives),
    response_format: anyOf('{"type": "text"}, as no other is supported', nothing, {
      type: 'object',
      properties: { type: { const: 'text' } },
      required: ['type'],
      additionalProperties: false,
    }),
  },
}

/** What of a body concerns the text: messages, a text, or its tokens. */
export type Input = { text: string } | { messages: Message[] } | { tokens: number[] }

export function completionInput(body: CompletionBody, facts: ModelFacts): Input {
  const { prompt } = body
  if (typeof prompt === 'string') return { text: wellFormed(prompt) }
  const [first] = prompt
  if (typeof first === 'string') return { text: wellFormed(first) }
  const wrong = (prompt as number[]).find((token) => token >= facts.vocabulary)
  if (wrong === undefined) return { tokens: prompt as number[] }
  throw new ApiError(400, `prompt: token ${wrong} is not in the model's vocabulary of ${facts.vocabulary}`, 'prompt')
}

export function chatInput(body: ChatBody, facts: ModelFacts): Input {
  if (!facts.chat) {
    throw new ApiError(400, 'this model has no chat template; use /v1/completions', 'messages')
  }
  const messages = body.messages.map(({ role, content }) => ({
    role,
    content: wellFormed(typeof content === 'string' ? content : content.map((part) => part.text).join('')),
  }))
  return { messages }
}

/** JSON can spell halves of characters, which are no text: each becomes a replacement character. */
function wellFormed(text: string): string {
  return Buffer.from(text).toString()
}

/** The wish without the length, which depends on the prompt. */
export function wishOf(body: CompletionBody | ChatBody): Omit<Wish, 'maxTokens'> {
  return {
    temperature: body.temperature ?? 1,
    topP: body.top_p ?? 1,
    seed: body.seed ?? undefined,
    stop: (typeof body.stop === 'string' ? [body.stop] : (body.stop ?? [])).map(wellFormed),
    logprobs: alternatives(body),
  }
}

function alternatives(body: CompletionBody | ChatBody): number | undefined {
  if (typeof body.logprobs === 'number') return body.logprobs
  const top = 'messages' in body ? (body.top_logprobs ?? undefined) : undefined
  if (body.logprobs === true) return top ?? 0
  if (top === undefined) return undefined
  throw new ApiError(400, 'top_logprobs: set logprobs to true as well', 'top_logprobs')
}

/** How many tokens are asked for, and by which parameter. */
function askedOf(body: CompletionBody | ChatBody): { asked: number | undefined; param: string } {
  if ('prompt' in body) return { asked: body.max_tokens ?? defaultTextTokens, param: 'max_tokens' }
  const param = typeof body.max_completion_tokens === 'number' ? 'max_completion_tokens' : 'max_tokens'
  return { asked: body[param] ?? undefined, param }
}

/** How many tokens may come, within what the server and the model allow. */
export function maxTokensOf(body: CompletionBody | ChatBody, prompt: number[], context: number, limit: number): number {
  const { asked, param } = askedOf(body)
  const room = context - prompt.length
  if (prompt.length === 0) throw new ApiError(400, 'the prompt has no tokens', 'prompt')
  if (room < 1 || (asked !== undefined && asked > room)) throw beyondContext(body, `${prompt.length}`, context)
  if (asked !== undefined && asked > limit) {
    throw new ApiError(
      400,
      `${param}: expected ${limit} or fewer, which is this server's limit, received ${asked}`,
      param,
    )
  }
  return Math.min(asked ?? Number.POSITIVE_INFINITY, room, limit)
}

export function beyondContext(body: CompletionBody | ChatBody, prompt: string, context: number): ApiError {
  const { asked = 1, param } = askedOf(body)
  const sum = `${prompt} tokens of prompt and ${asked} to generate`
  const message = `the model's context is ${context} tokens, received ${sum}`
  return new ApiError(400, message, param, 'context_length_exceeded')
}
