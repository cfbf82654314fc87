import { setImmediate } from 'node:timers'
import { native } from './native.js'

let unsaid = 0
let asked = false

/**
 * Notes memory that Python objects hold for JavaScript, for V8 to be told of: otherwise it would take a handle to
 * gigabytes for a few words, and be in no hurry to collect it.
 */
export function holdExternal(bytes: number): void {
  unsaid += bytes
  tellSoon()
}

/**
 * Has V8 told of all such memory, tensors' own too, in the next turn of the event loop. Handles are collected in such a
 * turn at the earliest; told at once, V8 would collect in the middle of a layer whose intermediate results come and go.
 */
export function tellSoon(): void {
  if (asked) return
  asked = true
  setImmediate(tell).unref()
}

function tell(): void {
  asked = false
  native().tensor.tellExternal(unsaid)
  unsaid = 0
}
