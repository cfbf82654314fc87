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

function invalid(validation: NonNullable<FastifyError['validation']>): Problem {
  const [first] = validation
  const path = first?.instancePath.slice(1).replaceAll('/', '.') ?? ''
  const { additionalProperty, missingProperty, allowedValues } = first?.params ?? {}
  const own = additionalProperty ?? missingProperty
  const param = [path, own].filter((part) => typeof part === 'string' && part !== '').join('.')
  if (additionalProperty !== undefined) return problem(400, `${param}: not supported`, param, 'unsupported_parameter')
  if (missingProperty !== undefined) return problem(400, `${param}: missing`, param, 'missing_parameter')
  const values = Array.isArray(allowedValues) ? `: ${allowedValues.map((each) => JSON.stringify(each)).join(', ')}` : ''
  return problem(400, `${param || 'body'}: ${first?.message ?? 'invalid'}${values}`, param || null, 'invalid_value')
}

function problem(status: number, message: string, param: string | null = null, code: string | null = null): Problem {
  const type = status === 429 ? 'rate_limit_error' : status >= 500 ? 'server_error' : 'invalid_request_error'
  return { status, headers: {}, body: { error: { message, type, param, code } } }
}
