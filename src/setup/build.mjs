// npm run build: src/ to dist/, for npm pack.
import { explain, step } from './step.mjs'
import { compileTypeScript } from './typescript.mjs'

try {
  await step('TypeScript', compileTypeScript)
} catch (error) {
  explain(error)
}
