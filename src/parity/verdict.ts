import type { Metrics } from '../native.js'
import type { Backend } from './backends.js'
import type { Bounds } from './case.js'
import type { ReferenceFacts } from './references.js'

/**
 * What a comparison has to reach:
 * `bit-exact`: no element differs (a NaN equals any NaN);
 * `ulp`: every element within a bound that follows from the number of roundings, in units in the last place;
 * `golden`: the error against the float64 oracle is no worse than the reference's own.
 */
export type Tier = 'bit-exact' | 'ulp' | 'golden'

export interface Requirement {
  tier: Tier
  /** For `ulp`. */
  bound?: number
}

/** What a backend owes a reference for one output; without bounds the output is exact. */
export function requirementFor(backend: Backend, reference: ReferenceFacts, bounds: Bounds | undefined): Requirement {
  if (bounds === undefined) return { tier: 'bit-exact' }
  const own = backend.numerics === 'triton' ? bounds.triton : bounds.fp32
  if (reference.name === 'float64') return { tier: 'ulp', bound: own }
  if (backend.numerics === 'fp32') return { tier: 'golden' }
  // The original's arithmetic is one fused rounding a slot. Only compiled Triton has it; eager torch and the interpreter
  // round the product first. Its exponentials and divisions are the GPU's own approximations, which a CPU cannot have.
  const fused = reference.compiled === true && reference.name !== 'torch' && reference.arithmetic === 'input-dtype'
  return fused && backend.device !== 'cpu' ? { tier: 'bit-exact' } : { tier: 'ulp', bound: own + bounds.reference }
}

/** `independent`: how many elements do not repeat others, where that is not all of them. */
export function passes({ tier, bound = 0 }: Requirement, metrics: Metrics, independent = metrics.total): boolean {
  if (metrics.mismatched === 0) return true
  if (tier === 'bit-exact') return false
  if (tier === 'ulp') return metrics.maxUlp <= bound
  return metrics.relL2 <= metrics.referenceRelL2 * samplingSlack(independent)
}

/**
 * Two error norms over n elements are estimates, each uncertain by about 1/sqrt(2n): on a handful of elements the better
 * arithmetic may come out a little worse by chance. The allowance vanishes as n grows (1.0006 at 29 million elements).
 */
export function samplingSlack(count: number): number {
  return 1 + 3 / Math.sqrt(Math.max(1, count))
}

/**
 * How many of an oracle's values differ: equal ones come of equal inputs and err alike, so a million elements computed from
 * nine small integers are a sample of 81.
 */
export function independentOf(oracle: Float64Array): number {
  const sorted = oracle.slice().sort()
  return sorted.reduce((count, value, i) => count + (i > 0 && Object.is(value, sorted[i - 1]) ? 0 : 1), 0)
}

/** The best tier a comparison reached, for reports. */
export function reached(requirement: Requirement, metrics: Metrics, passed: boolean): Tier | 'none' {
  if (metrics.mismatched === 0) return 'bit-exact'
  return passed ? requirement.tier : 'none'
}
