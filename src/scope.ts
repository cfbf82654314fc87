import { AsyncLocalStorage } from 'node:async_hooks'

/** What a scope ends: Tensors, PyRefs, Streams. */
type Held = Disposable

const storage = new AsyncLocalStorage<Set<Held>>()

/**
 * Runs `body` and disposes every Tensor and PyRef that it made, except what it returns: one of them, or an array or
 * plain object of them. A body that is asynchronous is followed through its awaits, and its scope ends when it settles.
 * Scopes nest; what an inner one returns belongs to the outer one.
 */
export function scope<Result>(body: () => Result): Result {
  const outer = storage.getStore()
  const held = new Set<Held>()
  const end = (result: unknown) => {
    for (const kept of heldIn(result)) {
      if (held.delete(kept)) outer?.add(kept)
    }
    for (const each of held) each[Symbol.dispose]()
  }
  let result: Result
  try {
    result = storage.run(held, body)
  } catch (error) {
    end(undefined)
    throw error
  }
  if (!(result instanceof Promise)) {
    end(result)
    return result
  }
  return result.then(
    (value: unknown) => {
      end(value)
      return value
    },
    (error: unknown) => {
      end(undefined)
      throw error
    },
  ) as Result
}

/** Enters a new object into the current scope, if there is one. */
export function enterScope(object: Held): void {
  storage.getStore()?.add(object)
}

/** Forgets an object that has been disposed. */
export function leaveScope(object: Held): void {
  storage.getStore()?.delete(object)
}

function* heldIn(value: unknown): Generator<Held> {
  if (typeof value !== 'object' || value === null) return
  if (Symbol.dispose in value) yield value as Held
  else if (Array.isArray(value)) for (const item of value) yield* heldIn(item)
  else if (Object.getPrototypeOf(value) === Object.prototype) yield* heldIn(Object.values(value))
}
