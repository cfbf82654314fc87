import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import test from 'ava'
import type { MigrationReport } from '../src/migrate/report.js'
import type { ScanReport } from '../src/migrate/scan.js'
import { gpu } from './helpers/devices.js'
import { emptyFolder, epmoe, plainPython, pythonTests, serve } from './helpers/migration.js'

const kernels = [
  'post_reorder_triton_kernel',
  'pre_reorder_triton_kernel',
  'run_moe_ep_preproess',
  'silu_and_mul_triton_kernel',
]

test('a stack is migrated by the commands: scan, record, replay, shadow, enable, rollback', async (t) => {
  t.timeout(300_000)
  const folder = emptyFolder(t)
  const config = join(folder, 'epmoe.migrate.json')
  const environment = { EPMOE_MIGRATE: config }
  const file = (name: string) => join(folder, name)
  const mode = async (text: string) => {
    const { status, stdout, stderr } = await epmoe(['mode', text, '--config', config])
    t.is(status, 0, stderr)
    t.true(stdout.includes(text))
  }
  await serve({ folder, steps: 0, write_only: true })

  // Where are they launched?
  const scanned = await epmoe(['scan', file('serving'), '--json'])
  t.is(scanned.status, 0, scanned.stderr)
  const scan = JSON.parse(scanned.stdout) as ScanReport
  t.deepEqual([...new Set(scan.sites.map(({ kernel }) => kernel))].sort(), kernels)
  writeFileSync(file('scan.json'), scanned.stdout)

  // Recorded while Triton serves.
  writeFileSync(config, JSON.stringify({ record: { folder: 'capsules', first_per_shape: 2, min_free_bytes: 0 } }))
  await mode('*=triton')
  const recorded = await serve({ folder, steps: 100 }, environment)
  t.like(recorded, { served: 100, wrong: 0, mode: 'triton', identical: true, events: [] })
  t.is(readdirSync(file('capsules')).length, 2 * 2 * 3 + 2 * 1 + 2 * 2)

  // The same calls on every backend against every reference.
  const replayed = await epmoe(['replay', '--config', config, '--json', file('replay.json'), '--quiet'])
  t.is(replayed.status, 0, replayed.stdout + replayed.stderr)
  t.regex(replayed.stdout, / 0 failed/)

  // Beside Triton, which serves.
  await mode('*=shadow')
  writeFileSync(
    config,
    JSON.stringify({ ...JSON.parse(readFileSync(config, 'utf8')), settings: { '*': { rate: 0.2, max_overhead: 0 } } }),
  )
  const shadowed = await serve({ folder, steps: 300, stats: file('shadow.json') }, environment)
  t.like(shadowed, { served: 300, wrong: 0, mode: 'shadow', identical: true, events: [] })
  const evidence = ['--shadow', file('shadow.json'), '--scan', file('scan.json'), '--parity', file('replay.json')]
  const outputs = ['--json', file('report.json'), '--html', file('report.html'), '--config', config]
  const reported = await epmoe(['shadow-report', ...evidence, ...outputs, '--least', '20'])
  t.is(reported.status, 0, reported.stdout + reported.stderr)
  const report = JSON.parse(readFileSync(file('report.json'), 'utf8')) as MigrationReport
  t.true(report.ready)
  t.deepEqual(
    report.kernels.map(({ kernel }) => kernel),
    kernels,
  )
  for (const { kernel, speed, sites } of report.kernels) {
    t.true(speed.length > 0 && speed.every(({ triton, epmoe: own }) => triton > 0 && own > 0), kernel)
    t.true(sites.length > 0, kernel)
  }
  t.true(readFileSync(file('report.html'), 'utf8').includes('All 4 kernels are ready.'))
  // The control: asked for more than was compared, or without a replay, nothing is ready.
  const strict = await epmoe(['shadow-report', ...evidence, '--least', '100000'])
  t.is(strict.status, 1)
  t.regex(strict.stdout, /0 of 4 kernels are ready[\s\S]*comparisons in shadow, of 100000 asked for/)
  const unproved = await epmoe(['shadow-report', ...evidence.slice(0, 2), '--least', '20'])
  t.is(unproved.status, 1)
  t.regex(unproved.stdout, /no parity or replay report has its op/)

  // epmoe serves; and back, while the process runs.
  await mode('*=epmoe')
  const ready = file('2000-steps-served')
  const running = serve({ folder, steps: 2000, watch: true, ready, until: 'triton' }, environment)
  while (!existsSync(ready)) await new Promise((resolve) => setTimeout(resolve, 50))
  await mode('*=triton')
  const enabled = await running
  t.like(enabled, { wrong: 0, mode: 'triton', identical: true, events: [] })
  for (const kernel of kernels) t.true((enabled.stats[kernel]?.['epmoe'] as number) >= 2000, kernel)
  const back = await serve({ folder, steps: 20 }, environment)
  for (const kernel of kernels) t.like(back.stats[kernel], { mode: 'triton', epmoe: 0 })
})

interface Fault {
  fault: string
  mode?: string
  record?: Record<string, unknown>
  [option: string]: unknown
}

