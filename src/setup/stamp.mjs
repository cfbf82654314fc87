// Stamps make a step quick when nothing it depends on has changed.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { root } from './step.mjs'

/** @param {string[]} files @param {string[]} facts @returns {string} */
export function hashOf(files, facts = []) {
  const hash = createHash('sha256')
  for (const file of files) hash.update(relative(root, file)).update('\0').update(readFileSync(file)).update('\0')
  for (const fact of facts) hash.update(fact).update('\0')
  return hash.digest('hex')
}

/** @param {string} folder @returns {string[]} every file below it, sorted */
export function filesIn(folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && !entry.name.startsWith('.'))
    .map((entry) => join(entry.parentPath, entry.name))
    .sort()
}

/** @param {string} stamp @param {string} value @returns {boolean} */
export function fresh(stamp, value) {
  return existsSync(stamp) && readFileSync(stamp, 'utf8') === value
}

/** @param {string} stamp @param {string} value */
export function mark(stamp, value) {
  mkdirSync(dirname(stamp), { recursive: true })
  writeFileSync(stamp, value)
}
