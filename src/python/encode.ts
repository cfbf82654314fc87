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

// Words of an encoder to begin with, and those beyond which it does not keep them for the next call.
const fewest = 128
const largest = 2 ** 16

// Tokens, as csrc/node/crossing.cc reads them; each has a word behind it.
const none = 0
const no = 1
const yes = 2
const int = 3
const double = 4
const largeInt = 5
const text = 6
const address = 7
const list = 8
const dict = 9

/**
 * Arguments as a row of tokens, for the addon to build Python's objects from: addresses of objects that stay as they are,
 * numbers, and places in a list of texts.
 */
export class Encoder {
  tokens = new Float64Array(fewest)
  texts: string[] = []
  #length = 0
  #depth = 0
  /** Whose addresses were written: they live until the call is made. */
  #refs: PyRef[] = []
  /** What was made for the call alone. */
  #made: (PyRef | PyObject)[] = []

  constructor(private readonly runtime: Runtime) {}

  /** Writes the arguments from the beginning. */
  write(args: readonly unknown[]): void {
    this.#length = 0
    this.#depth = 0
    this.#put(list, args.length)
    for (const arg of args) this.#value(arg)
    // A getter among the arguments may have disposed of one that was written before.
    for (const ref of this.#refs) ref.address
  }

  /** Once the call is made. */
  clear(): void {
    if (this.texts.length > 0) this.texts = []
    if (this.tokens.length > largest) this.tokens = new Float64Array(fewest)
    this.#refs.length = 0
    for (const each of this.#made) if (each instanceof PyRef) each.dispose()
    this.#made.length = 0
  }

  #put(token: number, word: number): void {
    if (this.#length === this.tokens.length) {
      const longer = new Float64Array(2 * this.#length)
      longer.set(this.tokens)
      this.tokens = longer
    }
    this.tokens[this.#length++] = token
    this.tokens[this.#length++] = word
  }

  #value(value: unknown): void {
    if (value === undefined || value === null) this.#put(none, 0)
    else if (typeof value === 'number') this.#number(value)
    else if (typeof value === 'string') this.#text(text, value)
    else if (typeof value === 'boolean') this.#put(value ? yes : no, 0)
    else if (typeof value === 'bigint') this.#text(largeInt, value.toString(16))
    else if (typeof value === 'object') this.#object(value)
    else if (typeof value === 'function') this.#function(value as (...args: PyRef[]) => unknown)
    else throw unsupported(value)
  }

  #number(value: number): void {
    this.#put(Number.isSafeInteger(value) && !Object.is(value, -0) ? int : double, value)
  }

  #function(value: (...args: PyRef[]) => unknown): void {
    this.#ref(refBehind(value) ?? this.#keep(this.runtime.callback(value)))
  }

  #object(value: object): void {
    if (value instanceof PyRef) this.#ref(value)
    else if (Array.isArray(value)) this.#list(value)
    else if (value instanceof Tensor) this.#ref(this.#keep(value.toTorch() as PyRef))
    else if (value instanceof PythonFloat) this.#put(double, value.value)
    else if (ArrayBuffer.isView(value)) this.#bytes(value)
    else if (value instanceof Map) this.#dict([...value])
    else if (isPlain(value)) this.#dict(Object.entries(value))
    else if (this.runtime.isPyObject(value)) this.#put(address, Number(this.#keep(value).id))
    else throw unsupported(value)
  }

  #bytes({ buffer, byteOffset, byteLength }: ArrayBufferView): void {
    const bytes = Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength)
    this.#put(address, Number(this.#keep(this.runtime.memoryview(bytes)).id))
  }

  #text(token: number, value: string): void {
    this.#put(token, this.texts.length)
    this.texts.push(value)
  }

  #ref(value: PyRef): void {
    this.#put(address, value.address)
    this.#refs.push(value)
  }

  #keep<Made extends PyRef | PyObject>(made: Made): Made {
    this.#made.push(made)
    return made
  }

  #list(values: readonly unknown[]): void {
    this.#begin(list, values.length)
    for (const value of values) this.#value(value)
    this.#depth--
  }

  #dict(entries: readonly (readonly [unknown, unknown])[]): void {
    this.#begin(dict, entries.length)
    for (const [key, value] of entries) {
      this.#value(key)
      this.#value(value)
    }
    this.#depth--
  }

  /** Python bounds the depth of recursion too. */
  #begin(container: number, length: number): void {
    if (this.#depth++ === maxDepth) {
      throw new EpmoeError({
        code: 'ERR_PYTHON_ARGUMENT',
        expected: `containers nested no deeper than ${maxDepth}`,
        received: 'one that is deeper, or contains itself',
        hint: 'Flatten it first',
      })
    }
    this.#put(container, length)
  }
}

function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
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

type Node = null | boolean | number | string | Node[] | { $: [string, unknown] }

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
