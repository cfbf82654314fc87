import type { DType } from '../dtype.js'
import type { Case, Problem } from './case.js'

/** What every op's cases are told by: numbers and words, printed as the case's name and read back from it. */
export interface Spec {
  dtype: DType
  seed: number
}

/** How an op makes cases of its specs. */
export interface Family<Kind extends Spec> {
  op: string
  /** In the order in which they are printed. */
  defaults: Kind
  axes(spec: Kind): Record<string, number>
  tags(spec: Kind): string[]
  /** Rough count of interpreted Triton steps. */
  steps(spec: Kind): number
  unspecified?(spec: Kind): string | undefined
  build(spec: Kind): Problem
}

/** Infinity over its own magnitude is NaN as well, so that any special value may bring this about. */
export const clampedNaN = "a quantised NaN stays one, but for Triton's clamp, which makes a number of it"

export function caseOf<Kind extends Spec>(family: Family<Kind>, spec: Partial<Kind>): Case {
  const full = { ...family.defaults, ...spec }
  const fields = Object.entries(full).map(([key, value]) => `${key}=${String(value)}`)
  return {
    name: `${family.op}/${fields.join(',')}`,
    op: family.op,
    dtype: full.dtype,
    tags: family.tags(full),
    axes: family.axes(full),
    interpreterSteps: family.steps(full),
    unspecified: family.unspecified?.(full),
    build: () => family.build(full),
  }
}

/** One case a name: models that share a shape make the same case. */
export function casesOf<Kind extends Spec>(family: Family<Kind>, specs: Partial<Kind>[]): Case[] {
  return [...new Map(specs.map((spec) => caseOf(family, spec)).map((each) => [each.name, each])).values()]
}

/** The case of a printed name; fields that are left out have their default. */
export function parseCase<Kind extends Spec>(family: Family<Kind>, name: string): Case | undefined {
  const [op, fields] = name.split('/')
  if (op !== family.op || fields === undefined) return undefined
  const defaults = family.defaults as unknown as Record<string, string | number>
  const spec: Record<string, string | number> = {}
  for (const field of fields.split(',')) {
    const [key = '', value = ''] = field.split('=')
    if (!(key in defaults)) return undefined
    spec[key] = typeof defaults[key] === 'number' ? Number(value) : value
  }
  return caseOf(family, spec as Partial<Kind>)
}
