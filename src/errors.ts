/**
 * What went wrong and how to mend it. `code` is stable and meant to be matched on; the other fields say which argument
 * of which op was concerned, what would have been right and what came instead.
 */
export class EpmoeError extends Error {
  override readonly name: string = 'EpmoeError'
  readonly code: string
  /** The op, or the function, that was called: `postReorder`. Empty where none is concerned. */
  readonly op: string
  /** The argument's name as TypeScript spells it: `topkIds`. Empty where none is concerned. */
  readonly argument: string
  readonly expected: string
  readonly received: string
  readonly hint: string

  constructor(details: ErrorDetails, options?: ErrorOptions) {
    super(compose(details), options)
    this.code = details.code
    this.op = details.op ?? ''
    this.argument = details.argument ?? ''
    this.expected = details.expected ?? ''
    this.received = details.received
    this.hint = details.hint ?? ''
  }
}

export interface ErrorDetails {
  code: string
  op?: string
  argument?: string
  expected?: string
  received: string
  hint?: string
}

/** An exception that was raised by Python code. */
export class PythonError extends EpmoeError {
  override readonly name = 'PythonError'
  /** The exception's class, e.g. `ValueError`. */
  readonly pythonType: string
  /** `str(exception)`. */
  readonly pythonMessage: string
  /** The formatted traceback, causes included. */
  readonly traceback: string

  constructor(type: string, message: string, traceback: string, options?: ErrorOptions) {
    super({ code: 'ERR_PYTHON_EXCEPTION', received: message === '' ? type : `${type}: ${message}` }, options)
    this.pythonType = type
    this.pythonMessage = message
    this.traceback = traceback
  }
}

function compose({ code, op, argument, expected, received, hint }: ErrorDetails): string {
  const where = [op, argument].filter((part) => part !== undefined && part !== '').join(': ')
  const what = expected ? `expected ${expected}, received ${received}` : received
  const report = code === 'ERR_INTERNAL' ? 'This is a bug in epmoe: please report it with this message' : ''
  return `${where === '' ? '' : `${where}: `}${[what, hint, report].filter(Boolean).join('. ')}`
}

/** Python and C++ say `topk_ids`, TypeScript says `topkIds`. */
export function camelCase(name: string): string {
  return name.replace(/_([a-z0-9])/g, (_, letter: string) => letter.toUpperCase())
}

/** The same for names inside a sentence; float8_e4m3fn and functions such as resolve_neg() stay. */
export function camelCaseWords(text: string): string {
  return text.replace(/\b(?!float8_)[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b(?!\()/g, camelCase)
}

/** Builds the error for a failure that the native side describes in its own spelling. */
export function nativeError(
  code: string,
  op: string,
  argument: string,
  expected: string,
  received: string,
  hint: string,
): EpmoeError {
  // Parameter names inside sentences follow the caller's spelling too.
  return new EpmoeError({
    code,
    op: camelCase(op),
    argument: camelCase(argument),
    expected: camelCaseWords(expected),
    received: camelCaseWords(received),
    hint: camelCaseWords(hint),
  })
}

/** A value in a few words, for messages. */
export function describeValue(value: unknown): string {
  if (value === null) return 'null'
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value)
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value === 'function') return 'a function'
  if (typeof value !== 'object') return String(value)
  const name = Object.getPrototypeOf(value)?.constructor?.name
  if (Array.isArray(value)) return `an array of ${value.length}`
  return name === undefined || name === 'Object' ? 'a plain object' : `a ${name}`
}
