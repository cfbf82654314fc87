// Installs the npm packages of the lock file, and sees to it that pymport has its native part.
import { existsSync } from 'node:fs'
import { fresh, hashOf, mark } from './stamp.mjs'
import { Missing, inRoot, install, probe, run } from './step.mjs'

const pythonHeaders = () =>
  install({
    'apt-get': 'python3-dev python3-venv pkg-config',
    dnf: 'python3-devel pkgconf-pkg-config',
    brew: 'python pkg-config',
  })

/** @returns {Promise<string>} a remark */
export async function installNodeModules() {
  const value = hashOf([inRoot('package-lock.json')])
  const stamp = inRoot('node_modules/.epmoe-stamp')
  if (fresh(stamp, value)) return 'unchanged'
  if (existsSync(inRoot('node_modules')) && !existsSync(inRoot('node_modules/.package-lock.json'))) {
    return 'used as found'  // unpacked by hand, for a machine without a registry
  }
  requireEmbedding()
  // Not `npm ci`: it rejects a lock file made where the registry lacks other platforms' optional binaries.
  // The package's own install script would build the addon; that is a step of its own here.
  await run('npm', ['install', '--no-save', '--ignore-scripts', '--no-audit', '--no-fund'], { remedy: 'check the npm registry and try again' })
  mark(stamp, value)
  return 'installed'
}

/** @returns {Promise<string>} a remark */
export async function buildPymport() {
  const binding = inRoot(`node_modules/pymport/lib/binding/${process.platform}-${process.arch}/pymport.node`)
  if (existsSync(binding)) return 'unchanged'
  requireEmbedding()
  await run('npm', ['rebuild', 'pymport', '--build-from-source', '--foreground-scripts'], { remedy: pythonHeaders() })
  if (!existsSync(binding)) {
    throw new Missing('pymport was not built', 'npm rebuild pymport --build-from-source --foreground-scripts')
  }
  return 'built'
}

/** pymport links libpython; which one, pkg-config says. @returns {string} its version, `3.11` */
export function requireEmbedding() {
  if (probe('pkg-config', ['--version']) === undefined && probe('pkg-config', ['--modversion', 'python3-embed']) === undefined) {
    throw new Missing('there is no pkg-config, by which pymport finds libpython', pythonHeaders())
  }
  const version = probe('pkg-config', ['--modversion', 'python3-embed'])
  if (version === undefined) throw new Missing('there are no Python headers (python3-embed)', pythonHeaders())
  return version
}
