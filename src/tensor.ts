import { constants } from 'node:buffer'
import { type Device, type DeviceLike, deviceName, dl, parseDevice } from './device.js'
import { type DType, dtypeFacts, dtypeName, dtypeOfArray, type TypedArray } from './dtype.js'
import { describeValue, EpmoeError } from './errors.js'
import { tellSoon } from './external.js'
import { pythonAddress, pythonRefs, torchBridge } from './foreign.js'
import { type NativeTensor, native } from './native.js'
import { enterScope, leaveScope } from './scope.js'

/** How torch and epmoe hand a tensor to each other: by torch's C exchange table, or by `__dlpack__` capsules. */
export type Protocol = 'exchange' | 'dlpack'

export interface TensorOptions {
  dtype?: DType
  /** `'cpu'` unless given. */
  device?: DeviceLike
  /** Page-locked host memory, from which the GPU copies without waiting. CPU only. */
  pinned?: boolean
}

const construct = Symbol('construct')

/**
 * An n-dimensional array in CPU or GPU memory: its own, a TypedArray's or torch's, never copied on the way.
 *
 * Fields are named as in torch. Memory is freed by `dispose()` (or `using`); the garbage collector is the net, not the
 * plan. Using a disposed tensor is an error.
 */
export class Tensor implements Disposable {
  readonly shape: readonly number[]
  /** In elements. */
  readonly strides: readonly number[]
  readonly dtype: DType
  readonly device: Device
  readonly pinned: boolean
  /** Address of the first element. */
  readonly dataPtr: bigint
  readonly nbytes: number
  readonly contiguous: boolean
  #handle: number
  readonly #foreign: boolean
  /** The owner of the memory when JavaScript brought it. */
  readonly #buffer: ArrayBufferLike | undefined

  /** Tensors are made by the static functions. */
  constructor(key: typeof construct, facts: NativeTensor, buffer?: ArrayBufferLike) {
    if (key !== construct) {
      throw new EpmoeError({
        code: 'ERR_VALUE',
        op: 'new Tensor',
        expected: 'Tensor.empty(), Tensor.from() or Tensor.fromTorch()',
        received: 'new',
        hint: 'Tensors are made by these functions',
      })
    }
    this.shape = Object.freeze(facts.shape)
    this.strides = Object.freeze(facts.strides)
    this.dtype = dtypeName(facts.dtype)
    this.device = deviceName(facts.deviceType, facts.deviceId)
    this.pinned = facts.deviceType === dl.cudaHost
    this.dataPtr = facts.address
    this.nbytes = facts.nbytes
    this.contiguous = facts.contiguous
    this.#handle = facts.handle
    this.#foreign = facts.foreign
    this.#buffer = buffer
    registry.register(this, facts.handle, this)
    enterScope(this)
    tellSoon()
  }

  /** Uninitialised memory. */
  static empty(shape: readonly number[], options: TensorOptions = {}): Tensor {
    const op = 'Tensor.empty'
    const device = parseDevice(options.device ?? 'cpu', op)
    const dtype = dtypeFacts(options.dtype ?? 'float32', op)
    const sizes = checkShape(shape, op, dtype.itemsize)
    let type: number = device.type
    if (options.pinned === true) {
      if (type === dl.cuda) {
        throw new EpmoeError({
          code: 'ERR_DEVICE',
          op,
          argument: 'pinned',
          expected: 'a CPU tensor',
          received: options.device as string,
          hint: 'Only host memory can be page-locked',
        })
      }
      type = dl.cudaHost
    }
    return new Tensor(construct, native().tensor.empty(sizes, dtype.index, type, device.id))
  }

  /** Zeros. */
  static zeros(shape: readonly number[], options: TensorOptions = {}): Tensor {
    if (options.device !== undefined && options.device !== 'cpu') {
      using host = Tensor.zeros(shape, { ...options, device: 'cpu' })
      return host.to(options.device)
    }
    const tensor = Tensor.empty(shape, options)
    if (tensor.nbytes > 0) tensor.data.fill((tensor.dtype === 'int64' ? 0n : 0) as never)
    return tensor
  }

