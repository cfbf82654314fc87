import { Op } from '../call.js'
import { type Device, devices } from '../device.js'
import { camelCase, EpmoeError } from '../errors.js'
import { defaultsIn } from '../modules.js'
import type { Python } from '../python/python.js'
import type { Backend } from './backends.js'
import type { Case, OpCases, Oracle, Problem } from './case.js'
import { environmentOf } from './environment.js'
import type { Guarded } from './guard.js'
import { judge, nothing } from './judge.js'
import { PythonReferences, type ReferenceFacts } from './references.js'
import type { CaseResult, ControlResult, Report, Skip } from './result.js'
import { decoderOf } from './values.js'
import { requirementFor } from './verdict.js'

/** Among so many tokens a comparison of norms sees a single wrong row, whatever the dtype rounds away. */
const controlTokens = 256

/** Every op that has cases: one file an op in cases/, found by listing the folder. */
export function loadCases(): Promise<OpCases[]> {
  return defaultsIn(new URL('./cases/', import.meta.url))
}

export interface RunOptions {
  cases: Case[]
  backends: Backend[]
  references: readonly string[]
  python: Python
  /** Interpreted Triton is slow: cases with more steps are left out, and said to be. */
  interpreterBudget: number
  /** Run as well when none of the cases has room for controls. */
  controlCases?: Case[]
  onCase?: (name: string, index: number, total: number) => void
}

/** Runs every case on every backend against every reference, with controls. */
export function runParity(options: RunOptions): Report {
  const begin = performance.now()
  const run = new ParityRun(options)
  options.cases.forEach((each, index) => {
    options.onCase?.(each.name, index, options.cases.length)
    run.case(each)
  })
  for (const each of options.controlCases ?? []) if (!run.controlled(each)) run.case(each)
  return run.report((performance.now() - begin) / 1000)
}

/** A call's outputs on the CPU, by snake_case name. */
type Outputs = Record<string, { guarded: Guarded; intact: boolean }>

/** What a reference came to: its outputs, none because the oracle is the reference, or why it cannot say. */
interface Answer {
  facts: ReferenceFacts
  outputs: Outputs | undefined
  reason: string | undefined
}

class ParityRun {
  readonly #options: RunOptions
  readonly #python: PythonReferences
  readonly #gpu: Device | undefined
  readonly #facts = new Map<string, ReferenceFacts[]>()
  readonly #ops = new Map<string, Op>()
  /** Operations, comparisons and spoilers that have been controlled together. */
  readonly #controlled = new Set<string>()
  readonly #controlNames = new Set<string>()
  readonly #cases: CaseResult[] = []
  readonly #controls: ControlResult[] = []
  readonly #skips: Skip[] = []

  constructor(options: RunOptions) {
    this.#options = options
    this.#python = new PythonReferences(options.python)
    this.#gpu = devices().find((device) => device !== 'cpu')
  }

  case(each: Case): void {
    using problem = each.build()
    const oracle = problem.oracle()
    const copies = new Map<Device, Record<string, Guarded>>([['cpu', problem.inputs]])
    const inputsOn = (device: Device) => {
      if (!copies.has(device))
        copies.set(
          device,
          mapValues(problem.inputs, (input) => input.to(device)),
        )
      return copies.get(device)!
    }
    try {
      const references = this.#referencesFor(each, problem, inputsOn)
      for (const backend of this.#options.backends) {
        if (this.#distinguishes(each.op, backend)) this.#backend(each, problem, oracle, backend, inputsOn, references)
      }
      for (const { outputs } of references) dispose(outputs)
    } finally {
      for (const [device, inputs] of copies) {
        if (device !== 'cpu') for (const input of Object.values(inputs)) input[Symbol.dispose]()
      }
      if (sizeOf(each) > 1e8) this.#python.release()
    }
  }

  /** An op without numerics computes one way: its other backend would be the same again. */
  #distinguishes(op: string, backend: Backend): boolean {
    return backend.numerics === 'fp32' || this.#op(op).info.params.some(({ name }) => name === 'numerics')
  }

  /** Whether the op and dtype of a case have been controlled. */
  controlled({ op, dtype }: Case): boolean {
    return this.#controls.some(({ name }) => name.startsWith(`${op}/${dtype}/`))
  }

