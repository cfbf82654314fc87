import { parseDevice } from './device.js'
import { camelCase, describeValue, EpmoeError } from './errors.js'
import { pythonAddress, torchBridge } from './foreign.js'
import { native, type OpInfo } from './native.js'
import type { PyRef } from './python/ref.js'
import type { TorchTensor } from './python/torch.js'
import { enterScope, leaveScope } from './scope.js'
import { Stream } from './stream.js'
import { notATensor, Tensor } from './tensor.js'

/** What an op takes as a tensor: epmoe's own, a PyRef or proxy of a torch.Tensor, or a bare pymport PyObject of one. */
export type TensorLike = Tensor | PyRef | TorchTensor | { readonly id: unknown; readonly callable: boolean }

const none = 0
const handle = 1
const object = 2
const integer = 3
const real = 4

/** Shared with the addon: a call's arguments are written here rather than passed. */
let words: Float64Array
let kinds: Int32Array
let streamSlot = 0

/** One op, as the generated functions call it. Arguments are put in the descriptor's order, then run() makes the call. */
export class Op {
  readonly name: string
  readonly #index: number
  readonly info: OpInfo
  #given = 0
  #temporary: Tensor[] | undefined
  #prepares = false

  constructor(name: string) {
    const ops = native().ops()
    this.#index = ops.findIndex((op) => op.name === name)
    const info = ops[this.#index]
    this.name = camelCase(name)
    if (info === undefined) {
      throw new EpmoeError({
        code: 'ERR_UNKNOWN_OP',
        op: this.name,
        expected: 'an op of the built library',
        received: `a library with ${ops.map((op) => camelCase(op.name)).join(', ') || 'none'}`,
        hint: 'Build it again with `npm run setup`',
      })
    }
    this.info = info
    streamSlot = native().maxValues
    words ??= new Float64Array(native().frame, 0, streamSlot + 1)
    kinds ??= new Int32Array(native().frame, 8 * (streamSlot + 1), streamSlot + 2)
  }

  /** A call by the descriptor, for callers that know the op by name only; the generated functions spell this out. */
  call(args: Record<string, unknown>, stream?: Stream): void {
    this.begin(args)
    this.info.params.forEach(({ name, kind, choices = [] }, slot) => {
      const argument = camelCase(name)
      const value = args[argument]
      if (kind === 'tensor') this.tensor(slot, argument, value as TensorLike | undefined)
      else if (kind === 'int') this.integer(slot, argument, value as number | undefined)
      else if (kind === 'float') this.real(slot, argument, value as number | undefined)
      else this.choice(slot, argument, value as string | undefined, choices)
    })
    this.run(args, stream)
  }

  begin(args: object): void {
    this.#given = 0
    this.#temporary = undefined
    this.#prepares = false
    if (typeof args === 'object' && args !== null) return
    throw new EpmoeError({
      code: 'ERR_MISSING_ARGUMENT',
      op: this.name,
      expected: 'an object of named arguments',
      received: describeValue(args),
      hint: `Call ${this.name}({ … })`,
    })
  }

  tensor(slot: number, argument: string, value: TensorLike | undefined | null): void {
    if (value instanceof Tensor) {
      words[slot] = value.handleFor(this.name, argument)
      kinds[slot] = handle
    } else if (value === undefined || value === null) {
      kinds[slot] = none
      if (value === undefined) return
    } else {
      this.#foreign(slot, argument, value)
    }
    this.#given++
  }

  #foreign(slot: number, argument: string, value: unknown): void {
    const address = pythonAddress(value)
    if (address === undefined) throw notATensor(this.name, argument, value)
    torchBridge(this.name)
    if (!this.#prepares && native().python.hasExchange()) {
      words[slot] = address
      kinds[slot] = object
      return
    }
    this.#temporary ??= []
    const tensor = Tensor.fromTorch(value)
    this.#temporary.push(tensor)
    words[slot] = tensor.handleFor(this.name, argument)
    kinds[slot] = handle
  }

  integer(slot: number, argument: string, value: number | bigint | undefined): void {
    kinds[slot] = none
    if (value === undefined) return
    const number = typeof value === 'bigint' ? Number(value) : value
    if (!Number.isSafeInteger(number)) throw this.#wrong(argument, 'a whole number up to 2^53', value)
    words[slot] = number
    kinds[slot] = integer
    this.#given++
  }

  real(slot: number, argument: string, value: number | undefined): void {
    kinds[slot] = none
    if (value === undefined) return
    if (typeof value !== 'number') throw this.#wrong(argument, 'a number', value)
    words[slot] = value
    kinds[slot] = real
    this.#given++
  }

