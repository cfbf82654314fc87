import { type Device, devices } from 'epmoe'

/** Where tests run: the CPU, and the first GPU when there is one. */
export const testDevices: Device[] = devices().slice(0, 2)
export const gpu: Device | undefined = testDevices[1]
