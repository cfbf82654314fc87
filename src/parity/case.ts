import type { DType } from '../dtype.js'
import type { Tensor } from '../tensor.js'
import type { Guarded } from './guard.js'

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
  build(): Problem
}

/** A case's data, on the CPU. */
export interface Problem extends Disposable {
  /** By snake_case name. */
  inputs: Record<string, Guarded>
  /** Fresh, poisoned outputs. */
  outputs(): Record<string, Guarded>
  scalars: Record<string, number>
  /** The truth in float64; belongs to the case, which may keep it for the next. */
  oracle(): Oracle
  /** Bounds that hold by the arithmetic, in units in the last place at the magnitude of the sum of absolute terms. */
  bounds: { fp32: number; triton: number; reference: number }
  /** Ways to spoil the call that a comparison must notice; each changes copies of the inputs. */
  spoilers: Spoiler[]
}

export interface Oracle extends Disposable {
  /** The one output that is compared, by snake_case name. */
  output: string
  /** float64, of the output's shape. */
  expected: Tensor
  /** float64: the magnitude of each element's terms. */
  scale: Tensor
}

export interface Spoiler {
  name: string
  /** Whether this case has what the spoiler changes, e.g. two local slots to swap. */
  apply(inputs: Record<string, Guarded>): boolean
}

/** What `src/parity/cases/<op>.ts` exports as default. */
export interface OpCases {
  op: string
  /** The cases of a default run: small, and with every hazard. */
  standard(): Case[]
  /** The cross product that the options ask for. */
  grid(options: GridOptions): Case[]
  /** A case by its name, for replay. */
  parse(name: string): Case | undefined
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
