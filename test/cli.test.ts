import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import type { Report } from '../src/doctor/examine.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const bin = join(root, 'src/cli/bin.mjs')
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }

function epmoe(args: string[], environment: Record<string, string> = {}, launcher = bin, cwd = root) {
  return spawnSync(process.execPath, [launcher, ...args], {
    cwd,
    encoding: 'utf8',
    env: { ...process.env, EPMOE_DEBUG: '', ...environment },
  })
}

function emptyFolder(t: { teardown(clean: () => void): void }): string {
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

test('--version and --help', (t) => {
  const told = epmoe(['--version'])
  t.is(told.status, 0)
  t.is(told.stdout, `${version}\n`)
  const help = epmoe(['--help'])
  t.is(help.status, 0)
  const verbs = readdirSync(join(root, 'src/cli/verbs')).map((file) => file.replace(/\.ts$/, ''))
  t.true(verbs.length >= 3)
  for (const verb of verbs) t.regex(help.stdout, new RegExp(`^  ${verb} `, 'm'), `${verb}: its file is enough`)
})

test('it runs from any folder, and through a link as npx does', (t) => {
  const folder = emptyFolder(t)
  symlinkSync(bin, join(folder, 'epmoe'))
  t.is(epmoe(['--version'], {}, join(folder, 'epmoe'), folder).stdout, `${version}\n`)
})

for (const [args, said] of [
  [[], /Usage: epmoe/],
  [['bogus'], /unknown command 'bogus'/],
  [['--bogus'], /unknown option '--bogus'/],
  [['list', '--bogus'], /unknown option '--bogus'/],
  [['list', 'surplus'], /too many arguments/],
  [['parity', '--tokens', 'many'], /--tokens: expected whole numbers from 0 on, separated by commas, received many/],
  [['parity', '--dtype', 'int8'], /--dtype: expected all, or some of float32, float16, bfloat16, received int8/],
] as const) {
  test(`wrong usage is code 2: epmoe ${args.join(' ')}`, (t) => {
    const { status, stdout, stderr } = epmoe([...args])
    t.is(status, 2)
    t.is(stdout, '')
    t.regex(stderr, said)
  })
}

test('something missing on the machine is code 3, in one line, with a stack when asked', (t) => {
  const environment = { EPMOE_NATIVE: emptyFolder(t) }
  const brief = epmoe(['list'], environment)
  t.is(brief.status, 3)
  t.regex(brief.stderr, /^epmoe: expected the native addon at .*epmoe\.node, received no such file/)
  t.regex(brief.stderr, /epmoe doctor/)
  t.notRegex(brief.stderr, /^ +at /m)
  t.regex(epmoe(['--debug', 'list'], environment).stderr, /^ +at /m)
  t.regex(epmoe(['list'], { ...environment, EPMOE_DEBUG: '1' }).stderr, /^ +at /m)
  const python = epmoe(['parity'], { EPMOE_PYTHON: '/bin/false' })
  t.is(python.status, 3)
  t.regex(python.stderr, /\/bin\/false \(from EPMOE_PYTHON\)/)
})

function examine(environment: Record<string, string> = {}) {
  const { status, stdout, stderr } = epmoe(['doctor', '--json'], environment)
  const report = JSON.parse(stdout) as Report
  const stateOf = (name: string) => report.findings.find((finding) => finding.name === name)?.state
  const works = (name: string) => report.abilities.find((ability) => ability.name === name)?.works
  return { status, stderr, report, stateOf, works }
}

test('doctor: all is well where the tests run', (t) => {
  const { status, report, stateOf, works } = examine()
  t.is(status, 0, JSON.stringify(report.findings, null, 1))
  t.true(report.ok)
  for (const name of ['Node', 'npm packages', 'addon', 'libepmoe', 'pymport', 'interpreter', 'numpy', 'bridge']) {
    t.is(stateOf(name), 'ok', name)
  }
  t.true(works('epmoe parity on the CPU'))
  const text = epmoe(['doctor'])
  t.is(text.status, 0)
  for (const { name, value } of report.findings) t.true(text.stdout.includes(`${name} `) && text.stdout.includes(value))
  t.regex(text.stdout, /What works here:\n {2}kernels on the CPU/)
})

test('doctor: without the addon nothing works, and it says how to build it', (t) => {
  const { status, report, stateOf } = examine({ EPMOE_NATIVE: emptyFolder(t) })
  t.is(status, 3)
  t.false(report.ok)
  t.is(stateOf('addon'), 'fail')
  t.is(stateOf('interpreter'), 'ok')
  t.deepEqual(
    report.abilities.filter(({ works }) => works),
    [],
  )
  t.regex(report.findings.find(({ name }) => name === 'addon')?.remedy ?? '', /npm run setup/)
})

test('doctor: without an interpreter the kernels still work', (t) => {
  const { status, stateOf, works } = examine({ EPMOE_PYTHON: '/no/such/python' })
  t.is(status, 3)
  t.is(stateOf('interpreter'), 'fail')
  t.is(stateOf('bridge'), 'fail')
  t.true(works('kernels on the CPU, from TypeScript'))
  t.false(works('epmoe parity on the CPU'))
})

test('doctor: an environment whose interpreter is gone is told from one that never was', (t) => {
  const folder = emptyFolder(t)
  mkdirSync(join(folder, 'bin'))
  writeFileSync(join(folder, 'pyvenv.cfg'), 'home = /gone/with/the/upgrade/bin\n')
  symlinkSync('/gone/with/the/upgrade/bin/python3', join(folder, 'bin/python'))
  const { stdout } = epmoe(['doctor', '--json'], { EPMOE_PYTHON: join(folder, 'bin/python') })
  const stale = (JSON.parse(stdout) as Report).findings.find(({ name }) => name === 'interpreter')
  t.regex(stale?.value ?? '', /made from \/gone\/with\/the\/upgrade\/bin, which is gone/)
  t.regex(stale?.remedy ?? '', /^rm -r /)
})

test('doctor: tools that are only needed for building may be absent', (t) => {
  const { status, report, stateOf } = examine({ PATH: emptyFolder(t), CUDA_HOME: '' })
  t.is(status, 0, JSON.stringify(report.findings, null, 1))
  for (const name of ['C++ compiler', 'CMake', 'libpython headers', 'NVIDIA driver']) {
    t.is(stateOf(name), 'absent', name)
    t.not(report.findings.find((finding) => finding.name === name)?.remedy, undefined)
  }
})