  /**
   * A tensor over a TypedArray's memory: writing to one is writing to the other. The shape is that of the array unless
   * given; `dtype` says what the bits of a Uint16Array or Uint8Array mean (float16, bfloat16, float8_e4m3fn).
   */
  static from(array: TypedArray, shape?: readonly number[], options: { dtype?: DType } = {}): Tensor {
    const op = 'Tensor.from'
    const dtype = options.dtype ?? (ArrayBuffer.isView(array) ? dtypeOfArray(array) : undefined)
    if (dtype === undefined || !(array instanceof dtypeFacts(dtype, op).array)) {
      throw new EpmoeError({
        code: 'ERR_DTYPE',
        op,
        argument: dtype === undefined ? 'array' : 'dtype',
        expected:
          'Float32Array, Float64Array, Int32Array, BigInt64Array, Uint8Array, or a Uint16Array with dtype float16 or bfloat16',
        received: `${describeValue(array)}${options.dtype === undefined ? '' : ` as ${options.dtype}`}`,
        hint: 'Give the dtype that the elements have',
      })
    }
    const facts = dtypeFacts(dtype, op)
    const sizes = checkShape(shape ?? [array.length], op, facts.itemsize)
    const count = sizes.reduce((product, size) => product * size, 1)
    if (count !== array.length) {
      throw new EpmoeError({
        code: 'ERR_SHAPE',
        op,
        argument: 'shape',
        expected: `sizes whose product is ${array.length}, the array's length`,
        received: `[${sizes.join(', ')}]`,
        hint: 'Change the shape, or take a subarray',
      })
    }
    const buffer = array.buffer
    if (
      (buffer as { resizable?: boolean }).resizable === true ||
      (buffer as { growable?: boolean }).growable === true
    ) {
      throw new EpmoeError({
        code: 'ERR_UNSUPPORTED_TENSOR',
        op,
        argument: 'array',
        expected: 'an array over a buffer of fixed length',
        received: 'one over a resizable buffer, whose memory may go away',
        hint: 'Copy it: new Float32Array(array)',
      })
    }
    return new Tensor(construct, native().tensor.fromBuffer(buffer, array.byteOffset, sizes, facts.index), buffer)
  }

  /**
   * A tensor over the memory of a torch.Tensor, which stays alive as long as this one does. `object` is a PyRef, or a
   * pymport PyObject. Sparse, quantised, meta and negative-bit tensors, and those that require grad, are refused.
   */
  static fromTorch(object: unknown, options: { protocol?: Protocol } = {}): Tensor {
    const op = 'Tensor.fromTorch'
    const address = pythonAddress(object)
    if (address === undefined) throw notATensor(op, 'object', object)
    const bridge = torchBridge(op)
    if (options.protocol === 'dlpack' || !native().python.hasExchange()) {
      native().python.check(address)
      return bridge.importCapsule(object)
    }
    return new Tensor(construct, native().python.fromObject(address))
  }

  /** A torch.Tensor over this tensor's memory, which stays alive as long as either does. Returns a PyRef. */
  toTorch(options: { protocol?: Protocol } = {}): unknown {
    const bridge = torchBridge('toTorch')
    const handle = this.handleFor('toTorch')
    if (options.protocol === 'dlpack' || !native().python.hasExchange()) {
      native().python.toCapsule(handle)
      return bridge.takeFromInboxAsTensor()
    }
    native().python.toObject(handle)
    return bridge.takeFromInbox()
  }

  /** Takes over a DLPack capsule at a CPython address. For the bridge. */
  static fromCapsule(address: number): Tensor {
    return new Tensor(construct, native().python.fromCapsule(address))
  }

  /** The number of elements. */
  get numel(): number {
    return this.shape.reduce((product, size) => product * size, 1)
  }

  /** Whether the memory belongs to torch. */
  get isTorch(): boolean {
    return this.#foreign
  }

  get disposed(): boolean {
    return this.#handle < 0
  }

