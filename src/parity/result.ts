import type { Metrics } from '../native.js'
import type { Tier } from './verdict.js'

/** One comparison. */
export interface CaseResult {
  name: string
  op: string
  backend: string
  reference: string
  /** What it had to reach, and with which bound. */
  tier: Tier
  bound?: number
  reached: Tier | 'none'
  passed: boolean
  /** Why it failed although the numbers agree: a guard zone was written to, or the call failed. */
  failure?: string
  metrics: Metrics
}

export interface ControlResult {
  /** `post_reorder/bfloat16/cuda/zeros against float64: bfloat16 ulp` */
  name: string
  /** Whether the comparison noticed the spoiled result, as it must. */
  detected: boolean
}

export interface Skip {
  name: string
  backend: string
  reference: string
  reason: string
}

/** The report of a run, as written by --json. */
export interface Report {
  schema: 'epmoe.parity/1'
  environment: Record<string, unknown>
  cases: CaseResult[]
  controls: ControlResult[]
  skips: Skip[]
  summary: { total: number; passed: number; failed: number; skipped: number; controlsMissed: number; seconds: number }
}

/** A run is good when something was compared, nothing failed, and no control slipped through. */
export function succeeded({ summary, controls }: Report): boolean {
  return summary.total > 0 && summary.failed === 0 && summary.controlsMissed === 0 && controls.length > 0
}
