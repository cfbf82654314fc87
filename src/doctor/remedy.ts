import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from '../package-root.js'

/** A checkout has the sources, and set-up mends most of it; an installed package is npm's business. */
export const inCheckout = existsSync(join(packageRoot, 'src', 'index.ts'))

export const rebuildAddon = inCheckout ? 'npm run setup' : 'npm rebuild epmoe --foreground-scripts'
export const rebuildPymport = inCheckout ? 'npm run setup' : 'npm rebuild pymport --foreground-scripts'
export const installPackages = inCheckout ? 'npm run setup' : 'npm install'

/** How Python packages get into an interpreter's environment. */
export function pipInstall(python: string, source: string, packages: string): string {
  return inCheckout && source === 'package .venv' ? 'npm run setup' : `${python} -m pip install ${packages}`
}
