#!/usr/bin/env node
// In a checkout the TypeScript sources run as they are; an installed package has them compiled.
import { existsSync } from 'node:fs'

const source = new URL('./index.ts', import.meta.url)
try {
  if (existsSync(source)) {
    const { register } = await import('tsx/esm/api')
    register()
    await import(source.href)
  } else {
    await import(new URL('../../dist/cli/index.js', import.meta.url).href)
  }
} catch (error) {
  const missing = error instanceof Error && 'code' in error && error.code === 'ERR_MODULE_NOT_FOUND'
  if (!missing) throw error
  console.error(`epmoe: ${error.message}\nTo mend it: ${existsSync(source) ? 'npm run setup' : 'npm install'}`)
  process.exitCode = 3
}
