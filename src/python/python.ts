import { EpmoeError } from '../errors.js'
import { setBridge } from '../foreign.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'
import type { PyObject } from './pymport.js'
import type { PyRef } from './ref.js'
import type { Runtime } from './runtime.js'

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
    })
  }

  /** `importlib.import_module(name)` */
  import(name: string): PyRef {
    return this.#runtime.run('import', name)
  }

  /** The value of a Python expression, with `names` as its variables. */
  eval(expression: string, names: Record<string, unknown> = {}): PyRef {
    return this.#runtime.run('eval', expression, names)
  }

  /**
   * Runs Python source as a module of its own and returns the module. Tracebacks show its lines, and Triton kernels may
   * be defined in it.
   */
  exec(source: string, filename = `nodejs:///inline-${++inlineModules}.py`): PyRef {
    return this.#runtime.run('exec', source, filename)
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
