import { spawnSync } from 'node:child_process'
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test, { type ExecutionContext } from 'ava'
import { EpmoeError, isMigrated, type ScanReport, scan } from 'epmoe'

const root = fileURLToPath(new URL('..', import.meta.url))
const bin = join(root, 'src/cli/bin.mjs')

const layer = `from sglang.srt.layers.moe.ep_moe.kernels import post_reorder_triton_kernel as combine

def forward(down, out, src2dst, ids, weights):
    combine[(out.shape[0],)](down, out, src2dst, ids, weights, 0, 7, 2, out.shape[1], BLOCK_SIZE=512)  # 😀
`
const rewritten = layer
  .replace('combine\n', 'combine\nfrom epmoe.shim import drop_in\n')
  .replace('    combine[', '    drop_in(combine)[')
const starred = 'from m import ep_gather\nep_gather(*everything)\n'

/** A folder with a file that can be rewritten, whose name needs care. */
function stack(t: ExecutionContext, more: Record<string, string> = {}) {
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  const file = join(folder, 'läyer 😀.py')
  writeFileSync(file, layer)
  for (const [name, text] of Object.entries(more)) writeFileSync(join(folder, name), text)
  return { folder, file, text: () => readFileSync(file, 'utf8') }
}

function epmoe(args: string[], environment: Record<string, string> = {}) {
  const env = { ...process.env, EPMOE_SGLANG: '', EPMOE_DEBUG: '', ...environment }
  return spawnSync(process.execPath, [bin, 'scan', ...args], { encoding: 'utf8', env })
}

test('scan() tells file, place, kernel, generation and arguments', async (t) => {
  const { folder, file } = stack(t)
  const { sites, problems, files, summary } = await scan(folder)
  t.deepEqual([problems, files, summary], [[], { seen: 1, parsed: 1 }, { ready: 1, blocked: 0, migrated: 0 }])
  const { arguments: mapped, ...site } = sites[0]!
  t.deepEqual(site, {
    file,
    line: 4,
    column: 5,
    kernel: 'post_reorder_triton_kernel',
    kind: 'launch',
    callee: 'combine',
    module: 'sglang.srt.layers.moe.ep_moe.kernels',
    definition: '',
    op: 'post_reorder',
    generation: 'A',
    state: 'ready',
    blockers: [],
    notes: [],
  })
  t.deepEqual(mapped[6], { parameter: 'end_expert_id', argument: 'end_expert_id', value: '7' })
  t.deepEqual(mapped[8], { parameter: 'hidden_size', argument: null, value: 'out.shape[1]' })
})

test('scan() writes and takes back, and says what is left', async (t) => {
  const { folder, text } = stack(t, { 'starred.py': starred })
  const looked = await scan([folder], { diff: true })
  t.regex(looked.changes[0]?.diff ?? '', /^\+ {4}drop_in\(combine\)\[/m)
  t.is(text(), layer)
  const written = await scan(folder, { action: 'write' })
  t.is(text(), rewritten)
  t.deepEqual(
    written.sites.map(({ state, blockers }) => [state, ...blockers.map(({ code }) => code)]),
    [['migrated'], ['blocked', 'star-arguments']],
  )
  t.deepEqual((await scan(folder, { action: 'write' })).changes, [])
  t.false(isMigrated(written))
  t.true(isMigrated(await scan(join(folder, 'läyer 😀.py'))))
  await scan(folder, { action: 'revert' })
  t.is(text(), layer)
})

test('a file that may hold launches and cannot be read is not migrated', async (t) => {
  const { folder } = stack(t, { 'broken.py': `${starred}def (` })
  const report = await scan(folder, { action: 'write' })
  t.deepEqual(
    report.problems.map(({ kind, harmless }) => [kind, harmless]),
    [['does-not-parse', false]],
  )
  t.is(report.summary.migrated, report.sites.length)
  t.false(isMigrated(report))
})

test('wrong usage is told before anything is read', async (t) => {
  const { folder } = stack(t)
  for (const call of [
    () => scan([]),
    () => scan(join(folder, 'none')),
    () => scan(folder, { sglang: join(folder, 'none') }),
    () => scan(folder, { action: 'delete' as never }),
  ]) {
    const error = await t.throwsAsync(call, { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_USAGE')
  }
})

test('a scan can be given up', async (t) => {
  const { folder, text } = stack(t)
  const gone = new Error('gone')
  const error = await t.throwsAsync(scan(folder, { action: 'write', signal: AbortSignal.abort(gone) }))
  t.is(error, gone)
  t.is(text(), layer)
})

test('epmoe scan: the way from a first look to a gate and back, by exit codes', (t) => {
  const { folder, file, text } = stack(t)
  const looked = epmoe([folder])
  t.is(looked.status, 0, looked.stderr)
  t.true(looked.stdout.includes(`${file}:4:5: ready: post_reorder_triton_kernel, generation A → post_reorder (launch)`))
  t.regex(looked.stdout, /^1 site: 0 migrated, 1 ready, 0 blocked; 1 file seen, 1 parsed/m)
  t.is(epmoe([folder, '--check']).status, 1)
  t.regex(epmoe([folder, '--diff']).stdout, /^\+from epmoe\.shim import drop_in$/m)
  t.is(text(), layer)
  const written = epmoe([folder, '--write', '--check', '--json'])
  t.is(written.status, 0, written.stderr)
  t.is((JSON.parse(written.stdout) as ScanReport).schema, 'epmoe.scan/1')
  t.is(text(), rewritten)
  t.is(epmoe([folder, '--check']).status, 0)
  t.is(epmoe([folder, '--revert', '--check']).status, 1)
  t.is(text(), layer)
})

test('epmoe scan: what is blocked fails the check, with the reason', (t) => {
  const { folder } = stack(t, { 'starred.py': starred })
  const { status, stdout } = epmoe([folder, '--write', '--check'])
  t.is(status, 1)
  t.regex(stdout, /starred\.py:2:1: blocked: ep_gather → ep_gather \(call\)\n {4}star-arguments: /)
})

test('epmoe scan: wrong usage is code 2, no Python code 3, a file that cannot be written code 1', (t) => {
  const { folder, text } = stack(t)
  for (const [args, said] of [
    [[], /missing required argument 'paths'/],
    [[join(folder, 'none')], /paths: expected files or folders that exist, received .*none/],
    [[folder, '--write', '--revert'], /--revert: expected one of --write and --revert, received both/],
    [[folder, '--sglang', join(folder, 'none')], /sglang: expected/],
  ] as const) {
    const { status, stderr } = epmoe([...args])
    t.is(status, 2)
    t.regex(stderr, said)
  }
  t.is(epmoe([folder], { EPMOE_PYTHON: '/bin/false' }).status, 3)
  if (process.getuid?.() === 0) return // whom no mode keeps from writing
  chmodSync(folder, 0o555)
  t.teardown(() => chmodSync(folder, 0o755))
  const { status, stdout } = epmoe([folder, '--write'])
  t.is(status, 1)
  t.regex(stdout, /not-written: Permission denied/)
  t.is(text(), layer)
})
