import { basename } from 'node:path'
import type { DType } from '../dtype.js'
import { EpmoeError } from '../errors.js'
import type { RecordedCall } from '../parity/case.js'
import { Guarded } from '../parity/guard.js'
import type { ReferenceFacts } from '../parity/references.js'
import type { Python } from '../python/python.js'
import type { PyRef } from '../python/ref.js'
import { Tensor } from '../tensor.js'

/** What a capsule says of itself. */
export interface CapsuleFacts {
  /** SGLang's name, and which of its signatures. */
  kernel: string
  generation: string
  op: string
  /** `recorded` or `mismatch`. */
  reason: string
  scalars: Record<string, number | string>
  launch: Record<string, unknown>
  environment: Record<string, unknown>
  findings: { what?: string }[]
  /** Seconds since 1970. */
  time: number
  arguments: string[]
  outputs: Record<string, { shape: number[]; dtype: DType }>
  /** Whose results are in it: `triton`, `epmoe`. */
  recorded: string[]
}

/**
 * A recorded call, its tensors between guards on the CPU. Throws ERR_CAPSULE for a file that is no capsule, is damaged,
 * or is made up.
 */
export class Capsule implements Disposable {
  readonly facts: CapsuleFacts
  readonly call: RecordedCall
  readonly #held: PyRef

  private constructor(
    readonly file: string,
    held: PyRef,
  ) {
    this.#held = held
    this.facts = held.method('described').toJS() as CapsuleFacts
    const { arguments: names, outputs, scalars } = this.facts
    const inputs = Object.fromEntries(names.map((name) => [name, this.#tensor('argument', name)]))
    // The arithmetic is the backend's, when it is made again.
    const { numerics: _, ...others } = scalars
    this.call = { inputs, outputs, scalars: others }
  }

  static read(python: Python, file: string): Capsule {
    using found = python.import('epmoe.migrate.replay').method('read', file)
    return Capsule.of(found, file)
  }

  /** Of what Python's `read` and `reduced` answer. */
  static of(found: PyRef, file: string): Capsule {
    const keys = found.method('keys')
    using listed = keys
    if ([...listed].some((key) => key.toJS() === 'error')) {
      throw new EpmoeError({ ...(found.item('error').toJS() as ErrorFields), op: 'capsule' })
    }
    try {
      return new Capsule(file, found.item('call'))
    } catch (cause) {
      if (!(cause instanceof EpmoeError)) throw cause
      throw refused(file, cause)
    }
  }

  /** The call as Python holds it. */
  get held(): PyRef {
    return this.#held
  }

  get name(): string {
    return basename(this.file).replace(/\.safetensors$/, '')
  }

  /** What Triton made of the call when it was recorded, if that was kept. */
  recorded(): { facts: ReferenceFacts; outputs(): Record<string, Guarded> } | undefined {
    const { recorded, environment, generation, kernel, outputs } = this.facts
    if (!recorded.includes('triton')) return undefined
    const single = generation === 'D' || kernel === 'post_reorder_deepgemm' || kernel === 'ep_gather'
    const facts: ReferenceFacts = {
      name: 'recorded',
      problem: null,
      compiled: String(environment['device']).startsWith('cuda'),
      arithmetic: single ? 'float32' : 'input-dtype',
      version: String(environment['triton'] ?? 'unknown'),
      generation,
    }
    return {
      facts,
      outputs: () => Object.fromEntries(Object.keys(outputs).map((name) => [name, this.#tensor('triton', name)])),
    }
  }

  #tensor(part: string, name: string): Guarded {
    using ref = this.#held.method('tensor', part, name)
    using from = Tensor.fromTorch(ref)
    const made = Guarded.create(from.shape, from.dtype)
    if (from.nbytes > 0) made.tensor.copyFrom(from)
    return made
  }

  [Symbol.dispose](): void {
    for (const input of Object.values(this.call.inputs)) input[Symbol.dispose]()
    this.#held.dispose()
  }
}

type ErrorFields = { code: string; argument: string; expected: string; received: string; hint: string }

/** A capsule whose content epmoe's own kernel refuses: nothing else is run on it. */
export function refused(file: string, cause: EpmoeError): EpmoeError {
  const received = cause.message
  return new EpmoeError({ code: 'ERR_CAPSULE', op: 'capsule', argument: file, expected: 'a call', received }, { cause })
}
