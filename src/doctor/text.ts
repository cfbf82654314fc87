import type { Report } from './examine.js'

const words = { ok: 'ok', warn: 'WARN', fail: 'FAIL', absent: '-' }

/** The report for reading: what there is, how to mend what is not, and what follows. */
export function textOf({ epmoe, findings, abilities }: Report): string {
  const width = Math.max(...findings.map(({ name }) => name.length))
  const lines = findings.flatMap(({ name, state, value, remedy }) => [
    `${words[state].padEnd(4)}  ${name.padEnd(width)}  ${value}`,
    ...(state === 'ok' || remedy === undefined ? [] : [`${' '.repeat(width + 8)}→ ${remedy}`]),
  ])
  const works = abilities.filter((ability) => ability.works).map(({ name }) => `  ${name}`)
  const doesNot = abilities.filter((ability) => !ability.works).map(({ name, why }) => `  ${name}: ${why}`)
  return [
    `epmoe ${epmoe}`,
    ...lines,
    '',
    'What works here:',
    ...(works.length === 0 ? ['  nothing'] : works),
    ...(doesNot.length === 0 ? [] : ['What does not:', ...doesNot]),
  ].join('\n')
}
