import { describeValue, EpmoeError } from '../errors.js'
import { pythonAddress } from '../foreign.js'
import type { PyRef } from '../python/ref.js'
import { notATensor, Tensor } from '../tensor.js'

interface Demands {
  /** Dtypes that will do. Default: that of the first tensor checked. */
  dtypes?: string[]
  /** Contiguous, and needing no gradient. */
  plain?: boolean
}

/** Axes of one name have one length: the first tensor that has the axis says which. */
export class Axes {
  readonly #op: string
  readonly #sizes: Map<string, number>
  #dtype = ''
  #device = ''

  constructor(op: string, sizes: Iterable<[string, number]> = []) {
    this.#op = op
    this.#sizes = new Map(sizes)
  }

  /** What is bound so far, to be bound further. */
  copy(): Axes {
    const copy = new Axes(this.#op, this.#sizes)
    copy.#dtype = this.#dtype
    copy.#device = this.#device
    return copy
  }

  get dtype(): string {
    return this.#dtype
  }

  get device(): string {
    return this.#device
  }

  size(axis: string): number {
    return this.#sizes.get(axis) ?? 0
  }

  check(argument: string, value: PyRef, axes: string[], { dtypes = [this.#dtype], plain = false }: Demands = {}): void {
    using tensor = this.#facts(argument, value, plain)
    const fail = (code: string, expected: string, received: string, hint: string): never => {
      throw new EpmoeError({ code, op: this.#op, argument, expected, received, hint })
    }
    if (!dtypes.includes(tensor.dtype)) {
      fail('ERR_DTYPE', dtypes.join(' or '), tensor.dtype, 'Convert it with .to(dtype)')
    }
    if (this.#device !== '' && tensor.device !== this.#device) {
      fail('ERR_DEVICE', `a tensor on ${this.#device}`, `one on ${tensor.device}`, 'Move it with .to(device)')
    }
    const fits = tensor.shape.length === axes.length && axes.every((axis, i) => this.#bind(axis, tensor.shape[i]!))
    if (!fits) {
      const known = axes.filter((axis) => this.#sizes.has(axis)).map((axis) => `${axis} = ${this.size(axis)}`)
      const shape = `shape [${axes.join(', ')}]${known.length > 0 ? ` with ${known.join(', ')}` : ''}`
      fail('ERR_SHAPE', shape, `[${tensor.shape.join(', ')}]`, 'Axes of one name have one length in all arguments')
    }
    if (plain && !tensor.contiguous) {
      fail('ERR_NOT_CONTIGUOUS', 'a contiguous tensor', `strides [${tensor.strides.join(', ')}]`, 'Call .contiguous()')
    }
    this.#dtype ||= tensor.dtype
    this.#device ||= tensor.device
  }

  /** Weights are parameters mostly: whether they need a gradient does not matter. */
  #facts(argument: string, value: PyRef, plain: boolean): Tensor {
    if (pythonAddress(value) === undefined) throw notATensor(this.#op, argument, value)
    if (!plain) {
      using detached = value.method('detach')
      return Tensor.fromTorch(detached)
    }
    try {
      return Tensor.fromTorch(value)
    } catch (cause) {
      if (!(cause instanceof EpmoeError)) throw cause
      const { code, expected, received, hint } = cause
      throw new EpmoeError({ code, op: this.#op, argument, expected, received, hint }, { cause })
    }
  }

  #bind(axis: string, size: number): boolean {
    if (!this.#sizes.has(axis)) this.#sizes.set(axis, size)
    return this.#sizes.get(axis) === size
  }
}

/** Refuses arguments that nobody would read. */
export function onlyKnown(args: object, known: readonly string[], op = 'moeLayer'): void {
  if (typeof args !== 'object' || args === null) {
    throw new EpmoeError({
      code: 'ERR_MISSING_ARGUMENT',
      op,
      expected: 'an object of named arguments',
      received: describeValue(args),
      hint: `It may have ${known.join(', ')}`,
    })
  }
  for (const [key, value] of Object.entries(args)) {
    if (known.includes(key) || value === undefined) continue
    throw new EpmoeError({
      code: 'ERR_UNEXPECTED_ARGUMENT',
      op,
      argument: key,
      expected: `only ${known.join(', ')}`,
      received: describeValue(value),
      hint: 'Check the spelling',
    })
  }
}

/** Refuses a name that is none of these; what is no name is for others to judge. */
export function oneOf(argument: string, value: unknown, names: readonly string[], op = 'moeLayer'): void {
  if (typeof value !== 'string' || names.includes(value)) return
  throw new EpmoeError({
    code: 'ERR_VALUE',
    op,
    argument,
    expected: names.map((name) => `'${name}'`).join(' or '),
    received: describeValue(value),
    hint: 'Leave it out for the default',
  })
}
