import { createRequire } from 'node:module'
import { EpmoeError } from './errors.js'
import { native } from './native.js'
import type { Tensor } from './tensor.js'

/**
 * Tensors of the embedded Python, as the rest of the library sees them: an address. The bridge (src/python) registers
 * itself here when Python starts, so that nothing else has to import it.
 */
export interface TorchBridge {
  /** torch.Tensor to Tensor by __dlpack__, for a torch without an exchange table or when asked for. */
  importCapsule(object: unknown): Tensor
  /** Hands the object that the addon put into the inbox to JavaScript. */
  takeFromInbox(): unknown
  /** torch.from_dlpack(capsule in the inbox). */
  takeFromInboxAsTensor(): unknown
  /** Tells the addon of torch, on the first call. */
  attach(): void
  /** torch's current stream of a CUDA device, for a torch without an exchange table. */
  currentStream(deviceId: number): number
  /** How many blocks torch has allocated on a CUDA device so far. */
  allocations(deviceId: number): number
}

let bridge: TorchBridge | undefined

export function setBridge(value: TorchBridge): void {
  bridge = value
}

/** The bridge, ready for tensors. `op` is named in the error when Python was not started. */
export function torchBridge(op: string): TorchBridge {
  if (bridge === undefined) {
    throw new EpmoeError({
      code: 'ERR_PYTHON_NOT_STARTED',
      op,
      expected: 'a running Python',
      received: 'a Python object, or a wish for one, before startPython()',
      hint: 'Call startPython() first',
    })
  }
  bridge.attach()
  return bridge
}

/** The bridge, when Python runs and its torch is known already. */
export function attachedBridge(): TorchBridge | undefined {
  return bridge !== undefined && native().python.hasExchange() ? bridge : undefined
}

/** Classes whose instances stand for a Python object, with a way to its address. */
const addressers: ((value: object) => number | undefined)[] = []

export function registerAddresser(addresser: (value: object) => number | undefined): void {
  addressers.push(addresser)
}

/**
 * The CPython address of the object that `value` stands for: a PyRef of the bridge, a pymport PyObject, or a pymport
 * proxy. Undefined for anything else, however much it looks like one: an address is only taken from pymport itself.
 */
export function pythonAddress(value: unknown): number | undefined {
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null) return undefined
  for (const addresser of addressers) {
    const address = addresser(value)
    if (address !== undefined) return address
  }
  const PyObject = pymportClass()
  if (PyObject === undefined) return undefined
  if (value instanceof PyObject) return rawAddress(value)
  const inner = (value as { __PyObject__?: unknown }).__PyObject__
  return inner instanceof PyObject ? rawAddress(inner) : undefined
}

function rawAddress(value: object): number {
  return Number((value as { id: number | bigint }).id)
}

type Class = abstract new (...args: never[]) => object
let cachedClass: Class | undefined

/** pymport's PyObject, when somebody has loaded pymport; it is never loaded for this. */
function pymportClass(): Class | undefined {
  if (cachedClass !== undefined) return cachedClass
  const require = createRequire(import.meta.url)
  let file: string
  try {
    file = require.resolve('pymport')
  } catch {
    return undefined
  }
  const module = require.cache[file]
  if (module?.loaded !== true) return undefined
  cachedClass = (module.exports as { PyObject: Class }).PyObject
  return cachedClass
}

/** Live PyRefs, and the bytes of the tensors they hold. Kept by the bridge, told by stats(). */
export const pythonRefs = { refs: 0, bytes: 0 }
