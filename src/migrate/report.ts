import type { BenchReport } from '../bench/result.js'
import type { CaseResult, Report } from '../parity/result.js'
import type { ReplayReport } from './replay.js'
import type { ScanReport, ScanSite } from './scan.js'

/** What `shim.save(path)` wrote; Python's spelling. */
export interface ShadowFile {
  schema: 'epmoe.shadow/1'
  time: number
  environment: Record<string, unknown>
  kernels: Record<string, ShadowCounts>
  events: { kernel: string; kind: string; what: string; capsule?: string | null }[]
}

export interface ShadowCounts {
  op: string
  mode: string
  tripped: string
  launches: number
  /** Passed over for what comparing takes. */
  put_off: number
  compared: number
  matched: number
  mismatches: number
  errors: number
  fallbacks: number
  uncovered: number
  uncompared: number
  captured: number
  staged: number
  recorded: number
  reasons: Record<string, number>
  shadow_overhead: number
  timings: Record<string, { samples: number; triton_seconds: number; epmoe_seconds: number }>
}

/** What a report is made of; each part may be missing, and then stands against a verdict of ready where it is needed. */
export interface Evidence {
  shadow: ShadowFile | undefined
  scan: ScanReport | undefined
  parity: (Report | ReplayReport)[]
  bench: BenchReport | undefined
  /** Comparisons in shadow that a kernel needs. */
  least: number
  /** The configuration file, as the way back names it. */
  config: string
}

export interface Speed {
  shape: string
  /** Microseconds. */
  triton: number
  epmoe: number
  /** `shadow`: the shortest of what shadow timed. `bench`: medians of a bench. */
  from: 'shadow' | 'bench'
}

export interface KernelReport {
  kernel: string
  op: string
  ready: boolean
  /** What stands against it. */
  reasons: string[]
  /** What to know of it all the same. */
  notes: string[]
  shadow: ShadowCounts | undefined
  parity: { passed: number; total: number; against: string[] }
  speed: Speed[]
  sites: ScanSite[]
  /** How to switch it, and how to get back. */
  enable: string
  rollback: string
}

export interface MigrationReport {
  schema: 'epmoe.migration/1'
  time: string
  environment: Record<string, unknown>
  ready: boolean
  kernels: KernelReport[]
  /** Files that the scan could not read. */
  problems: string[]
  /** What the numbers do not say. */
  caveats: string[]
  rollback: string
}

/** Is it safe to switch, what is gained, how does one get back: for every kernel that was launched or is called. */
export function migrationReport(evidence: Evidence): MigrationReport {
  const { shadow, scan, config } = evidence
  const sites = scan?.sites ?? []
  const names = new Set([...Object.keys(shadow?.kernels ?? {}), ...sites.map(({ kernel }) => kernel)])
  const kernels = [...names].sort().map((kernel) => kernelReport(kernel, evidence))
  return {
    schema: 'epmoe.migration/1',
    time: new Date().toISOString(),
    environment: shadow?.environment ?? evidence.parity[0]?.environment ?? {},
    ready: kernels.length > 0 && kernels.every(({ ready }) => ready),
    kernels,
    problems: (scan?.problems ?? [])
      .filter(({ harmless }) => !harmless)
      .map(({ file, reason }) => `${file}: ${reason}`),
    caveats: caveatsOf(shadow),
    rollback: `npx epmoe mode '*=triton' --config ${config}`,
  }
}

function caveatsOf(shadow: ShadowFile | undefined): string[] {
  if (shadow === undefined || String(shadow.environment['device']).startsWith('cuda')) return []
  return ['Shadow ran on the CPU, where Triton is interpreted: its times say nothing of a GPU']
}

