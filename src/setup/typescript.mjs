// Compiles src/ to dist/, so that programs may import 'epmoe'.
import { existsSync } from 'node:fs'
import { filesIn, fresh, hashOf, mark } from './stamp.mjs'
import { inRoot, run } from './step.mjs'

/** @returns {Promise<string>} a remark */
export async function compileTypeScript() {
  const tsc = inRoot('node_modules/.bin/tsc')
  const compiler = inRoot(`node_modules/@typescript/typescript-${process.platform}-${process.arch}`)
  if (!existsSync(tsc) || !existsSync(compiler)) return 'left out: no compiler here, the sources run by tsx'
  const value = hashOf([...filesIn(inRoot('src')), inRoot('tsconfig.json'), inRoot('package.json')])
  const stamp = inRoot('dist/.epmoe-stamp')
  if (fresh(stamp, value)) return 'unchanged'
  await run(tsc, ['-p', inRoot('src/tsconfig.json')], { remedy: 'mend what the compiler says above' })
  mark(stamp, value)
  return 'compiled'
}