  /**
   * The elements, as a TypedArray over the same memory; float16, bfloat16 and float8 as the bits. CPU tensors that are
   * contiguous only: on the GPU there is no such view, copy with toHost(). After dispose() the array has length 0.
   */
  get data(): TypedArray {
    const handle = this.handleFor('data')
    if (this.device !== 'cpu') {
      throw new EpmoeError({
        code: 'ERR_DEVICE',
        op: 'data',
        expected: 'a tensor on the CPU',
        received: `one on ${this.device}`,
        hint: 'Copy it first: await tensor.toHost()',
      })
    }
    this.#requireContiguous('data')
    const { array, itemsize } = dtypeFacts(this.dtype, 'data')
    if (this.nbytes === 0) return new array(new ArrayBuffer(0), 0, 0)
    if (this.nbytes > constants.MAX_LENGTH) {
      throw new EpmoeError({
        code: 'ERR_UNSUPPORTED_TENSOR',
        op: 'data',
        expected: `at most ${constants.MAX_LENGTH} bytes, the longest buffer of Node ${process.version}`,
        received: `${this.nbytes} bytes`,
        hint: 'Take the data of parts: tensor.view(shape, offset).data',
      })
    }
    const { buffer, byteOffset } = native().tensor.buffer(handle)
    return new array(buffer, byteOffset, this.nbytes / itemsize)
  }

