import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { setTimeout } from 'node:timers/promises'
import { parserAnswer } from './problems.js'

/** Responses that are not over yet, and their connections. */
export class Connections {
  readonly #open = new Set<ServerResponse>()
  readonly #known = new WeakSet<Socket>()

  add(response: ServerResponse): void {
    this.#open.add(response)
    response.once('close', () => this.#open.delete(response))
    const { socket } = response.req
    if (this.#known.has(socket)) return
    this.#known.add(socket)
    socket.once('close', () => this.#closed(socket))
  }

  /** Node tells the end of a connection to the first response on it only, and not to those that wait behind. */
  #closed(socket: Socket): void {
    for (const response of this.#open) {
      if (response.req.socket === socket && response.socket === null) response.destroy().emit('close')
    }
  }

  /** Answers what Node could not read, unless that would get into the middle of another answer. */
  refuse(error: NodeJS.ErrnoException, socket: Socket): void {
    const begun = [...this.#open].some((response) => response.socket === socket && response.headersSent)
    if (socket.writable && !begun) socket.write(parserAnswer(error))
    socket.destroy(error)
  }

  /** Waits for the last bytes of answers, but not for clients that do not read them. */
  async flush(seconds: number): Promise<void> {
    const deadline = performance.now() + seconds * 1000
    while (this.#open.size > 0 && performance.now() < deadline) await setTimeout(10)
  }
}
