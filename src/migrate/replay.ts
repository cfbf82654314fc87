import { Op } from '../call.js'
import { EpmoeError } from '../errors.js'
import type { Backend } from '../parity/backends.js'
import type { Case, Problem } from '../parity/case.js'
import { controlCases } from '../parity/controls.js'
import { Guarded } from '../parity/guard.js'
import { referenceNames } from '../parity/references.js'
import type { CaseResult, Report } from '../parity/result.js'
import { callOp, loadCases, runParity } from '../parity/run.js'
import type { Python } from '../python/python.js'
import { type Capsule, type CapsuleFacts, refused } from './capsule.js'

/** `recorded`: what Triton made of the call at the time. */
export const replayReferences = [...referenceNames, 'recorded'] as const

export interface ReplayOptions {
  capsules: Capsule[]
  backends: Backend[]
  references: readonly string[]
  python: Python
  interpreterBudget: number
  /** Whether comparisons are controlled, as a verdict needs; shrinking does without. */
  controls: 'on' | 'off'
  onCase?: (name: string, index: number, total: number) => void
}

/** parity's report, and what each capsule is. */
export interface ReplayReport extends Report {
  capsules: (Pick<CapsuleFacts, 'kernel' | 'generation' | 'op' | 'reason' | 'environment' | 'time'> & {
    file: string
    name: string
    /** What was found wrong when it was recorded. */
    findings: string[]
    passed: boolean
    /** Who disagrees with whom, in words; absent where nothing failed. */
    conclusion?: string
  })[]
}

/** Runs each capsule's call on every backend against every reference: parity on data that serving met. */
export async function replay(options: ReplayOptions): Promise<ReplayReport> {
  const { capsules, controls, ...rest } = options
  const known = await loadCases()
  const first = (name: string) => capsules.findIndex((each) => each.name === name)
  const cases = capsules.map((capsule, index) => {
    // Folders may hold files of one name.
    const name = first(capsule.name) === index ? capsule.name : `${capsule.name}#${index + 1}`
    return caseOf(capsule, name, known)
  })
  const report = runParity({ ...rest, cases, controlCases: controls === 'on' ? await controlCases(cases) : [] })
  return {
    ...report,
    capsules: capsules.map((capsule, index) => {
      const { kernel, generation, op, reason, environment, time, findings } = capsule.facts
      const own = report.cases.filter(({ name }) => name === cases[index]!.name)
      const conclusion = conclusionOf(own)
      return {
        file: capsule.file,
        name: cases[index]!.name,
        kernel,
        generation,
        op,
        reason,
        environment,
        time,
        findings: findings.map(({ what }) => String(what)),
        passed: own.length > 0 && own.every(({ passed }) => passed),
        ...(conclusion === undefined ? {} : { conclusion }),
      }
    }),
  }
}

/** A capsule as a case of parity. Throws ERR_CAPSULE where epmoe's kernel on the CPU does not take the call. */
function caseOf(capsule: Capsule, title: string, known: Awaited<ReturnType<typeof loadCases>>): Case {
  const { op } = capsule.facts
  const own = known.find((each) => each.op === op)
  if (own?.recorded === undefined) {
    throw refused(capsule.file, new EpmoeError({ code: 'ERR_UNKNOWN_OP', expected: 'an op with cases', received: op }))
  }
  rehearse(capsule)
  const { oracle, ...facts } = own.recorded(capsule.call)
  const recorded = capsule.recorded()
  const { inputs, outputs, scalars } = capsule.call
  const problem: Problem = {
    inputs,
    outputs: () => freshOutputs(outputs),
    scalars,
    oracle,
    bytes: 0,
    spoilers: [],
    ...(recorded === undefined ? {} : { recorded }),
    [Symbol.dispose]: () => {},
  }
  const name = `${op}/${title}`
  return { name, op, tags: ['recorded'], unspecified: undefined, ...facts, build: () => problem }
}

/**
 * epmoe's kernel on the CPU checks every argument and every index that it uses. What it refuses, a made-up file or one
 * that would read out of bounds, no reference ever sees.
 */
function rehearse({ file, facts, call }: Capsule): void {
  const outputs = freshOutputs(call.outputs)
  try {
    callOp(new Op(facts.op), { ...call.inputs, ...outputs }, call.scalars, 'fp32')
  } catch (cause) {
    if (!(cause instanceof EpmoeError)) throw cause
    throw refused(file, cause)
  } finally {
    for (const output of Object.values(outputs)) output[Symbol.dispose]()
  }
}

function freshOutputs(outputs: Capsule['call']['outputs']): Record<string, Guarded> {
  return Object.fromEntries(
    Object.entries(outputs).map(([name, { shape, dtype }]) => [name, Guarded.create(shape, dtype)]),
  )
}

/** The oracle says which side is wrong, where it has been asked. */
function conclusionOf(results: CaseResult[]): string | undefined {
  const failed = results.filter(({ passed }) => !passed)
  if (failed.length === 0) return undefined
  const references = [...new Set(failed.map(({ reference }) => reference))]
  if (references.includes('float64')) {
    const backends = failed.filter(({ reference }) => reference === 'float64').map(({ backend }) => backend)
    return `epmoe is wrong: ${[...new Set(backends)].join(', ')} misses the float64 oracle`
  }
  const oracle = results.some(({ reference }) => reference === 'float64')
  const agrees = oracle ? 'epmoe is within its bounds of the float64 oracle, so' : 'the oracle was not asked, but'
  return `${agrees} ${references.join(' and ')} differs`
}
