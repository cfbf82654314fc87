// One step of the set-up: a line on stderr with its time, and when it fails the end of its log and what to do.
import { spawn, spawnSync } from 'node:child_process'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
export const cores = availableParallelism()

/** @param {string} file */
export const inRoot = (file) => join(root, file)

/** Something that is missing on this machine, with the command that mends it. */
export class Missing extends Error {
  /** @param {string} what @param {string} remedy @param {string} [log] */
  constructor(what, remedy, log = '') {
    super(what)
    this.remedy = remedy
    this.log = log
  }
}

const terminal = process.stderr.isTTY === true
let current = ''

/**
 * @template {{ remark: string }} Result
 * @param {string} label
 * @param {() => Promise<Result> | Result} work
 * @returns {Promise<Result>}
 */
export async function step(label, work) {
  const begin = performance.now()
  current = `${label} … `
  process.stderr.write(current)
  const result = await work()
  const seconds = ((performance.now() - begin) / 1000).toFixed(1)
  show(`ok (${result.remark}), ${seconds} s\n`)
  return result
}

/** Ends the line of the current step; on a terminal whatever it showed so far is overwritten. @param {string} text */
function show(text) {
  process.stderr.write(terminal ? `\r\x1b[2K${current}${text}` : text)
}

/**
 * Runs a command quietly; its output is shown only when it fails.
 *
 * @param {string} command @param {string[]} args
 * @param {{ env?: NodeJS.ProcessEnv, remedy?: string }} [options]
 * @returns {Promise<string>} its output
 */
export function run(command, args, options = {}) {
  const { env = process.env, remedy = '' } = options
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { cwd: root, env, stdio: ['ignore', 'pipe', 'pipe'] })
    let log = ''
    const take = (/** @type {Buffer} */ chunk) => {
      log += chunk
      const line = String(chunk).trimEnd().split('\n').at(-1) ?? ''
      if (terminal) show(line.slice(0, Math.max(0, (process.stderr.columns ?? 80) - current.length - 1)))
    }
    child.stdout.on('data', take)
    child.stderr.on('data', take)
    child.on('error', (error) => reject(new Missing(`${command}: ${error.message}`, remedy, log)))
    child.on('close', (code, signal) => {
      if (code === 0) return resolve(log)
      const what = `\`${[command, ...args].join(' ')}\` ended with ${signal ?? `code ${code}`}`
      reject(new Missing(what, remedy, log))
    })
  })
}

/**
 * @param {string} command @param {string[]} args @param {NodeJS.ProcessEnv} [env]
 * @returns {string | undefined} its standard output when it succeeds
 */
export function probe(command, args, env = process.env) {
  const result = spawnSync(command, args, { encoding: 'utf8', env })
  return result.status === 0 ? result.stdout.trim() : undefined
}

/** Says what is missing and ends the process with code 3. @param {unknown} error @returns {never} */
export function explain(error) {
  if (!(error instanceof Missing)) throw error
  show('failed\n')
  if (error.log) process.stderr.write(`\n${error.log.trimEnd().split('\n').slice(-30).join('\n')}\n`)
  process.stderr.write(`\n${error.message}\n${error.remedy ? `To mend it: ${error.remedy}\n` : ''}`)
  process.exit(3)
}

/** The command that installs system packages here. @param {Record<'apt-get' | 'dnf' | 'brew', string>} names */
export function install(names) {
  for (const manager of /** @type {const} */ (['apt-get', 'dnf', 'brew'])) {
    if (probe(manager, ['--version']) === undefined) continue
    const sudo = manager === 'brew' || process.getuid?.() === 0 ? '' : 'sudo '
    return `${sudo}${manager} install ${names[manager]}`
  }
  return `install ${names['apt-get']} (named as in Debian)`
}
