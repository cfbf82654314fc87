#!/usr/bin/env node
// In a checkout the TypeScript sources run as they are; an installed package has them compiled.
import { existsSync } from 'node:fs'

if (existsSync(new URL('./index.ts', import.meta.url))) {
  const { register } = await import('tsx/esm/api')
  register()
  await import(new URL('./index.ts', import.meta.url).href)
} else {
  await import(new URL('../../dist/cli/index.js', import.meta.url).href)
}
