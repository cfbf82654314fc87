// Which Python interpreter, and so which environment, is used. Plain JavaScript: set-up runs it before anything is
// installed, and the bridge imports it afterwards.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'

/**
 * @typedef {object} FoundPython
 * @property {string} python   absolute path of the interpreter
 * @property {string} version  `3.11.2`
 * @property {string} source   who named it: `option`, `EPMOE_PYTHON`, `VIRTUAL_ENV`, `./.venv` or `package .venv`
 */

/**
 * The interpreter to use, or undefined when nobody names one.
 *
 * @param {{ python?: string | undefined, fromEnvironment?: string | undefined, packageRoot: string }} options
 * @returns {{ python: string, source: string } | undefined}
 */
export function findPython({ python, fromEnvironment, packageRoot }) {
  const inside = (/** @type {string} */ venv) => join(venv, process.platform === 'win32' ? 'Scripts/python.exe' : 'bin/python')
  /** @type {[string, string | undefined][]} */
  const named = [
    ['option', python],
    ['EPMOE_PYTHON', fromEnvironment],
    ['VIRTUAL_ENV', process.env['VIRTUAL_ENV'] && inside(process.env['VIRTUAL_ENV'])],
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
  if (path.includes('/') || path.includes('\\')) return resolve(path)
  const folders = (process.env['PATH'] ?? '').split(process.platform === 'win32' ? ';' : ':')
  return folders.map((folder) => join(folder, path)).find((file) => existsSync(file)) ?? path
}

/**
 * The version of an interpreter: from its venv's configuration where there is one, otherwise by asking it.
 *
 * @param {string} python
 * @returns {string | undefined} undefined when it does not run
 */
export function pythonVersion(python) {
  const config = join(dirname(dirname(python)), 'pyvenv.cfg')
  const match = existsSync(config) ? /^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)/m.exec(readFileSync(config, 'utf8')) : null
  if (match?.[1] && existsSync(python)) return match[1]
  const result = spawnSync(python, ['-c', 'import sys; print("%d.%d.%d" % sys.version_info[:3])'], { encoding: 'utf8' })
  return result.status === 0 ? result.stdout.trim() : undefined
}

/** @param {string} version @returns {string} `3.11` of `3.11.2` */
export function minor(version) {
  return version.split('.').slice(0, 2).join('.')
}
