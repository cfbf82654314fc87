import { Op } from '../call.js'
import { type Device, devices } from '../device.js'
import { camelCase, EpmoeError } from '../errors.js'
import { defaultsIn } from '../modules.js'
import { type Metrics, native } from '../native.js'
import type { Python } from '../python/python.js'
import type { Tensor } from '../tensor.js'
import type { Backend } from './backends.js'
import type { Case, OpCases, Oracle, Problem } from './case.js'
import { environmentOf } from './environment.js'
import type { Guarded } from './guard.js'
import { PythonReferences, type ReferenceFacts } from './references.js'
import type { CaseResult, ControlResult, Report, Skip } from './result.js'
import { passes, type Requirement, reached, requirementFor } from './verdict.js'

/** Every op that has cases: one file an op in cases/, found by listing the folder. */
export function loadCases(): Promise<OpCases[]> {
  return defaultsIn(new URL('./cases/', import.meta.url))
}

export interface RunOptions {
  cases: Case[]
  backends: Backend[]
  references: string[]
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

interface Output {
  guarded: Guarded
  intact: boolean
}

class ParityRun {
  readonly #options: RunOptions
  readonly #python: PythonReferences
  readonly #gpu: Device | undefined
  readonly #facts = new Map<string, ReferenceFacts[]>()
  readonly #ops = new Map<string, Op>()
  readonly #controlled = new Set<string>()
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
      for (const backend of this.#options.backends) this.#backend(each, problem, oracle, backend, inputsOn, references)
      for (const { output } of references) output?.guarded[Symbol.dispose]()
    } finally {
      for (const [device, inputs] of copies) {
        if (device !== 'cpu') for (const input of Object.values(inputs)) input[Symbol.dispose]()
      }
      if (each.axes['T']! * each.axes['H']! * (each.axes['K'] ?? 1) > 1e8) this.#python.release()
    }
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

  /** Each reference's output, computed once for all backends; undefined with a reason when it cannot say. */
  #referencesFor(each: Case, problem: Problem, inputsOn: (device: Device) => Record<string, Guarded>) {
    return this.#factsOf(each.op)
      .filter(({ name }) => this.#options.references.includes(name))
      .map((facts) => {
        if (facts.name === 'float64') return { facts, output: undefined, reason: undefined }
        const result = this.#reference(each, problem, inputsOn, facts)
        return typeof result === 'string'
          ? { facts, output: undefined, reason: result }
          : { facts, output: result, reason: undefined }
      })
  }

  #reference(
    each: Case,
    problem: Problem,
    inputsOn: (device: Device) => Record<string, Guarded>,
    facts: ReferenceFacts,
  ): Output | string {
    if (facts.problem !== null) return facts.problem
    const preferred = this.#options.backends.some((backend) => backend.device !== 'cpu') ? this.#gpu! : 'cpu'
    const device = this.#python.deviceFor(facts, preferred, this.#gpu)
    if (device === undefined) return 'compiled Triton needs a GPU'
    if (facts.compiled === false && each.interpreterSteps > this.#options.interpreterBudget) {
      return `too large for interpreted Triton (${each.interpreterSteps} steps; --interpreter-budget raises the limit)`
    }
    const outputs = outputsOn(problem, device)
    const objection = this.#python.run(each.op, facts.name, { ...inputsOn(device), ...outputs }, problem.scalars)
    if (objection !== null) return objection
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
    references: { facts: ReferenceFacts; output: Output | undefined; reason: string | undefined }[],
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
    const outcome = attempt(() => this.#call(each.op, problem, inputsOn(backend.device), backend))
    for (const { facts, output, reason } of references) {
      if (reason !== undefined) {
        this.#skips.push({ name: each.name, backend: backend.name, reference: facts.name, reason })
        continue
      }
      const requirement = requirementFor(backend, facts, problem.bounds)
      const result: CaseResult =
        outcome instanceof Error
          ? {
              ...key,
              reference: facts.name,
              ...requirement,
              reached: 'none',
              passed: false,
              failure: outcome.message,
              metrics: nothing,
            }
          : this.#judge(key, facts, requirement, outcome, output, oracle)
      this.#cases.push(result)
      if (!(outcome instanceof Error)) {
        this.#control(each, problem, oracle, backend, facts, requirement, output, inputsOn)
      }
    }
    if (!(outcome instanceof Error)) outcome.guarded[Symbol.dispose]()
  }

  #judge(
    key: Pick<CaseResult, 'name' | 'op' | 'backend'>,
    facts: ReferenceFacts,
    requirement: Requirement,
    actual: Output,
    reference: Output | undefined,
    oracle: Oracle,
  ): CaseResult {
    const metrics = compare(actual.guarded.tensor, reference?.guarded.tensor ?? oracle.expected, oracle)
    const failure = actual.intact ? {} : { failure: 'memory around the output was written to' }
    return {
      ...key,
      reference: facts.name,
      ...requirement,
      reached: reached(requirement, metrics),
      passed: actual.intact && passes(requirement, metrics),
      ...failure,
      metrics,
    }
  }

