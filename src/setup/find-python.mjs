// Which Python interpreter, and so which environment, is used. Plain JavaScript: set-up runs it before anything is
// installed, and the bridge imports it afterwards.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { delimiter, dirname, join, resolve } from 'node:path'

/**
 * The interpreter to use, or undefined when nobody names one and there is no .venv. `source` tells who named it:
 * `option`, `EPMOE_PYTHON`, `VIRTUAL_ENV`, `./.venv` or `package .venv`.
 *
 * @param {{ python?: string | undefined, fromEnvironment?: string | undefined, packageRoot: string }} options
 * @returns {{ python: string, source: string } | undefined}
 */
export function findPython({ python, fromEnvironment, packageRoot }) {
  const inside = (/** @type {string} */ venv) => join(venv, 'bin', 'python')
  const active = process.env['VIRTUAL_ENV']
  /** @type {[string, string | undefined][]} */
  const named = [
    ['option', python],
    ['EPMOE_PYTHON', fromEnvironment],
    ['VIRTUAL_ENV', active && inside(active)],
  ]
  for (const [source, path] of named) if (path) return { python: absolute(path), source }
  /** @type {[string, string][]} */
  const usual = [
    ['./.venv', inside(resolve('.venv'))],
    ['package .venv', inside(join(packageRoot, '.venv'))],
  ]
  for (const [source, path] of usual) if (existsSync(path)) return { python: path, source }
  return undefined
}

/** @param {string} path a path, or the name of a command on PATH */
function absolute(path) {
  if (path.includes('/')) return resolve(path)
  const folders = (process.env['PATH'] ?? '').split(delimiter)
  return folders.map((folder) => join(folder, path)).find((file) => existsSync(file)) ?? path
}

/**
 * The version of an interpreter: from its venv's configuration where there is one, otherwise by asking it.
 *
 * @param {string} python
 * @returns {string | undefined} `3.11.2`; undefined when it does not run
 */
export function pythonVersion(python) {
  const config = join(dirname(dirname(python)), 'pyvenv.cfg')
  const match = existsSync(config)
    ? /^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)/m.exec(readFileSync(config, 'utf8'))
    : null
  if (match?.[1] && existsSync(python)) return match[1]
  const result = spawnSync(python, ['-c', 'import sys; print("%d.%d.%d" % sys.version_info[:3])'], { encoding: 'utf8' })
  return result.status === 0 && /^\d+\.\d+\.\d+\s*$/.test(result.stdout) ? result.stdout.trim() : undefined
}

/** @param {string} version @returns {string} `3.11` of `3.11.2` */
export function minor(version) {
  return version.split('.').slice(0, 2).join('.')
}
