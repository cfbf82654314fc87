// npm run lint: every check of style and types, all of them even when one fails. npm run format mends what can be.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { filesIn } from './stamp.mjs'
import { explain, inRoot, install, Missing, root, step } from './step.mjs'
import { makeVenv, versionOf } from './venv.mjs'

const fix = process.argv.includes('--fix')

/** ruff and clang-format, in a venv of their own: any Python runs them. */
async function linters() {
  const base = ['python3', 'python'].find((command) => versionOf(command) !== undefined)
  if (base === undefined) {
    throw new Missing('there is no Python', install({ 'apt-get': 'python3-venv', dnf: 'python3', brew: 'python' }))
  }
  return makeVenv({
    folder: inRoot('.cache/linters'),
    requirements: inRoot('python/requirements-dev.txt'),
    version: versionOf(base) ?? '3',
    base: () => base,
  })
}

/** @param {string} bin @returns {[string, string[]][]} commands, their paths and arguments */
function checks(bin) {
  const npm = (/** @type {string} */ name) => inRoot(`node_modules/.bin/${name}`)
  const native = ['csrc', 'bench', 'test']
    .flatMap((folder) => filesIn(inRoot(folder)))
    .filter((file) => /\.(cc|cu|cuh|h)$/.test(file))
  const ruff = join(bin, 'ruff')
  const python = ['--config', 'python/pyproject.toml', '--cache-dir', '.cache/ruff', 'python', 'bench', 'test']
  return [
    [npm('biome'), ['check', ...(fix ? ['--write'] : []), '--error-on-warnings', '.']],
    [npm('oxlint'), fix ? ['--fix'] : ['--deny-warnings']],
    [npm('tsc'), ['-p', 'tsconfig.json']],
    [join(bin, 'clang-format'), [...(fix ? ['-i'] : ['--dry-run', '-Werror']), ...native]],
    [ruff, ['check', ...(fix ? ['--fix'] : []), ...python]],
    [ruff, ['format', ...(fix ? [] : ['--check']), ...python]],
  ]
}

try {
  const { python } = await step('linters', linters)
  for (const [command, args] of checks(join(python, '..'))) {
    const label = `${command.split('/').at(-1)} ${args[0]}`
    const { status } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
    if (status === 0) continue
    process.stderr.write(`${label}: failed\n`)
    process.exitCode = 1
  }
  if (!process.exitCode) process.stderr.write('lint: all passed\n')
} catch (error) {
  explain(error)
}
