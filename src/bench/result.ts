/** One implementation's time on one case. */
export interface Timing {
  /** The case's name, as parity prints it. */
  name: string
  op: string
  implementation: string
  device: string
  /** Whether the arguments were rotated beyond the caches. */
  cold: boolean
  /** Median of a call. */
  microseconds: number
  /** Half the distance of the quartiles, over the median. */
  spread: number
  samples: number
  /** Whether the median is known to half a percent. */
  stable: boolean
  /** Of the bytes that the call has to move. */
  gigabytesPerSecond: number
  /** Of the rate that a copy reached just before and after. */
  ofCopy: number
  /** Host time of a call, launch included; CUDA only. */
  launchMicroseconds?: number
  /** Why there is no time, or why it counts for nothing. */
  problem?: string
  note?: string
  tokens: number
  hidden: number
}

/** The report of a run, as written by --json. */
export interface BenchReport {
  schema: 'epmoe.bench/1'
  environment: Record<string, unknown>
  /** GB/s, read and written, of a copy in this run, the median of its times; by device. */
  copy: Record<string, number>
  timings: Timing[]
  /** Why the run is worth nothing, if it is. */
  invalid: string[]
}