test('faults: each is caught and named, and what Triton made serves', async (t) => {
  t.timeout(300_000)
  const folder = emptyFolder(t)
  await serve({ folder, steps: 0, write_only: true })
  const shadow = ({ fault, mode = 'shadow', record = {}, ...more }: Fault) => {
    const config = join(folder, `${fault}.json`)
    writeFileSync(
      config,
      JSON.stringify({
        modes: { '*': mode },
        settings: { '*': { rate: 1, trip_after: 3, max_overhead: 0 } },
        record: { folder: `${fault}-capsules`, min_free_bytes: 0, ...record },
      }),
    )
    return serve({ folder, steps: 30, fault, ...more }, { EPMOE_MIGRATE: config })
  }
  const capsules = (fault: string) =>
    readdirSync(join(folder, `${fault}-capsules`)).map((name) => join(folder, `${fault}-capsules`, name))

  // A slot in a million.
  const slot = await shadow({ fault: 'slot', steps: 40, large: 4096 })
  t.like(slot, { wrong: 0, served: 40, mode: 'shadow' })
  t.is(slot.events.length, 1)
  t.like(slot.events[0], { kernel: 'run_moe_ep_preproess', kind: 'mismatch' })
  t.regex(slot.events[0]!.what, /src2dst: 1 of 32768 differ/)
  t.deepEqual(capsules('slot'), [slot.events[0]!.capsule!])
  const [nan, coverage, disk, threads] = await Promise.all([
    shadow({ fault: 'nan' }),
    shadow({ fault: 'coverage', mode: 'epmoe' }),
    shadow({ fault: 'disk', mode: 'triton', record: { rate: 1 } }),
    // Interpreted Triton is for one thread: what stands for it here is not.
    plainPython(['-m', 'unittest', 'test_shadow.Faults.test_two_threads']),
  ])
  // Rows of NaN, after which the kernel goes back to Triton by itself.
  t.like(nan, { wrong: 0, served: 30, mode: 'triton' })
  t.deepEqual(
    nan.events.map(({ kind }) => kind),
    ['mismatch', 'mismatch', 'mismatch', 'tripped'],
  )
  t.regex(nan.events[0]!.what, /output: 16 of \d+ differ, .* by up to inf/)
  t.is(capsules('nan').length, 3)
  // A dtype outside coverage stays with Triton.
  t.like(coverage, { wrong: 0, mode: 'epmoe' })
  t.true(
    coverage.warnings.some((text) => /stays with Triton: .*received float64/.test(text)),
    coverage.warnings.join(),
  )
  t.is(coverage.stats['post_reorder_triton_kernel']?.['fallbacks'], 1)
  // A disk that takes no more.
  t.like(disk, { wrong: 0, served: 30 })
  t.true(
    disk.events.length > 0 && disk.events.every(({ kind, what }) => kind === 'record_failed' && /OSError/.test(what)),
  )
  t.deepEqual(capsules('disk'), [])
  t.is(threads.status, 0, threads.stderr)
  // A graph replays what Python sees nothing of.
  if (gpu !== undefined) {
    const graph = await shadow({ fault: 'graph' })
    t.like(graph, { wrong: 0, served: 30, mode: 'triton' })
    t.regex(graph.events[0]!.what, /in 30 of 30 replays of a captured launch/)
    t.is(capsules('graph').length, 1)
  }

  // What was recorded of the fault is replayed: epmoe as it is today is right.
  const replayed = await epmoe(['replay', ...capsules('nan'), ...capsules('slot'), '--quiet'])
  t.is(replayed.status, 0, replayed.stdout + replayed.stderr)
})

test('a process that dies while it records leaves whole capsules only, and the next goes on', async (t) => {
  t.timeout(120_000)
  const folder = emptyFolder(t)
  const config = join(folder, 'epmoe.migrate.json')
  writeFileSync(config, JSON.stringify({ modes: { '*': 'triton' }, record: { folder: 'capsules', rate: 1 } }))
  const options = JSON.stringify({ folder, steps: 10, fault: 'crash' })
  const { signal } = await plainPython(['serve.py', options], { EPMOE_MIGRATE: config })
  t.is(signal, 'SIGKILL')
  const left = readdirSync(join(folder, 'capsules'))
  t.is(left.filter((name) => name.startsWith('capsule-')).length, 4)
  t.is(left.filter((name) => name.startsWith('.tmp-')).length, 1)
  const again = await serve({ folder, steps: 1 }, { EPMOE_MIGRATE: config })
  t.is(again.wrong, 0)
  const replayed = await epmoe(['replay', '--config', config, '--quiet', '--reference', 'float64,recorded'])
  t.is(replayed.status, 0, replayed.stdout + replayed.stderr)
  t.true(existsSync(join(folder, 'capsules', left.find((name) => name.startsWith('.tmp-'))!)))
})

test('a mode computes the same in plain Python and in Python inside Node', async (t) => {
  t.timeout(120_000)
  const folder = emptyFolder(t)
  const { python } = await import('./helpers/python.js')
  using path = python.import('sys').get('path')
  path.method('insert', 0, pythonTests).dispose()
  using loop = python.import('serve')
  for (const numerics of ['triton', 'fp32']) {
    const options = { folder, steps: 2, hidden: 70, dtype: 'bfloat16', exact: false, digest: true, numerics }
    const install = { mode: 'epmoe' }
    const plain = await serve({ ...options, install })
    const run = await loop.methodAsync('run', { ...options, install })
    const embedded = run.toJS() as { digest: string | null; stats: Record<string, { epmoe: number }> }
    t.true(embedded.stats['post_reorder_triton_kernel']!.epmoe > 0)
    t.is(embedded.digest, plain.digest, numerics)
    // The control: Triton's numbers are others, or the two would agree whatever ran.
    const triton = await serve({ ...options, install: { mode: 'triton' } })
    t.not(triton.digest, null)
    if (numerics === 'fp32') t.not(triton.digest, plain.digest)
  }
})
