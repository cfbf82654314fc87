import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

/** What a worker of a test runs. */
export const workerFile: string = fileURLToPath(new URL('../fixtures/worker.mjs', import.meta.url))

/**
 * Whether workers can run at all: they import the compiled package, as a user's do, because the loader of TypeScript
 * sources does not reach into them.
 */
export const workersRun: boolean = existsSync(fileURLToPath(new URL('../../dist/index.js', import.meta.url)))
