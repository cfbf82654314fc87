import { registerAddresser } from '../foreign.js'
import type { KeywordArguments } from './encode.js'
import type { PyRef } from './ref.js'

const refs = new WeakMap<object, PyRef>()

/** The PyRef behind a proxy; undefined for anything else. */
export function refBehind(value: unknown): PyRef | undefined {
  return (typeof value === 'function' || typeof value === 'object') && value !== null ? refs.get(value) : undefined
}

/**
 * A Python object that is used like a JavaScript one: attributes are properties, calls are calls. Numbers, strings,
 * booleans, None and lists or tuples of them arrive as JavaScript values; everything else as a proxy again. Keyword
 * arguments are passed as kw({ … }). The type says what is known of the object; nothing checks it.
 */
export function proxyOf<Shape extends object>(ref: PyRef): Shape {
  // Only a function can be called through a Proxy.
  const target = () => undefined
  const proxy = new Proxy(target, {
    get(_, name) {
      if (name === Symbol.dispose) return () => ref.dispose()
      if (name === Symbol.toPrimitive || name === Symbol.toStringTag) return () => ref.toString()
      if (name === Symbol.iterator) return () => iterate(ref)
      if (typeof name === 'symbol' || (askedByJavaScript.has(name) && !ref.has(name))) return undefined
      return unwrap(ref.get(name))
    },
    set(_, name, value) {
      if (typeof name === 'symbol') return false
      ref.set(name, value)
      return true
    },
    has: (_, name) => typeof name === 'string' && ref.has(name),
    ownKeys: () => [],
    apply: (_, __, args: unknown[]) => unwrap(ref.call(...args)),
  })
  refs.set(proxy, ref)
  return proxy as unknown as Shape
}

/** What await, JSON and consoles look for on any object, and must not take for an error. */
const askedByJavaScript = new Set(['then', 'constructor', 'prototype', 'toJSON', 'nodeType', 'asymmetricMatch'])

function unwrap(ref: PyRef): unknown {
  const plain = ref.plain()
  if (plain === undefined) return proxyOf(ref)
  ref.dispose()
  return plain.value
}

function* iterate(ref: PyRef): Generator<unknown> {
  for (const item of ref) yield unwrap(item)
}

/** Keyword arguments of known names, for the types of functions. */
export type Keywords<Names extends object> = KeywordArguments & { readonly values: Names & Record<string, unknown> }

registerAddresser((value) => refBehind(value)?.address)
