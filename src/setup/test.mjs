// Runs the tests; arguments are ava's.
import { spawnSync } from 'node:child_process'
import { inRoot } from './step.mjs'

const result = spawnSync(process.execPath, [inRoot('node_modules/ava/entrypoints/cli.mjs'), ...process.argv.slice(2)], {
  stdio: 'inherit',
})
process.exit(result.status ?? 1)
