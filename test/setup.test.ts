import { existsSync } from 'node:fs'
import { join } from 'node:path'
import test, { type ExecutionContext } from 'ava'
import { findPython, pythonVersion } from '../src/setup/find-python.mjs'
import { Sandbox } from './helpers/sandbox.js'

interface Result {
  status: number | null
  output: string
}

/** The step ended the process with code 3 and said all of this. */
function mends(t: ExecutionContext, { status, output }: Result, ...said: RegExp[]): void {
  t.is(status, 3, output)
  for (const pattern of said) t.regex(output, pattern)
}

function succeeds(t: ExecutionContext, { status, output }: Result, said: RegExp): void {
  t.is(status, 0, output)
  t.regex(output, said)
}

const tools = ['c++', 'cmake', 'make']

for (const [tool, message, remedy] of [
  ['c++', /there is no C\+\+ compiler \(c\+\+\)/, /apt-get install g\+\+/],
  ['cmake', /there is no CMake/, /apt-get install cmake/],
  ['make', /there is neither make nor ninja/, /apt-get install make/],
] as const) {
  test(`without ${tool}, the native step names it and the command that installs it`, (t) => {
    const sandbox = new Sandbox(t)
    for (const each of [...tools, 'apt-get']) if (each !== tool) sandbox.command(each, 'echo 1.0')
    mends(t, sandbox.step('native', 'buildNative'), message, remedy)
  })
}

test('the remedy suits the machine', (t) => {
  const sandbox = new Sandbox(t)
  mends(t, sandbox.step('native', 'buildNative'), /To mend it: install g\+\+ \(named as in Debian\)/)
  sandbox.command('dnf', '')
  mends(t, sandbox.step('native', 'buildNative'), /To mend it: (sudo )?dnf install gcc-c\+\+/)
})

