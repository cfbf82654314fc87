import { randomUUID } from 'node:crypto'
import type { Generation, Piece, TokenLogprob } from './generation.js'
import type { ChatBody, CompletionBody } from './requests.js'

/** The two kinds of completion differ in the form of their answers only. */
export interface Form {
  /** The whole answer. */
  whole(text: string, logprobs: TokenLogprob[], generation: Generation): object
  /** What a stream begins with, if anything. */
  opening(): object[]
  chunk(piece: Piece): object
  closing(generation: Generation): object
  /** The chunk behind the last when `include_usage` is on. */
  usage(generation: Generation): object
}

export function usageOf({ prompt, completionTokens }: Generation) {
  return {
    prompt_tokens: prompt.length,
    completion_tokens: completionTokens,
    total_tokens: prompt.length + completionTokens,
  }
}

/** Chunks have the field as soon as it is asked for; whoever knows the usage writes over it. */
function usageToCome({ stream_options }: CompletionBody | ChatBody) {
  return stream_options?.include_usage === true ? { usage: null } : {}
}

export function textForm(model: string, body: CompletionBody): Form {
  const id = `cmpl-${randomUUID()}`
  const head = { id, object: 'text_completion', created: now(), model, ...usageToCome(body) }
  const told = (logprobs: TokenLogprob[]) => (typeof body.logprobs === 'number' ? textLogprobs(logprobs) : null)
  const choice = (text: string, logprobs: TokenLogprob[], finish: string | null) => [
    { index: 0, text, logprobs: told(logprobs), finish_reason: finish },
  ]
  return {
    whole: (text, logprobs, generation) => ({
      ...head,
      choices: choice(text, logprobs, generation.finish ?? null),
      usage: usageOf(generation),
    }),
    opening: () => [],
    chunk: (piece) => ({ ...head, choices: choice(piece.text, piece.logprobs, null) }),
    closing: (generation) => ({ ...head, choices: choice('', [], generation.finish ?? null) }),
    usage: (generation) => ({ ...head, choices: [], usage: usageOf(generation) }),
  }
}

export function chatForm(model: string, body: ChatBody): Form {
  const withLogprobs = body.logprobs === true
  const id = `chatcmpl-${randomUUID()}`
  const chunk = { id, object: 'chat.completion.chunk', created: now(), model, ...usageToCome(body) }
  const told = (logprobs: TokenLogprob[]) => (withLogprobs ? { content: logprobs.map(chatLogprob) } : null)
  const choice = (delta: object, finish: string | null, logprobs: TokenLogprob[] = []) => [
    { index: 0, delta, logprobs: told(logprobs), finish_reason: finish },
  ]
  return {
    whole: (content, logprobs, generation) => ({
      ...chunk,
      object: 'chat.completion',
      choices: [
        {
          index: 0,
          message: { role: 'assistant', content, refusal: null },
          logprobs: withLogprobs ? { ...told(logprobs), refusal: null } : null,
          finish_reason: generation.finish ?? null,
        },
      ],
      usage: usageOf(generation),
    }),
    opening: () => [{ ...chunk, choices: choice({ role: 'assistant', content: '' }, null) }],
    chunk: (piece) => ({ ...chunk, choices: choice({ content: piece.text }, null, piece.logprobs) }),
    closing: (generation) => ({ ...chunk, choices: choice({}, generation.finish ?? null) }),
    usage: (generation) => ({ ...chunk, choices: [], usage: usageOf(generation) }),
  }
}

/** One event of a stream. */
export function event(data: object): string {
  return `data: ${JSON.stringify(data)}\n\n`
}

function now(): number {
  return Math.floor(Date.now() / 1000)
}

function textLogprobs(logprobs: TokenLogprob[]) {
  return {
    tokens: logprobs.map((each) => each.token),
    token_logprobs: logprobs.map((each) => each.logprob),
    // Different tokens may be the same text, bytes that are no character for one: the likeliest is told.
    top_logprobs: logprobs.map((each) =>
      Object.fromEntries(each.top.toReversed().map((one) => [one.token, one.logprob])),
    ),
    text_offset: logprobs.map((each) => each.offset),
  }
}

function chatLogprob({ token, logprob, bytes, top }: TokenLogprob) {
  return { token, logprob, bytes, top_logprobs: top }
}
