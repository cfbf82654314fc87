// Makes virtual environments.
import { existsSync } from 'node:fs'
import { basename, join } from 'node:path'
import { fresh, hashOf, mark } from './stamp.mjs'
import { install, probe, run } from './step.mjs'

/**
 * A venv of this base interpreter that holds what a requirements file lists.
 *
 * @param {{ folder: string, requirements: string, version: string, base: () => string }} options `version` is the
 *   base's, `3.11`
 * @returns {Promise<{ remark: string, python: string }>}
 */
export async function makeVenv({ folder, requirements, version, base }) {
  const python = join(folder, 'bin', 'python')
  const value = hashOf([requirements], [version, folder])
  const stamp = join(folder, '.epmoe-stamp')
  if (existsSync(python) && fresh(stamp, value)) return { remark: 'unchanged', python }
  const interpreter = base()
  await run(interpreter, ['-m', 'venv', '--clear', folder], {
    remedy: install({ 'apt-get': `python${version}-venv`, dnf: `python${version}`, brew: `python@${version}` }),
  })
  await pipInstall(python, requirements)
  mark(stamp, value)
  return { remark: `made with ${interpreter}`, python }
}

/**
 * Adds to such a venv what another requirements file lists. Its stamp goes when the venv is made anew.
 *
 * @param {{ folder: string, requirements: string }} options
 * @returns {Promise<{ remark: string }>}
 */
export async function addToVenv({ folder, requirements }) {
  const stamp = join(folder, `.epmoe-stamp-${basename(requirements)}`)
  const value = hashOf([requirements])
  if (fresh(stamp, value)) return { remark: 'unchanged' }
  await pipInstall(join(folder, 'bin', 'python'), requirements)
  mark(stamp, value)
  return { remark: `added ${basename(requirements)}` }
}

/** @param {string} python @param {string} requirements */
async function pipInstall(python, requirements) {
  await run(python, ['-m', 'pip', 'install', '--disable-pip-version-check', '--retries', '1', '-r', requirements], {
    remedy: 'check that pip reaches its index, or name an environment that has it all: EPMOE_PYTHON=/path/to/python',
  })
}

/** `3.11` of a command that runs Python. @param {string} command */
export function versionOf(command) {
  return probe(command, ['-c', 'import sys; print("%d.%d" % sys.version_info[:2])'])
}