  report(seconds: number): Report {
    const passed = this.#cases.filter((result) => result.passed).length
    return {
      schema: 'epmoe.parity/1',
      environment: environmentOf(this.#options.python, [...this.#facts.values()].flat()),
      cases: this.#cases,
      controls: this.#controls,
      skips: this.#skips,
      summary: {
        total: this.#cases.length,
        passed,
        failed: this.#cases.length - passed,
        skipped: this.#skips.length,
        controlsMissed: this.#controls.filter((control) => !control.detected).length,
        seconds: Math.round(seconds * 10) / 10,
      },
    }
  }

  /** Each reference's outputs, computed once for all backends. */
  #referencesFor(each: Case, problem: Problem, inputsOn: (device: Device) => Record<string, Guarded>): Answer[] {
    const { recorded } = problem
    const answers = this.#factsOf(each.op)
      .filter(({ name }) => this.#options.references.includes(name))
      .map((facts): Answer => {
        if (facts.name === 'float64') return { facts, outputs: undefined, reason: undefined }
        const result = this.#reference(each, problem, inputsOn, facts)
        return typeof result === 'string'
          ? { facts, outputs: undefined, reason: result }
          : { facts, outputs: result, reason: undefined }
      })
    if (recorded === undefined || !this.#options.references.includes(recorded.facts.name)) return answers
    const outputs = mapValues(recorded.outputs(), (guarded) => ({ guarded, intact: true }))
    return [...answers, { facts: recorded.facts, outputs, reason: undefined }]
  }

  #reference(
    each: Case,
    problem: Problem,
    inputsOn: (device: Device) => Record<string, Guarded>,
    facts: ReferenceFacts,
  ): Outputs | string {
    if (facts.problem !== null) return facts.problem
    const preferred = this.#options.backends.some((backend) => backend.device !== 'cpu') ? this.#gpu! : 'cpu'
    const device = this.#python.deviceFor(facts, preferred, this.#gpu)
    if (device === undefined) return 'compiled Triton needs a GPU'
    if (facts.compiled === false && each.interpreterSteps > this.#options.interpreterBudget) {
      return `too large for interpreted Triton (${each.interpreterSteps} steps; --interpreter-budget raises the limit)`
    }
    const outputs = outputsOn(problem, device)
    const objection = this.#python.run(each.op, facts.name, { ...inputsOn(device), ...outputs }, problem.scalars)
    if (objection !== null) {
      for (const output of Object.values(outputs)) output[Symbol.dispose]()
      return objection
    }
    return this.#read(outputs)
  }

  #op(name: string): Op {
    const op = this.#ops.get(name) ?? new Op(name)
    this.#ops.set(name, op)
    return op
  }

  #factsOf(op: string): ReferenceFacts[] {
    if (!this.#facts.has(op)) {
      this.#facts.set(op, [{ name: 'float64', problem: null }, ...this.#python.describe(op)])
    }
    return this.#facts.get(op)!
  }

  #backend(
    each: Case,
    problem: Problem,
    oracle: Oracle,
    backend: Backend,
    inputsOn: (device: Device) => Record<string, Guarded>,
    references: Answer[],
  ): void {
    const key = { name: each.name, op: each.op, backend: backend.name }
    if (backend.device !== 'cpu' && !this.#op(each.op).info.cuda) {
      this.#skips.push({
        name: each.name,
        backend: backend.name,
        reference: '*',
        reason: 'this build has no CUDA kernel',
      })
      return
    }
    if (backend.numerics === 'triton' && each.unspecified !== undefined) {
      this.#skips.push({ name: each.name, backend: backend.name, reference: '*', reason: each.unspecified })
      return
    }
    const outcome = attempt(() => this.#call(each.op, problem, inputsOn(backend.device), backend))
    for (const { facts, outputs, reason } of references) {
      if (reason !== undefined) {
        this.#skips.push({ name: each.name, backend: backend.name, reference: facts.name, reason })
        continue
      }
      this.#cases.push({
        ...key,
        reference: facts.name,
        ...(outcome instanceof Error
          ? {
              tier: 'bit-exact' as const,
              reached: 'none' as const,
              passed: false,
              failure: outcome.message,
              metrics: nothing,
            }
          : judge(outcome, outputs, oracle, backend, facts)),
      })
      if (!(outcome instanceof Error)) {
        this.#control(each, problem, oracle, backend, facts, outputs, inputsOn)
      }
    }
    if (!(outcome instanceof Error)) dispose(outcome)
  }

  /** Runs the op on a backend and reads its outputs back. */
  #call(op: string, problem: Problem, inputs: Record<string, Guarded>, backend: Backend): Outputs {
    const outputs = outputsOn(problem, backend.device)
    callOp(this.#op(op), { ...inputs, ...outputs }, problem.scalars, backend.numerics)
    return this.#read(outputs)
  }

  /** The outputs on the CPU; reading waits for the device and reports its index errors. */
  #read(outputs: Record<string, Guarded>): Outputs {
    return mapValues(outputs, (output) => {
      const { host, intact } = output.read()
      output[Symbol.dispose]()
      return { guarded: host, intact }
    })
  }

  /**
   * Once for every backend, reference and kind of comparison (what each output's dtype and tier are): the same comparison
   * on spoiled results, which it must reject. Taken on the first case that has room for every way of spoiling.
   */
  #control(
    each: Case,
    problem: Problem,
    oracle: Oracle,
    backend: Backend,
    facts: ReferenceFacts,
    reference: Outputs | undefined,
    inputsOn: (device: Device) => Record<string, Guarded>,
  ): void {
    const key = `${each.op}/${each.dtype}/${backend.name}`
    const against = `against ${facts.name}: ${this.#comparison(problem, oracle, backend, facts)}`
    const id = [key, against, ...problem.spoilers.map(({ name }) => name)].join('/')
    if (this.#controlled.has(id) || (each.axes['T'] ?? 0) > controlTokens || uncontrolled(each)) return
    const spoiled = spoiledOutputs(
      problem,
      (inputs) => this.#call(each.op, { ...problem, inputs }, inputs, backend),
      inputsOn(backend.device),
      backend,
    )
    if (spoiled === undefined) return
    this.#controlled.add(id)
    for (const { name: spoiler, outputs } of spoiled) {
      const name = `${key}/${spoiler} ${against}`
      // Cases with one spoiler more repeat the others.
      if (!this.#controlNames.has(name)) {
        this.#controlNames.add(name)
        this.#controls.push({ name, detected: !judge(outputs, reference, oracle, backend, facts).passed })
      }
      dispose(outputs)
    }
  }

  /** `float8_e4m3fn ulp, float32 bit-exact`: by what the outputs are judged. */
  #comparison(problem: Problem, oracle: Oracle, backend: Backend, facts: ReferenceFacts): string {
    const outputs = problem.outputs()
    const kinds = oracle.outputs.map(
      ({ name, bounds }) => `${outputs[name]!.tensor.dtype} ${requirementFor(backend, facts, bounds).tier}`,
    )
    for (const output of Object.values(outputs)) output[Symbol.dispose]()
    return kinds.join(', ')
  }
}

