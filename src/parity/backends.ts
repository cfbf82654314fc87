import { type Device, devices } from '../device.js'

/** One way of running epmoe's kernels: a device and an arithmetic. */
export interface Backend {
  name: string
  device: Device
  numerics: 'fp32' | 'triton'
}

export const backendNames = ['cpu', 'cpu:triton-numerics', 'cuda', 'cuda:triton-numerics'] as const

/** The backends of this machine that are asked for; throws nothing for absent ones, they are simply not there. */
export function availableBackends(wanted: readonly string[]): Backend[] {
  const gpu = devices().find((device) => device !== 'cpu')
  const all: (Backend | undefined)[] = [
    { name: 'cpu', device: 'cpu', numerics: 'fp32' },
    { name: 'cpu:triton-numerics', device: 'cpu', numerics: 'triton' },
    gpu && { name: 'cuda', device: gpu, numerics: 'fp32' },
    gpu && { name: 'cuda:triton-numerics', device: gpu, numerics: 'triton' },
  ]
  return all.filter((backend) => backend !== undefined && wanted.includes(backend.name)) as Backend[]
}