  choice(slot: number, argument: string, value: string | undefined, choices: readonly string[]): void {
    kinds[slot] = none
    if (value === undefined) return
    const index = choices.indexOf(value)
    if (index < 0) throw this.#wrong(argument, choices.map((choice) => `'${choice}'`).join(' or '), value)
    words[slot] = index
    kinds[slot] = integer
    this.#given++
  }

  run(args: object, stream: Stream | undefined): void {
    this.#end(args, stream)
    try {
      native().invoke()
    } finally {
      if (this.#temporary !== undefined) for (const tensor of this.#temporary) tensor.dispose()
      this.#temporary = undefined
    }
  }

  /** Begins a call that is to be prepared: it takes its own hold of torch's tensors. */
  beginPrepared(args: object): void {
    this.begin(args)
    this.#prepares = true
  }

  /** Checks the call that was put, and keeps it. */
  prepare(args: object, stream: Stream | undefined): PreparedCall {
    const held = this.#temporary ?? []
    try {
      // The stream is looked up at each run: torch's current one changes.
      this.#end(args, undefined, stream)
      return new PreparedCall(native().prepare(), this.name, held, stream)
    } catch (error) {
      for (const tensor of held) tensor.dispose()
      throw error
    } finally {
      this.#prepares = false
      this.#temporary = undefined
    }
  }

  /** What follows the arguments in the frame: the op, and the stream. */
  #end(args: object, stream: Stream | undefined, later?: Stream): void {
    let given = 0
    for (const key in args) if ((args as Record<string, unknown>)[key] !== undefined) given++
    if (given !== this.#given + ((stream ?? later) === undefined ? 0 : 1)) this.#unexpected(args)
    kinds[streamSlot + 1] = this.#index
    kinds[streamSlot] = 0
    for (const each of [stream, later]) {
      if (each !== undefined && !(each instanceof Stream)) throw this.#wrong('stream', 'a Stream', each)
    }
    if (stream !== undefined) {
      useStream(stream)
    } else if (this.#temporary !== undefined && !this.#prepares) {
      this.#useTorchStream(this.#temporary)
    }
  }

  /** Without an exchange table the addon cannot ask torch for its stream; the bridge can. */
  #useTorchStream(tensors: Tensor[]): void {
    const gpu = tensors.find((tensor) => tensor.device !== 'cpu')
    if (gpu === undefined) return
    const { id } = parseDevice(gpu.device, this.name)
    words[streamSlot] = torchBridge(this.name).currentStream(id)
    kinds[streamSlot] = 1 + id
  }

  #unexpected(args: object): void {
    const known = this.info.params.map((param) => camelCase(param.name))
    for (const key of Object.keys(args)) {
      if (known.includes(key) || key === 'stream') continue
      throw new EpmoeError({
        code: 'ERR_UNEXPECTED_ARGUMENT',
        op: this.name,
        argument: key,
        expected: `only ${known.join(', ')} and stream`,
        received: describeValue((args as Record<string, unknown>)[key]),
        hint: 'Check the spelling',
      })
    }
  }

  #wrong(argument: string, expected: string, value: unknown): EpmoeError {
    return new EpmoeError({
      code: 'ERR_VALUE',
      op: this.name,
      argument,
      expected,
      received: describeValue(value),
      hint: 'Leave it out for the default',
    })
  }
}

function useStream(stream: Stream | undefined): void {
  kinds[streamSlot] = stream === undefined ? 0 : 1 + stream.id
  if (stream !== undefined) words[streamSlot] = stream.address
}

/**
 * A call whose arguments were checked once, to be made many times: `run()` costs little more than the launch. The
 * contents of the tensors may change between runs; the tensors must stay. Dispose it when done.
 */
export class PreparedCall implements Disposable {
  #number: number
  readonly #name: string
  readonly #held: Tensor[]
  readonly #stream: Stream | undefined

  /** Made by an op's prepare(). */
  constructor(number: number, name: string, held: Tensor[], stream: Stream | undefined) {
    this.#number = number
    this.#name = name
    this.#held = held
    this.#stream = stream
    preparedCalls.register(this, number, this)
    enterScope(this)
  }

  /** Runs the op as it was prepared; throws what the op itself would throw of indices in its tensors. */
  run(): void {
    useStream(this.#stream)
    native().runPrepared(this.#number)
  }

  dispose(): void {
    if (this.#number === 0) return
    preparedCalls.unregister(this)
    native().forgetPrepared(this.#number)
    for (const tensor of this.#held) tensor.dispose()
    this.#number = 0
    leaveScope(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  toString(): string {
    return `PreparedCall(${this.#name}${this.#number === 0 ? ', disposed' : ''})`
  }
}

const preparedCalls = new FinalizationRegistry<number>((number) => native().forgetPrepared(number))
