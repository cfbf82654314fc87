import { nativeError, PythonError } from '../errors.js'
import { decode, Encoder, KeywordArguments } from './encode.js'
import { Executor, JobArgument } from './executor.js'
import type { Pymport, PyObject } from './pymport.js'
import { PyRef } from './ref.js'

/**
 * The one path between JavaScript and Python. It hands pymport nothing but strings, lists and objects, and never lets an
 * exception cross: see python/epmoe/_bridge.py for the other end.
 */
export class Runtime {
  readonly #pymport: Pymport
  readonly #call: PyObject
  readonly #clear: PyObject
  readonly #value: PyObject
  readonly #noObjects: PyObject
  readonly #operations = new Map<string, PyObject>()
  /** Errors thrown by JavaScript functions that Python called, until they come back; Python may also swallow them. */
  readonly #thrown = new Map<string, unknown>()
  #lastToken = 0
  readonly executor = new Executor(this)

  constructor(pymport: Pymport, bridge: PyObject) {
    this.#pymport = pymport
    this.#call = bridge.get('call')
    this.#clear = bridge.get('clear')
    this.#value = bridge.get('value')
    this.#noObjects = pymport.PyObject.list([])
  }

  /** Runs an operation of the bridge and returns its result boxed. */
  run(operation: string, ...args: unknown[]): PyRef {
    const box = this.#call.call(...this.#encoded(operation, args))
    const facts = this.#field(box, 'facts')
    if (facts === '') throw this.#failure(this.#field(box, 'text'))
    return new PyRef(this, box, facts)
  }

  /** What the bridge's functions take: the operation's name, the arguments as text, and the objects that it refers to. */
  #encoded(operation: string, args: unknown[]): PyObject[] {
    const encoder = new Encoder(this)
    const { PyObject } = this.#pymport
    const text = PyObject.string(encoder.text(args))
    return [
      this.#operation(operation),
      text,
      encoder.objects.length === 0 ? this.#noObjects : PyObject.list(encoder.objects),
    ]
  }

  /** Each name as a Python object that is made once: making and finalising one is a good part of a call's time. */
  #operation(name: string): PyObject {
    const known = this.#operations.get(name)
    if (known !== undefined) return known
    const made = this.#pymport.PyObject.string(name)
    this.#operations.set(name, made)
    return made
  }

  /** Runs an operation and converts its result. */
  value(operation: string, ...args: unknown[]): unknown {
    const text = this.#value.call(...this.#encoded(operation, args)).toJS() as string
    if (text.startsWith('!')) throw this.#failure(text.slice(1))
    return decode(text)
  }

  apply(callable: PyRef, args: unknown[]): PyRef {
    return this.run('call', ...callOf(callable, args))
  }

  /** The same on the executor's thread. */
  applyAsync(callable: PyRef, args: unknown[]): Promise<PyRef> {
    const last = args.at(-1)
    const options = last instanceof JobArgument ? last.options : {}
    return this.executor.submit(
      'call',
      callOf(callable, last instanceof JobArgument ? args.slice(0, -1) : args),
      options,
    )
  }

  toJS(ref: PyRef): unknown {
    return this.value('same', ref)
  }

  /** A string attribute of a box; a failure has no facts. */
  #field(box: PyObject, name: 'text' | 'facts'): string {
    return box.get(name).toJS() as string
  }

  clear(box: PyObject): void {
    this.#clear.call(box)
  }

  memoryview(buffer: Buffer): PyObject {
    return this.#pymport.PyObject.memoryview(buffer)
  }

  isPyObject(value: object): value is PyObject {
    return value instanceof this.#pymport.PyObject
  }

  /** A Python callable that calls `fn` with its positional arguments as PyRefs and returns what it returns. */
  callback(fn: (...args: PyRef[]) => unknown): PyObject {
    return this.#pymport.PyObject.func((request: PyObject) => {
      try {
        const [args] = [...new PyRef(this, request, this.#field(request, 'facts'))] as [PyRef]
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

/** A call's operands as the bridge takes them: callable, positional and keyword arguments. */
function callOf(callable: PyRef, args: unknown[]): unknown[] {
  const last = args.at(-1)
  const keywords = last instanceof KeywordArguments ? last.values : {}
  return [callable, last instanceof KeywordArguments ? args.slice(0, -1) : args, keywords]
}
