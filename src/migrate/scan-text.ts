import type { ScanReport, ScanSite } from './scan.js'

/** A report for people: a line a site as compilers print them, what stands against it below, and a summary. */
export function scanText({ sites, problems, changes, files, seconds, summary }: ScanReport): string {
  const lines = sites.flatMap(siteLines)
  for (const { file, kind, reason } of problems) lines.push(`${file}: ${kind}: ${reason}`)
  for (const { file, sites: count, written } of changes)
    if (written) lines.push(`${file}: written, ${plural(count, 'site')}`)
  const { ready, blocked, migrated } = summary
  lines.push(
    `${plural(sites.length, 'site')}: ${migrated} migrated, ${ready} ready, ${blocked} blocked; ` +
      `${plural(files.seen, 'file')} seen, ${files.parsed} parsed, ${seconds.toFixed(1)} s`,
  )
  return lines.join('\n')
}

function siteLines(site: ScanSite): string[] {
  const { file, line, column, kernel, generation, op, state, kind } = site
  const which = generation === '' ? kernel : `${kernel}, generation ${generation}`
  const mapped = site.arguments.flatMap(({ argument, value }) => (argument === null ? [] : [`${argument}=${value}`]))
  return [
    `${file}:${line}:${column}: ${state}: ${which} → ${op} (${kind})`,
    ...(mapped.length > 0 ? [`    ${mapped.join(', ')}`] : []),
    ...site.blockers.map(({ code, reason }) => `    ${code}: ${reason}`),
    ...site.notes.map((note) => `    note: ${note}`),
  ]
}

function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`
}