  /** Runs the op on a backend and reads its output back. */
  #call(op: string, problem: Problem, inputs: Record<string, Guarded>, backend: Backend): Output {
    const outputs = outputsOn(problem, backend.device)
    callOp(this.#op(op), { ...inputs, ...outputs }, problem.scalars, backend.numerics)
    return this.#read(outputs)
  }

  /** The (one) output on the CPU; reading waits for the device and reports its index errors. */
  #read(outputs: Record<string, Guarded>): Output {
    const [output] = Object.values(outputs) as [Guarded]
    const { host, intact } = output.read()
    output[Symbol.dispose]()
    return { guarded: host, intact }
  }

  /**
   * Once for every backend, reference and tier: the same comparison on spoiled results, which it must reject. Taken on
   * the first case that has room for every way of spoiling.
   */
  #control(
    each: Case,
    problem: Problem,
    oracle: Oracle,
    backend: Backend,
    facts: ReferenceFacts,
    requirement: Requirement,
    reference: Output | undefined,
    inputsOn: (device: Device) => Record<string, Guarded>,
  ): void {
    const key = `${each.op}/${each.dtype}/${backend.name}`
    const id = `${key} ${facts.name}`
    if (this.#controlled.has(id) || each.axes['T']! * each.axes['H']! > 1e6 || each.tags.includes('special')) return
    const spoiled = spoiledOutputs(
      problem,
      (inputs) => this.#call(each.op, { ...problem, inputs }, inputs, backend),
      inputsOn(backend.device),
      backend,
    )
    if (spoiled === undefined) return
    this.#controlled.add(id)
    for (const { name, output } of spoiled) {
      const metrics = compare(output.guarded.tensor, reference?.guarded.tensor ?? oracle.expected, oracle)
      this.#controls.push({ name: `${key}/${name} against ${facts.name}`, detected: !passes(requirement, metrics) })
      output.guarded[Symbol.dispose]()
    }
  }
}

/** Results that are wrong on purpose, or undefined when this case cannot be spoiled in every way. */
function spoiledOutputs(
  problem: Problem,
  call: (inputs: Record<string, Guarded>) => Output,
  inputs: Record<string, Guarded>,
  backend: Backend,
): { name: string; output: Output }[] | undefined {
  const spoiled: { name: string; output: Output }[] = []
  for (const spoiler of problem.spoilers) {
    const copies = mapValues(problem.inputs, (input) => input.to('cpu'))
    const applied = spoiler.apply(copies)
    if (applied) {
      const here = backend.device === 'cpu' ? copies : mapValues(copies, (copy) => copy.to(backend.device))
      spoiled.push({ name: spoiler.name, output: call(here) })
      if (here !== copies) for (const copy of Object.values(here)) copy[Symbol.dispose]()
    }
    for (const copy of Object.values(copies)) copy[Symbol.dispose]()
    if (!applied) {
      for (const { output } of spoiled) output.guarded[Symbol.dispose]()
      return undefined
    }
  }
  const zeros = call(inputs)
  zeros.guarded.tensor.data.fill(0 as never)
  return [{ name: 'zeros', output: zeros }, ...spoiled]
}

function callOp(op: Op, tensors: Record<string, Guarded>, scalars: Record<string, number>, numerics: string): void {
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

function compare(actual: Tensor, reference: Tensor, oracle: Oracle): Metrics {
  return native().parity.compare(
    actual.handleFor('compare'),
    reference.handleFor('compare'),
    oracle.expected.handleFor('compare'),
    oracle.scale.handleFor('compare'),
  )
}

const nothing: Metrics = { mismatched: 0, total: 0, maxUlp: 0, maxAbs: 0, relL2: 0, referenceRelL2: 0 }

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
