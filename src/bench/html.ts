import type { BenchReport, Timing } from './result.js'
import { groupBy } from './table.js'

const colours: Record<string, string> = {
  epmoe: '#0b7a75',
  'epmoe:triton-numerics': '#7fb800',
  triton: '#d1495b',
  'triton-original': '#edae49',
  torch: '#5f6caf',
  'torch.compile': '#a23e98',
}

/** One page without anything from elsewhere: plots over tokens, a line an implementation, and the numbers. */
export function benchPage(report: BenchReport): string {
  const groups = groupBy(
    report.timings.filter(({ problem }) => problem === undefined),
    seriesOf,
  )
  const sections = [...groups].map(([title, timings]) => section(title, timings))
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>epmoe bench</title><style>${style}</style></head><body>
<h1>epmoe bench</h1>
<p class="facts">${escape(factsOf(report))}</p>
${report.invalid.map((reason) => `<p class="invalid">Invalid: ${escape(reason)}</p>`).join('\n')}
${sections.join('\n')}
</body></html>
`
}

/** What a plot holds: cases that differ in their tokens alone. What is off or as usual is not worth a reader's time. */
function seriesOf({ name, device, cold }: Timing): string {
  const [op = '', fields = ''] = name.split('/')
  const told = fields
    .split(',')
    .map((field) => field.split('=') as [string, string])
    .filter(
      ([key, value]) => !/^([TR]|seed|rank|values|routing)$/.test(key) && !/^(0|none|same|static|packed)$/.test(value),
    )
    .map(([key, value]) => `${key} ${value}`)
  return [op, ...told, `on ${device}${cold ? ', cold' : ''}`].join(' · ')
}

function factsOf({ environment, copy }: BenchReport): string {
  const gpus = (environment['gpus'] as { name: string }[] | undefined) ?? []
  const machine = gpus.length > 0 ? gpus.map(({ name }) => name).join(', ') : String(environment['cpu'])
  const rates = Object.entries(copy).map(([device, rate]) => `copy on ${device} ${rate.toFixed(0)} GB/s`)
  return [machine, ...rates, `epmoe ${String(environment['epmoe'])}`, String(environment['time'])].join(' · ')
}

function section(title: string, timings: Timing[]): string {
  const shares = [1, ...timings.map(({ ofCopy }) => ofCopy)]
  return `<section><h2>${escape(title)}</h2><div class="plots">
${plot('µs a call', timings, ({ microseconds }) => microseconds, 'log')}
${plot('percent of a copy', timings, ({ ofCopy }) => 100 * ofCopy, 'linear', 110 * Math.max(...shares))}
</div>${legend(timings)}${table(timings)}</section>`
}

const [width, height] = [460, 280]
const margin = { left: 62, right: 24, top: 30, bottom: 38 }

type Scale = (value: number) => number

function plot(
  title: string,
  timings: Timing[],
  valueOf: (timing: Timing) => number,
  kind: 'log' | 'linear',
  most?: number,
): string {
  const tokens = timings.map((timing) => Math.max(1, timing.tokens))
  const values = timings.map(valueOf)
  const x = logScale(Math.min(...tokens), Math.max(...tokens), margin.left, width - margin.right)
  const [bottom, top] = [height - margin.bottom, margin.top]
  const y =
    kind === 'log'
      ? logScale(Math.min(...values) / 1.2, Math.max(...values) * 1.2, bottom, top)
      : linearScale(0, most ?? Math.max(...values), bottom, top)
  const marks = kind === 'log' ? decades(Math.min(...values) / 1.2, Math.max(...values) * 1.2) : percents(most ?? 100)
  // The first is drawn last: where lines meet, epmoe's is seen.
  const lines = [...groupBy(timings, ({ implementation }) => implementation)].reverse().map(([name, own]) => {
    const sorted = [...own].sort((a, b) => a.tokens - b.tokens)
    const points = sorted.map(
      (timing) => `${x(Math.max(1, timing.tokens)).toFixed(1)},${y(valueOf(timing)).toFixed(1)}`,
    )
    const colour = colours[name] ?? '#888'
    const dots = points.map((point, i) => {
      const [cx, cy] = point.split(',')
      const text = `${name}, T = ${sorted[i]?.tokens}: ${number(valueOf(sorted[i]!))}`
      return `<circle cx="${cx}" cy="${cy}" r="3" fill="${colour}"><title>${escape(text)}</title></circle>`
    })
    return `<polyline points="${points.join(' ')}" fill="none" stroke="${colour}" stroke-width="2"/>${dots.join('')}`
  })
  const grid = marks.map((mark) => {
    const at = y(mark).toFixed(1)
    return `<line x1="${margin.left}" x2="${width - margin.right}" y1="${at}" y2="${at}" class="grid"/><text x="${margin.left - 6}" y="${at}" class="y">${number(mark)}</text>`
  })
  const ticks = [...new Set(tokens)]
    .sort((a, b) => a - b)
    .map((count) => `<text x="${x(count).toFixed(1)}" y="${height - margin.bottom + 16}" class="x">${count}</text>`)
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(title)}"><text x="${margin.left}" y="18" class="title">${escape(title)}</text>${grid.join('')}${ticks.join('')}<text x="${width - margin.right}" y="${height - 6}" class="x end">tokens</text>${lines.join('')}</svg>`
}