function kernelReport(kernel: string, evidence: Evidence): KernelReport {
  const counts = evidence.shadow?.kernels[kernel]
  const sites = evidence.scan?.sites.filter((site) => site.kernel === kernel) ?? []
  const op = counts?.op ?? sites[0]?.op ?? ''
  const results = evidence.parity.flatMap(({ cases }) => cases.filter((each) => each.op === op))
  const missed = evidence.parity.flatMap(({ controls }) =>
    controls.filter(({ name, detected }) => name.startsWith(`${op}/`) && !detected),
  )
  const reasons = [
    ...againstShadow(counts, evidence.least),
    ...againstParity(results, missed.length),
    ...sites.flatMap(({ file, line, blockers }) => blockers.map(({ reason }) => `${file}:${line}: ${reason}`)),
  ]
  const speed = speedOf(op, counts, evidence.bench)
  const short = kernel.replace(/_triton_kernel$/, '')
  return {
    kernel,
    op,
    ready: reasons.length === 0,
    reasons,
    notes: notesOf(counts, speed),
    shadow: counts,
    parity: {
      passed: results.filter(({ passed }) => passed).length,
      total: results.length,
      against: [...new Set(results.map(({ backend, reference }) => `${backend} against ${reference}`))],
    },
    speed,
    sites,
    enable: `npx epmoe mode ${short}=epmoe --config ${evidence.config}`,
    rollback: `npx epmoe mode ${short}=triton --config ${evidence.config}`,
  }
}

function againstShadow(counts: ShadowCounts | undefined, least: number): string[] {
  if (counts === undefined) return ['it was not seen in shadow']
  const putOff = counts.put_off > 0 ? `; max_overhead put ${counts.put_off} more off` : ''
  return [
    ...(counts.tripped === '' ? [] : [`it went back to Triton by itself: ${counts.tripped}`]),
    ...(counts.mismatches === 0 ? [] : [`${counts.mismatches} of ${counts.compared} comparisons in shadow differ`]),
    ...(counts.errors === 0 ? [] : [`epmoe failed ${counts.errors} times in shadow`]),
    ...(counts.compared >= least ? [] : [`${counts.compared} comparisons in shadow, of ${least} asked for${putOff}`]),
    ...(counts.uncompared === 0 ? [] : [`${counts.uncompared} launches under graph capture are not compared`]),
  ]
}

function againstParity(results: CaseResult[], missed: number): string[] {
  if (results.length === 0) return ['no parity or replay report has its op']
  const failed = results.filter(({ passed }) => !passed)
  return [
    ...(failed.length === 0 ? [] : [`${failed.length} of ${results.length} comparisons of parity or replay failed`]),
    ...(missed === 0 ? [] : [`${missed} controls of parity went unnoticed`]),
  ]
}

function notesOf(counts: ShadowCounts | undefined, speed: Speed[]): string[] {
  const outside = (counts?.uncovered ?? 0) + (counts?.fallbacks ?? 0)
  const slower = speed.filter(({ triton, epmoe }) => epmoe > triton)
  const reasons = Object.entries(counts?.reasons ?? {}).map(([reason, count]) => `${reason} (${count})`)
  return [
    ...(outside > 0
      ? [`${outside} launches are outside what epmoe takes and stay with Triton: ${reasons.join('; ')}`]
      : []),
    ...(slower.length > 0 ? [`slower than Triton at ${slower.map(({ shape }) => shape).join('; ')}`] : []),
  ]
}

function speedOf(op: string, counts: ShadowCounts | undefined, bench: BenchReport | undefined): Speed[] {
  const seen = Object.entries(counts?.timings ?? {}).map(([shape, { triton_seconds, epmoe_seconds }]) => ({
    shape,
    triton: triton_seconds * 1e6,
    epmoe: epmoe_seconds * 1e6,
    from: 'shadow' as const,
  }))
  const timings = (bench?.timings ?? []).filter((each) => each.op === op && each.problem === undefined)
  const timed = [...new Set(timings.map(({ name }) => name))].flatMap((name) => {
    const of = (implementation: string) =>
      timings.find((each) => each.name === name && each.implementation === implementation)?.microseconds
    const [triton, epmoe] = [of('triton-original') ?? of('triton'), of('epmoe')]
    return triton === undefined || epmoe === undefined ? [] : [{ shape: name, triton, epmoe, from: 'bench' as const }]
  })
  return [...seen, ...timed]
}
