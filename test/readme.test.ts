import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'

const root = fileURLToPath(new URL('..', import.meta.url))
const readme = readFileSync(join(root, 'README.md'), 'utf8')

test("the README's first program runs and says what it should", (t) => {
  const program = /```ts\n([\s\S]*?)```/.exec(readme)?.[1]
  t.truthy(program)
  // Below the checkout, where 'epmoe' is the package itself.
  const folder = mkdtempSync(join(root, '.cache-readme-'))
  try {
    const file = join(folder, 'first.ts')
    writeFileSync(file, program ?? '')
    const { status, stdout, stderr } = spawnSync(
      process.execPath,
      ['--conditions=epmoe-source', '--import=tsx', file],
      { encoding: 'utf8' },
    )
    t.is(status, 0, stdout + stderr)
    const difference = Number(/torch in float32: ([\d.e-]+)/.exec(stdout)?.[1])
    // One rounding to bfloat16 of values around 1.
    t.true(difference > 0 && difference < 0.02, stdout)
    t.regex(stdout, /first row: torch\.Size\(\[64\]\)/)
  } finally {
    rmSync(folder, { recursive: true })
  }
})

test('every command line of the README that names a verb is one that exists', (t) => {
  const verbs = [...readme.matchAll(/(?:npx )?epmoe (parity|doctor|list|\w+) ?/g)].map((match) => match[1])
  const help = spawnSync(process.execPath, [join(root, 'src/cli/bin.mjs'), '--help'], { encoding: 'utf8' }).stdout
  for (const verb of ['parity', 'doctor', 'list']) {
    t.true(verbs.includes(verb))
    t.regex(help, new RegExp(`^ +${verb}\\b`, 'm'))
  }
})

test('every path the README names is there', (t) => {
  for (const [, path] of readme.matchAll(/`((?:csrc|src|python|test)\/[\w./-]+)`/g)) {
    if (path?.includes('<')) continue
    t.notThrows(() => readFileSync(join(root, path ?? '')), path)
  }
})
