// Streams, events, graphs and several GPUs without a GPU: test/fixtures/stand_in plays two of them, adversely.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { python } from './helpers/python.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const build = join(root, 'build/stand-in')
const files = ['stream', 'event', 'graph', 'prepared', 'tensor', 'lifetime', 'workers', 'devices', 'fault']

/** CUDA's headers: the toolkit's, or those that Triton brings. */
function headers(): string | undefined {
  const triton = python.eval('__import__("importlib.util").util.find_spec("triton").submodule_search_locations[0]')
  const folders = ['/usr/local/cuda/include', join(triton.toJS() as string, 'backends/nvidia/include')]
  return folders.find((folder) => existsSync(join(folder, 'cuda_runtime_api.h')))
}

test('the tests of streams, events, graphs, devices and faults pass on two GPUs that a stand-in plays', (t) => {
  t.timeout(600_000)
  const cuda = headers()
  if (cuda === undefined) {
    t.log('not run: there are no CUDA headers')
    t.pass()
    return
  }
  const run = (args: string[]) => {
    const environment = { ...process.env, EPMOE_NATIVE: join(build, 'Release'), NODE_OPTIONS: '' }
    return spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8', env: environment })
  }
  const made = run([
    join(root, 'node_modules/cmake-js/bin/cmake-js'),
    'compile',
    '--directory=csrc',
    `--out=${build}`,
    '--CDEPMOE_CUDA=off',
    `--CDEPMOE_CUDA_HEADERS=${cuda}`,
    `--CDEPMOE_EXTRA_OPS=${join(root, 'test/fixtures/stand_in')}`,
  ])
  t.is(made.status, 0, made.stdout + made.stderr)
  const tested = run([
    join(root, 'node_modules/ava/entrypoints/cli.mjs'),
    '--tap',
    ...files.map((file) => `test/${file}.test.ts`),
  ])
  t.is(tested.status, 0, tested.stdout + tested.stderr)
  const passed = tested.stdout.match(/^ok (?!.*# SKIP).*$/gm) ?? []
  t.log(`${passed.length} tests passed on the stand-in`)
  for (const file of files)
    t.true(
      passed.some((line) => line.includes(`- ${file} ›`)),
      `${file}: nothing was run`,
    )
})
