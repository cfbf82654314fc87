import { type Device, type DeviceLike, deviceName, dl, parseDevice } from './device.js'
import { describeValue, EpmoeError } from './errors.js'
import { torchBridge } from './foreign.js'
import { native } from './native.js'
import { enterScope, leaveScope } from './scope.js'

/**
 * A CUDA stream. An op runs on the stream it is given; without one, on torch's current stream when one of its tensors
 * is torch's, otherwise on epmoe's own stream of the device. Work on a Tensor waits for earlier work on it, whichever
 * stream that was on; where torch's own tensors are given to an op together with a stream, an Event orders it with torch.
 */
export class Stream implements Disposable {
  readonly device: Device
  #address: number | undefined
  /** @internal The GPU's number. */
  readonly id: number
  readonly #owned: boolean

  private constructor(id: number, address: number, owned: boolean) {
    this.device = deviceName(dl.cuda, id)
    this.id = id
    this.#address = address
    this.#owned = owned
  }

  /** A new stream that runs beside all others. Dispose it when done. */
  static create(device: DeviceLike = 'cuda'): Stream {
    const id = cudaId(device, 'Stream.create')
    return new Stream(id, native().stream.create(id), true)
  }

  /** The stream epmoe uses for its own tensors on that device. */
  static own(device: DeviceLike = 'cuda'): Stream {
    const id = cudaId(device, 'Stream.own')
    return new Stream(id, native().stream.own(id), false)
  }

  /** torch's current stream of that device, as of now. Needs startPython(). */
  static torchCurrent(device: DeviceLike = 'cuda'): Stream {
    const id = cudaId(device, 'Stream.torchCurrent')
    const bridge = torchBridge('Stream.torchCurrent')
    native().stream.own(id) // a torch without CUDA would answer for a GPU that is not there
    const address = native().python.hasExchange() ? native().stream.foreign(id) : bridge.currentStream(id)
    return new Stream(id, address, false)
  }

  /** The cudaStream_t, to hand to other libraries. */
  get address(): number {
    if (this.#address === undefined) {
      throw new EpmoeError({
        code: 'ERR_DISPOSED',
        op: 'Stream',
        expected: 'a live stream',
        received: 'a disposed one',
        hint: 'Keep it until its last use',
      })
    }
    return this.#address
  }

  /**
   * Resolves when all work launched on this stream so far is done; the event loop goes on meanwhile. Rejects with
   * ERR_INDEX_OUT_OF_RANGE when a kernel on this device met an index outside its bounds, and with ERR_CUDA when the
   * work failed.
   */
  async synchronize(): Promise<void> {
    await native().stream.synchronize(this.id, this.address)
  }

  /** The same, blocking. */
  synchronizeSync(): void {
    native().stream.synchronizeSync(this.id, this.address)
  }

  /** Makes work launched here from now on wait for the event as it was last recorded. Blocks nobody. */
  wait(event: Event): void {
    if (!(event instanceof Event)) {
      const received = describeValue(event)
      throw new EpmoeError({ code: 'ERR_VALUE', op: 'Stream.wait', argument: 'event', expected: 'an Event', received })
    }
    native().stream.waitEvent(this.id, this.address, event.number('Stream.wait'))
  }

  /** Waits for the stream and destroys it, when it is one that create() made. Harmless when repeated. */
  dispose(): void {
    const address = this.#address
    this.#address = undefined
    if (address !== undefined && this.#owned) native().stream.destroy(this.id, address)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

export interface EventOptions {
  /** Whether elapsedMs() is to be asked; events are cheaper without. Default true. */
  timing?: boolean
}

/**
 * A point in the work of a CUDA stream: other streams, torch's too, wait for it without blocking anybody, and the time
 * between two is known to about half a microsecond.
 */
export class Event implements Disposable {
  readonly device: Device
  #number: number
  #recorded = false

  private constructor(id: number, number: number) {
    this.device = deviceName(dl.cuda, id)
    this.#number = number
    events.register(this, number, this)
    enterScope(this)
  }

  /** An event of a device, not yet recorded. Dispose it when done. */
  static create(device: DeviceLike = 'cuda', options: EventOptions = {}): Event {
    const id = cudaId(device, 'Event.create')
    return new Event(id, native().event.create(id, options.timing ?? true))
  }

  /** Marks what `stream`, of the event's device, has been given so far. May be repeated: the last one counts. */
  record(stream: Stream): this {
    const number = this.#live('Event.record')
    if (!(stream instanceof Stream) || stream.device !== this.device) {
      throw new EpmoeError({
        code: 'ERR_DEVICE',
        op: 'Event.record',
        argument: 'stream',
        expected: `a Stream of ${this.device}`,
        received: stream instanceof Stream ? `one of ${stream.device}` : describeValue(stream),
        hint: "Create the event on the stream's device",
      })
    }
    native().event.record(number, stream.address)
    this.#recorded = true
    return this
  }

  /** Whether the work that was marked is done. */
  get done(): boolean {
    return native().event.query(this.number('Event.done'))
  }

  /** Resolves when the work that was marked is done; the event loop goes on meanwhile. Rejects as Stream.synchronize(). */
  async synchronize(): Promise<void> {
    await native().event.synchronize(this.number('Event.synchronize'))
  }

  /** The same, blocking. */
  synchronizeSync(): void {
    native().event.synchronizeSync(this.number('Event.synchronizeSync'))
  }

  /** Milliseconds from this event to `later`. Both must be done. */
  elapsedMs(later: Event): number {
    const op = 'Event.elapsedMs'
    if (!(later instanceof Event)) {
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op,
        argument: 'later',
        expected: 'an Event',
        received: describeValue(later),
      })
    }
    return native().event.elapsed(this.number(op), later.number(op))
  }

  /** Lets go of the event; who waits for it already is not disturbed. Harmless when repeated. */
  dispose(): void {
    if (this.#number === 0) return
    events.unregister(this)
    native().event.forget(this.#number)
    this.#number = 0
    leaveScope(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** @internal The native number, of an event that was recorded. */
  number(op: string): number {
    const number = this.#live(op)
    if (this.#recorded) return number
    throw new EpmoeError({
      code: 'ERR_VALUE',
      op,
      argument: 'event',
      expected: 'an event that was recorded',
      received: 'one that was not',
      hint: 'Call event.record(stream) first: CUDA would not wait for anything',
    })
  }

  #live(op: string): number {
    if (this.#number !== 0) return this.#number
    throw new EpmoeError({
      code: 'ERR_DISPOSED',
      op,
      argument: 'event',
      expected: 'a live event',
      received: 'a disposed one',
      hint: 'Keep it until its last use',
    })
  }
}

const events = new FinalizationRegistry<number>((number) => native().event.forget(number))

function cudaId(device: DeviceLike, op: string): number {
  const { type, id } = parseDevice(device, op)
  if (type === dl.cuda) return id
  throw new EpmoeError({
    code: 'ERR_DEVICE',
    op,
    argument: 'device',
    expected: 'a CUDA device',
    received: device,
    hint: 'The CPU has neither streams nor events: its ops are done on return',
  })
}