  /** A part of a contiguous tensor, from element `offset` on, as a contiguous tensor over the same memory. */
  view(shape: readonly number[], offset = 0): Tensor {
    const handle = this.handleFor('view')
    this.#requireContiguous('view')
    const { index, itemsize } = dtypeFacts(this.dtype, 'view')
    const sizes = checkShape(shape, 'view', itemsize)
    const count = sizes.reduce((product, size) => product * size, 1)
    if (!Number.isSafeInteger(offset) || offset < 0 || offset + count > this.numel) {
      throw new EpmoeError({
        code: 'ERR_SHAPE',
        op: 'view',
        argument: 'shape',
        expected: `a part of the ${this.numel} elements`,
        received: `[${sizes.join(', ')}] from element ${offset} on`,
        hint: 'Take fewer elements, or begin earlier',
      })
    }
    return new Tensor(construct, native().tensor.view(handle, offset, sizes, index), this.#buffer)
  }

  /** Copies `source`'s elements here; dtypes and numbers of elements must be equal. Ordered after earlier work on both. */
  copyFrom(source: Tensor): this {
    this.#copy(source, 'copyFrom')
    return this
  }

  /** A copy on `device`. Returns at once; later work on the copy is ordered after it. */
  to(device: DeviceLike): Tensor {
    const copy = Tensor.empty(this.shape, { dtype: this.dtype, device })
    try {
      copy.#copy(this, 'to')
    } catch (error) {
      copy.dispose()
      throw error
    }
    return copy
  }

  /** A copy in (page-locked) host memory, once all earlier work on this tensor is done. The event loop goes on. */
  async toHost(): Promise<Tensor> {
    if (this.device === 'cpu') return this.to('cpu')
    const copy = Tensor.empty(this.shape, { dtype: this.dtype, pinned: true })
    try {
      const stream = copy.#copy(this, 'toHost')
      await native().stream.synchronize(parseDevice(this.device, 'toHost').id, stream)
    } catch (error) {
      copy.dispose()
      throw error
    }
    return copy
  }

  /** The same, blocking. */
  toHostSync(): Tensor {
    if (this.device === 'cpu') return this.to('cpu')
    const copy = Tensor.empty(this.shape, { dtype: this.dtype })
    try {
      const stream = copy.#copy(this, 'toHostSync')
      native().stream.synchronizeSync(parseDevice(this.device, 'toHostSync').id, stream)
    } catch (error) {
      copy.dispose()
      throw error
    }
    return copy
  }

  /** Lets go of the memory. Harmless when repeated. */
  dispose(): void {
    if (this.#handle < 0) return
    registry.unregister(this)
    leaveScope(this)
    letGo(this.#handle, true)
    this.#handle = -1
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  toString(): string {
    return `Tensor(${this.dtype}[${this.shape.join(', ')}] on ${this.device}${this.disposed ? ', disposed' : ''})`
  }

  /** @internal The native handle, of a tensor that may be used. */
  handleFor(op: string, argument = 'tensor'): number {
    if (this.#handle < 0) {
      throw new EpmoeError({
        code: 'ERR_DISPOSED',
        op,
        argument,
        expected: 'a live tensor',
        received: 'a disposed one',
        hint: 'Keep it until its last use',
      })
    }
    // A transferred ArrayBuffer takes its memory along; only a length of 0 tells.
    if (this.#buffer !== undefined && this.nbytes > 0 && this.#buffer.byteLength === 0) {
      throw new EpmoeError({
        code: 'ERR_DISPOSED',
        op,
        argument,
        expected: 'a tensor whose ArrayBuffer is still here',
        received: 'one whose ArrayBuffer was transferred',
        hint: 'Do not transfer a buffer that a tensor uses, or copy it first',
      })
    }
    return this.#handle
  }

  #requireContiguous(op: string): void {
    if (this.contiguous) return
    throw new EpmoeError({
      code: 'ERR_NOT_CONTIGUOUS',
      op,
      argument: 'tensor',
      expected: 'row-major contiguous memory',
      received: `strides [${this.strides.join(', ')}] for shape [${this.shape.join(', ')}]`,
      hint: 'Call contiguous() on the torch tensor first',
    })
  }

  #copy(source: Tensor, op: string): number {
    if (!(source instanceof Tensor)) throw notATensor(op, 'source', source)
    this.#requireContiguous(op)
    source.#requireContiguous(op)
    if (source.dtype !== this.dtype || source.numel !== this.numel) {
      throw new EpmoeError({
        code: source.dtype === this.dtype ? 'ERR_SHAPE' : 'ERR_DTYPE',
        op,
        argument: 'source',
        expected: `${this.numel} elements of ${this.dtype}`,
        received: `${source.numel} of ${source.dtype}`,
        hint: 'Copies do not convert or broadcast',
      })
    }
    return native().tensor.copy(this.handleFor(op), source.handleFor(op, 'source'))
  }
}

export function notATensor(op: string, argument: string, value: unknown): EpmoeError {
  return new EpmoeError({
    code: 'ERR_NOT_A_TENSOR',
    op,
    argument,
    expected: 'a Tensor or a torch.Tensor',
    received: describeValue(value),
    hint: 'Make one with Tensor.from(), or pass the PyRef of a torch.Tensor',
  })
}

export interface Count {
  tensors: number
  bytes: number
}

/** What is alive: Tensors and the bytes under them, by kind of device and by device; and what PyRefs hold. */
export function stats(): {
  cpu: Count
  cuda: Count
  devices: Partial<Record<Device, Count>>
  python: { refs: number; bytes: number }
} {
  const devices: Partial<Record<Device, Count>> = {}
  const total = { cpu: { tensors: 0, bytes: 0 }, cuda: { tensors: 0, bytes: 0 } }
  for (const { deviceType, deviceId, tensors, bytes } of native().tensor.count()) {
    devices[deviceName(deviceType, deviceId)] = { tensors, bytes }
    const kind = deviceType === dl.cuda ? total.cuda : total.cpu
    kind.tensors += tensors
    kind.bytes += bytes
  }
  return { ...total, devices, python: { ...pythonRefs } }
}

const registry = new FinalizationRegistry<number>((handle) => letGo(handle, false))

function letGo(handle: number, detach: boolean): void {
  native().tensor.dispose(handle, detach)
  tellSoon()
}

function checkShape(shape: readonly number[], op: string, itemsize: number): number[] {
  const valid = Array.isArray(shape) && shape.every((size) => Number.isSafeInteger(size) && size >= 0)
  if (!valid || shape.length > 16) {
    throw new EpmoeError({
      code: 'ERR_SHAPE',
      op,
      argument: 'shape',
      expected: 'up to 16 sizes, each a whole number of 0 or more',
      received: Array.isArray(shape) ? `[${shape.join(', ')}]` : describeValue(shape),
    })
  }
  if (shape.reduce((product, size) => product * size, itemsize) > Number.MAX_SAFE_INTEGER) {
    throw new EpmoeError({
      code: 'ERR_OUT_OF_MEMORY',
      op,
      argument: 'shape',
      expected: 'fewer than 2^53 bytes',
      received: `[${shape.join(', ')}]`,
    })
  }
  return [...shape]
}