/** Results that are wrong on purpose, or undefined when this case cannot be spoiled in every way. */
function spoiledOutputs(
  problem: Problem,
  call: (inputs: Record<string, Guarded>) => Outputs,
  inputs: Record<string, Guarded>,
  backend: Backend,
): { name: string; outputs: Outputs }[] | undefined {
  const spoiled: { name: string; outputs: Outputs }[] = []
  for (const spoiler of problem.spoilers) {
    const copies = mapValues(problem.inputs, (input) => input.to('cpu'))
    const applied = spoiler.apply(copies)
    if (applied) {
      const here = backend.device === 'cpu' ? copies : mapValues(copies, (copy) => copy.to(backend.device))
      spoiled.push({ name: spoiler.name, outputs: call(here) })
      if (here !== copies) for (const copy of Object.values(here)) copy[Symbol.dispose]()
    }
    for (const copy of Object.values(copies)) copy[Symbol.dispose]()
    if (!applied) {
      for (const { outputs } of spoiled) dispose(outputs)
      return undefined
    }
  }
  const zeros = call(inputs)
  const changed = Object.values(zeros).filter(({ guarded }) => fillZeros(guarded))
  if (changed.length > 0) return [{ name: 'zeros', outputs: zeros }, ...spoiled]
  dispose(zeros)
  return spoiled
}

/** Whether that changed anything. */
function fillZeros({ tensor }: Guarded): boolean {
  const { data, dtype } = tensor
  const decode = decoderOf(dtype)
  let changed = false
  for (let i = 0; i < data.length && !changed; i++) changed = decode(data, i) !== 0
  data.fill((data instanceof BigInt64Array ? 0n : 0) as never)
  return changed
}

/** Whose data may be such that a spoiled result is as good as the right one. */
function uncontrolled({ tags }: Case): boolean {
  return tags.includes('special') || tags.includes('recorded')
}

function dispose(outputs: Outputs | undefined): void {
  for (const { guarded } of Object.values(outputs ?? {})) guarded[Symbol.dispose]()
}

/** Elements that a case moves, roughly. */
function sizeOf({ axes }: Case): number {
  return (axes['T'] ?? 1) * (axes['H'] ?? 1) * (axes['K'] ?? 1)
}

/** Calls an op by name; `numerics` reaches those that have it. */
export function callOp(op: Op, tensors: Record<string, Guarded>, scalars: Problem['scalars'], numerics: string): void {
  const named = { ...mapValues(tensors, ({ tensor }) => tensor as unknown), ...scalars }
  const args = Object.fromEntries(Object.entries(named).map(([name, value]) => [camelCase(name), value]))
  op.call(op.info.params.some(({ name }) => name === 'numerics') ? { ...args, numerics } : args)
}

/** Fresh outputs on a device. */
function outputsOn(problem: Problem, device: Device): Record<string, Guarded> {
  return mapValues(problem.outputs(), (output) => {
    if (device === 'cpu') return output
    using host = output
    return host.to(device)
  })
}

function attempt<Result>(work: () => Result): Result | Error {
  try {
    return work()
  } catch (error) {
    if (error instanceof EpmoeError) return error
    throw error
  }
}

function mapValues<From, To>(record: Record<string, From>, change: (value: From) => To): Record<string, To> {
  return Object.fromEntries(Object.entries(record).map(([key, value]) => [key, change(value)]))
}
