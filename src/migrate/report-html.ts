import type { KernelReport, MigrationReport } from './report.js'
import { comparedText, gainText, machineText, micros, verdictText } from './report-text.js'

/** One page without anything from elsewhere. */
export function reportPage(report: MigrationReport): string {
  const { kernels, problems, rollback, environment, time, ready } = report
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Migration to epmoe</title><style>${style}</style></head><body>
<h1>Migration to epmoe</h1>
<p class="facts">${escape(machineText(environment))} · ${escape(time)}</p>
<p class="verdict ${ready ? 'ready' : 'not'}">${escape(verdictText(report))}</p>
${report.caveats.map((each) => `<p>${escape(each)}.</p>`).join('')}
<table class="all"><thead><tr><th>kernel</th><th>verdict</th><th>launches</th><th>same of compared in shadow</th><th>parity</th><th>Triton over epmoe</th><th>call sites</th></tr></thead>
<tbody>${kernels.map(row).join('\n')}</tbody></table>
${kernels.map(section).join('\n')}
${problems.length > 0 ? `<h2>Files not scanned</h2>${list(problems)}` : ''}
<h2>The way back</h2>
<p>From the next launch on Triton serves everything again where the process watches the file, else when it starts:</p>
<pre>${escape(rollback)}</pre>
<p><code>shim.uninstall()</code> puts back the objects that were there before.</p>
</body></html>
`
}

function row(each: KernelReport): string {
  const cells = [
    each.shadow?.launches ?? 0,
    comparedText(each),
    `${each.parity.passed}/${each.parity.total}`,
    gainText(each),
    each.sites.length,
  ]
  return `<tr><td><a href="#${escape(each.kernel)}">${escape(each.kernel)}</a></td><td>${badge(each.ready)}</td>${cells.map((cell) => `<td>${escape(String(cell))}</td>`).join('')}</tr>`
}

function badge(ready: boolean): string {
  return `<span class="badge ${ready ? 'ready' : 'not'}">${ready ? 'ready' : 'not ready'}</span>`
}

function section(each: KernelReport): string {
  const { kernel, op, reasons, notes, sites, speed, enable, rollback, ready, parity } = each
  const commands = ready ? [enable, rollback] : [rollback]
  return `<section id="${escape(kernel)}"><h2>${escape(kernel)} ${badge(ready)}</h2>
<p class="facts">epmoe’s ${escape(op)}${parity.against.length > 0 ? ` · ${escape(parity.against.join(', '))}` : ''}</p>
${reasons.length > 0 ? list(reasons, 'reasons') : ''}${notes.length > 0 ? list(notes) : ''}
${speed.length > 0 ? speedTable(speed) : ''}
${sites.length > 0 ? `<details><summary>${sites.length === 1 ? '1 call site' : `${sites.length} call sites`}</summary>${list(sites.map(({ file, line, state }) => `${file}:${line} ${state}`))}</details>` : ''}
<pre>${commands.map(escape).join('\n')}</pre></section>`
}

/** A bar for each, as long as its time: the eye sees the gain. */
function speedTable(speed: KernelReport['speed']): string {
  const most = Math.max(...speed.flatMap(({ triton, epmoe }) => [triton, epmoe]))
  const bar = (value: number, who: string) =>
    `<div class="bar"><i class="${who}" style="width:${Math.max(0.5, (100 * value) / most).toFixed(1)}%"></i><span>${micros(value)} µs</span></div>`
  const rows = speed.map(
    ({ shape, triton, epmoe, from }) =>
      `<tr><td>${escape(shape)}<br><small>${from}</small></td><td class="bars">${bar(triton, 'triton')}${bar(epmoe, 'epmoe')}</td><td>${(triton / epmoe).toFixed(1)}×</td></tr>`,
  )
  return `<p class="legend"><span><i class="triton"></i>Triton</span><span><i class="epmoe"></i>epmoe</span></p><table class="speed"><tbody>${rows.join('\n')}</tbody></table>`
}

function list(items: string[], kind = ''): string {
  return `<ul class="${kind}">${items.map((item) => `<li>${escape(item)}</li>`).join('')}</ul>`
}

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`)
}

const style = `
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1020px; margin: 2rem auto; padding: 0 1rem }
h1 { margin: 0 } h2 { font-size: 1.05rem; margin: 2.2rem 0 .2rem; overflow-wrap: anywhere }
.facts { color: #777; margin: .2rem 0 .6rem; overflow-wrap: anywhere } small { color: #777 }
.verdict { font-weight: 600; padding: .5rem .8rem; border-radius: 4px; color: #fff } .verdict.ready { background: #0b7a75 } .verdict.not { background: #b00020 }
.badge { font-size: .8rem; font-weight: 600; padding: .05rem .5rem; border-radius: 1rem; color: #fff; white-space: nowrap } .badge.ready { background: #0b7a75 } .badge.not { background: #b00020 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% } td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8883 }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere } .all th { font-weight: 600; font-size: .85rem; vertical-align: bottom }
.bars { width: 60% } .bar { display: flex; align-items: center; gap: .5rem } .bar i { display: block; height: .7rem; border-radius: 2px } .bar span { font-size: .8rem; white-space: nowrap }
i.triton { background: #d1495b } i.epmoe { background: #0b7a75 }
.legend span { margin-right: 1.2rem } .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
.reasons li::marker { content: '✗  '; color: #b00020 } pre { background: #8882; padding: .5rem .8rem; border-radius: 4px; overflow-x: auto }
summary { cursor: pointer }
`
