import { describeValue, EpmoeError } from './errors.js'
import { type DeviceFacts, native } from './native.js'

/** Where a tensor lives, named as in torch. */
export type Device = 'cpu' | `cuda:${number}`

/** What users may write: `'cuda'` is `'cuda:0'`. */
export type DeviceLike = Device | 'cuda'

/** DLPack's device types. */
export const dl = { cpu: 1, cuda: 2, cudaHost: 3 } as const

export interface ParsedDevice {
  type: number
  id: number
}

export function parseDevice(device: DeviceLike, op: string): ParsedDevice {
  if (device === 'cpu') return { type: dl.cpu, id: 0 }
  const match = typeof device === 'string' ? /^cuda(?::(\d{1,4}))?$/.exec(device) : null
  if (match === null) {
    throw new EpmoeError({
      code: 'ERR_DEVICE',
      op,
      argument: 'device',
      expected: "'cpu', 'cuda' or 'cuda:N'",
      received: describeValue(device),
      hint: 'devices() lists those of this machine',
    })
  }
  return { type: dl.cuda, id: Number(match[1] ?? 0) }
}

export function deviceName(type: number, id: number): Device {
  return type === dl.cuda ? `cuda:${id}` : 'cpu'
}

/** Every device that ops can run on here: the CPU, then the GPUs. */
export function devices(): Device[] {
  return ['cpu', ...Array.from({ length: native().device.cudaCount() }, (_, id): Device => `cuda:${id}`)]
}

/** What CUDA tells of a GPU. Throws ERR_NO_CUDA or ERR_DEVICE when there is none of that number. */
export function deviceFacts(device: DeviceLike): DeviceFacts {
  const { type, id } = parseDevice(device, 'deviceFacts')
  if (type !== dl.cuda) {
    throw new EpmoeError({
      code: 'ERR_DEVICE',
      op: 'deviceFacts',
      argument: 'device',
      expected: 'a CUDA device',
      received: device,
      hint: 'The CPU has no such facts',
    })
  }
  return native().device.facts(id)
}

/** How many threads CPU ops use; 0 restores the default, the cores this process may run on. */
export function setCpuThreads(count: number): void {
  if (!Number.isInteger(count) || count < 0 || count > 1024) {
    throw new EpmoeError({
      code: 'ERR_VALUE',
      op: 'setCpuThreads',
      argument: 'count',
      expected: 'a whole number from 0 to 1024',
      received: describeValue(count),
    })
  }
  native().device.setCpuThreads(count)
}

export function cpuThreads(): number {
  return native().device.cpuThreads()
}
