// Installs the npm packages of the lock file.
import { existsSync } from 'node:fs'
import { fresh, hashOf, mark } from './stamp.mjs'
import { inRoot, run } from './step.mjs'

/** @returns {Promise<{ remark: string }>} */
export async function installNodeModules() {
  const value = hashOf([inRoot('package-lock.json')])
  const stamp = inRoot('node_modules/.epmoe-stamp')
  if (fresh(stamp, value)) return { remark: 'unchanged' }
  if (existsSync(inRoot('node_modules')) && !existsSync(inRoot('node_modules/.package-lock.json'))) {
    return { remark: 'used as found' } // unpacked by hand, for a machine without a registry
  }
  // Not `npm ci`: it rejects a lock file made where the registry lacks other platforms' optional binaries.
  // Install scripts would build pymport and the addon; those are steps of their own, with better words for a failure.
  await run('npm', ['install', '--no-save', '--ignore-scripts', '--no-audit', '--no-fund'], {
    remedy: 'check that npm reaches its registry (npm ping), then try again',
  })
  mark(stamp, value)
  return { remark: 'installed' }
}