function logScale(low: number, high: number, from: number, to: number): Scale {
  const span = Math.log(high) - Math.log(low)
  return (value) => (span === 0 ? (from + to) / 2 : from + ((Math.log(value) - Math.log(low)) / span) * (to - from))
}

function linearScale(low: number, high: number, from: number, to: number): Scale {
  return (value) => from + ((value - low) / (high - low)) * (to - from)
}

/** 1, 2 and 5 of each decade, or the decades alone where those would crowd. */
function decades(low: number, high: number): number[] {
  const marks: number[] = []
  const few = Math.log10(high / low) < 2
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of few ? [1, 2, 5] : [1]) marks.push(factor * 10 ** power)
  }
  return marks.filter((mark) => mark >= low && mark <= high)
}

function percents(most: number): number[] {
  const step = most > 400 ? 100 : most > 160 ? 50 : 25
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step)
}

function legend(timings: Timing[]): string {
  const names = [...new Set(timings.map(({ implementation }) => implementation))]
  const items = names.map((name) => `<span><i style="background:${colours[name] ?? '#888'}"></i>${escape(name)}</span>`)
  return `<p class="legend">${items.join('')}</p>`
}

function table(timings: Timing[]): string {
  const rows = timings.map(
    ({ tokens, implementation, microseconds, spread, stable, gigabytesPerSecond, ofCopy, launchMicroseconds }) =>
      `<tr><td>${tokens}</td><td>${escape(implementation)}</td><td>${number(microseconds)}</td><td>${(100 * spread).toFixed(1)}${stable ? '' : ' ?'}</td><td>${number(gigabytesPerSecond)}</td><td>${(100 * ofCopy).toFixed(1)}</td><td>${launchMicroseconds === undefined ? '' : number(launchMicroseconds)}</td></tr>`,
  )
  return `<details><summary>Numbers</summary><table><thead><tr><th>tokens</th><th></th><th>µs</th><th>± %</th><th>GB/s</th><th>% of copy</th><th>launch µs</th></tr></thead><tbody>${rows.join('')}</tbody></table></details>`
}

function number(value: number): string {
  const text = value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toPrecision(2)
  return text.replace(/\.0$/, '')
}

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`)
}

const style = `
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1020px; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0 } h2 { font-size: 1rem; font-weight: 600; margin: 2.2rem 0 .4rem; overflow-wrap: anywhere }
.facts { color: #777; margin-top: .2rem } .invalid { background: #b00020; color: #fff; padding: .4rem .8rem; border-radius: 4px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: currentColor }
.title { font-weight: 600; font-size: 12px } .y { text-anchor: end; dominant-baseline: middle; opacity: .7 }
.x { text-anchor: middle; opacity: .7 } .x.end { text-anchor: end } .grid { stroke: currentColor; opacity: .14 }
.legend span { margin-right: 1.2rem; white-space: nowrap } .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .1rem .8rem; text-align: right } td:nth-child(2) { text-align: left }
summary { cursor: pointer; opacity: .7 }
`
