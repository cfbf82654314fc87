import { inspect } from 'node:util'
import type { Runtime } from './runtime.js'

/** How long exit waits for Python's threads. */
const seconds = 2

/**
 * Python's part in the end of the process. Its atexit functions run and its output is flushed however Node ends, short
 * of a signal; threads of the bridge are stopped. While some other Python thread is still at work, finalising the
 * interpreter would crash or hang, so the process ends without.
 */
export function exitWith(runtime: Runtime): void {
  let uncaught: { error: unknown } | undefined
  process.on('uncaughtExceptionMonitor', (error) => {
    uncaught = { error }
  })
  process.on('exit', function end(code) {
    if (runtime.value('shutdown', seconds) === true) return
    // The process ends here, and who listens for its exit since Python started has not been told yet.
    try {
      const listeners = process.listeners('exit')
      for (const listener of listeners.slice(listeners.indexOf(end) + 1)) listener.call(process, code)
    } catch (error) {
      uncaught = { error }
      process.exitCode ||= 1
    }
    // Node prints an uncaught error after this event, which is not coming back.
    if (uncaught !== undefined) process.stderr.write(`Uncaught:\n${inspect(uncaught.error)}\n`)
    runtime.run('abandon', Number(process.exitCode ?? code))
  })
}
