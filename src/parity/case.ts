import type { DType } from '../dtype.js'
import type { Tensor } from '../tensor.js'
import type { Guarded } from './guard.js'
import type { ReferenceFacts } from './references.js'

/** One point of an op's grid. Its name is test title, filter, bench key and replay key. */
export interface Case {
  /** `post_reorder/T=7,H=7168,...`: says everything that build() depends on. */
  name: string
  /** snake_case */
  op: string
  dtype: DType
  tags: string[]
  /** Numbers of interest to filters and reports. */
  axes: Record<string, number>
  /** Rough count of interpreted Triton steps, by which slow combinations are left out. */
  interpreterSteps: number
  /** Why Triton's numerics have no result that is laid down; the default has one always. */
  unspecified: string | undefined
  build(): Problem
}

/** A case's data, on the CPU. */
export interface Problem extends Disposable {
  /** By snake_case name. */
  inputs: Record<string, Guarded>
  /** Fresh, poisoned outputs. */
  outputs(): Record<string, Guarded>
  /** Numbers, and the words of enums. */
  scalars: Record<string, number | string>
  /** The truth in float64; belongs to the case, which may keep it for the next. */
  oracle(): Oracle
  /** Bytes that the call has to read and to write, each once: what a bench divides by time. */
  bytes: number
  /** Ways to spoil the call that a comparison must notice; each changes copies of the inputs. */
  spoilers: Spoiler[]
  /** Results that somebody else's run of the same call left: one more reference. */
  recorded?: { facts: ReferenceFacts; outputs(): Record<string, Guarded> }
}

/** A call that was made somewhere, as replay has it. */
export interface RecordedCall {
  inputs: Record<string, Guarded>
  outputs: Record<string, { shape: number[]; dtype: DType }>
  scalars: Record<string, number | string>
}

/** What an op knows of a recorded call. */
export interface Known extends Pick<Problem, 'oracle'> {
  dtype: DType
  axes: Record<string, number>
  interpreterSteps: number
}

/** Bounds that follow from the arithmetic, in units in the last place at the magnitude of the terms. */
export interface Bounds {
  fp32: number
  triton: number
  /** Of torch's and of interpreted Triton's result, which round more often. */
  reference: number
}

export interface Oracle extends Disposable {
  outputs: OracleOutput[]
}

/** The truth of one output. What an op leaves untouched stays as it was poisoned: NaN, and -1 in integers. */
export interface OracleOutput {
  /** snake_case */
  name: string
  /** float64, of the output's shape. */
  expected: Tensor
  /** float64: the magnitude of each element's terms. */
  scale: Tensor
  /** Absent: no rounding is allowed anywhere, as of integers and of rows that are moved. */
  bounds?: Bounds
}

export interface Spoiler {
  name: string
  /** Whether this case has what the spoiler changes, e.g. two local slots to swap. */
  apply(inputs: Record<string, Guarded>): boolean
}

/** What `src/parity/cases/<op>.ts` exports as default. */
export interface OpCases {
  op: string
  /** References the op has; all when absent. */
  references?: readonly string[]
  /** The cases of a default run: small, and with every hazard. */
  standard(): Case[]
  /** The cross product that the options ask for. */
  grid(options: GridOptions): Case[]
  /** A case by its name, for replay. */
  parse(name: string): Case | undefined
  /** The truth of a recorded call. Its arguments are those that the op takes; absent where nothing records the op. */
  recorded?(call: RecordedCall): Known
}

export interface GridOptions {
  tokens: number[]
  presets: string[]
  hidden: number[]
  topk: number[]
  experts: number[]
  dtypes: DType[]
  ep: number[]
  idsDtypes: ('int32' | 'int64')[]
  weightsDtypes: ('float32' | 'same')[]
  routings: ('uniform' | 'skewed')[]
  seed: number
}
