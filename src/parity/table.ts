import type { CaseResult, Report } from './result.js'

/** The results, one line for each op, backend, reference and tier, and every failure in full. */
export function tableOf(report: Report): string {
  const groups = new Map<string, CaseResult[]>()
  for (const result of report.cases) {
    const key = [result.op, result.backend, result.reference, result.tier].join('|')
    groups.set(key, [...(groups.get(key) ?? []), result])
  }
  const header = ['op', 'backend', 'reference', 'tier', 'passed', 'identical', 'max ulp', "error by reference's"]
  const rows = [...groups].map(([key, results]) => [
    ...key.split('|'),
    `${results.filter((result) => result.passed).length}/${results.length}`,
    String(results.filter((result) => result.metrics.mismatched === 0).length),
    worst(results, ({ metrics }) => metrics.maxUlp).toPrecision(3),
    errorsOf(results),
  ])
  const widths = header.map((title, column) => Math.max(title.length, ...rows.map((row) => row[column]!.length)))
  const line = (cells: string[]) =>
    cells
      .map((cell, column) => cell.padEnd(widths[column]!))
      .join('  ')
      .trimEnd()
  const failures = report.cases.filter((result) => !result.passed)
  return [
    line(header),
    widths.map((width) => '-'.repeat(width)).join('  '),
    ...rows.map(line),
    ...failures.map(failureText),
    ...report.controls.filter((control) => !control.detected).map(({ name }) => `MISSED CONTROL ${name}`),
  ].join('\n')
}

function failureText({ name, backend, reference, tier, bound, failure, metrics }: CaseResult): string {
  const numbers = `${metrics.mismatched} of ${metrics.total} differ, max ${metrics.maxUlp.toPrecision(3)} ulp, error ${metrics.relL2.toExponential(3)} against ${metrics.referenceRelL2.toExponential(3)}`
  const asked = bound === undefined ? tier : `${tier} ${bound.toPrecision(4)}`
  return `FAILED ${name}\n  ${backend} against ${reference}, ${asked}: ${failure ?? numbers}`
}

export function summaryOf({ summary, controls, skips }: Report): string {
  const reasons = new Map<string, number>()
  for (const { reference, reason } of skips) {
    const key = `${reference}: ${reason.replace(/\(\d+ steps; /, '(')}`
    reasons.set(key, (reasons.get(key) ?? 0) + 1)
  }
  return [
    '',
    ...[...reasons].map(([reason, count]) => `${count} comparisons skipped, ${reason}`),
    `${controls.length - summary.controlsMissed} of ${controls.length} controls detected`,
    `${summary.passed} passed, ${summary.failed} failed, ${summary.skipped} skipped in ${summary.seconds} s`,
  ].join('\n')
}

function worst(results: CaseResult[], value: (result: CaseResult) => number): number {
  return results.reduce((most, result) => Math.max(most, value(result)), 0)
}

/** The median of error over reference's error, which dtypes of any precision share; none where nothing is rounded. */
function errorsOf(results: CaseResult[]): string {
  const ratios = results
    .map(({ metrics }) => metrics.relL2 / metrics.referenceRelL2)
    .filter((ratio) => Number.isFinite(ratio))
    .sort((a, b) => a - b)
  return ratios[Math.floor(ratios.length / 2)]?.toFixed(2) ?? ''
}
