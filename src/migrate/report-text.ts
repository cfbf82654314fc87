import type { KernelReport, MigrationReport } from './report.js'

/** For people and pull requests. */
export function reportMarkdown(report: MigrationReport): string {
  const { kernels, problems, rollback, environment, time } = report
  const rows = kernels.map(
    (each) =>
      `| ${each.kernel} | ${each.ready ? 'ready' : 'not ready'} | ${each.shadow?.launches ?? 0} | ${comparedText(each)} | ${each.parity.passed}/${each.parity.total} | ${gainText(each)} | ${each.sites.length} |`,
  )
  return [
    '# Migration to epmoe',
    '',
    `${verdictText(report)} ${time}, ${machineText(environment)}.`,
    '',
    ...report.caveats.flatMap((each) => [`${each}.`, '']),
    '| kernel | verdict | launches | shadow, same of compared | parity | Triton over epmoe | call sites |',
    '|---|---|---|---|---|---|---|',
    ...rows,
    '',
    ...kernels.flatMap(kernelLines),
    ...(problems.length > 0 ? ['## Files not scanned', '', ...problems.map((each) => `- ${each}`), ''] : []),
    '## The way back',
    '',
    'From the next launch on Triton serves everything again where the process watches the file, else when it starts:',
    '',
    '```sh',
    rollback,
    '```',
    '',
    '`shim.uninstall()` puts back the objects that were there before.',
    '',
  ].join('\n')
}

function kernelLines({ kernel, op, reasons, notes, speed, sites, enable, rollback, ready }: KernelReport): string[] {
  return [
    `## ${kernel}: ${ready ? 'ready' : 'not ready'}`,
    '',
    `epmoe's ${op}.`,
    '',
    ...reasons.map((reason) => `- not ready: ${reason}`),
    ...notes.map((note) => `- ${note}`),
    ...sites.map(
      ({ file, line, state, generation }) => `- ${file}:${line} ${state}${generation && `, generation ${generation}`}`,
    ),
    ...(reasons.length + notes.length + sites.length > 0 ? [''] : []),
    ...(speed.length > 0
      ? [
          '| shape | Triton µs | epmoe µs | from |',
          '|---|---|---|---|',
          ...speed.map(
            ({ shape, triton, epmoe, from }) => `| ${shape} | ${micros(triton)} | ${micros(epmoe)} | ${from} |`,
          ),
          '',
        ]
      : []),
    ...(ready ? [`On: \`${enable}\`. Back: \`${rollback}\`.`] : [`Back: \`${rollback}\`.`]),
    '',
  ]
}

export function verdictText({ ready, kernels }: MigrationReport): string {
  const count = kernels.filter((each) => each.ready).length
  if (kernels.length === 0) return 'Nothing was seen: no kernel was launched, and no call site found.'
  if (kernels.length === 1) return ready ? 'The one kernel is ready.' : 'The one kernel is not ready.'
  return ready ? `All ${count} kernels are ready.` : `${count} of ${kernels.length} kernels are ready.`
}

export function machineText(environment: Record<string, unknown>): string {
  const { device_name: gpu, device, gpus, cpu, torch, triton, epmoe } = environment
  const first = (gpus as { name: string }[] | undefined)?.[0]?.name
  const versions = Object.entries({ epmoe, torch, triton }).flatMap(([name, version]) =>
    version === undefined ? [] : [`${name} ${String(version)}`],
  )
  return [String(gpu ?? first ?? cpu ?? device ?? 'unknown machine'), ...versions].join(', ')
}

export function comparedText({ shadow }: KernelReport): string {
  return shadow === undefined ? '–' : `${shadow.matched}/${shadow.compared}`
}

/** The range of Triton's time over epmoe's, by shape. */
export function gainText({ speed }: KernelReport): string {
  const gains = speed.map(({ triton, epmoe }) => triton / epmoe).sort((a, b) => a - b)
  if (gains.length === 0) return '–'
  const [least, most] = [gains[0]!.toFixed(1), gains.at(-1)!.toFixed(1)]
  return least === most ? `${least}×` : `${least}× to ${most}×`
}

export function micros(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3)
}
