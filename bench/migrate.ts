// The serving loop of test/python migrated for longer than the tests have time for, with what each fault printed, and
// what shadow costs.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { devices, startPython } from 'epmoe'
import { epmoe, plainPython, type Served, serve } from '../test/helpers/migration.js'

const gpu = devices().length > 1
const shapes = gpu
  ? { tokens: [1, 16, 64, 256], hidden: 2048, large: 4096 }
  : { tokens: [1, 2, 3], hidden: 70, large: 64 }
const steps = gpu ? 5000 : 1000

export default async function migrate(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-bench-'))
  try {
    overhead(join(folder, 'overhead'), Number(process.argv[3] ?? 60))
    await transcript(folder)
    await faults(folder)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function transcript(folder: string): Promise<void> {
  const config = join(folder, 'epmoe.migrate.json')
  const file = (name: string) => join(folder, name)
  const run = async (...args: string[]) => {
    const { status, stdout, stderr } = await epmoe(args)
    console.log(`$ epmoe ${args.join(' ')}\n${stdout}${stderr}(exit code ${status})\n`)
    return stdout
  }
  const served = async (more: Record<string, unknown> = {}) =>
    tell(await serve({ folder, steps, ...shapes, ...more }, { EPMOE_MIGRATE: config }))
  const settings = { '*': { max_overhead: 0 } } // as many comparisons as the rate says, in so short a run
  writeFileSync(config, JSON.stringify({ settings, record: { folder: 'capsules', first_per_shape: 2, rate: 0.002 } }))
  await run('mode', '*=triton', '--config', config)
  await served()
  await run('scan', file('serving'))
  writeFileSync(file('scan.json'), (await epmoe(['scan', file('serving'), '--json'])).stdout)
  await run('replay', '--config', config, '--json', file('replay.json'), '--quiet')
  await run('mode', '*=shadow', '--config', config)
  await served({ stats: file('shadow.json') })
  const evidence = ['--shadow', file('shadow.json'), '--scan', file('scan.json'), '--parity', file('replay.json')]
  await run('shadow-report', ...evidence, '--least', '10', '--config', config)
  await run('mode', '*=epmoe', '--config', config)
  await served()
  await run('mode', '*=triton', '--config', config)
  await served()
}

async function faults(folder: string): Promise<void> {
  for (const [fault, mode] of [
    ['slot', 'shadow'],
    ['nan', 'shadow'],
    ['coverage', 'epmoe'],
    ['disk', 'triton'],
    ...(gpu
      ? [
          ['threads', 'shadow'],
          ['graph', 'shadow'],
        ]
      : []),
  ] as [string, string][]) {
    const config = join(folder, `${fault}.json`)
    const settings = { '*': { rate: 1, trip_after: 3, max_overhead: 0 } }
    writeFileSync(
      config,
      JSON.stringify({
        modes: { '*': mode },
        settings,
        record: { folder: `${fault}-kept`, rate: fault === 'disk' ? 1 : 0 },
      }),
    )
    console.log(`fault ${fault}:`)
    const options = {
      folder,
      steps: 60,
      ...shapes,
      large: fault === 'slot' ? 4096 : shapes.large,
      fault,
      also: fault === 'threads' ? 1 : 0,
    }
    tell(await serve(options, { EPMOE_MIGRATE: config }))
  }
  const config = join(folder, 'crash.json')
  writeFileSync(config, JSON.stringify({ modes: { '*': 'triton' }, record: { folder: 'crash-kept', rate: 1 } }))
  const crash = JSON.stringify({ folder, steps: 60, ...shapes, fault: 'crash' })
  const { signal } = await plainPython(['serve.py', crash], { EPMOE_MIGRATE: config })
  const { status, stdout } = await epmoe(['replay', '--config', config, '--quiet', '--reference', 'float64,recorded'])
  console.log(`fault crash:\n  ended by ${signal}; what it left is replayed with exit code ${status}:`)
  console.log(`  ${stdout.trim().split('\n').at(-1)}\n`)
}

function tell({ served, wrong, seconds, mode, device, identical, events, warnings, stats }: Served): void {
  const counts = (name: string) => Object.values(stats).reduce((sum, each) => sum + (each[name] as number), 0)
  console.log(
    `  ${served} steps on ${device} in ${seconds.toFixed(1)} s, ${wrong} other than Triton's; mode ${mode} at the end; ` +
      `${counts('launches')} launches, ${counts('compared')} compared, ${counts('mismatches')} mismatches, ` +
      `${counts('fallbacks')} fallbacks, ${counts('recorded')} recorded; uninstalled, identical objects: ${identical}`,
  )
  for (const { kernel, kind, what } of events.slice(0, 4)) console.log(`  event: ${kernel} ${kind}: ${what}`)
  if (events.length > 4) console.log(`  and ${events.length - 4} more`)
  for (const warning of warnings) console.log(`  warned: ${warning}`)
  console.log('')
}

function overhead(folder: string, seconds: number): void {
  const file = fileURLToPath(new URL('./migrate.py', import.meta.url))
  if (!gpu) process.env['TRITON_INTERPRET'] ??= '1'
  const found = startPython().exec(readFileSync(file, 'utf8'), file).method('overhead', folder, seconds)
  console.log(JSON.stringify(found.toJS(), null, 1))
}