test('a build that fails shows the end of its log', (t) => {
  const sandbox = new Sandbox(t)
  for (const tool of tools) sandbox.command(tool, 'echo 1.0')
  sandbox.write('node_modules/cmake-js/package.json', '{"name":"cmake-js"}')
  sandbox.write(
    'node_modules/cmake-js/bin/cmake-js',
    'console.error("addon.cc:7: error: no such thing"); process.exit(1)',
  )
  const result = sandbox.step('native', 'buildNative', { EPMOE_CUDA: '0' })
  mends(t, result, /addon\.cc:7: error: no such thing/, /cmake-js compile .* ended with code 1/, /removing build\//)
})

test('the native step builds when sources or tools change, and not otherwise', (t) => {
  const sandbox = new Sandbox(t)
  for (const tool of tools) sandbox.command(tool, 'echo 1.0')
  sandbox.write('node_modules/cmake-js/package.json', '{"name":"cmake-js"}')
  // Leaves a trace in build/, which a build from scratch removes.
  sandbox.write(
    'node_modules/cmake-js/bin/cmake-js',
    `const fs = require('fs')
     fs.mkdirSync('build/Release', { recursive: true })
     fs.writeFileSync('build/Release/epmoe.node', '')
     fs.appendFileSync('build/trace', process.argv.slice(2).join(' ') + '\\n')`,
  )
  const build = () => sandbox.step('native', 'buildNative', { EPMOE_CUDA: '0' })
  const builds = () => sandbox.node(['-p', "require('fs').readFileSync('build/trace', 'utf8')"]).output
  succeeds(t, build(), /ok \(built CPU only: EPMOE_CUDA=0\)/)
  succeeds(t, build(), /ok \(unchanged, CPU only: EPMOE_CUDA=0\)/)
  t.regex(builds(), /^compile .*--CDEPMOE_CUDA=off\n\n$/)
  sandbox.write('csrc/ops/another.cc', '// new')
  succeeds(t, build(), /ok \(built/)
  t.is(builds().trim().split('\n').length, 2, 'other sources: built upon what is there')
  sandbox.command('c++', 'echo 2.0')
  succeeds(t, build(), /ok \(built/)
  t.is(builds().trim().split('\n').length, 1, 'another compiler: built afresh')
})

/** A lock file of these packages; those of `dev` are needed for development only. */
function lock(versions: Record<string, string>, dev: string[] = []): string {
  const packages = Object.entries(versions).map(([name, version]) => [
    `node_modules/${name}`,
    { version, ...(dev.includes(name) ? { dev: true } : {}) },
  ])
  return JSON.stringify({
    packages: { '': {}, 'node_modules/none': { optional: true }, ...Object.fromEntries(packages) },
  })
}

test('npm packages: installed when one of the lock file is not there; a failure says so', (t) => {
  const sandbox = new Sandbox(t)
  const install = (environment = {}) => sandbox.step('node-modules', 'installNodeModules', environment)
  const put = (name: string, version: string) =>
    sandbox.write(`node_modules/${name}/package.json`, JSON.stringify({ name, version }))
  sandbox.write('package-lock.json', lock({ one: '1.0.0', two: '2.0.0' }, ['two']))
  sandbox.command('npm', 'echo "npm error code ECONNREFUSED" >&2; exit 1')
  mends(t, install(), /ECONNREFUSED/, /npm ping/)
  put('one', '1.0.0')
  mends(t, install(), /ECONNREFUSED/)
  succeeds(t, install({ npm_config_offline: 'true' }), /ok \(offline, without two\)/)
  sandbox.command('npm', '')
  succeeds(t, install(), /ok \(installed\)/)
  put('two', '2.0.0')
  succeeds(t, install(), /ok \(unchanged\)/)
  sandbox.write('package-lock.json', lock({ one: '1.0.1', two: '2.0.0' }))
  succeeds(t, install(), /ok \(installed\)/)
  t.is(sandbox.calls().split('npm install').length - 1, 4)
})

test('pymport needs pkg-config and Python headers', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.command('apt-get', '')
  sandbox.pymport(undefined)
  const remedy = /apt-get install python3-dev python3-venv pkg-config/
  mends(t, sandbox.step('pymport', 'buildPymport'), /there is no pkg-config/, remedy)
  sandbox.command('pkg-config', '[ "$1" = --version ] && echo 1.8')
  mends(t, sandbox.step('pymport', 'buildPymport'), /there are no Python headers \(python3-embed\)/, remedy)
})

test('pymport is built once, and again for another libpython', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.pymport('3.98')
  succeeds(t, sandbox.step('pymport', 'buildPymport'), /ok \(unchanged, libpython 3\.98\)/)
  sandbox.command('pkg-config', 'echo 3.99')
  sandbox.command('npm', 'echo "gyp ERR! not ok"; exit 1')
  mends(t, sandbox.step('pymport', 'buildPymport'), /gyp ERR! not ok/, /python3\.99-dev .*npm rebuild pymport/)
})

test('the interpreter that EPMOE_PYTHON names must have its libpython', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.pymport('3.99')
  sandbox.command('pkg-config', 'echo 3.99')
  sandbox.command('mine', 'echo 3.98.1')
  const environment = { EPMOE_PYTHON: `${sandbox.folder}/bin/mine` }
  const result = sandbox.step('pymport', 'buildPymport', environment)
  mends(
    t,
    result,
    /is Python 3\.98, but the only libpython with headers is 3\.99/,
    /name an interpreter of Python 3\.99/,
  )
  mends(
    t,
    sandbox.step('python-env', 'preparePython', environment),
    /3\.98\.1, but pymport is built with libpython 3\.99/,
  )
  mends(
    t,
    sandbox.step('pymport', 'buildPymport', { EPMOE_PYTHON: '/no/python' }),
    /EPMOE_PYTHON=\/no\/python does not run/,
  )
})

test('nothing is installed into the environment that EPMOE_PYTHON names', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.pymport('3.99')
  const environment = { EPMOE_PYTHON: 'mine' }
  sandbox.command('mine', 'case "$2" in *find_spec*) echo triton numpy;; *) echo 3.99.1;; esac')
  const result = sandbox.step('python-env', 'preparePython', environment)
  mends(t, result, /lacks triton, numpy; it is yours/, /bin\/mine -m pip install triton numpy/)
  t.notRegex(sandbox.calls(), /pip/)
  sandbox.command('mine', 'case "$2" in *find_spec*) ;; *) echo 3.99.1;; esac')
  succeeds(t, sandbox.step('python-env', 'preparePython', environment), /ok \(.*bin\/mine, 3\.99\.1\)/)
})

// A Python of libpython's version whose venvs hold a pip that does as PIP says.
const python = `
case "$*" in
  "-c import sys"*) echo 3.99 ;;
  "-m venv"*) [ -n "$NO_VENV" ] && { echo "ensurepip is not available" >&2; exit 1; }
    mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip"*) [ -n "$NO_NET" ] && { echo "Could not find a version that satisfies torch" >&2; exit 1; } || exit 0 ;;
esac`

