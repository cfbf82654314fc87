import { EpmoeError } from '../errors.js'
import { setBridge } from '../foreign.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'
import type { JobOptions } from './executor.js'
import { proxyOf } from './proxy.js'
import type { PyObject } from './pymport.js'
import type { PyRef } from './ref.js'
import type { Runtime } from './runtime.js'
import type { Torch } from './torch.js'

/** The Python interpreter inside this process. One for all; made by startPython(). */
export class Python {
  /** `3.12.3` */
  readonly version: string
  /** The interpreter whose environment is used. */
  readonly executable: string
  readonly #runtime: Runtime
  #attached = false

  constructor(runtime: Runtime, version: string, executable: string) {
    this.#runtime = runtime
    this.version = version
    this.executable = executable
    setBridge({
      attach: () => this.#attach(),
      importCapsule: (object) => this.#importCapsule(object),
      takeFromInbox: () => this.#runtime.run('take'),
      takeFromInboxAsTensor: () => this.#runtime.run('take_tensor'),
      currentStream: (deviceId) => this.#runtime.value('current_stream', deviceId) as number,
      allocations: (deviceId) => this.#runtime.value('allocations', deviceId) as number,
    })
  }

  /** `importlib.import_module(name)` */
  import(name: string): PyRef {
    return this.#runtime.run('import', name)
  }

  /** The module torch, typed: `python.torch().randn(2, 3).sum().item()`. */
  torch(): Torch {
    return proxyOf<Torch>(this.import('torch'))
  }

  /** The value of a Python expression, with `names` as its variables. */
  eval(expression: string, names: Record<string, unknown> = {}): PyRef {
    return this.#runtime.run('eval', expression, names)
  }

  /**
   * Runs Python source as a module of its own and returns the module. Tracebacks show its lines, and Triton kernels may
   * be defined in it.
   */
  exec(source: string, filename = inlineName()): PyRef {
    return this.#runtime.run('exec', source, filename)
  }

  /** The same on the executor thread: an import may take seconds, during which the event loop goes on. */
  importAsync(name: string, options: JobOptions = {}): Promise<PyRef> {
    return this.#runtime.executor.submit('import', [name], options)
  }

  evalAsync(expression: string, names: Record<string, unknown> = {}, options: JobOptions = {}): Promise<PyRef> {
    return this.#runtime.executor.submit('eval', [expression, names], options)
  }

  execAsync(source: string, options: JobOptions & { filename?: string } = {}): Promise<PyRef> {
    return this.#runtime.executor.submit('exec', [source, options.filename ?? inlineName()], options)
  }

  /** Awaits a coroutine, or another awaitable, in the event loop of the executor thread. */
  run(awaitable: PyRef, options: JobOptions = {}): Promise<PyRef> {
    return this.#runtime.executor.submit('run', [awaitable], options)
  }

  /** `importlib.reload(module)`, its loaded submodules first: for development. */
  reload(module: PyRef): PyRef {
    return this.#runtime.run('reload', module)
  }

  /** Asynchronous calls that wait or run. */
  get pending(): number {
    return this.#runtime.executor.pending
  }

  /** How many asynchronous calls may wait or run; further ones are refused with ERR_QUEUE_FULL. Default 1000. */
  get queueLimit(): number {
    return this.#runtime.executor.limit
  }

  set queueLimit(limit: number) {
    this.#runtime.executor.limit = limit
  }

  /** Resolves when the queue has room for another asynchronous call. */
  ready(): Promise<void> {
    return this.#runtime.executor.ready()
  }

  /** @internal Calls `listener` soon after Python's `_executor.ring()`, on whatever thread; returns how to end that. */
  listen(listener: () => void): () => void {
    return this.#runtime.executor.listen(listener)
  }

  #attach(): void {
    if (this.#attached) return
    const facts = (this.#runtime.value('torch_facts') as string).split(' ').map(Number)
    const [tensorType, capsule, inbox] = facts as [number, number, number]
    native().python.attach(tensorType, capsule, inbox)
    this.#attached = true
  }

  #importCapsule(object: unknown): Tensor {
    const capsule = this.#capsule(object)
    try {
      return Tensor.fromCapsule(capsule.address)
    } finally {
      capsule.dispose()
    }
  }

  #capsule(object: unknown): PyRef {
    try {
      return this.#runtime.run('to_capsule', unwrapProxy(object))
    } catch (cause) {
      throw new EpmoeError(
        {
          code: 'ERR_UNSUPPORTED_TENSOR',
          op: 'Tensor.fromTorch',
          argument: 'object',
          expected: 'a dense torch.Tensor that does not require grad',
          received: cause instanceof Error ? cause.message : String(cause),
          hint: 'Detach it, or make it dense, first',
        },
        { cause },
      )
    }
  }
}

function unwrapProxy(object: unknown): unknown {
  return (object as { __PyObject__?: PyObject }).__PyObject__ ?? object
}

let inlineModules = 0

function inlineName(): string {
  return `nodejs:///inline-${++inlineModules}.py`
}
