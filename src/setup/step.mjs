// One step of the set-up: a line on stderr with its time, and when it fails the end of its log and what to do.
import { spawn, spawnSync } from 'node:child_process'
import { cpus } from 'node:os'
import { fileURLToPath } from 'node:url'
import { dirname, join } from 'node:path'

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
export const cores = Math.max(1, cpus().length)

/** Something that is missing on this machine, with the command that mends it. */
export class Missing extends Error {
  /** @param {string} what @param {string} remedy @param {string} [log] */
  constructor(what, remedy, log = '') {
    super(what)
    this.remedy = remedy
    this.log = log
  }
}

/**
 * @param {string} label
 * @param {() => Promise<string | void> | string | void} work  returns a remark for the end of the line
 */
export async function step(label, work) {
  const begin = performance.now()
  process.stderr.write(`${label} … `)
  const remark = await work()
  const seconds = ((performance.now() - begin) / 1000).toFixed(1)
  process.stderr.write(`${remark ?? 'done'} (${seconds} s)\n`)
}

/**
 * Runs a command quietly; its output is shown only when it fails.
 *
 * @param {string} command @param {string[]} args
 * @param {{ cwd?: string, env?: NodeJS.ProcessEnv, remedy?: string }} [options]
 * @returns {Promise<string>} its output
 */
export function run(command, args, options = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: options.cwd ?? root,
      env: options.env ?? process.env,
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let log = ''
    child.stdout.on('data', (chunk) => (log += chunk))
    child.stderr.on('data', (chunk) => (log += chunk))
    child.on('error', (error) => reject(new Missing(`${command}: ${error.message}`, options.remedy ?? '', log)))
    child.on('close', (code, signal) => {
      if (code === 0) return resolve(log)
      const what = `\`${[command, ...args].join(' ')}\` ended with ${signal ?? `code ${code}`}`
      reject(new Missing(what, options.remedy ?? '', log))
    })
  })
}

/** @param {string} command @param {string[]} args @returns {string | undefined} its standard output when it succeeds */
export function probe(command, args) {
  const result = spawnSync(command, args, { encoding: 'utf8' })
  return result.status === 0 ? result.stdout.trim() : undefined
}

/** @param {string} file */
export const inRoot = (file) => join(root, file)

/** @param {unknown} error */
export function explain(error) {
  if (!(error instanceof Missing)) throw error
  process.stderr.write('failed\n')
  if (error.log) process.stderr.write(`\n${error.log.trimEnd().split('\n').slice(-30).join('\n')}\n`)
  process.stderr.write(`\n${error.message}\n${error.remedy ? `To mend it: ${error.remedy}\n` : ''}`)
  process.exit(3)
}

/** The command that installs system packages here. @param {Record<'apt-get' | 'dnf' | 'brew', string>} names */
export function install(names) {
  for (const manager of /** @type {const} */ (['apt-get', 'dnf', 'brew'])) {
    if (probe(manager, ['--version']) === undefined) continue
    return `${manager === 'brew' ? '' : 'sudo '}${manager} install ${names[manager]}`
  }
  return `install ${names['apt-get']} (names as in Debian)`
}
