// Installs the npm packages of the lock file.
import { existsSync, readFileSync } from 'node:fs'
import { inRoot, run } from './step.mjs'

/** @returns {Promise<{ remark: string }>} */
export async function installNodeModules() {
  const missing = missingPackages()
  if (missing.length === 0) return { remark: 'unchanged' }
  if (process.env['npm_config_offline'] === 'true' && missing.every(({ dev }) => dev)) {
    return { remark: `offline, without ${missing.map(({ path }) => path.replace('node_modules/', '')).join(', ')}` }
  }
  // Not `npm ci`: it would remove what is there first.
  // Install scripts would build pymport and the addon; those are steps of their own, with better words for a failure.
  await run('npm', ['install', '--no-save', '--ignore-scripts', '--no-audit', '--no-fund'], {
    remedy: 'check that npm reaches its registry (npm ping), then try again',
  })
  return { remark: 'installed' }
}

/**
 * The packages of the lock file that node_modules lacks, or has in another version. Optional ones may be absent, but for
 * pymport: users of the kernels alone can do without it, a checkout cannot.
 */
function missingPackages() {
  /** @type {{ packages: Record<string, { version?: string, optional?: boolean, dev?: boolean }> }} */
  const lock = JSON.parse(readFileSync(inRoot('package-lock.json'), 'utf8'))
  return Object.entries(lock.packages).flatMap(([path, { version, optional, dev = false }]) => {
    const manifest = inRoot(`${path}/package.json`)
    if (path === '' || (optional && path !== 'node_modules/pymport')) return []
    const found = existsSync(manifest) ? JSON.parse(readFileSync(manifest, 'utf8')).version : undefined
    return found === version ? [] : [{ path, dev }]
  })
}
