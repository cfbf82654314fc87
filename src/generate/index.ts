// npm run generate [-- --check]: writes the sources that follow from the op descriptors, or says which are stale.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { native } from '../native.js'
import { packageRoot } from '../package-root.js'
import { pythonOf } from './python.js'
import { typescriptOf } from './typescript.js'

/** What the generated files should hold, by path from the package's root. */
export function generated(): Map<string, string> {
  const ops = native().ops()
  return new Map([
    ['src/generated/ops.ts', typescriptOf(ops)],
    ['python/epmoe/generated.py', pythonOf(ops)],
  ])
}

if (process.argv[1] === import.meta.filename) {
  const check = process.argv.includes('--check')
  for (const [file, text] of generated()) {
    const path = join(packageRoot, file)
    if (!check) {
      writeFileSync(path, text)
      console.log(`wrote ${file}`)
    } else if (readFileSync(path, 'utf8') !== text) {
      console.error(`${file} is stale: run \`npm run generate\``)
      process.exitCode = 1
    }
  }
}
