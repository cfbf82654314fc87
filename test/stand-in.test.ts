// Streams, events, graphs and several GPUs without a GPU: test/fixtures/stand_in plays two of them, adversely.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'

const root = fileURLToPath(new URL('..', import.meta.url))
const build = join(root, 'build/stand-in')

test('the tests of streams, events, graphs, devices and faults pass on two GPUs that a stand-in plays', (t) => {
  t.timeout(600_000)
  const run = (args: string[]) => {
    const environment = { ...process.env, EPMOE_NATIVE: join(build, 'Release'), NODE_OPTIONS: '' }
    return spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8', env: environment })
  }
  const made = run([join(root, 'test/fixtures/stand_in/build.mjs'), build])
  if (made.status === 3) {
    t.log(`not run: ${made.stderr}`)
    t.pass()
    return
  }
  t.is(made.status, 0, made.stderr)
  const files = made.stdout.trim().split('\n')
  const tested = run([join(root, 'node_modules/ava/entrypoints/cli.mjs'), '--tap', ...files])
  t.is(tested.status, 0, tested.stdout + tested.stderr)
  const passed = tested.stdout.match(/^ok (?!.*# SKIP).*$/gm) ?? []
  t.log(`${passed.length} tests passed on the stand-in`)
  for (const file of files)
    t.true(
      passed.some((line) => line.includes(`- ${file.slice('test/'.length, -'.test.ts'.length)} ›`)),
      `${file}: nothing was run`,
    )
})
