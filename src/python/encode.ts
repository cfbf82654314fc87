import { describeValue, EpmoeError } from '../errors.js'
import { Tensor } from '../tensor.js'
import { refBehind } from './proxy.js'
import type { PyObject } from './pymport.js'
import { PyRef } from './ref.js'
import type { Runtime } from './runtime.js'

/** Marks the last argument of a call as keyword arguments: `f.call(x, kw({ dim: 1 }))`. */
export class KeywordArguments {
  constructor(readonly values: Record<string, unknown>) {}
}

export function kw(values: Record<string, unknown>): KeywordArguments {
  return new KeywordArguments(values)
}

class PythonFloat {
  constructor(readonly value: number) {}
}

/** A number that Python is to see as a float even when it is whole: `float(1)` is `1.0`. */
export function float(value: number): PythonFloat {
  return new PythonFloat(value)
}

const maxDepth = 200

type Node = null | boolean | number | string | Node[] | { $: [string, unknown] }

/** Arguments as one JSON text plus the Python objects it refers to. */
export class Encoder {
  readonly objects: PyObject[] = []

  constructor(private readonly runtime: Runtime) {}

  #depth = 0

  text(args: readonly unknown[]): string {
    // Only ASCII crosses: the embedding layer truncates strings with characters beyond the basic plane.
    return JSON.stringify(args.map((arg) => this.#node(arg))).replace(
      /[\u0080-\uffff]/g,
      (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`,
    )
  }

  #node(value: unknown): Node {
    switch (typeof value) {
      case 'undefined':
        return null
      case 'boolean':
      case 'string':
        return value
      case 'number':
        return encodeNumber(value)
      case 'bigint':
        return { $: ['int', value.toString()] }
      case 'function': {
        const behind = refBehind(value)
        if (behind !== undefined) return this.#object('box', behind.box)
        return this.#object('function', this.runtime.callback(value as (...args: PyRef[]) => unknown))
      }
      case 'object':
        return value === null ? null : this.#objectNode(value)
      default:
        throw unsupported(value)
    }
  }

  #objectNode(value: object): Node {
    if (value instanceof PyRef) return this.#object('box', value.box)
    if (value instanceof Tensor) return this.#object('box', (value.toTorch() as PyRef).box)
    if (value instanceof PythonFloat) return { $: ['float', pythonFloat(value.value)] }
    if (Array.isArray(value)) return this.#inner(() => value.map((item) => this.#node(item)))
    if (ArrayBuffer.isView(value)) {
      const { buffer, byteOffset, byteLength } = value
      return this.#object('object', this.runtime.memoryview(Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength)))
    }
    if (value instanceof Map)
      return this.#inner(() => ({ $: ['dict', [...value].map(([key, item]) => [this.#node(key), this.#node(item)])] }))
    const prototype = Object.getPrototypeOf(value)
    if (prototype === Object.prototype || prototype === null) {
      return this.#inner(() => ({ $: ['dict', Object.entries(value).map(([key, item]) => [key, this.#node(item)])] }))
    }
    if (this.runtime.isPyObject(value)) return this.#object('object', value)
    throw unsupported(value)
  }

  /** Python bounds the depth of recursion too. */
  #inner(encode: () => Node): Node {
    if (this.#depth === maxDepth) {
      throw new EpmoeError({
        code: 'ERR_PYTHON_ARGUMENT',
        expected: `containers nested no deeper than ${maxDepth}`,
        received: 'one that is deeper, or contains itself',
        hint: 'Flatten it first',
      })
    }
    this.#depth++
    try {
      return encode()
    } finally {
      this.#depth--
    }
  }

  #object(tag: string, object: PyObject): Node {
    this.objects.push(object)
    return { $: [tag, this.objects.length - 1] }
  }
}

function encodeNumber(value: number): Node {
  if (Number.isSafeInteger(value) && !Object.is(value, -0)) return value
  return { $: ['float', pythonFloat(value)] }
}

function pythonFloat(value: number): string {
  if (Number.isNaN(value)) return 'nan'
  if (!Number.isFinite(value)) return value > 0 ? 'inf' : '-inf'
  return Object.is(value, -0) ? '-0.0' : String(value)
}

function unsupported(value: unknown): EpmoeError {
  return new EpmoeError({
    code: 'ERR_PYTHON_ARGUMENT',
    expected:
      'numbers, strings, booleans, null, bigints, arrays, plain objects, Maps, typed arrays, functions, Tensors or PyRefs',
    received: describeValue(value),
    hint: 'Convert it first, e.g. a Date with toISOString()',
  })
}

/** The reverse: what the bridge wrote. Whole floats stay numbers; integers beyond 2^53 become bigints. */
export function decode(text: string): unknown {
  return revive(JSON.parse(text) as Node)
}

function revive(node: Node): unknown {
  if (typeof node !== 'object' || node === null || Array.isArray(node)) return node
  const [tag, value] = node.$
  switch (tag) {
    case 'int':
      return BigInt(value as string)
    case 'float':
      return reviveFloat(value as string)
    case 'list':
      return (value as Node[]).map(revive)
    default: {
      const entries = (value as [Node, Node][]).map(([key, item]) => [revive(key), revive(item)] as const)
      const strings = entries.every(([key]) => typeof key === 'string')
      return strings ? Object.fromEntries(entries) : new Map(entries)
    }
  }
}

function reviveFloat(text: string): number {
  if (text === 'nan') return Number.NaN
  if (text === 'inf') return Number.POSITIVE_INFINITY
  return text === '-inf' ? Number.NEGATIVE_INFINITY : Number(text)
}
