// Compiles src/ to dist/, so that programs may import 'epmoe'.
import { existsSync, rmSync } from 'node:fs'
import { filesIn, fresh, hashOf, mark } from './stamp.mjs'
import { inRoot, run } from './step.mjs'

/** @returns {Promise<{ remark: string }>} */
export async function compileTypeScript() {
  const compiler = inRoot(`node_modules/@typescript/typescript-${process.platform}-${process.arch}`)
  if (!existsSync(compiler)) return { remark: 'left out: no compiler here, the sources run as they are' }
  const value = hashOf([...filesIn(inRoot('src')), inRoot('tsconfig.json'), inRoot('package.json')])
  const stamp = inRoot('dist/.epmoe-stamp')
  if (fresh(stamp, value)) return { remark: 'unchanged' }
  rmSync(inRoot('dist'), { recursive: true, force: true })
  await run(inRoot('node_modules/.bin/tsc'), ['-p', inRoot('src/tsconfig.json')], {
    remedy: 'mend what the compiler says',
  })
  mark(stamp, value)
  return { remark: 'compiled' }
}
