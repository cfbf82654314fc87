import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { startPython } from 'epmoe'
import { gpu } from './helpers/devices.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const readme = readFileSync(join(root, 'README.md'), 'utf8')

const programs = [...readme.matchAll(/```ts\n([\s\S]*?)```/g)].map((match) => match[1] ?? '')

/** Runs a program of the README below the checkout, where 'epmoe' is the package itself. */
function outputOf(program: string, launcher: string[] = [], variables: Record<string, string> = {}): string {
  const folder = mkdtempSync(join(root, '.cache-readme-'))
  try {
    const file = join(folder, 'program.ts')
    writeFileSync(file, program)
    const args = ['--conditions=epmoe-source', '--import=tsx', file]
    const [command = '', ...rest] = [...launcher, process.execPath, ...args]
    const { status, stdout, stderr } = spawnSync(command, rest, {
      encoding: 'utf8',
      env: { ...process.env, ...variables },
    })
    if (status !== 0) throw new Error(stdout + stderr)
    return stdout
  } finally {
    rmSync(folder, { recursive: true })
  }
}

test("the README's first program runs and says what it should", (t) => {
  const stdout = outputOf(programs[0] ?? '')
  const difference = Number(/torch in float32: ([\d.e-]+)/.exec(stdout)?.[1])
  // One rounding to bfloat16 of values around 1.
  t.true(difference > 0 && difference < 0.02, stdout)
  t.regex(stdout, /first row: torch\.Size\(\[64\]\)/)
})

test("the README's layer runs", (t) => {
  t.is(programs.length, 4)
  t.is(outputOf(programs[1] ?? ''), 'torch.Size([16, 64])\n')
})

test("the README's ranks run under torchrun", (t) => {
  const { executable } = startPython()
  // NCCL would want a GPU for each rank.
  const variables = { EPMOE_PYTHON: executable, CUDA_VISIBLE_DEVICES: '' }
  const torchrun = ['-m', 'torch.distributed.run', '--no-python', '--standalone', '--nproc-per-node', '2']
  const stdout = outputOf(programs[2] ?? '', [executable, ...torchrun], variables)
  t.deepEqual(stdout.trim().split('\n').sort(), [
    'rank 0 of 2: experts 0 to 5, torch.Size([0, 64])',
    'rank 1 of 2: experts 6 to 10, torch.Size([5, 64])',
  ])
})

test("the README's graph is captured and replayed, where there is a GPU", (t) => {
  t.is(outputOf(programs[3] ?? ''), gpu === undefined ? '' : '0,8,8,8,8,8,8,8,8\n')
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
    t.true(existsSync(join(root, path ?? '')), path)
  }
})
