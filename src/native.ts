import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join, resolve } from 'node:path'
import { env } from './env.js'
import { EpmoeError, nativeError } from './errors.js'
import { packageRoot } from './package-root.js'

/** What the addon says of a tensor; sizes and strides count elements. */
export interface NativeTensor {
  handle: number
  shape: number[]
  strides: number[]
  dtype: number
  deviceType: number
  deviceId: number
  address: bigint
  nbytes: number
  contiguous: boolean
  foreign: boolean
}

export interface OpParam {
  /** snake_case */
  name: string
  doc: string
  kind: 'tensor' | 'int' | 'float' | 'enum'
  optional: boolean
  role?: 'in' | 'out'
  shape?: string
  dtypes?: string[]
  dtypeLike?: string
  default?: number
  min?: number
  max?: number
  choices?: string[]
}

export interface OpInfo {
  /** snake_case */
  name: string
  doc: string
  /** Whether this build carries a CUDA kernel for it. */
  cuda: boolean
  params: OpParam[]
}

export interface DeviceFacts {
  name: string
  computeCapability: string
  smCount: number
  l2Bytes: number
  totalBytes: number
  /** As CUDA counts: 13000 is 13.0. */
  driverVersion: number
  runtimeVersion: number
}

export interface Metrics {
  mismatched: number
  total: number
  maxUlp: number
  maxAbs: number
  relL2: number
  referenceRelL2: number
}

export interface Native {
  version: string
  abiVersion: number
  headerAbiVersion: number
  frame: ArrayBuffer
  maxValues: number
  dtypes: { name: string; itemsize: number }[]
  setErrorMaker(maker: typeof nativeError): void
  /** Runs the op whose index and arguments stand in the frame. */
  invoke(): void
  /** Checks the call that stands in the frame and keeps it; returns its number. */
  prepare(): number
  runPrepared(call: number): void
  forgetPrepared(call: number): void
  ops(): OpInfo[]
  tensor: {
    empty(shape: number[], dtype: number, deviceType: number, deviceId: number): NativeTensor
    fromBuffer(buffer: ArrayBufferLike, byteOffset: number, shape: number[], dtype: number): NativeTensor
    view(handle: number, offset: number, shape: number[], dtype: number): NativeTensor
    dispose(handle: number, detach: boolean): boolean
    buffer(handle: number): { buffer: ArrayBuffer; byteOffset: number }
    copy(destination: number, source: number): number
    count(): { deviceType: number; deviceId: number; tensors: number; bytes: number }[]
    /** Tells V8 of memory that its heap holds without containing it: so many bytes more, and what tensors hold. */
    tellExternal(bytes: number): void
  }
  stream: {
    create(deviceId: number): number
    own(deviceId: number): number
    foreign(deviceId: number): number
    destroy(deviceId: number, stream: number): void
    synchronize(deviceId: number, stream: number): Promise<void>
    synchronizeSync(deviceId: number, stream: number): void
    waitEvent(deviceId: number, stream: number, event: number): void
  }
  event: {
    create(deviceId: number, timed: boolean): number
    forget(event: number): void
    record(event: number, stream: number): void
    query(event: number): boolean
    synchronize(event: number): Promise<void>
    synchronizeSync(event: number): void
    elapsed(begin: number, end: number): number
  }
  graph: {
    /** Runs `body` while the stream is captured; returns the graph's number. */
    capture(deviceId: number, stream: number, body: () => unknown): number
    replay(graph: number, stream: number): void
    forget(graph: number): void
  }
  device: {
    cudaCompiled: boolean
    cudaCount(): number
    /** Why there are no devices, in CUDA's words; empty when there are, or when this build has no CUDA. */
    cudaProblem(): string
    peerAccess(deviceId: number, peerId: number): boolean
    facts(deviceId: number): DeviceFacts
    setCpuThreads(count: number): void
    cpuThreads(): number
  }
  python: {
    attach(tensorType: number, exchangeCapsule: number, inbox: number): void
    hasExchange(): boolean
    check(address: number): void
    fromObject(address: number): NativeTensor
    fromCapsule(address: number): NativeTensor
    toObject(handle: number): void
    toCapsule(handle: number): void
  }
  crossing: {
    /** Takes the addresses of the bridge's guard and of its function that raises, once the interpreter runs. */
    start(guard: number, raise: number): void
    /**
     * Calls a function of the bridge's with what the tokens say. Returns the address of its result, with the bytes it
     * holds in the first token; or a text, with -1 there for the description of a failure and -2 for a value.
     */
    call(address: number, tokens: Float64Array, texts: string[]): number | string
    hold(address: number): void
    release(address: number): void
  }
  bell: {
    /** Returns the address of a C function without arguments, by which any thread has `answer` called soon. */
    open(answer: () => void): number
    /** Whether the process stays alive for the next ring. */
    hold(alive: boolean): void
  }
  parity: {
    fillNormal(handle: number, seed: number, scale: number): void
    compare(actual: number, reference: number, oracle: number, scale: number): Metrics
  }
}

let loaded: Native | undefined

/** The folder of epmoe.node and libepmoe. */
export function nativeFolder(): string {
  return resolve(env.nativeFolder ?? join(packageRoot, 'build', 'Release'))
}

/** The addon, loaded on first use. */
export function native(): Native {
  loaded ??= load()
  return loaded
}

function load(): Native {
  const file = join(nativeFolder(), 'epmoe.node')
  if (!existsSync(file)) {
    throw new EpmoeError({
      code: 'ERR_NATIVE',
      expected: `the native addon at ${file}`,
      received: 'no such file',
      hint: 'Build it with `npm run setup` in a checkout, or `npm rebuild epmoe` where epmoe is installed',
    })
  }
  let addon: Native
  try {
    addon = createRequire(import.meta.url)(file) as Native
  } catch (cause) {
    throw new EpmoeError(
      {
        code: 'ERR_NATIVE',
        expected: `a native addon that loads on ${process.platform}-${process.arch} with Node ${process.version}`,
        received: cause instanceof Error ? cause.message : String(cause),
        hint: 'It was probably built elsewhere: build it again with `npm run setup` or `npm rebuild epmoe`',
      },
      { cause },
    )
  }
  if (addon.abiVersion !== addon.headerAbiVersion) {
    throw new EpmoeError({
      code: 'ERR_NATIVE',
      expected: `libepmoe of ABI ${addon.headerAbiVersion} beside the addon`,
      received: `ABI ${addon.abiVersion}`,
      hint: 'Two builds are mixed: remove the build folder and run `npm run setup`',
    })
  }
  addon.setErrorMaker(nativeError)
  return addon
}
