import type { Device } from 'epmoe'
import { type PyRef, type Python, startPython } from 'epmoe'
import { gpu, standIn } from './devices.js'

// Triton decides how to run when it is imported.
if (gpu === undefined) process.env['TRITON_INTERPRET'] ??= '1'

export const python: Python = startPython()
export const torch: PyRef = python.import('torch')

/** The value of a Python expression in which `torch` is known. */
export function evaluate(expression: string, names: Record<string, unknown> = {}): PyRef {
  return python.eval(expression, { torch, ...names })
}

export function valueOf(expression: string, names: Record<string, unknown> = {}): unknown {
  using result = evaluate(expression, names)
  return result.toJS()
}

/** The first GPU, when torch reaches it as well. */
export const torchGpu: Device | undefined = standIn ? undefined : gpu
