import { nativeError, PythonError } from '../errors.js'
import { native } from '../native.js'
import { decode, Encoder, KeywordArguments } from './encode.js'
import { Executor, JobArgument, type JobOptions } from './executor.js'
import type { Pymport, PyObject } from './pymport.js'
import { PyRef } from './ref.js'

/**
 * The one path between JavaScript and Python: csrc/node/crossing.cc brings arguments over exactly and counts every
 * reference, where pymport's own calls do neither, and no exception crosses. python/epmoe/_bridge.py is the other end.
 */
export class Runtime {
  readonly #pymport: Pymport
  readonly #table: PyObject
  /** Addresses of the bridge's functions. */
  readonly #operations = new Map<string, number>()
  /** As many as calls are under way at most: an argument may need a call of its own. */
  readonly #encoders: Encoder[] = []
  /** Errors thrown by JavaScript functions that Python called, until they come back; Python may also swallow them. */
  readonly #thrown = new Map<string, unknown>()
  #lastToken = 0
  readonly executor = new Executor(this)

  constructor(pymport: Pymport, bridge: PyObject) {
    this.#pymport = pymport
    this.#table = bridge.get('operations')
    native().crossing.start(Number(bridge.get('guard').id), Number(bridge.get('raise_error').id))
  }

  /** Runs an operation of the bridge and returns its result. */
  run(operation: string, ...args: unknown[]): PyRef {
    return this.#cross(this.#operation(operation), args, (result, kind) => {
      if (typeof result === 'string') throw this.#failure(result)
      return new PyRef(this, result, kind)
    })
  }

  /** Runs an operation and converts its result. */
  value(operation: string, ...args: unknown[]): unknown {
    return this.#cross(this.#operation('value'), [operation, ...args], (result, kind) => {
      if (kind !== told) throw this.#failure(result as string)
      return decode(result as string)
    })
  }

  #cross<Result>(address: number, args: unknown[], finish: (result: number | string, kind: number) => Result): Result {
    const encoder = this.#encoders.pop() ?? new Encoder(this)
    let result: number | string
    let kind: number
    try {
      encoder.write(args)
      result = native().crossing.call(address, encoder.tokens, encoder.texts)
      kind = encoder.tokens[0]!
    } finally {
      encoder.clear()
      this.#encoders.push(encoder)
    }
    return finish(result, kind)
  }

  #operation(name: string): number {
    const known = this.#operations.get(name)
    if (known !== undefined) return known
    const address = Number(this.#table.item(this.#pymport.PyObject.string(name)).id)
    this.#operations.set(name, address)
    return address
  }

  apply(callable: PyRef, args: unknown[]): PyRef {
    return this.run('call', callable, ...operands(args))
  }

  applyMethod(object: PyRef, name: string, args: unknown[]): PyRef {
    return this.run('method', object, name, ...operands(args))
  }

  /** The same on the executor's thread. */
  applyAsync(callable: PyRef, args: unknown[]): Promise<PyRef> {
    const [given, options] = withoutJob(args)
    return this.executor.submit('call', [callable, ...operands(given)], options)
  }

  applyMethodAsync(object: PyRef, name: string, args: unknown[]): Promise<PyRef> {
    const [given, options] = withoutJob(args)
    return this.executor.submit('method', [object, name, ...operands(given)], options)
  }

  toJS(ref: PyRef): unknown {
    return this.value('same', ref)
  }

  memoryview(buffer: Buffer): PyObject {
    return this.#pymport.PyObject.memoryview(buffer)
  }

  isPyObject(value: object): value is PyObject {
    return value instanceof this.#pymport.PyObject
  }

  /** A Python callable that calls `fn` with its positional arguments as PyRefs and returns what it returns. */
  callback(fn: (...args: PyRef[]) => unknown): PyRef {
    const function_ = this.#pymport.PyObject.func((borrowed: PyObject) => {
      const address = Number(borrowed.id)
      native().crossing.hold(address)
      using request = new PyRef(this, address, 0)
      try {
        using args = request.get('args')
        this.run('answer', request, fn(...args)).dispose()
      } catch (error) {
        const token = String(++this.#lastToken)
        this.#thrown.set(token, error)
        if (this.#thrown.size > 1000) this.#thrown.delete(this.#thrown.keys().next().value as string)
        const message = error instanceof Error ? `${error.name}: ${error.message}` : String(error)
        this.run('fail', request, message, token).dispose()
      }
      return 0 // null would lose a reference of None on its way back
    })
    return this.run('callback', function_)
  }

  #failure(text: string): PythonError {
    const details = JSON.parse(text) as Failure
    // The error of a JavaScript function that Python called, or epmoe's own Python error in this side's terms.
    const cause = details.epmoe === undefined ? this.#thrown.get(details.token) : nativeError(...details.epmoe)
    this.#thrown.delete(details.token)
    return new PythonError(
      details.type,
      details.message,
      details.traceback,
      cause === undefined ? undefined : { cause },
    )
  }
}

/** What the bridge tells of an exception. */
interface Failure {
  type: string
  message: string
  traceback: string
  token: string
  /** Of an EpmoeError: code, op, argument, expected, received, hint. */
  epmoe?: Parameters<typeof nativeError>
}

/** What the addon says of a text that is no failure. */
const told = -2

/** A call's operands as the bridge takes them: positional and keyword arguments. */
function operands(args: unknown[]): [unknown[], Record<string, unknown>] {
  const last = args.at(-1)
  return last instanceof KeywordArguments ? [args.slice(0, -1), last.values] : [args, noKeywords]
}

const noKeywords = {}

function withoutJob(args: unknown[]): [unknown[], JobOptions] {
  const last = args.at(-1)
  return last instanceof JobArgument ? [args.slice(0, -1), last.options] : [args, {}]
}
