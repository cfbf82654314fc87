import { STATUS_CODES } from 'node:http'
import type { FastifyError } from 'fastify'
import { PythonError } from '../errors.js'
import { Refusal } from './batcher.js'

/** A request that cannot be served, as OpenAI's clients understand it. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly param: string | null = null,
    readonly code: string | null = null,
  ) {
    super(message)
  }
}

export interface Problem {
  status: number
  headers: Record<string, string>
  body: { error: { message: string; type: string; param: string | null; code: string | null } }
}

/** Any error as status, headers and body. What went wrong inside is told by its kind only. */
export function problemOf(error: unknown): Problem {
  if (error instanceof ApiError) return problem(error.status, error.message, error.param, error.code)
  if (error instanceof Refusal) {
    const [status, code] = error.reason === 'full' ? [429, 'rate_limit_exceeded'] : [503, 'shutting_down']
    return {
      ...problem(status, error.message, null, code),
      headers: { 'retry-after': String(error.retryAfterSeconds) },
    }
  }
  const { validation, statusCode, message } = error as Partial<FastifyError>
  if (validation !== undefined) return invalid(validation)
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) return problem(statusCode, message ?? '')
  const kind = error instanceof PythonError ? error.pythonType : 'error'
  return problem(500, `the model failed (${kind}); the server's log has more`, null, 'model_error')
}

/** What Node's HTTP parser says, with the status for it; 400 for the rest. */
const parserErrors: Record<string, [status: number, message: string]> = {
  ERR_HTTP_REQUEST_TIMEOUT: [408, 'the request did not come to its end in time'],
  HPE_HEADER_OVERFLOW: [431, 'the headers are too long'],
}

/** A request that is none has no response to go with: the whole answer, as it goes over the wire. */
export function parserAnswer({ code = '' }: NodeJS.ErrnoException): string {
  const { status, body } = problem(...(parserErrors[code] ?? [400, 'expected a request of HTTP/1.1']))
  const text = JSON.stringify(body)
  const headers = `content-type: application/json\r\ncontent-length: ${Buffer.byteLength(text)}\r\nconnection: close`
  return `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\n${headers}\r\n\r\n${text}`
}

type Invalid = NonNullable<FastifyError['validation']>[number] & { parentSchema?: { description?: string } }

function invalid(validation: Invalid[]): Problem {
  // Of several branches none is what was meant: their schema says in words what is expected.
  const described = validation.find(({ parentSchema }) => parentSchema?.description !== undefined)
  const first = described ?? validation[0]
  const path = first?.instancePath.slice(1).replaceAll('/', '.') ?? ''
  const { additionalProperty, missingProperty, allowedValues } = first?.params ?? {}
  const own = additionalProperty ?? missingProperty
  const param = [path, own].filter((part) => typeof part === 'string' && part !== '').join('.')
  if (additionalProperty !== undefined) return problem(400, `${param}: not supported`, param, 'unsupported_parameter')
  if (missingProperty !== undefined) return problem(400, `${param}: missing`, param, 'missing_parameter')
  const values = Array.isArray(allowedValues) ? `: ${allowedValues.map((each) => JSON.stringify(each)).join(', ')}` : ''
  const told = described ? `expected ${described.parentSchema?.description}` : `${first?.message ?? 'invalid'}${values}`
  return problem(400, `${param || 'body'}: ${told}`, param || null, 'invalid_value')
}

function problem(status: number, message: string, param: string | null = null, code: string | null = null): Problem {
  const type = status === 429 ? 'rate_limit_error' : status >= 500 ? 'server_error' : 'invalid_request_error'
  return { status, headers: {}, body: { error: { message, type, param, code } } }
}
