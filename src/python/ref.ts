import { EpmoeError } from '../errors.js'
import { holdExternal } from '../external.js'
import { pythonRefs, registerAddresser } from '../foreign.js'
import { native } from '../native.js'
import { enterScope, leaveScope } from '../scope.js'
import { proxyOf } from './proxy.js'
import type { Runtime } from './runtime.js'

/**
 * A Python object. Attributes, calls and items go through one guarded path: exceptions arrive as PythonError, arguments
 * keep their types. Let go of large ones with dispose() or `using`.
 */
export class PyRef implements Disposable {
  readonly #runtime: Runtime
  readonly #held: Held
  #disposed = false

  /** Made by the bridge, from a reference to an object that is JavaScript's from now on. */
  constructor(runtime: Runtime, address: number, bytes: number) {
    this.#runtime = runtime
    this.#held = { address, bytes }
    count(1, bytes)
    registry.register(this, this.#held, this)
    enterScope(this)
  }

  /** `id(object)`. */
  get address(): number {
    if (!this.#disposed) return this.#held.address
    throw new EpmoeError({
      code: 'ERR_DISPOSED',
      op: 'PyRef',
      expected: 'a live Python object',
      received: 'one that was disposed',
      hint: 'Keep it until its last use',
    })
  }

  get disposed(): boolean {
    return this.#disposed
  }

  /** `object.name` */
  get(name: string): PyRef {
    return this.#runtime.run('get', this, name)
  }

  /** `hasattr(object, name)` */
  has(name: string): boolean {
    return this.#runtime.value('has', this, name) as boolean
  }

  /**
   * The object as an ordinary value: attributes as properties, calls as calls. `Shape` says what is known of it, and
   * what an editor completes: `module.proxy<{ add(a: number, b: number): number }>().add(1, 2)`.
   */
  proxy<Shape extends object = Record<string, unknown>>(): Shape {
    return proxyOf<Shape>(this)
  }

  /** @internal The value of numbers, strings, booleans, None and lists or tuples of them; undefined for the rest. */
  plain(): { value: unknown } | undefined {
    const value = this.#runtime.value('plain', this) as [unknown] | null
    return value === null ? undefined : { value: value[0] }
  }

  /** `object.name = value` */
  set(name: string, value: unknown): void {
    this.#runtime.run('set', this, name, value).dispose()
  }

  /** `object(*args)`; the last argument may be kw({ … }). */
  call(...args: unknown[]): PyRef {
    return this.#runtime.apply(this, args)
  }

  /** `object.name(*args)`; the last argument may be kw({ … }). */
  method(name: string, ...args: unknown[]): PyRef {
    return this.#runtime.applyMethod(this, name, args)
  }

  /** The same on Python's executor thread; the event loop goes on. The last arguments may be kw({ … }) and job({ … }). */
  callAsync(...args: unknown[]): Promise<PyRef> {
    return this.#runtime.applyAsync(this, args)
  }

  /** `object.name(*args)` on the executor thread. */
  methodAsync(name: string, ...args: unknown[]): Promise<PyRef> {
    return this.#runtime.applyMethodAsync(this, name, args)
  }

  /** `object[key]` */
  item(key: unknown): PyRef {
    return this.#runtime.run('item', this, key)
  }

  /** `object[key] = value` */
  setItem(key: unknown, value: unknown): void {
    this.#runtime.run('set_item', this, key, value).dispose()
  }

  /** `len(object)` */
  get length(): number {
    return this.#runtime.value('len', this) as number
  }

  /**
   * The object as a JavaScript value: None, booleans, numbers, strings, and lists, tuples and dicts of them. Integers
   * beyond 2^53 become bigints; dicts with other than string keys become Maps.
   */
  toJS(): unknown {
    return this.#runtime.toJS(this)
  }

  /** `repr(object)` */
  toString(): string {
    return this.disposed ? 'PyRef(disposed)' : (this.#runtime.value('repr', this) as string)
  }

  *[Symbol.iterator](): Generator<PyRef> {
    using iterator = this.#runtime.run('iter', this)
    for (;;) {
      using step = this.#runtime.run('next', iterator)
      if (step.length === 0) return
      yield step.item(0)
    }
  }

  /** The items of an asynchronous iterator, or of an ordinary one, each fetched on the executor thread. */
  async *[Symbol.asyncIterator](): AsyncGenerator<PyRef> {
    using iterator = this.#runtime.run('async_iter', this)
    for (;;) {
      using step = await this.#runtime.executor.submit('async_next', [iterator])
      if (step.length === 0) return
      yield step.item(0)
    }
  }

  /**
   * `with object as value: body(value)`. What `body` throws is told to the context manager as an exception, which may
   * swallow it: the result is then undefined.
   */
  with<Result>(body: (value: PyRef) => Result): Result | undefined {
    using value = this.#runtime.run('enter', this)
    let result: Result
    try {
      result = body(value)
    } catch (error) {
      const swallowed = this.#runtime.value(
        'exit_context',
        this,
        error instanceof Error ? error.message : String(error),
      )
      if (swallowed === true) return undefined
      throw error
    }
    this.#runtime.run('exit_context', this, null).dispose()
    return result
  }

  /** Lets go of the object at once. Harmless when repeated. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    registry.unregister(this)
    release(this.#held)
    leaveScope(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

interface Held {
  address: number
  /** What letting go of a tensor would free. */
  bytes: number
}

function release({ address, bytes }: Held): void {
  count(-1, -bytes)
  native().crossing.release(address)
}

function count(refs: number, bytes: number): void {
  pythonRefs.refs += refs
  pythonRefs.bytes += bytes
  if (bytes !== 0) holdExternal(bytes)
}

const registry = new FinalizationRegistry<Held>(release)

registerAddresser((value) => (value instanceof PyRef ? value.address : undefined))
