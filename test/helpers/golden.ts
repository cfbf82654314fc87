import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { PyRef } from 'epmoe'
import { samplingSlack } from '../../src/parity/verdict.js'
import { python } from './python.js'

const file = fileURLToPath(new URL('moe_layer.py', import.meta.url))

/** The layer in plain torch: helpers/moe_layer.py. */
export const reference: PyRef = python.exec(readFileSync(file, 'utf8'), file)

/**
 * The largest error norm that counts as no worse than the reference's. In float32 an error is the order in which torch's
 * matrix products add, and torch picks it by shape: a layer cannot be asked for less than what those products give in the
 * worst of the shapes, `attainable` (moe_layer.py). In 16 bits these are below the reference, and ask for nothing less.
 */
export function allowedError(reference: number, attainable: number[], elements: number): number {
  return Math.max(reference, ...attainable) * samplingSlack(elements)
}

/**
 * The same where the elements of a sample hang together, as one prompt's logits do, so that only samples are independent:
 * both errors by sample. By chance the sum of squares is up to three standard errors of the pairs' differences larger.
 */
export function allowedOverSamples(reference: number[], own: number[]): number {
  const squares = reference.map((error) => error ** 2)
  const differences = own.map((error, i) => error ** 2 - squares[i]!)
  const mean = sum(differences) / own.length
  const variance = sum(differences.map((each) => (each - mean) ** 2)) / (own.length - 1)
  return Math.sqrt(sum(squares) + 3 * Math.sqrt(own.length * variance))
}

function sum(values: number[]): number {
  return values.reduce((total, each) => total + each, 0)
}
