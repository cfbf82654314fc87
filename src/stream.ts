import { type Device, type DeviceLike, deviceName, dl, parseDevice } from './device.js'
import { EpmoeError } from './errors.js'
import type { Event } from './event.js'
import { native } from './native.js'

/**
 * A CUDA stream. An op runs on the stream it is given; without one, on torch's current stream when one of its tensors
 * is torch's, otherwise on epmoe's own stream of the device.
 */
export class Stream implements Disposable {
  readonly device: Device
  #address: number | undefined
  readonly #id: number
  readonly #owned: boolean

  private constructor(id: number, address: number, owned: boolean) {
    this.device = deviceName(dl.cuda, id)
    this.#id = id
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
    return new Stream(id, native().stream.foreign(id), false)
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
    await native().stream.synchronize(this.#id, this.address)
  }

  /** The same, blocking. */
  synchronizeSync(): void {
    native().stream.synchronizeSync(this.#id, this.address)
  }

  /** Makes work launched here from now on wait for the event as it was last recorded. Blocks nobody. */
  wait(event: Event): void {
    native().stream.waitEvent(this.#id, this.address, event.number('Stream.wait'))
  }

  /** Waits for the stream and destroys it, when it is one that create() made. Harmless when repeated. */
  dispose(): void {
    const address = this.#address
    this.#address = undefined
    if (address !== undefined && this.#owned) native().stream.destroy(this.#id, address)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** The number of a GPU; the CPU is refused. */
export function cudaId(device: DeviceLike, op: string): number {
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
