import type { Device } from './device.js'
import { describeValue, EpmoeError } from './errors.js'
import { tellSoon } from './external.js'
import { attachedBridge } from './foreign.js'
import { native } from './native.js'
import { enterScope, leaveScope } from './scope.js'
import { Stream } from './stream.js'

/**
 * Ops captured once in a CUDA graph, to be launched again by one call, which costs little more than the launch itself.
 *
 * A replay does what the ops did, on what their tensors hold by then. The graph keeps the memory of every tensor it
 * uses, disposed ones too, until it is disposed itself; prepared calls may be disposed before.
 */
export class Graph implements Disposable {
  readonly device: Device
  #number: number
  readonly #stream: Stream

  private constructor(number: number, stream: Stream) {
    this.device = stream.device
    this.#number = number
    this.#stream = stream
    graphs.register(this, number, this)
    enterScope(this)
  }

  /**
   * Captures what `body` does on `stream`: ops and prepared calls on tensors of its device, which need not name the
   * stream, and copies between GPU and pinned tensors. Nothing is run yet.
   *
   * What a graph cannot hold throws ERR_CAPTURE: ops on the CPU, other streams, copies of other host memory, waiting
   * for results, a body that is asynchronous. An error in `body` drops the capture and is thrown on; the stream can be
   * used as before. Tensors may be made in `body`; they are memory like any other.
   *
   * torch's own work is captured too when `stream` is torch's current one (a side stream: CUDA does not capture the
   * default one), as far as it allocates nothing: it would give the memory to others. Where torch has to allocate, have
   * torch.cuda.graph() capture; epmoe's ops can be captured by it.
   */
  static capture(stream: Stream, body: () => void): Graph {
    if (!(stream instanceof Stream) || typeof body !== 'function') {
      const argument = stream instanceof Stream ? 'body' : 'stream'
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op: 'Graph.capture',
        argument,
        expected: argument === 'stream' ? 'a Stream of a GPU' : 'a function that calls ops',
        received: describeValue(argument === 'stream' ? stream : body),
        hint: 'The CPU has neither streams nor graphs: there, prepare() calls and run them again',
      })
    }
    return new Graph(native().graph.capture(stream.id, stream.address, refusingAllocations(stream, body)), stream)
  }

  /**
   * Launches the graph on `stream`, by default the one it was captured on, after earlier work on its tensors and before
   * later work on them, torch's included. Returns at once. An index out of range is reported by the next wait.
   */
  replay(stream: Stream = this.#stream): void {
    if (!(stream instanceof Stream) || stream.device !== this.device) {
      throw new EpmoeError({
        code: 'ERR_DEVICE',
        op: 'Graph.replay',
        argument: 'stream',
        expected: `a Stream of ${this.device}`,
        received: stream instanceof Stream ? `one of ${stream.device}` : describeValue(stream),
        hint: 'Leave it out for the stream that was captured',
      })
    }
    native().graph.replay(this.#number, stream.address)
  }

  /** Lets go of the graph and of its hold on tensors. A replay under way is not disturbed. Harmless when repeated. */
  dispose(): void {
    if (this.#number === 0) return
    graphs.unregister(this)
    forget(this.#number)
    this.#number = 0
    leaveScope(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  toString(): string {
    return `Graph(on ${this.device}${this.#number === 0 ? ', disposed' : ''})`
  }
}

/** The body, for a stream that is torch's current one: what torch allocates there now it gives to others later. */
function refusingAllocations(stream: Stream, body: () => unknown): () => unknown {
  const torch = attachedBridge()
  if (torch === undefined || native().stream.foreign(stream.id) !== stream.address) return body
  return () => {
    const before = torch.allocations(stream.id)
    const result = body()
    const count = torch.allocations(stream.id) - before
    if (count === 0) return result
    throw new EpmoeError({
      code: 'ERR_CAPTURE',
      op: 'Graph.capture',
      argument: 'body',
      expected: 'a body in which torch allocates nothing',
      received: `${count} allocations, whose memory torch would give to others while the graph uses it`,
      hint: 'Write into tensors made before (out=, in place), or have torch.cuda.graph() capture',
    })
  }
}

const graphs = new FinalizationRegistry<number>(forget)

function forget(number: number): void {
  native().graph.forget(number)
  tellSoon() // the memory of tensors that only the graph still held
}