test('the venv is made by an interpreter of the version of libpython', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.pymport('3.99')
  const prepare = (environment = {}) => sandbox.step('python-env', 'preparePython', environment)
  sandbox.command('python3', 'echo 3.98')
  sandbox.command('apt-get', '')
  mends(
    t,
    prepare(),
    /libpython is 3\.99, but there is no interpreter of that version/,
    /install python3\.99 python3\.99-venv/,
  )
  sandbox.command('python3.99', python)
  mends(t, prepare({ NO_VENV: '1' }), /ensurepip is not available/, /apt-get install python3\.99-venv/)
  mends(t, prepare({ NO_NET: '1' }), /Could not find a version/, /EPMOE_PYTHON=\/path\/to\/python/)
  succeeds(t, prepare(), /ok \(made with python3\.99\)/)
  t.true(existsSync(join(sandbox.folder, '.venv/bin/python')))
  succeeds(t, prepare(), /ok \(unchanged\)/)
  sandbox.write('python/requirements.txt', 'torch==99')
  succeeds(t, prepare(), /ok \(made with python3\.99\)/)
})

test('an old Node is told', (t) => {
  const old = 'data:text/javascript,Object.defineProperty(process.versions,"node",{value:"20.18.9"})'
  mends(t, new Sandbox(t).node(['--import', old, 'src/setup/setup.mjs']), /is too old/, /install Node 20\.19 or newer/)
})

test('a program after the set-up gets the interpreter, its arguments, and gives its exit code', (t) => {
  const sandbox = new Sandbox(t)
  sandbox.write('package-lock.json', lock({}))
  sandbox.pymport('3.99')
  for (const tool of tools) sandbox.command(tool, 'echo 1.0')
  sandbox.command('mine', 'case "$2" in *find_spec*) ;; *) echo 3.99.1;; esac')
  sandbox.write('node_modules/cmake-js/package.json', '{"name":"cmake-js"}')
  sandbox.write(
    'node_modules/cmake-js/bin/cmake-js',
    "const fs = require('fs'); fs.mkdirSync('build/Release'); fs.writeFileSync('build/Release/epmoe.node', '')",
  )
  const program = 'console.log(process.env.EPMOE_PYTHON, process.argv[1]); process.exit(7)'
  const environment = { EPMOE_PYTHON: 'mine', EPMOE_CUDA: '0' }
  const { status, output } = sandbox.node(['src/setup/setup.mjs', '-e', program, 'word'], environment)
  t.is(status, 7, output)
  t.regex(output, new RegExp(`^${sandbox.folder}/bin/mine word$`, 'm'))
})

test.serial('interpreters: option, then EPMOE_PYTHON, then VIRTUAL_ENV, then .venv', (t) => {
  const sandbox = new Sandbox(t)
  const before = process.env['VIRTUAL_ENV']
  t.teardown(() => (before === undefined ? delete process.env['VIRTUAL_ENV'] : (process.env['VIRTUAL_ENV'] = before)))
  process.env['VIRTUAL_ENV'] = '/some/venv'
  const all = { python: '/a/python', fromEnvironment: '/b/python', packageRoot: sandbox.folder }
  t.deepEqual(findPython(all), { python: '/a/python', source: 'option' })
  t.deepEqual(findPython({ ...all, python: undefined }), { python: '/b/python', source: 'EPMOE_PYTHON' })
  const neither = { packageRoot: sandbox.folder }
  t.deepEqual(findPython(neither), { python: '/some/venv/bin/python', source: 'VIRTUAL_ENV' })
  delete process.env['VIRTUAL_ENV']
  const here = process.cwd()
  t.teardown(() => process.chdir(here))
  process.chdir(join(sandbox.folder, 'csrc'))
  t.is(findPython(neither), undefined)
  sandbox.write('.venv/bin/python', '')
  t.deepEqual(findPython(neither), { python: join(sandbox.folder, '.venv/bin/python'), source: 'package .venv' })
})

test("an interpreter's version stands in pyvenv.cfg, or the interpreter tells it", (t) => {
  const sandbox = new Sandbox(t)
  sandbox.write('.venv/bin/python', '')
  sandbox.write('.venv/pyvenv.cfg', 'home = /usr/bin\nversion_info = 3.12.3.final.0\n')
  t.is(pythonVersion(join(sandbox.folder, '.venv/bin/python')), '3.12.3')
  sandbox.command('python3', 'echo 3.10.4')
  t.is(pythonVersion(join(sandbox.folder, 'bin/python3')), '3.10.4')
  sandbox.command('python3', 'echo help')
  t.is(pythonVersion(join(sandbox.folder, 'bin/python3')), undefined)
  t.is(pythonVersion('/no/such/python'), undefined)
})
