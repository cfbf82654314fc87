import anyTest, { type ExecutionContext, type TestFn } from 'ava'
import type { PyRef } from 'epmoe'
import type { Server } from '../../src/serve/server.js'
import { helpers, start, whyNot } from './serve.js'

const reason = whyNot()
/** One after the other, for they share Python's thread; skipped where no model can be served. */
export const test = (reason === undefined ? anyTest.serial : anyTest.skip) as TestFn
if (reason !== undefined) anyTest(`no model is served: ${reason}`, (t) => t.pass())

/** A server that ends with the test. */
export async function served(t: ExecutionContext, options: Parameters<typeof start>[0] = {}) {
  const server = await start(options)
  t.teardown(() => server.close())
  return server
}

/** Holds forward passes up until it is opened. */
export function shutGate(t: ExecutionContext, server: Server): PyRef {
  const gate = helpers().method('Gate', server.model.engine)
  t.teardown(() => gate.method('remove'))
  gate.method('shut').dispose()
  return gate
}
